"""Code names in the text lead to the API reference.

`` `artlib.art` ``, `` `artlib.art(flow, x_T)` `` and, on the pages that list functions,
`` `cost` `` become links where the reference has such a name; other code stays as is.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_NAME = re.compile(r"(?:(artlib)\.)?([A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)
_LISTS = ("book/paper-map", "book/glossary", "book/scorecard")
"""Pages on which a name stands for one of artlib without saying so."""


def target_of(text: str, page: str) -> str | None:
    """The full name that a piece of code stands for, if it looks like one."""
    found = _NAME.fullmatch(text.strip())
    if not found:
        return None
    prefix, name = found.groups()
    if prefix is None and page not in _LISTS and "." not in name:
        return None
    return f"artlib.{name}"


class LinkedNames(SphinxTransform):
    """Before references are collected; what cannot be resolved stays plain code."""

    default_priority = 700

    def apply(self, **kwargs: Any) -> None:
        if self.env.docname.startswith("book/api/"):
            return
        for literal in list(self.document.findall(nodes.literal)):
            inside = literal.parent
            while inside is not None and not isinstance(
                inside, nodes.reference | nodes.title | addnodes.pending_xref
            ):
                inside = inside.parent
            target = target_of(literal.astext(), self.env.docname)
            if inside is not None or target is None:
                continue
            link = addnodes.pending_xref(
                "",
                literal.deepcopy(),
                refdomain="py",
                reftype="obj",
                reftarget=target,
                refdoc=self.env.docname,
                refexplicit=True,
                refwarn=False,
            )
            literal.replace_self(link)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_transform(LinkedNames)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
