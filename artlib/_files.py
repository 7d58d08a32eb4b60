"""Writing a file: all of it, or nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: after a failure the old one stands, or none.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and
    replace the target in one operation. A symbolic link is followed.

    Raises:
        OSError: If the folder cannot be written to; nothing half-written remains.
    """
    target = Path(os.path.realpath(path))
    # A plain exclusive open, unlike mkstemp, leaves the usual permissions.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
