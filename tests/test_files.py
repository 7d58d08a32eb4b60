"""Writing files: whole or not at all, and nothing is replaced by mistake."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import artlib
from artlib._common import files as _files
from artlib._common.files import check_output, write_bytes


@pytest.fixture
def special(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A pipe that somebody reads, one that nobody does, and a socket."""
    paths = {name: tmp_path / name for name in ("pipe", "unread", "socket")}
    os.mkfifo(paths["pipe"])
    os.mkfifo(paths["unread"])
    reader = os.open(paths["pipe"], os.O_RDWR | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(paths["socket"]))
        yield paths
    os.close(reader)


@pytest.mark.parametrize("name", ["pipe", "unread", "socket"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_file_is_refused_and_stays(
    special: dict[str, Path], name: str, linked: bool, tmp_path: Path
) -> None:
    path = special[name]
    if linked:
        (tmp_path / "link").symlink_to(path)
    before = os.stat(path)
    given = tmp_path / "link" if linked else path
    for write in (
        lambda: write_bytes(given, b"x"),
        lambda: artlib.edm(artlib.VE()).save(given),
        lambda: check_output(given, replace=False),
    ):
        with pytest.raises(OSError, match=r"is a (pipe|socket), which") as caught:
            write()
        assert caught.value.filename == str(given)
    assert os.path.samestat(os.stat(path), before)
    assert stat.S_IFMT(os.stat(path).st_mode) == stat.S_IFMT(before.st_mode)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, f"{tmp_path}/new/"):
        with pytest.raises(IsADirectoryError, match="name a file in it"):
            write_bytes(path, b"x")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_file_in_the_way_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none"):
        write_bytes(tmp_path / "none" / "x", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone"):
        write_bytes(tmp_path / "link", b"x")
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError, match="exists already"):
        check_output(tmp_path / "file", replace=False)
    with pytest.raises(NotADirectoryError):
        write_bytes(tmp_path / "file" / "x", b"x")
    assert (tmp_path / "file").read_text() == "old"


def test_what_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests may run as root, whom no permission stops.
    file = tmp_path / "file"
    file.write_text("old")
    for denied, message in ((file, "is read-only"), (tmp_path, "the folder .* cannot")):
        with monkeypatch.context() as patch:
            patch.setattr(
                _files.os,
                "access",
                lambda path, *_, denied=denied: Path(path) != denied,
            )
            with pytest.raises(PermissionError, match=message) as caught:
                write_bytes(file, b"new")
        assert caught.value.filename == str(file)
    assert file.read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_permissions_are_kept(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(mode)
    os.utime(file, (1, 1))
    if not os.access(file, os.W_OK):
        pytest.skip("not root: a read-only file is refused")
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.stat().st_mtime > time.time() - 60  # the content is new


def test_a_private_file_is_private_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o600)
    seen = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(_files.os, "fsync", look)
    write_bytes(file, b"new")
    assert seen == [0o600]


def test_the_owner_is_kept_where_that_is_allowed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    file = tmp_path / "file"
    file.write_text("old")
    os.chown(file, 12345, 23456)
    write_bytes(file, b"new")
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 23456)


def test_a_file_that_cannot_be_given_away_runs_as_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    file = tmp_path / "file"
    file.write_text("old")
    os.chown(file, 12345, 23456)
    file.chmod(0o4755)

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_files.os, "chown", refuse)
    write_bytes(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o755


def test_a_file_that_is_replaced_is_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    os.utime(file, (0, 0))
    write_bytes(file, b"new")
    assert file.stat().st_mtime > time.time() - 3600


def test_a_link_by_the_name_of_a_leftover_stays(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    link = tmp_path / ".artlib-0123456789abcdef.tmp"
    link.symlink_to("other")
    write_bytes(tmp_path / "file", b"new")
    assert link.is_symlink()
    assert link.read_text() == "other"


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.write_text("")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode == usual.stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("folder/target")
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    target.unlink()
    write_bytes(link, b"again")  # where it points, though nothing is there
    assert link.is_symlink()
    assert target.read_bytes() == b"again"


@pytest.mark.parametrize("name", ["x" * 255, "x" * 240 + ".json", "\N{SNOWMAN}" * 85])
def test_every_name_that_the_file_system_takes_is_saved(
    tmp_path: Path, name: str
) -> None:
    write_bytes(tmp_path / name, b"1")
    write_bytes(tmp_path / name, b"2")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"2"
    with pytest.raises(OSError, match="name too long") as caught:
        write_bytes(tmp_path / f"{name}{'x' * 255}", b"1")
    assert name in str(caught.value)


KILLED = """
import os, sys, time
from artlib._common import files

def wait(descriptor):
    print("writing", flush=True)
    time.sleep(60)

os.fsync = wait
files.write_bytes(sys.argv[1], b"half")
"""


def writer(path: Path) -> "subprocess.Popen[str]":
    """A process that stands still in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with writer(file) as process:
        (left,) = tmp_path.iterdir()
        write_bytes(tmp_path / "other", b"1")
        assert left.exists()  # its writer is alive
        process.send_signal(signal.SIGKILL)
    assert left.exists()
    assert not file.exists()
    similar = tmp_path / ".artlib-notes.tmp"
    similar.write_text("somebody's own")
    write_bytes(tmp_path / "other", b"2")
    assert sorted(tmp_path.iterdir()) == [similar, tmp_path / "other"]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    contents = [bytes([k]) * 100_000 for k in range(4)]
    failed: list[BaseException] = []

    def work(content: bytes) -> None:
        try:
            for _ in range(25):
                write_bytes(file, content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if file.exists():
            assert file.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert not failed
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("call", ["replace", "fsync", "open"])
def test_a_failure_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_files.os, call, fail)
        with pytest.raises(OSError, match="No space left") as caught:
            write_bytes(file, b"new")
    assert caught.value.filename == str(file)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"
