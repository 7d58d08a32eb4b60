"""tools/gpu.sh end to end on a CPU, tiny: a test, a training, a chapter, a bench."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import nbformat
import pytest
from md2nb import to_notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = """
# A result

```{code-cell}
import sys
from artlib import book

assert "IPython" not in sys.modules
book.made("one", lambda: {"value": 1}, seed=0)
```
"""
# As `python`, but the training has images, which a clone has not.
WRAPPER = f"""#!/bin/sh
if [ "$2" = artlib.zoo.train ]; then
    shift 2
    exec {sys.executable} train.py "$@"
fi
exec {sys.executable} "$@"
"""
TRAIN = """
import sys
import torch
from artlib.zoo import train

train.training_images = lambda recipe: torch.rand(4, *recipe.config.shape)
sys.exit(train.main())
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the script needs of a clone, without its history."""
    (tmp_path / "tools").mkdir()
    for name in ("gpu.sh", "run_chapter.py"):
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "artlib").symlink_to(ROOT / "artlib")
    (tmp_path / "notebooks" / "results").mkdir(parents=True)
    nbformat.write(to_notebook(CHAPTER), tmp_path / "notebooks" / "17-tiny.ipynb")
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "bench.py").write_text("print('ratio 1.0')\n")
    (tmp_path / "python").write_text(WRAPPER)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(clone: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": str(clone / "python"),
        "ARTLIB_RESULTS": str(clone / "notebooks" / "results"),
        "ARTLIB_COMMIT": "0123456789ab",
        "CHECKS": "test_it.py",
        "BENCH": "bench.py",
        "NET": "fashion-small",
        "MORE": "--steps 2 --batch 2 --device cpu",
        "CHAPTERS": "17",
        **more,
    }
    command = ["sh", clone / "tools" / "gpu.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_everything_is_done_and_brought_back(clone: Path) -> None:
    done = run(clone, "300", PIECE="100k")
    assert done.returncode == 0, done.stdout + done.stderr
    for task in ("check", "train", "tables", "bench"):
        assert f"{task}: done, " in done.stdout
    pieces = sorted((clone / "_build" / "gpu").glob("made.tar.gz.*"))
    assert len(pieces) > 1
    assert all(piece.stat().st_size <= 100 * 1024 for piece in pieces)
    archive = clone / "made.tar.gz"
    archive.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    with tarfile.open(archive) as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert names == {"one.json", "fashion-small.safetensors", "fashion-small.json"}


def test_a_failure_is_told_and_the_rest_is_done(clone: Path) -> None:
    (clone / "test_it.py").write_text("def test_it(): assert False\n")
    done = run(clone, "300", "check", "bench")
    assert done.returncode == 1
    assert "check: FAILED with status 1, see _build/gpu/check.log" in done.stdout
    assert "bench: done, " in done.stdout


def test_what_has_no_time_is_not_begun(clone: Path) -> None:
    done = run(clone, "1", "bench")
    assert "bench: not begun, the time is over" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("soon",), ("60", "polish")])
def test_it_says_how_it_is_called(clone: Path, arguments: tuple[str, ...]) -> None:
    done = run(clone, *arguments)
    assert done.returncode == 2
    assert "gpu.sh" in done.stderr or "unknown task polish" in done.stderr
    assert not (clone / "_build").exists()
