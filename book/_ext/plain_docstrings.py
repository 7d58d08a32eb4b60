"""Docstrings are written to be read in an editor; a few signs mean something to Sphinx.

Shapes such as ``[N, *shape]`` and absolute values such as ``|Q|`` are escaped on their
way into the API pages, outside of code and mathematics.
"""

from __future__ import annotations

import re
from typing import Any

_SPANS = re.compile(r"(``.*?``|:math:`[^`]*`|`[^`]*`)")
_STAR = re.compile(r"(?<=[\[, ])\*(?=\w+[\],])")


def escaped(lines: list[str]) -> list[str]:
    """The lines with stars of shapes and vertical bars escaped."""
    done, block, span = [], -1, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block >= 0 and line.strip() and indent <= block:
            block = -1
        if block < 0 and (".. math::" in line or line.rstrip().endswith("::")):
            block = indent
        elif block < 0 and not line.lstrip().startswith(("| ", ">>>")):
            parts = _SPANS.split(line)
            for i in range(0, len(parts), 2):
                if span or parts[i].count("`") % 2:  # mathematics over two lines
                    span = span != bool(parts[i].count("`") % 2)
                    continue
                parts[i] = _STAR.sub(r"\\*", parts[i]).replace("|", r"\|")
            line = "".join(parts)
        done.append(line)
    return done


def _process(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = escaped(lines)


def setup(app: Any) -> dict[str, bool]:
    """Run before napoleon, which sees the escaped lines."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
