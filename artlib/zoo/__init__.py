"""Data and, later, small networks to try things on; nothing is downloaded."""

from .data import digits

__all__ = ["digits"]
