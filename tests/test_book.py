"""The book agrees with the library, and the files of the repository with each other."""

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from execute_notebooks import KEPT
from md2nb import FIRST_CELL, FIRST_TAGS, METADATA, TAGS, to_notebook, to_text
from packaging.requirements import Requirement
from packaging.version import Version

import artlib
from artlib._common.version import RELEASE, REPOSITORY

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
chapters = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in notebook(path).cells if cell.cell_type == "code"]


PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
URL = PROJECT["urls"]["Repository"]
PINS = {
    requirement.name.lower(): str(requirement.specifier).removeprefix("==")
    for line in read("constraints.txt").splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}


# Chapters. nbval passes over a cell that was never executed, and over tags that tell it
# to; so what it relies on is asserted here.


@chapters
def test_every_cell_is_executed_in_order(path: Path) -> None:
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@chapters
def test_outputs_are_clean(path: Path) -> None:
    for number, cell in enumerate(code_cells(path), start=1):
        for output in cell.outputs:
            assert output.output_type != "error", f"cell {number} failed"
            assert output.get("name") != "stderr", f"cell {number} wrote to stderr"
            data = output.get("data", {})
            text = output.get("text", "") + data.get("text/plain", "")
            # An address in memory would differ at the next execution.
            assert not re.search(r"\bat 0x[0-9a-f]+", text), f"cell {number}: {text}"


@chapters
def test_metadata_are_those_that_the_book_uses(path: Path) -> None:
    assert notebook(path).metadata == METADATA
    for cell in notebook(path).cells:
        assert set(cell.metadata) <= set(KEPT)
        assert set(cell.metadata.get("tags", [])) <= TAGS


@chapters
def test_figures_have_a_caption_and_a_text(path: Path) -> None:
    for number, cell in enumerate(code_cells(path), start=1):
        images = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        shown = not {"remove-cell", "remove-output"} & set(
            cell.metadata.get("tags", [])
        )
        if images and shown:
            assert len(images) == 1, f"cell {number} shows {len(images)} figures"
            assert "mystnb" in cell.metadata, f"the figure of cell {number} has no name"


@chapters
def test_first_cell_is_the_common_one(path: Path) -> None:
    # What tests/test_first_cell.py shows of the one file is then true of all chapters.
    (common,) = to_notebook("").cells
    first = dict(notebook(path).cells[0])
    assert (first.pop("execution_count"), common.pop("execution_count")) == (1, None)
    assert first == common, "run: python tools/md2nb.py --first-cell notebooks/*.ipynb"
    assert first["source"] == FIRST_CELL.read_text(encoding="utf-8").rstrip()
    assert first["metadata"] == {"tags": FIRST_TAGS}
    assert first["outputs"] == [], "inside a clone it says nothing"


@chapters
def test_cells_are_plain_python(path: Path) -> None:
    # A full run has no Jupyter; a magic is no Python and fails to parse.
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                names.append(getattr(node, "module", None) or "")
                assert not [
                    n for n in names if n.split(".")[0] in ("IPython", "myst_nb")
                ]


@chapters
def test_text_form_gives_the_same_notebook(path: Path) -> None:
    def essence(cells: list[Any]) -> list[tuple[Any, ...]]:
        return [(c.cell_type, c.source, c.metadata) for c in cells]

    text = path.parent / "text" / f"{path.stem}.md"
    assert text.is_file(), f"{text.name} is missing, write it: make texts"
    again = essence(to_notebook(text.read_text(encoding="utf-8")).cells)
    for number, (ours, theirs) in enumerate(
        zip_longest(again, essence(notebook(path).cells)), start=1
    ):
        assert ours == theirs, (
            f"cell {number} differs between text and notebook; who edited the "
            f"notebook runs: make texts; who edited the text: python tools/md2nb.py "
            f"notebooks/text/{text.name} notebooks/{path.name}"
        )
    assert text.read_text(encoding="utf-8") == to_text(notebook(path))


def test_every_text_belongs_to_a_chapter() -> None:
    texts = {path.stem for path in (ROOT / "notebooks" / "text").iterdir()}
    assert texts == {path.stem for path in NOTEBOOKS}


def test_no_two_chapters_define_the_same_name() -> None:
    owners: dict[str, str] = {}
    for path in NOTEBOOKS:
        for cell in code_cells(path):
            # Methods, every class has: what counts are the names of the chapter.
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    owner = owners.setdefault(node.name, path.stem)
                    assert owner == path.stem, (
                        f"{owner} and {path.stem} both define {node.name}: "
                        "it belongs to the library"
                    )


# What a page shows is the story: no cell fills the screen, and none needs a name that
# only a hidden cell defines, so that who copies the page's code can run it.
LONGEST = 30
HIDDEN = {"remove-cell", "remove-input"}
# Chapter -> how many of its visible cells are longer; to be brought down to none.
LONGER: dict[str, int] = {}
# Chapters whose visible cells still need what a hidden one defines.
INCOMPLETE: set[str] = set()


def visible_cells(path: Path) -> list[Any]:
    return [c for c in code_cells(path) if not HIDDEN & set(c.metadata.get("tags", []))]


@chapters
def test_visible_cells_are_short(path: Path) -> None:
    lengths = [cell.source.count("\n") + 1 for cell in visible_cells(path)]
    longer = [length for length in lengths if length > LONGEST]
    allowed = LONGER.get(path.stem[:2], 0)
    assert len(longer) <= allowed, f"cells of {longer} lines, {LONGEST} are the most"
    assert len(longer) == allowed, f"only {len(longer)} are left: lower the exception"


def defined(tree: ast.AST) -> set[str]:
    """Names that a piece of code binds, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


@chapters
def test_visible_code_needs_no_hidden_name(path: Path) -> None:
    known, missing = {*dir(builtins), "display"}, set()
    for cell in visible_cells(path):
        tree = ast.parse(cell.source)
        known |= defined(tree)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        missing |= used - known
    assert bool(missing) == (path.stem[:2] in INCOMPLETE), missing


def test_every_chapter_is_in_the_contents() -> None:
    toc = yaml.safe_load(read("_toc.yml"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    sections = [section for c in chapters for section in c.get("sections", [])]
    files = [toc["root"], *(entry["file"] for entry in [*chapters, *sections])]
    assert len(files) == len(set(files))
    listed = {name for name in files if name.startswith("notebooks/")}
    assert listed == {f"notebooks/{path.stem}" for path in NOTEBOOKS}
    pages = {name for name in files if name.startswith("book/")}
    found = (path.relative_to(ROOT) for path in (ROOT / "book").rglob("*.md"))
    assert pages == {path.with_suffix("").as_posix() for path in found}


# The paper map.


def map_rows() -> list[list[str]]:
    lines = [line for line in read("book/paper-map.md").splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[1])
def test_paper_map_names_what_exists(row: list[str]) -> None:
    _, _, chapter, functions, code, tests = row
    documents = re.findall(r"\{doc\}`[^<]+<\.\./([^>]+)>`", chapter)
    (document,) = documents
    path = ROOT / f"{document}.ipynb"
    assert path.is_file(), document
    names = re.findall(r"`([\w.]+)`", functions)
    assert names, "no function named"
    for name in names:
        resolve(name)
    places = re.findall(r"`([\w.]+)`", code)
    assert places, "no code named"
    found = [place_of_code(place) for place in places]
    cases = re.findall(r"`(test_\w+)::(test_\w+)`", tests)
    assert cases, "no test named"
    if equation := re.search(r"<eq-paper-(\w+)>", row[0]):
        sources = "".join(cell.source for cell in notebook(path).cells)
        assert f"(eq-paper-{equation[1]})=" in sources, f"no {equation[1]}"
        for place, thing in zip(places, found, strict=True):
            told = " ".join((thing.__doc__ or "").split())
            assert re.search(rf"\beqs?\. [^.]*\({equation[1]}\)", told), (
                f"the docstring of artlib.{place} does not name eq. ({equation[1]})"
            )
    for module, case in cases:
        tree = ast.parse(read(f"tests/{module}.py"))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert case in defined, f"{module} has no {case}"


def resolve(name: str) -> object:
    """What a dotted name inside artlib stands for; raises if there is no such thing."""
    module, _, rest = name.partition(".")
    try:
        found: object = import_module(f"artlib.{module}")
    except ModuleNotFoundError:
        found, rest = artlib, name
    for part in filter(None, rest.split(".")):
        found = getattr(found, part)
    return found


def place_of_code(name: str) -> object:
    """What a module of artlib defines, by the module's path and the names in it."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = ".".join(("artlib", *parts[:length]))
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        owner = getattr(found, "__module__", module)  # a property has none
        assert owner == module, f"{name} is defined in {owner}"
        return found
    raise ModuleNotFoundError(f"artlib has no module for {name}")


def test_every_equation_of_the_paper_that_has_a_number_is_in_the_map() -> None:
    numbers = [re.search(r"<eq-paper-(\w+)>", row[0]) for row in map_rows()]
    expected = [str(n) for n in range(1, 19)] + ["29a", "29b", "30"]
    assert [number[1] for number in numbers if number] == expected


# Files that say the same thing twice.


def test_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert artlib.__version__ == version
    assert str(yaml.safe_load(read("CITATION.cff"))["version"]) == version
    latest = re.search(r"^## \[(.+?)\] - (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert latest is not None
    assert latest[1] == version
    assert latest[2] == yaml.safe_load(read("CITATION.cff"))["date-released"]


def test_first_cell_names_the_release_that_the_chapters_belong_to() -> None:
    # The tag of the version or, while there are changes without one, of a later one: a
    # clone of the last release lacks what the chapters of today use.
    (tag,) = re.findall(r'^release = "v(.+?)"', FIRST_CELL.read_text(), re.MULTILINE)
    unreleased = read("CHANGELOG.md").split("## [Unreleased]")[1].split("\n## [")[0]
    last = Version(PROJECT["version"])
    assert Version(tag) > last if unreleased.strip() else Version(tag) == last
    assert f"v{tag}" == RELEASE  # where the library's own files are fetched


def test_address_of_the_repository_is_the_same_everywhere() -> None:
    assert yaml.safe_load(read("_config.yml"))["repository"]["url"] == URL
    assert yaml.safe_load(read("CITATION.cff"))["repository-code"] == URL
    assert f"git+{URL}\n" in read("README.md")
    assert f'"{URL}"' in read("tools/first_cell.py")
    assert REPOSITORY == URL


def test_names_and_licence_agree() -> None:
    config, citation = (
        yaml.safe_load(read(n)) for n in ("_config.yml", "CITATION.cff")
    )
    author = PROJECT["authors"][0]["name"]
    assert citation["authors"] == [{"name": author}]
    assert config["author"] == author
    assert f"(c) {config['copyright']} {author}" in read("LICENSE")
    assert PROJECT["license"] == citation["license"] == "MIT"
    assert read("LICENSE").startswith("MIT License")
    assert config["title"] in citation["title"]
    start_page = notebook(ROOT / "notebooks" / "intro.ipynb")
    assert config["title"] in start_page.cells[1].source.splitlines()[1]
    for name in (PROJECT["name"], "Adaptive Resonance Theory"):
        assert name in read("README.md")


def test_python_versions_agree() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    listed = [c.split()[-1] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert min(listed, key=Version) == oldest
    assert f"Python {oldest} or newer" in read("README.md")
    assert f"sys.version_info >= ({oldest.replace('.', ', ')})" in read("Makefile")
    assert f"python={oldest}" in yaml.safe_load(read("environment.yml"))["dependencies"]


def test_every_requirement_has_a_pin_within_its_range() -> None:
    extras = PROJECT["optional-dependencies"].values()
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(PINS[requirement.name.lower()])


def test_environment_has_the_same_pins() -> None:
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["name"] == PROJECT["name"]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip[0] == "-c constraints.txt"
    assert pip[-1] == "-e .[book,test]"
    assert '-c constraints.txt -e ".[book,test]"' in read("Makefile")
    pinned = {r.name.lower(): r.specifier for r in map(Requirement, pip[1:-1])}
    for name, specifier in pinned.items():
        assert str(specifier) == f"=={PINS[name]}"
    books = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *books["notebooks"], *books["book"]]
    direct = {Requirement(line).name.lower() for line in needed} - {PROJECT["name"]}
    assert direct - pinned.keys() == {"nbclient"}, "or list the new one there"


def test_commands_of_the_readme_exist_and_ci_runs_them() -> None:
    commands = re.findall(r"^make (\w+)", read("README.md"), re.MULTILINE)
    targets = re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE)
    assert set(commands) <= set(targets)
    assert {"book", "test"} <= set(commands)
    in_help = re.findall(r'"make (\w+)', read("Makefile"))
    assert set(in_help) == set(targets) - {"help"}
    ran = re.findall(r"^make (\w+) </dev/null$", read(".ci/run"), re.MULTILINE)
    assert ran == ["test", "book"]


def test_the_public_host_runs_the_same() -> None:
    text = read(".github/workflows/test.yml")
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        "make setup",
        "bash .ci/run",
    ]
    (python,) = (s["with"] for s in job["steps"] if "setup-python" in s.get("uses", ""))
    assert python["python-version"] == PROJECT["requires-python"].removeprefix(">=")
    assert all((ROOT / f).is_file() for f in python["cache-dependency-path"].split())
    assert "secrets" not in text


def test_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    torch.manual_seed(0)
    example = example.replace("(64, 3, 32, 32", "(64, 3, 8, 8")  # and all else as it is
    # The denoiser of standard normal data.
    scope: dict[str, Any] = {"denoiser": lambda x, t: x / (1 + t**2)}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["grid"][0] == 80.0
    assert scope["grid"][-1] == 0.0
    assert len(scope["grid"]) == 11
    assert abs(float(scope["x_0"].std()) - 1.0) < 0.05
    assert (tmp_path / "my-model.json").is_file()


def test_status_page_is_current() -> None:
    command = [sys.executable, "tools/build_status.py", "--check"]
    subprocess.run(command, cwd=ROOT, check=True)


def test_every_public_name_is_on_a_page_of_the_reference() -> None:
    pages = "".join(p.read_text() for p in ROOT.glob("book/api/*.md"))
    listed = re.findall(r"\.\. auto(?:function|class|exception):: artlib\.(\w+)", pages)
    assert sorted(listed) == sorted(artlib.__all__)
    for name in listed:
        documented = getattr(artlib, name)
        assert documented.__doc__, name
