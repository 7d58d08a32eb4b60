"""The command line, ``artlib`` or ``python -m artlib.cli``."""

from .parser import main

__all__ = ["main"]
