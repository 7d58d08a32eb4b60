"""The rooms of `artlib`: which may import from which, and that there is no circle.

A room is a folder or a single module at the top of the package. Its imports are read
from the source: those that run when a module is imported, and, apart, those within
functions and for types only.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import artlib

PACKAGE = Path(__file__).parent.parent / "artlib"
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
        ".__init__"
    ): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
ORDER = [
    {"_common"},
    {"flow", "metrics"},
    {"solvers", "schedules"},
    {"control"},
    {"rl", "clocks", "comparison", "exact", "rivals", "parallel", "tuning"},
    {"plotting", "adapters", "zoo"},
    {"book", "cli"},
]
"""Floors, from the ground: a room imports from its own floor and those below."""

LATE = {("schedules", "adapters")}
"""A room that reaches up, within a function: `Schedule.to_diffusers` and its like."""


def _within(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _within(node)


def _imports(module: str, *, late: bool = False) -> Iterator[tuple[str, str]]:
    """The modules of artlib that a module imports, with the name it takes."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    here = module.split(".")
    if MODULES[module].name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(tree) if late else _within(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name in MODULES)
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            if source.split(".")[0] == "artlib":
                for alias in node.names:
                    whole = f"{source}.{alias.name}"
                    yield (whole, "") if whole in MODULES else (source, alias.name)


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, or nothing."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(edges.get(node, ())):
            if found := search(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(edges) if (found := search(node, []))), [])


def test_modules_import_in_no_circle() -> None:
    # The name of a package stands for its __init__, unless one of its own asks.
    edges = {
        module: {
            target
            for target, _ in _imports(module)
            if target != module and not module.startswith(f"{target}.")
        }
        for module in MODULES
    }
    assert sum(map(len, edges.values())) > 200, "the imports were not found"
    assert not _circle(edges), " -> ".join(_circle(edges))


def test_rooms_import_from_their_floor_and_below() -> None:
    floor = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        room = _room(module)
        for target, _ in _imports(module, late=True):
            other = _room(target)
            if room and other and room != other and (room, other) not in LATE:
                assert floor[other] <= floor[room], f"{module} imports {target}"
                edges.setdefault(room, set()).add(other)
    assert not _circle(edges), " -> ".join(_circle(edges))


def test_there_are_few_rooms() -> None:
    rooms = {_room(module) for module in MODULES} - {""}
    assert rooms == {room for rooms in ORDER for room in rooms}
    assert len(rooms) <= 18


@pytest.mark.parametrize("module", MODULES)
def test_what_is_private_stays_in_its_room(module: str) -> None:
    for target, name in _imports(module, late=True):
        if _room(target) == _room(module):
            continue
        private = [part for part in target.split(".")[2:] if part.startswith("_")]
        assert not private, f"{module} imports the module {target}"
        assert not name.startswith("_") or name == "__version__", (
            f"{module} imports {name} from {target}"
        )


# What importing costs.

LOADED_LATE = """
import sys

def none_of(*heavy):
    assert not set(heavy) & sys.modules.keys(), set(heavy) & sys.modules.keys()

import artlib
none_of("torch", "numpy", "scipy", "matplotlib")
for name in artlib.__all__:
    getattr(artlib, name)
none_of("matplotlib", "PIL", "scipy.optimize", "scipy.interpolate", "torchdiffeq")
import artlib.zoo
none_of("fontTools", "PIL", "sklearn")
import artlib.adapters
artlib.edm(artlib.VE()).to_k_diffusion(3)
none_of("matplotlib", "scipy.optimize", "torchdiffeq")
none_of("diffusers", "transformers", "accelerate", "k_diffusion")
artlib.zoo.load("fashion-small")
none_of("torch._dynamo", "sympy")
"""


def test_what_is_heavy_is_loaded_late() -> None:
    subprocess.run([sys.executable, "-c", LOADED_LATE], check=True, timeout=120)


HELP = """
import sys
from artlib.cli import main

try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "numpy"} & sys.modules.keys()
"""


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_help_waits_for_no_torch(asked: str) -> None:
    command = [sys.executable, "-c", HELP, asked]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert b"artlib" in done.stdout


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: f"artlib.{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(artlib.__all__)
    for name, module in seen.items():
        assert getattr(artlib, name) is getattr(import_module(module), name), name
    assert set(dir(artlib)) >= {*seen, "zoo", "book", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        artlib.nonsense  # noqa: B018
