"""The wheel carries its types: a user's script is checked against them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """\
import artlib

process = artlib.VE(sigma_min=0.002, sigma_max=80.0)
reveal_type(process.t_max)
reveal_type(artlib.edm(process))
reveal_type(artlib.edm(process).grid)
artlib.edm("process")
"""

# What artlib is built on is left aside: reading the types of torch takes long.
CONFIGURATION = """\
[mypy]
cache_dir = {cache}
[mypy-torch.*,numpy.*,scipy.*,matplotlib.*,jaxtyping.*,tqdm.*,safetensors.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy without the data of the zoo."""
    pytest.importorskip("setuptools", minversion="77")
    source, built = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("samples", "weights", "__pycache__")
    shutil.copytree(ROOT / "artlib", source / "artlib", ignore=leave_out)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True
    )
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_marker(wheel: Path) -> None:
    assert "artlib/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_a_users_script_is_checked_against_the_installed_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mypy")
    place = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(place)], check=True
    )
    paths = {"base": str(place), "platbase": str(place)}
    scheme = sysconfig.get_preferred_scheme("prefix")
    installed = sysconfig.get_path("purelib", scheme, paths)
    zipfile.ZipFile(wheel).extractall(installed)
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = tmp_path / "mypy.ini"
    settings.write_text(CONFIGURATION.format(cache=tmp_path / "cache"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings)]
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    # A path of modules would be read as source, which needs no marker.
    environment = {k: v for k, v in os.environ.items() if not k.endswith("PATH")}
    environment["PATH"] = os.environ["PATH"]
    found = subprocess.run(
        [*command, "--python-executable", str(python), "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = (found.stdout + found.stderr).splitlines()
    assert 'Revealed type is "float"' in lines[0].replace("builtins.", "")
    assert 'Revealed type is "artlib.schedules.schedule.Schedule"' in lines[1]
    assert '"def (K: int)' in lines[2].replace("builtins.", "").replace("'", '"')
    assert 'incompatible type "str"; expected "Process"' in lines[3]
    assert len(lines) == 5
