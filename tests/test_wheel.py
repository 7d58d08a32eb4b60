"""The wheel: what is in it, its types, and how it gets what is not in it."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from check_sums import check_sums

from artlib import zoo
from artlib._common.version import RELEASE
from artlib.zoo import cache, networks
from artlib.zoo.shipped import shipped

ROOT = Path(__file__).parent.parent
ZOO = ROOT / "artlib" / "zoo"

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
    """The wheel, built from a copy of a clone, weights included."""
    pytest.importorskip("setuptools", minversion="77")
    source, built = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "artlib", source / "artlib", ignore=leave_out)
    assert list(source.rglob("fashion-base.safetensors"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True
    )
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is unpacked."""
    place = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(place)
    return place


# What is in it.


def test_the_wheel_holds_the_code_its_types_and_a_list_of_the_rest(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    code = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "artlib").rglob("*.py")
    }
    assert inside == code | {"artlib/py.typed", "artlib/zoo/shipped.sha256"}


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 2e6


def test_the_list_of_the_rest_is_that_of_the_files() -> None:
    found = (ZOO / "shipped.sha256").read_text()
    assert found == check_sums(), "write it anew: python tools/check_sums.py"
    assert found.count("\n") == len(shipped()) > 10


# What is not in it.

FIRST_USE = """\
import sys
from pathlib import Path
import artlib
assert Path(artlib.__file__).is_relative_to(sys.argv[1]), artlib.__file__
import artlib.zoo
assert "fashion-base" in artlib.zoo.available()
assert not artlib.zoo.fully_trained("fashion-small")
print(artlib.zoo.load("fashion-small").name)
assert artlib.zoo.fully_trained("fashion-small")
print(artlib.zoo.features("mnist").name)
print(len(artlib.zoo.mnist("sample")))
"""


def published(place: Path, revision: str, *paths: str) -> str:
    """The address of a repository, as a public host shows it, with some files."""
    for path in paths:
        target = place / "raw" / revision / "artlib" / "zoo" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ZOO / path, target)
    return place.as_uri()


def test_an_installed_wheel_fetches_what_it_lacks_once(
    installed: Path, tmp_path: Path
) -> None:
    paths = (
        "weights/fashion-small.safetensors",
        "weights/lenet-mnist.safetensors",
        "datasets/samples/mnist.safetensors",
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "PYTHONPATH": str(installed),
        "ARTLIB_DATA": str(tmp_path / "cache"),
        "ARTLIB_REPOSITORY": published(tmp_path / "host", RELEASE, *paths),
    }
    kept = tmp_path / "cache"
    for again in (False, True):
        script = FIRST_USE.replace("assert not", "assert") if again else FIRST_USE
        done = subprocess.run(
            [sys.executable, "-c", script, str(installed)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.stdout, done.stderr) == ("fashion-small\nlenet-mnist\n400\n", "")
        assert {p.relative_to(kept).as_posix() for p in kept.rglob("*.*")} == {
            "zoo/fashion-small.safetensors",
            "zoo/lenet-mnist.safetensors",
            "samples/mnist.safetensors",
        }
        environment["ARTLIB_REPOSITORY"] = (tmp_path / "gone").as_uri()


SAMPLE = "datasets/samples/mnist.safetensors"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As installed without a clone: no files beside the code, an empty cache."""
    monkeypatch.setattr(cache, "_ZOO", tmp_path / "no clone")
    monkeypatch.setattr(networks, "WEIGHTS", tmp_path / "no clone")
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("ARTLIB_REPOSITORY", (tmp_path / "host").as_uri())
    monkeypatch.delenv("ARTLIB_REVISION", raising=False)
    return tmp_path


def test_before_the_release_the_newest_state_is_fetched(bare: Path) -> None:
    published(bare / "host", "HEAD", SAMPLE)
    assert cache.sample_file("mnist") == bare / "cache" / "samples/mnist.safetensors"


def test_a_revision_that_is_named_is_the_only_one(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(bare / "host", "HEAD", SAMPLE)
    monkeypatch.setenv("ARTLIB_REVISION", "mine")
    with pytest.raises(ConnectionError, match=r"raw/mine/artlib/zoo/datasets"):
        cache.sample_file("mnist")
    published(bare / "host", "mine", SAMPLE)
    assert cache.sample_file("mnist").is_file()


@pytest.mark.parametrize(
    ("ask", "file"),
    [
        (lambda: zoo.load("fashion-base"), "zoo/fashion-base.safetensors"),
        (lambda: zoo.load_autoencoder(), "zoo/fashion-autoencoder.safetensors"),
        (lambda: zoo.features("mnist"), "zoo/lenet-mnist.safetensors"),
        (
            lambda: zoo.features("imagenet"),
            "zoo/efficientnet-lite0-cifar10.safetensors",
        ),
        (lambda: zoo.emoji("sample"), "samples/emoji.safetensors"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(
    bare: Path, ask: Callable[[], object], file: str
) -> None:
    with pytest.raises(ConnectionError) as caught:
        ask()
    message = str(caught.value)
    assert f"clone {(bare / 'host').as_uri()} and install it" in message
    assert message.endswith(f"or put the file at {bare / 'cache' / file}")
    assert not (bare / "cache").exists()


def test_a_file_put_where_the_error_says_is_taken(bare: Path) -> None:
    (bare / "cache" / "samples").mkdir(parents=True)
    place = bare / "cache" / "samples" / "mnist.safetensors"
    shutil.copy(ZOO / SAMPLE, place)
    assert cache.sample_file("mnist") == place
    place.write_bytes(place.read_bytes()[:-1])  # damaged: not taken
    with pytest.raises(ConnectionError, match="put the file at"):
        cache.sample_file("mnist")


def test_another_file_than_the_listed_one_is_refused_and_not_kept(bare: Path) -> None:
    published(bare / "host", RELEASE, SAMPLE)
    served = bare / "host" / "raw" / RELEASE / "artlib" / "zoo" / SAMPLE
    served.write_bytes(served.read_bytes() + b" ")
    expected = shipped()[SAMPLE][:12]
    with pytest.raises(ValueError, match=rf"SHA-256 \w+, expected {expected}.*clone"):
        zoo.mnist("sample")
    assert not (bare / "cache").exists()


def test_an_answer_that_stops_in_the_middle_is_refused(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str((ZOO / SAMPLE).stat().st_size))
            self.end_headers()
            self.wfile.write((ZOO / SAMPLE).read_bytes()[:1000])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Half) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("ARTLIB_REPOSITORY", f"{address}/some/art.git")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with pytest.raises(ConnectionError) as caught:
            zoo.mnist("sample")
        server.shutdown()
    assert f"{address}/some/art/raw/{RELEASE}/artlib/zoo/{SAMPLE} (" in str(
        caught.value
    )
    assert "bytes read" in str(caught.value)
    assert not (bare / "cache").exists()


def test_a_cache_that_cannot_be_written_to_is_refused(bare: Path) -> None:
    published(bare / "host", RELEASE, SAMPLE)
    (bare / "cache").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"fetched but not kept .*ARTLIB_DATA"):
        zoo.mnist("sample")


# Its types.


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
