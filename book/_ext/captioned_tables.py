"""Give the tables of `artlib.book.table` a number, and a name to refer to it by.

They come out of a notebook as HTML. To count among the tables of the book, the outer
element and its caption have to be nodes that Sphinx knows; what is inside stays.
"""

from __future__ import annotations

import html
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_TABLE = re.compile(
    r'\s*<table class="art-table"(?: id="(?P<name>[^"]+)")?>\s*'
    r"<caption>(?P<caption>.*?)</caption>(?P<inside>.*)</table>\s*",
    re.DOTALL,
)


class CaptionedTables(SphinxTransform):
    """Before Sphinx collects what can be referred to (priority 850)."""

    default_priority = 700

    def apply(self, **kwargs: Any) -> None:
        for raw in list(self.document.findall(nodes.raw)):
            found = raw.get("format") == "html" and _TABLE.fullmatch(raw.astext())
            if not found:
                continue
            table = nodes.table(classes=["art-table"])
            title = nodes.title()
            for part in re.split(r"(<code>.*?</code>)", found["caption"].strip()):
                text = html.unescape(re.sub(r"</?code>", "", part))
                kind = nodes.literal if part.startswith("<code>") else nodes.inline
                title += kind(text, text)
            inside = found["inside"]
            table += [title, nodes.raw(inside, inside, format="html")]
            if found["name"]:
                name = nodes.fully_normalize_name(html.unescape(found["name"]))
                table["names"].append(name)
                self.document.note_explicit_target(table, raw)
            else:
                self.document.set_id(table)
            raw.replace_self(table)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_transform(CaptionedTables)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
