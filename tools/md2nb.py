r"""Turn a chapter written as text into an unexecuted notebook, and back.

    python tools/md2nb.py chapter.md notebooks/04-name.ipynb
    python tools/md2nb.py --reverse notebooks/04-name.ipynb chapter.md
    python tools/md2nb.py --first-cell notebooks/*.ipynb
    python tools/md2nb.py --texts

The text is MyST Markdown. A fenced ``{code-cell}`` block is a code cell; everything
between two of them is one Markdown cell (a line ``+++`` splits it). Options stand at
the top of a block, one a line, and a longer value goes on in indented lines:

    ```{code-cell}
    :tags: [hide-input]
    :figure: fig-clock
    :caption: The clock $\psi$ of three schedules.
    :alt: Three rising curves; ART's rises fastest at first.
    ...code...
    ```

The set-up cell (tools/first_cell.py) is put first by the converter and left out on
the way back; the third form puts it into executed notebooks and keeps all else. The
fourth writes the texts that are committed beside the notebooks, notebooks/text. A
cell's id is a hash of its content, so equal text gives equal files.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml

FIRST_CELL = Path(__file__).with_name("first_cell.py")
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
FIRST_TAGS = ["remove-cell"]
TAGS = {"hide-input", "hide-output", "remove-cell", "remove-input", "remove-output"}
OPTIONS = {"tags", "figure", "caption", "alt"}
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


class ChapterError(ValueError):
    """The text is not a chapter; the message says where and why."""


def to_notebook(text: str) -> nbformat.NotebookNode:
    """Build the notebook of a chapter's text."""
    cells = [_first_cell()]
    prose: list[str] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    fence = ""  # the fence of the non-executable block we are in, if any
    for number, line in lines:
        opening = re.match(r"(`{3,}|~{3,}|:{3,})", line)
        if not fence and re.match(r"```\{code-cell\}", line):
            _flush(prose, cells)
            cells.append(_code_cell(number, lines))
        elif not fence and re.fullmatch(r"\+\+\+\s*", line):
            _flush(prose, cells)
        else:
            if "{code-cell}" in line:
                raise ChapterError(
                    f"line {number}: a code cell must start with ```{{code-cell}} "
                    "at the left margin, outside any other block"
                )
            if opening and not fence and not opening[1].startswith(":"):
                fence = opening[1]
            elif fence and line.rstrip() == fence:
                fence = ""
            prose.append(line)
    if fence:
        raise ChapterError(f"a block opened with {fence} is never closed")
    _flush(prose, cells)
    seen: dict[str, int] = {}
    for cell in cells:  # equal cells get a counter, ids must differ
        count = seen[cell.id] = seen.get(cell.id, 0) + 1
        cell.id += f"-{count}" if count > 1 else ""
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    nbformat.validate(notebook)
    return notebook


def renew_first_cell(text: str) -> str:
    """The text of a notebook's file with the set-up cell of today.

    The outputs of the chapter do not depend on that cell, so they stay.
    """
    notebook = nbformat.reads(text, as_version=4)
    old = notebook.cells[0]
    if old.metadata.get("tags") != FIRST_TAGS or old.cell_type != "code":
        raise ChapterError(f"its first cell is no code cell with the tags {FIRST_TAGS}")
    new = _first_cell()
    old.source, old.id = new.source, new.id
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def to_text(notebook: nbformat.NotebookNode) -> str:
    """Write a notebook as a chapter's text, without its set-up cell and outputs."""
    blocks = []
    previous = ""
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            blocks.append(("+++\n\n" if previous == "markdown" else "") + cell.source)
        else:
            blocks.append(
                f"```{{code-cell}}\n{_header(cell.metadata)}{cell.source}\n```"
            )
        previous = cell.cell_type
    return "\n\n".join(blocks) + "\n"


def write_texts(notebooks: Path = NOTEBOOKS) -> None:
    """Write the text of every notebook of a folder, and remove those of no notebook."""
    folder = notebooks / "text"
    folder.mkdir(exist_ok=True)
    texts = {
        folder / f"{path.stem}.md": to_text(nbformat.read(path, as_version=4))
        for path in sorted(notebooks.glob("*.ipynb"))
    }
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    for path in set(folder.glob("*.md")) - texts.keys():
        path.unlink()


def _first_cell() -> nbformat.NotebookNode:
    source = FIRST_CELL.read_text(encoding="utf-8").rstrip()
    return _cell("code", source, {"tags": FIRST_TAGS})


def _flush(prose: list[str], cells: list[nbformat.NotebookNode]) -> None:
    source = "\n".join(prose).strip("\n")
    prose.clear()
    if source.strip():
        cells.append(_cell("markdown", source, {}))


def _code_cell(start: int, lines: Any) -> nbformat.NotebookNode:
    """Read one ``{code-cell}`` block, whose opening line has been consumed."""
    body: list[str] = []
    for _, line in lines:
        if line.rstrip() == "```":
            break
        body.append(line)
    else:
        raise ChapterError(f"line {start}: this code cell is never closed")
    header: list[str] = []
    while body and (
        re.match(r":\w+:", body[0]) or (header and re.match(r"\s+\S", body[0]))
    ):
        header.append(body.pop(0))
    options: dict[str, str] = {}
    for line in header:
        if option := re.match(r":(\w+):\s*(.*)", line):
            key = option[1]
            options[key] = option[2].strip()
        else:
            options[key] = f"{options[key]} {line.strip()}".strip()
    source = "\n".join(body).strip("\n")
    if not source:
        raise ChapterError(f"line {start}: this code cell is empty")
    return _cell("code", source, _metadata(start, options))


def _metadata(start: int, options: dict[str, str]) -> dict[str, Any]:
    if unknown := sorted(options.keys() - OPTIONS):
        raise ChapterError(
            f"line {start}: unknown option {unknown}, use {sorted(OPTIONS)}"
        )
    metadata: dict[str, Any] = {}
    tags = yaml.safe_load(options.get("tags", "[]"))
    if not isinstance(tags, list) or not TAGS.issuperset(tags):
        raise ChapterError(
            f"line {start}: tags must be a list out of {sorted(TAGS)}, got {tags!r}"
        )
    if tags:
        metadata["tags"] = tags
    figure = {key: options.get(key, "") for key in ("figure", "caption", "alt")}
    if any(figure.values()):
        if missing := [key for key, value in figure.items() if not value]:
            raise ChapterError(f"line {start}: a figure also needs {missing}")
        metadata["mystnb"] = {
            "figure": {"name": figure["figure"], "caption": figure["caption"]},
            "image": {"alt": figure["alt"]},
        }
    return metadata


def _header(metadata: dict[str, Any]) -> str:
    lines = []
    if metadata.get("tags"):
        lines.append(f":tags: [{', '.join(metadata['tags'])}]\n")
    if shown := metadata.get("mystnb"):
        lines.append(f":figure: {shown['figure']['name']}\n")
        lines.append(f":caption: {shown['figure']['caption']}\n")
        lines.append(f":alt: {shown['image']['alt']}\n")
    return "".join(lines)


def _cell(kind: str, source: str, metadata: dict[str, Any]) -> nbformat.NotebookNode:
    new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    digest = hashlib.sha256(f"{kind}\n{metadata}\n{source}".encode()).hexdigest()
    return new(source=source, metadata=metadata, id=digest[:12])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", type=Path, nargs="*", metavar="path")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--reverse", action="store_true", help="notebook to text")
    form.add_argument(
        "--first-cell", action="store_true", help="renew that of the notebooks"
    )
    form.add_argument(
        "--texts", action="store_true", help="write those beside the notebooks"
    )
    arguments = parser.parse_args()
    paths: list[Path] = arguments.paths
    if arguments.texts:
        if paths:
            parser.error("--texts takes no paths, it writes all of them")
        write_texts()
        return
    if not arguments.first_cell and len(paths) != 2:
        parser.error(f"expected a source and a target, got {len(paths)} paths")
    for path in paths if arguments.first_cell else paths[:1]:
        text = path.read_text(encoding="utf-8")
        try:
            if arguments.first_cell:
                path.write_text(renew_first_cell(text), encoding="utf-8")
            elif arguments.reverse:
                chapter = to_text(nbformat.reads(text, as_version=4))
                paths[1].write_text(chapter, encoding="utf-8")
            else:
                nbformat.write(to_notebook(text), paths[1])
        except ChapterError as error:
            sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
