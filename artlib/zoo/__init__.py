"""Data and, later, small networks to try things on; nothing is downloaded unasked."""

from .data import DATASETS, digits, emoji, fashion_mnist, mnist

__all__ = ["DATASETS", "digits", "emoji", "fashion_mnist", "mnist"]
