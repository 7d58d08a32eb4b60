"""Argument checks shared by the library: each names what came and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._types import SeedLike


def generator(seed: SeedLike, device: torch.device | str = "cpu") -> torch.Generator:
    """Turn a seed into a generator; a generator is passed through.

    Args:
        seed: An integer, or a ``torch.Generator`` whose state is then advanced.
        device: Where a newly made generator lives.

    Raises:
        TypeError: If ``seed`` is neither.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(
            f"seed: expected an int or a torch.Generator, got {type(seed).__name__}; "
            "pass seed=0 for reproducible draws"
        )
    return torch.Generator(device=device).manual_seed(int(seed))


def positive_int(value: Any, name: str, minimum: int = 1) -> int:
    """Check that ``value`` is an integer of at least ``minimum``.

    Raises:
        TypeError: If it is no integer (booleans and floats are none).
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{name}: expected an integer, got {value!r} of type {type(value).__name__}"
        )
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return int(value)


def finite_float(value: Any, name: str, *, positive: bool = False) -> float:
    """Check that ``value`` is a finite (if asked, positive) real number.

    Raises:
        ValueError: If it is NaN, infinite, or not positive where it has to be.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    if positive and number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number


def as_grid(grid: Sequence[float] | np.ndarray | Tensor, name: str = "grid") -> Tensor:
    """Check a list of timesteps and return it as float64 on the CPU.

    Args:
        grid: K + 1 process times, strictly descending, the last one >= 0.
        name: The argument's name, for the message.

    Returns:
        The grid as a float64 tensor of shape [K + 1].

    Raises:
        TypeError: If it is no sequence of numbers.
        ValueError: If it is not one-dimensional, has fewer than two nodes, holds a
            NaN or an infinity, does not descend strictly, or ends below 0.
    """
    if hasattr(grid, "grid"):
        raise TypeError(
            f"{name}: expected a list of timesteps, got a {type(grid).__name__}; "
            "call .grid(K) on it for K steps"
        )
    try:
        nodes = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}: expected a sequence of numbers, got {type(grid).__name__}"
        ) from error
    if nodes.ndim != 1 or nodes.numel() < 2:
        raise ValueError(
            f"{name}: expected K + 1 >= 2 timesteps in one dimension, "
            f"got shape {tuple(nodes.shape)}"
        )
    if not bool(torch.isfinite(nodes).all()):
        where = int((~torch.isfinite(nodes)).nonzero()[0])
        raise ValueError(f"{name}: node {where} is {float(nodes[where])}, not finite")
    steps = nodes[:-1] - nodes[1:]
    if not bool((steps > 0).all()):
        where = int((steps <= 0).nonzero()[0])
        raise ValueError(
            f"{name}: expected strictly descending times, but node {where} = "
            f"{float(nodes[where]):.6g} is followed by {float(nodes[where + 1]):.6g}; "
            "sampling runs from t_max down to 0"
        )
    if float(nodes[-1]) < 0:
        raise ValueError(
            f"{name}: the last node is {float(nodes[-1])}, expected >= 0 (data is t=0)"
        )
    return nodes


def check_samples(x: Any, name: str = "x_T") -> Tensor:
    """Check a batch of states: floating, [n, *shape] with n >= 1, finite.

    Raises:
        TypeError: If it is no floating-point tensor.
        ValueError: If it has no sample axis, no sample, or a value that is not finite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor of shape [n, *sample_shape], "
            f"got {type(x).__name__}"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {x.dtype}; "
            f"pass {name}.float() or {name}.double()"
        )
    if x.ndim < 2:
        raise ValueError(
            f"{name}: expected shape [n, *sample_shape], got {tuple(x.shape)}; "
            "for scalar data use shape [n, 1]"
        )
    if x.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, which holds no sample")
    require_finite(x, name, "check how it was drawn (target.sample_prior is exact)")
    return x


def require_finite(x: Tensor, what: str, remedy: str) -> None:
    """Raise a ``ValueError`` saying how many values of ``x`` are not finite.

    Args:
        x: Any tensor.
        what: What it is, opening the message.
        remedy: What the caller should do, closing it.

    Raises:
        ValueError: If ``x`` holds a NaN or an infinity.
    """
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad} of {x.numel()} values are NaN or infinite; {remedy}"
        )
