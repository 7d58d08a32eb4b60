"""The set-up cell of the chapters, in every state that it can find a machine in.

The cell runs in a process of its own that has neither artlib nor a network: git clones
a small repository of this folder, and pip is a stub that notes what it was asked. Each
run ends with the library in use, or with one sentence that says what to do.
"""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from md2nb import FIRST_CELL

ROOT = Path(__file__).resolve().parent.parent
CELL = FIRST_CELL.read_text(encoding="utf-8")
ADDRESS = "https://github.com/art-diffusion/art"
(RELEASE,) = (line.split('"')[1] for line in CELL.splitlines() if line[:7] == "release")
BOOK = "STATE = {state!r}\ndef device():\n    return 'cpu'\n"
PIP = """\
import os, sys
with open(os.environ["PIP_LOG"], "a") as file:
    print(*sys.argv[1:], file=file)
sys.exit(int(os.environ.get("PIP_STATUS", "0")))
"""
DRIVER = """\
import json, os, sys, types
{before}
scope = {{"__name__": "__main__", **{scope!r}}}
exec(compile({cell!r}, "cell", "exec"), scope)
book = scope["book"]
print(json.dumps([book.STATE, book.__file__, os.getcwd(), scope["device"]]))
"""
COLAB = "sys.modules['google.colab'] = types.ModuleType('google.colab')"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write_library(folder: Path, state: str) -> Path:
    """What the cell needs of a clone: a library that says which state it is."""
    files = {
        "artlib/__init__.py": "",
        "artlib/book/__init__.py": BOOK.format(state=state),
        "notebooks/results/a.json": "{}",
        "tools/first_cell.py": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Machine:
    """A folder with the repository, the stub of pip, and /content of Colab."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content = folder / "content"
        self.content.mkdir()
        self.clone = self.content / "art"
        self.repository = folder / "repository"
        self.repository.mkdir()
        git(self.repository, "init", "-q", "-b", "main")
        self.commit("the release")
        self.log = folder / "pip.log"
        (folder / "stubs" / "pip").mkdir(parents=True)
        (folder / "stubs" / "pip" / "__init__.py").touch()
        (folder / "stubs" / "pip" / "__main__.py").write_text(PIP)

    def commit(self, state: str) -> str:
        write_library(self.repository, state)
        git(self.repository, "add", ".")
        git(self.repository, "commit", "-qm", state)
        return git(self.repository, "rev-parse", "HEAD").strip()

    def run(
        self,
        *,
        colab: bool = True,
        cwd: Path | None = None,
        installed: Path | None = None,
        before: str = "",
        scope: dict[str, str] | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the cell in a fresh process; ``installed`` is a folder with an artlib."""
        path = [self.folder / "stubs", *([installed] if installed else [])]
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_LOG": str(self.log),
            "HOME": str(self.folder),
            # git takes the repository here for the one on the network.
            "GIT_CONFIG_COUNT": "2",
            "GIT_CONFIG_KEY_0": f"url.{self.repository.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": ADDRESS,
            "GIT_CONFIG_KEY_1": "protocol.https.allow",
            "GIT_CONFIG_VALUE_1": "never",
            **environment,
        }
        cell = CELL.replace("/content", str(self.content))
        driver = DRIVER.format(
            before=(COLAB if colab else "") + "\n" + before,
            scope=scope or {},
            cell=cell,
        )
        return subprocess.run(
            [sys.executable, "-S", "-c", driver],  # -S: no packages of ours
            cwd=cwd or self.content,
            env=variables,
            capture_output=True,
            text=True,
        )

    def pip(self) -> list[str]:
        """What pip was asked so far."""
        return self.log.read_text().splitlines() if self.log.is_file() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def outcome(done: subprocess.CompletedProcess[str]) -> list[str]:
    """State, file, folder and device of a run that ended well."""
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed run ends with, without an earlier error above it."""
    assert done.returncode == 1
    assert "During handling" not in done.stderr
    assert done.stderr.count("Traceback") == 1
    return done.stderr.splitlines()[-1]


# Colab.


def test_fresh_machine_clones_the_release_and_installs_it(machine: Machine) -> None:
    git(machine.repository, "tag", RELEASE)
    machine.commit("newer than the release")
    done = machine.run()
    state, file, folder, device = outcome(done)
    assert state == "the release"
    assert file == str(machine.clone / "artlib" / "book" / "__init__.py")
    assert folder == str(machine.clone / "notebooks")
    assert device == "cpu"
    assert machine.pip() == [
        f"install --no-input --editable {machine.clone}[notebooks]"
    ]
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith(f"Set-up 1 of 2: cloning {ADDRESS}")
    assert second.startswith("Set-up 2 of 2: installing")
    assert {p.name for p in machine.content.iterdir()} == {"art", "art.origin"}


def test_before_the_release_the_newest_state_is_taken(machine: Machine) -> None:
    machine.commit("newest")
    done = machine.run()
    assert outcome(done)[0] == "newest"
    assert f"There is no {RELEASE} yet: the newest state" in done.stdout
    assert "pathspec" not in done.stderr


def test_after_a_restart_nothing_is_done_again(machine: Machine) -> None:
    outcome(machine.run())
    machine.log.unlink()
    for folder in (machine.content, machine.clone / "notebooks", machine.folder):
        done = machine.run(installed=machine.clone, cwd=folder, PATH="")
        assert outcome(done)[2] == str(machine.clone / "notebooks")
        assert len(done.stdout.splitlines()) == 1
    assert machine.pip() == []


def test_a_clone_of_the_user_is_taken_as_it_is(machine: Machine) -> None:
    write_library(machine.clone, "my own")
    assert outcome(machine.run(installed=machine.clone, PATH=""))[0] == "my own"
    assert machine.pip() == []


def test_current_folder_that_is_gone(machine: Machine) -> None:
    gone = machine.folder / "gone"
    gone.mkdir()
    for _ in range(2):
        done = machine.run(before=f"os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})")
        assert outcome(done)[2] == str(machine.clone / "notebooks")
        gone.mkdir()


def test_failed_install_is_made_up_for(machine: Machine) -> None:
    text = sentence(machine.run(PIP_STATUS="1"))
    assert text.startswith("RuntimeError: the set-up stopped (Command ")
    assert "'pip', 'install'" in text
    assert text.endswith("and run this cell again")
    done = machine.run(PATH="")  # the clone is there, no git is needed
    assert outcome(done)[0] == "the release"
    assert len(machine.pip()) == 2


@pytest.mark.parametrize(
    "left", [[], [".git/HEAD"], [".git/HEAD", "artlib/book/__init__.py"]]
)
def test_half_a_clone_is_put_aside(machine: Machine, left: list[str]) -> None:
    machine.clone.mkdir()
    for name in left:
        (machine.clone / name).parent.mkdir(parents=True, exist_ok=True)
        (machine.clone / name).write_text("half")
    done = machine.run()
    assert outcome(done)[0] == "the release"
    (aside,) = machine.content.glob("art-*")
    assert f"it is {aside} now" in done.stdout
    kept = {str(p.relative_to(aside)) for p in aside.rglob("*") if p.is_file()}
    assert kept == set(left), "nothing of it may be lost"


def test_interrupted_clone_is_begun_again(machine: Machine) -> None:
    (machine.content / "art.part" / ".git").mkdir(parents=True)
    assert outcome(machine.run())[0] == "the release"
    assert not (machine.content / "art.part").exists()


def test_no_connection_is_said_in_a_sentence(machine: Machine) -> None:
    text = sentence(machine.run(ARTLIB_REPOSITORY="https://example.org/art"))
    assert text.startswith("RuntimeError: the set-up stopped (Command '['git', 'clone'")
    assert "check the connection and https://example.org/art at" in text
    assert not machine.clone.exists()
    assert "No such file or directory: 'git'" in sentence(machine.run(PATH=""))
    assert outcome(machine.run())[0] == "the release"


def test_fork_and_revision_are_obeyed(machine: Machine) -> None:
    git(machine.repository, "tag", RELEASE)
    fork = machine.folder / "fork"
    git(machine.folder, "clone", "-q", str(machine.repository), str(fork))
    git(fork, "checkout", "-q", "-b", "mine")
    write_library(fork, "mine")
    git(fork, "commit", "-qam", "mine")
    commit = git(fork, "rev-parse", "HEAD").strip()
    for revision in ("mine", commit, commit[:10]):
        done = machine.run(ARTLIB_REPOSITORY=str(fork), ARTLIB_REVISION=revision)
        assert outcome(done)[0] == "mine"
    text = sentence(machine.run(ARTLIB_REPOSITORY=str(fork), ARTLIB_REVISION="nobody"))
    assert f"{fork} at nobody" in text
    assert (machine.clone / "artlib").is_dir(), "what was there, goes when all is well"
    # Back to the default: the clone of the fork is kept, beside the new one.
    done = machine.run(installed=machine.clone)
    assert outcome(done)[0] == "the release"
    assert "it is" in done.stdout


# Elsewhere.


@pytest.mark.parametrize("place", ["", "notebooks", "notebooks/results"])
def test_kernel_without_the_library_inside_a_clone(
    machine: Machine, place: str
) -> None:
    done = machine.run(colab=False, cwd=machine.repository / place, PATH="")
    assert outcome(done)[1] == str(
        machine.repository / "artlib" / "book" / "__init__.py"
    )
    assert len(done.stdout.splitlines()) == 1, "nothing is printed"


def test_chapter_in_a_clone_opened_from_another_folder(machine: Machine) -> None:
    chapter = machine.repository / "notebooks" / "04-x.ipynb"
    scope = {"__vsc_ipynb_file__": str(chapter)}  # as VS Code says it
    done = machine.run(colab=False, cwd=machine.folder, scope=scope)
    assert outcome(done)[1] == str(
        machine.repository / "artlib" / "book" / "__init__.py"
    )


def test_lone_chapter_with_the_library_installed(machine: Machine) -> None:
    site = write_library(machine.folder / "site", "installed")
    alone = machine.folder / "alone"
    alone.mkdir()
    done = machine.run(colab=False, cwd=alone, installed=site)
    assert outcome(done)[0] == "installed"
    assert outcome(done)[2] == str(alone), "the folder is the user's"


def test_lone_chapter_without_the_library_says_what_to_install(
    machine: Machine,
) -> None:
    text = sentence(machine.run(colab=False, PATH=""))
    assert text.startswith("ImportError: artlib, the library of this book, cannot be")
    assert "(No module named 'artlib')" in text
    line = f'-m pip install "art-diffusion[notebooks] @ git+{ADDRESS}@{RELEASE}"'
    assert f"run {sys.executable} {line} (without @{RELEASE} as long as" in text
    fork = {"ARTLIB_REPOSITORY": "https://example.org/art", "ARTLIB_REVISION": "mine"}
    text = sentence(machine.run(colab=False, **fork))
    assert '@ git+https://example.org/art@mine", restart' in text
    assert machine.pip() == [], "nothing is installed unasked"


def test_missing_requirement_of_a_clone_is_named(machine: Machine) -> None:
    (machine.repository / "artlib" / "__init__.py").write_text("import torchdiffeq")
    text = sentence(machine.run(colab=False, cwd=machine.repository / "notebooks"))
    assert "(No module named 'torchdiffeq')" in text
    assert f'pip install --editable "{machine.repository}[notebooks]"' in text


def test_another_package_of_that_name(machine: Machine) -> None:
    site = machine.folder / "site"
    (site / "artlib").mkdir(parents=True)
    (site / "artlib" / "__init__.py").touch()
    text = sentence(machine.run(colab=False, installed=site))
    assert f"cannot import name 'book' from 'artlib' ({site}" in text
    inside = machine.run(colab=False, installed=site, cwd=machine.repository)
    assert outcome(inside)[0] == "the release"
    assert outcome(machine.run(installed=site))[0] == "the release"


# The library itself.


def test_stored_results_are_found_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ARTLIB_RESULTS", raising=False)
    (tmp_path / "art").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    scope: dict[str, Any] = {}
    exec(compile(CELL.replace("/content", str(tmp_path)), "cell", "exec"), scope)
    load: Callable[[str], Any] = scope["book"].load_results
    stored = sorted(p.stem for p in (ROOT / "notebooks" / "results").glob("ch*.json"))
    for folder in (Path.cwd(), tmp_path):
        monkeypatch.chdir(folder)
        assert load(stored[0])["results"]
