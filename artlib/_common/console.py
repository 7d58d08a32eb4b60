r"""Text for a terminal: what a file says may be printed, but not command it.

Names of schedules, sources and files come from elsewhere. A control character in them
could move the cursor, set the window's title or hide a line, and a console may know no
other letters than its own: both are printed as escapes, such as ``\x1b``.
"""

from __future__ import annotations

import sys
from typing import TextIO


def printable(text: str) -> str:
    """A text on one line, everything but visible characters and spaces escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text.replace("\N{NO-BREAK SPACE}", " ")
    )


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print lines to standard output, or to standard error.

    Args:
        text: One line or several.
        error: Whether it belongs to standard error.
        end: What comes after it.

    Raises:
        OSError: If it cannot be written; of a closed pipe, a `BrokenPipeError`.
    """
    stream: TextIO | None = sys.stderr if error else sys.stdout
    if stream is None:  # a program without a console
        return
    lines = "\n".join(map(printable, text.split("\n"))) + end
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(lines.encode(encoding, "backslashreplace").decode(encoding))
