# Two commands are enough: `make book` and `make test`. Both need only python3 and make.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Modules are compiled when first imported: installing takes less time.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile --quiet
INSTALLED := $(VENV)/.installed
# Further words for pip, for example PIP_ARGS="--extra-index-url ..." (see README.md).
PIP_ARGS ?=
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup book pdf test lint notebooks gallery status texts full zoo cifar bench clean

help:
	@echo "make setup                create $(VENV) and install everything (book and test do it)"
	@echo "make book                 build the book from the stored outputs, print its start page"
	@echo "make pdf                  the same as one PDF (needs Chromium)"
	@echo "make test                 lint, types, book, unit tests, and every notebook re-executed"
	@echo "make lint                 only ruff and mypy"
	@echo "make notebooks            re-execute all chapters in place; CHAPTER=04 only that one"
	@echo "make gallery              write the schedules of the stored results, schedules/"
	@echo "make texts                write the chapters as text, notebooks/text"
	@echo "make status               the same, and write the runtimes on the build status page"
	@echo "make full CHAPTER=10      a chapter at full size, as plain Python (use a GPU)"
	@echo "make full CHAPTER=17 SECONDS=480  the same in slices: stops, and goes on when given again"
	@echo "make zoo                  train the networks that are not fully trained yet (use a GPU)"
	@echo "make cifar                fetch CIFAR-10 (139 MB), check it, keep it outside the repository"
	@echo "make bench                ratios: sampling overhead, cost of the closed form, of Q and of rivals"
	@echo "make clean                remove what was built (not $(VENV))"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another one: make setup PYTHON=python3.12")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_ARGS) "$(TORCH)"
	$(PIP) $(PIP_ARGS) -c constraints.txt -e ".[book,test]"
	@touch $@

book: $(INSTALLED)
	@rm -rf _build/html
	@$(PY) tools/build_status.py --check
	$(VENV)/bin/jupyter-book build . --all -W --keep-going --quiet
	@echo "Start page: file://$(CURDIR)/_build/html/index.html"

pdf: book
	@$(PY) tools/build_pdf.py

test: $(INSTALLED)
	@$(PY) tools/run_tests.py

lint: $(INSTALLED)
	@$(PY) tools/run_tests.py lint format types

notebooks: $(INSTALLED)
	$(PY) tools/execute_notebooks.py $(CHAPTER)

gallery: $(INSTALLED)
	@$(PY) tools/build_gallery.py

texts: $(INSTALLED)
	@$(PY) tools/md2nb.py --texts

status: $(INSTALLED)
	$(PY) tools/execute_notebooks.py --record-runtimes $(CHAPTER)
	$(PY) tools/build_status.py

full: $(INSTALLED)
	@test -n "$(CHAPTER)" || { echo "which chapter? make full CHAPTER=10" >&2; exit 1; }
	ARTLIB_FULL=1 $(PY) tools/run_chapter.py $(CHAPTER) $(if $(SECONDS),--seconds $(SECONDS)) \
		|| { test $$? -eq 75 && echo "the same command goes on"; }

zoo: $(INSTALLED)
	$(PY) -m artlib.zoo.train missing --out artlib/zoo/weights --checkpoints _build/zoo
	@$(PY) tools/check_sums.py

cifar: $(INSTALLED)
	@$(PY) -m artlib.zoo.get_cifar

bench: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(PY) tools/bench.py
	@OMP_NUM_THREADS=1 $(PY) tools/bench_images.py

clean:
	rm -rf _build build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find artlib tests tools notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
