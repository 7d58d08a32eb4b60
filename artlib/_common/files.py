"""Writing a file: all of it, or nothing, and nothing else is replaced on the way.

The bytes go to a temporary file in the target's folder, which then takes its place in
one operation. Its name is short whatever the target's is, and it is locked while it is
written: one that can be locked belongs to nobody any more, and the next writer into
that folder removes it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

from .checks import got

# Windows has no such locks: nothing there says whose a temporary file is.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

_TEMPORARY = re.compile(r"\.artlib-[0-9a-f]{16}\.tmp")
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_output(path: str | os.PathLike[str], *, replace: bool = True) -> Path:
    """Refuse a place that cannot be written to, before anything is spent on it.

    Args:
        path: Of the file to come.
        replace: Whether a file that is there may be replaced.

    Returns:
        The file that would be written: a symbolic link is followed.

    Raises:
        IsADirectoryError: If it is a folder.
        FileExistsError: If it exists, and may not be replaced.
        FileNotFoundError: If there is no folder to write it to.
        PermissionError: If the file is read-only or the folder cannot be written to.
        OSError: If it is a pipe, a socket or a device, which a file must not replace.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path of a file: expected a str or a Path, got {got(path)}")
    name = os.fsdecode(path)
    target = Path(os.path.realpath(name))
    found = _stat(name)
    kind = 0 if found is None else stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR or name.endswith(("/", os.sep)):
        raise IsADirectoryError(errno.EISDIR, "is a folder; name a file in it", name)
    if kind not in (0, stat.S_IFREG):
        raise OSError(
            errno.EINVAL,
            f"is {_SPECIAL.get(kind, 'no plain file')}, which is not replaced by a "
            "file; nothing was written: name another file",
            name,
        )
    folder = target.parent if os.path.islink(name) else Path(name).parent
    if not folder.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"there is no folder {folder}; make it first", name
        )
    if found is not None and not replace:
        raise FileExistsError(errno.EEXIST, "exists already", name)
    if found is not None and not os.access(name, os.W_OK):
        raise PermissionError(
            errno.EACCES, "is read-only; allow writing, or name another file", name
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES,
            f"the folder {folder} cannot be written to; name a file in another",
            name,
        )
    return target


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: after a failure the old one stands, or none.

    A symbolic link is followed and stays. A file that is replaced hands on its
    permissions and, where the system allows it, its owner; a new one has the usual
    permissions. (Another hard link to the old file keeps the old content.)

    Raises:
        OSError: If it cannot be written, see `check_output`; the error names the file,
            and nothing half-written remains.
    """
    target = check_output(path)
    old = _stat(target)
    _remove_leftovers(target.parent)
    try:
        # What replaces a private file is private from its first byte.
        temporary, descriptor = _create(target.parent, 0o666 if old is None else 0o600)
        with contextlib.ExitStack() as held:
            if fcntl is not None:
                held.callback(os.close, os.dup(descriptor))  # locked until replaced
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if old is not None:
                    _hand_on(old, target, temporary)
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
    except OSError as error:
        # The temporary file means nothing to whoever asked for the target. (An error
        # without a number says all in its text, which a name would hide.)
        if error.errno is not None:
            error.filename, error.filename2 = os.fsdecode(path), None
        raise


def _stat(path: str | Path) -> os.stat_result | None:
    """Of what is there, links followed; None if nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _create(folder: Path, mode: int) -> tuple[Path, int]:
    """A new temporary file, open for writing, and locked where that is possible."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    while True:
        temporary = folder / f".artlib-{secrets.token_hex(8)}.tmp"
        descriptor = os.open(temporary, flags, mode)
        if fcntl is None:
            return temporary, descriptor
        with contextlib.suppress(OSError):  # a network folder may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for a leftover just before


def _hand_on(old: os.stat_result, target: Path, temporary: Path) -> None:
    """Owner, permissions and attributes of the file that is replaced."""
    if hasattr(os, "chown"):
        with contextlib.suppress(OSError):  # only root gives files away
            os.chown(temporary, old.st_uid, old.st_gid)
    with contextlib.suppress(PermissionError):  # some file systems have no such thing
        shutil.copystat(target, temporary)
    os.utime(temporary)  # it is new all the same
    new = os.stat(temporary)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        # "Run as the owner" was said of another owner.
        os.chmod(temporary, stat.S_IMODE(old.st_mode) & 0o777)


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if not _TEMPORARY.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # of a writer at work, or another user
                descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(descriptor)
