r"""Let an equation of several lines carry the paper's number.

Sphinx puts every displayed equation that contains ``\\`` into a ``split`` environment,
where TeX allows no ``\tag``. Such an equation is put into ``equation*`` instead, as
notebooks show it anyway.
"""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx


def keep_tags(app: Sphinx, doctree: nodes.document) -> None:
    """Wrap the equations with both a tag and a line break ourselves."""
    for node in doctree.findall(nodes.math_block):
        text = node.astext()
        if r"\tag" in text and r"\\" in text and not node.get("nowrap"):
            text = rf"\begin{{equation*}}{text.strip()}\end{{equation*}}"
            node.children = [nodes.Text(text)]
            node["nowrap"] = True


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("doctree-read", keep_tags)
    return {"version": "1", "parallel_read_safe": True}
