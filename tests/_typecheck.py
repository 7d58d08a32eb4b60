"""The run-time type checker of the test suite: beartype, an int being a float too.

Checking takes longer than most of what is checked: with it the tests of the exact error
took four times as long, those of the closed form twice. So a test's first calls are all
checked and then one in 101, a number that no loop has as its period. The same goes for
functions inside functions, which are new, and prepared, at each call of the outer one.
"""

from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import config

FIRST, THEN = 20, 101

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_jaxtyped = jaxtyping.jaxtyped


class Sparing(type(config)):
    """The settings of jaxtyping, which asks at each call whether to let it pass."""

    calls = 0
    off = False

    @property
    def jaxtyping_disable(self) -> bool:
        self.calls += 1
        return self.off or (self.calls > FIRST and self.calls % THEN != 0)

    @jaxtyping_disable.setter
    def jaxtyping_disable(self, off: bool) -> None:
        self.off = off


def jaxtyped(**options: Any) -> Callable[[Any], Any]:
    """What the import hook decorates every function with."""
    decorate = _jaxtyped(**options)

    def sparing(made: Any) -> Any:
        inner = "<locals>" in getattr(made, "__qualname__", "")
        return made if inner and config.jaxtyping_disable else decorate(made)

    return sparing


def install() -> None:
    """Check what is imported from now on of artlib."""
    config.__class__ = Sparing
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook("artlib", "_typecheck.checked")


def start_over() -> None:
    """Before each test: its first calls are checked again."""
    config.calls = 0
