"""Argument checks shared by the library: each names what came and what to do."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor

from .types import SeedLike


def generator(seed: SeedLike, device: torch.device | str = "cpu") -> torch.Generator:
    """Turn a seed into a generator; a generator is passed through.

    Args:
        seed: An integer, or a ``torch.Generator`` whose state is then advanced.
        device: Where a newly made generator lives.

    Raises:
        TypeError: If ``seed`` is neither.
        ValueError: If it does not fit into 64 bits.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(
            f"seed: expected an int or a torch.Generator, got {got(seed)}; "
            "pass seed=0 for reproducible draws"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {got(seed)}")
    return torch.Generator(device=device).manual_seed(int(seed))


def got(value: Any) -> str:
    """What came, for a message: a short representation and the type."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{kind} of shape {tuple(value.shape)} and dtype {dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None:
        return "None"
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def printable(text: Any, name: str) -> str:
    """Check text that is shown: no control characters, which a terminal would obey.

    Raises:
        TypeError: If it is no str.
        ValueError: If it holds control characters, line breaks among them, characters
            that turn the direction of writing, or halves of a surrogate pair.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a str, got {got(text)}")
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cs", "Zl", "Zp") or character in turning:
            raise ValueError(
                f"{name}: holds {character!r}, a character that is not to be printed, "
                f"in {reprlib.repr(text)}; use plain text in one line"
            )
    return text


def positive_int(value: Any, name: str, minimum: int = 1) -> int:
    """Check that ``value`` is an integer of at least ``minimum``.

    Raises:
        TypeError: If it is no integer (booleans and floats are none).
        ValueError: If it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: expected an integer, got {got(value)}; pass an int")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    return int(value)


def real_number(value: Any, name: str) -> float:
    """One real number as a Python float: NumPy's numbers and 0-d tensors are taken.

    Raises:
        TypeError: If it is text, a boolean, complex, several numbers or none, or a
            tensor with a graph, which a Python float would cut off.
        ValueError: If it is beyond the range of float64.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if isinstance(value, Tensor) and value.requires_grad:
            raise TypeError(
                f"{name}: expected a plain number, got a tensor that requires a "
                "gradient, which would be lost; pass it detached, or .item()"
            )
        numbers = real_tensor(value, name, "a real number")
        if numbers.numel() != 1:
            raise TypeError(
                f"{name}: expected one number, got {got(value)}; pass a single element"
            )
        return float(numbers)
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        # complex and text are among them: float() would parse the latter.
        raise TypeError(
            f"{name}: expected a real number, got {got(value)}; pass a float or an int"
        )
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name}: {got(value)} is too large for float64") from error


def finite_float(value: Any, name: str, *, positive: bool = False) -> float:
    """Check that ``value`` is a finite (if asked, positive) real number.

    Returns:
        It as a Python float, whatever kind of number came: hashable, JSON-able.

    Raises:
        TypeError: If it is no real number, see `real_number`.
        ValueError: If it is NaN, infinite, or not positive where it has to be.
    """
    number = real_number(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    if positive and number <= 0:
        raise ValueError(f"{name}: expected a positive number, got {number}")
    return number


def real_tensor(
    value: Any, name: str, expected: str = "a tensor or an array of numbers"
) -> Tensor:
    """Real numbers as float64 without a graph; a tensor stays on its device.

    Args:
        value: A tensor, an array, a number, or nested sequences of them.
        name: The argument's name, for the message; an element is named by its index.
        expected: What it should have been, for the message.

    Returns:
        A tensor, elsewhere than on its input's device only on the CPU. It may share
        memory with ``value``.

    Raises:
        TypeError: If it is or holds text, booleans, complex numbers or other objects.
        ValueError: If its rows differ in length, or a number is beyond float64.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected {expected}, got {got(value)}")
        if value.is_meta:
            raise TypeError(
                f"{name}: expected {expected}, got a tensor on the meta device, which "
                "holds no numbers; make it under torch.device('cpu')"
            )
        return value.detach().to(torch.float64)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind in "iuf":
            # torch refuses reversed, read-only and byte-swapped arrays.
            return torch.from_numpy(np.require(array, np.float64, ["C", "W"]))
        if array.dtype.kind != "O":
            raise TypeError(f"{name}: expected {expected}, got {got(array)}")
        value = array.tolist()
    is_number = isinstance(value, SupportsFloat) and not isinstance(value, bool)
    if not (is_number or _is_sequence(value)):
        raise TypeError(f"{name}: expected {expected}, got {got(value)}")
    plain = _plain(value, name)
    try:
        return torch.tensor(plain, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: expected {expected}, got rows of different lengths ({error})"
        ) from error


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _plain(value: Any, name: str) -> Any:
    """Nested sequences of numbers as nested lists of Python floats."""
    if _is_sequence(value):
        return [
            v if type(v) is float else _plain(v, f"{name}[{k}]")
            for k, v in enumerate(value)
        ]
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return real_tensor(value, name).tolist()
    return real_number(value, name)


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
    nodes = real_tensor(grid, name, "a sequence of numbers").cpu()
    if nodes.ndim != 1 or nodes.numel() < 2:
        raise ValueError(
            f"{name}: expected K + 1 >= 2 timesteps in one dimension, "
            f"got shape {tuple(nodes.shape)}; schedule.grid(K) makes them"
        )
    if not bool(torch.isfinite(nodes).all()):
        where = int((~torch.isfinite(nodes)).nonzero()[0])
        raise ValueError(
            f"{name}: node {where} is {float(nodes[where])}, not finite; sampling "
            "runs from t_max down to 0"
        )
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


def as_variances(variances: Tensor | Sequence[float]) -> Tensor:
    """Check the eigenvalues of a covariance, and return them in float64 on the CPU.

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If they are not one-dimensional, none, negative or not finite.
    """
    lam = real_tensor(variances, "variances", "the eigenvalues of a covariance").cpu()
    if lam.ndim != 1 or lam.numel() == 0:
        raise ValueError(
            "variances: expected the eigenvalues of the covariance, shape [d], got "
            f"{tuple(lam.shape)}; torch.linalg.eigvalsh(cov) gives them"
        )
    require_finite(lam, "variances", "give finite eigenvalues")
    if bool((lam < 0).any()):
        raise ValueError(f"variances: expected >= 0, got {float(lam.min()):.3g}")
    return lam


def check_samples(x: Any, name: str = "x_T") -> Tensor:
    """Check a batch of states: floating, [n, *shape] with n >= 1, finite.

    Raises:
        TypeError: If it is no floating-point tensor.
        ValueError: If it has no sample axis, no sample, or a value that is not finite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor of shape [n, *sample_shape], got "
            f"{got(x)}; torch.as_tensor makes one of an array or of lists"
        )
    if not x.is_floating_point():
        remedy = f"pass {name}.float() or {name}.double()"
        if x.is_complex():
            remedy = "pass real and imaginary parts as two channels"
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {x.dtype}; {remedy}"
        )
    if x.dtype.itemsize < 2:
        raise TypeError(
            f"{name}: expected a dtype that computes, got {x.dtype}, which only "
            f"stores; pass {name}.float() or {name}.bfloat16()"
        )
    if x.is_meta:
        raise TypeError(
            f"{name}: expected numbers, got a tensor on the meta device, which holds "
            "none; make it on the device of the network"
        )
    if x.ndim < 2:
        raise ValueError(
            f"{name}: expected shape [n, *sample_shape], got {tuple(x.shape)}; "
            "for scalar data use shape [n, 1]"
        )
    if x.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, which holds no sample")
    prior = " (target.sample_prior is exact)" if name == "x_T" else ""
    require_finite(x, name, f"check how it was made{prior}")
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
