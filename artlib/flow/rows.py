r"""A part of the samples, and the part of a denoiser that belongs to it.

A denoiser may know its samples one by one: a class label or a prompt for each row of x.
Whoever takes some of the rows has to take their conditions too. The protocol is one
optional method of a denoiser,

``rows(index)``: the same denoiser for the samples ``index``,

where ``index`` is a slice or a tensor of row numbers, and conditions of one row stay as
they are. The library's own wrappers pass it on. A denoiser without it is called on
the part as it is; if that fails, and the whole number of rows does not, the error says
what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from torch import Tensor

from .._common.types import DenoiserFn
from .ask import Explained

Rows: TypeAlias = slice | Tensor
"""Which samples: a slice, or row numbers [n] (int64)."""


@runtime_checkable
class _Flow(Protocol):
    """What of a `ProbabilityFlow` is needed here."""

    def rows(self: F, index: Rows, count: int) -> F: ...


@runtime_checkable
class _Counter(Protocol):
    """What of a `CountNFE` is needed here."""

    nfe: int


F = TypeVar("F", bound=_Flow)


def rows_of(denoiser: DenoiserFn, index: Rows) -> DenoiserFn:
    """A denoiser for some of its samples; itself where it has no method ``rows``.

    Args:
        denoiser: Any callable D(x, t).
        index: Which samples.
    """
    rows = getattr(denoiser, "rows", None)
    part: DenoiserFn = rows(index) if callable(rows) else denoiser
    return part


def take_rows(value: Tensor, index: Rows) -> Tensor:
    """Rows of a tensor, wherever it and the index are."""
    return value[index if isinstance(index, slice) else index.to(value.device)]


def in_batches(
    flow: F,
    tensors: Sequence[Tensor],
    batch: int | None,
    *,
    counter: _Counter | None = None,
) -> Iterator[tuple[F, tuple[Tensor, ...]]]:
    """Parts of at most ``batch`` samples, each with the flow of its rows.

    Args:
        flow: The flow of all samples.
        tensors: What is split along its first axis, all of one length n.
        batch: Samples of a part; None for all at once, then the flow is passed as it
            is.
        counter: Counts the evaluations of a sample: batches that follow each other
            count as one, the most expensive.

    Yields:
        A flow and the tensors' rows.
    """
    count = len(tensors[0])
    if batch is None or batch >= count:
        yield flow, tuple(tensors)
        return
    before = most = 0 if counter is None else counter.nfe
    for first in range(0, count, batch):
        index = slice(first, min(first + batch, count))
        if counter is not None:
            counter.nfe = before
        yield flow.rows(index, count), tuple(t[index] for t in tensors)
        if counter is not None:
            most = max(most, counter.nfe)
    if counter is not None:
        counter.nfe = most


class _NeedsRows(Explained, ValueError): ...


class Part:
    """A denoiser on a part of its samples, with an eye on what it fails on.

    Args:
        denoiser: The denoiser of the part.
        whole: That of all samples.
        count: How many those are.
    """

    def __init__(self, denoiser: DenoiserFn, whole: DenoiserFn, count: int) -> None:
        self.denoiser = denoiser
        self._whole = whole
        self._count = count

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        try:
            denoised = self.denoiser(x, t)
        except (torch.OutOfMemoryError, _NeedsRows):  # the latter of a part of it
            raise
        except Exception as error:
            if self._takes_all(x, t):
                raise self._needs_rows(len(x), str(error)) from error
            raise
        got = denoised.shape[:1] if isinstance(denoised, Tensor) else x.shape[:1]
        if got != x.shape[:1]:
            raise self._needs_rows(len(x), f"it returned {tuple(denoised.shape)}")
        return denoised

    def rows(self, index: Rows) -> Part:
        """The same on a part of the part; it still knows of the whole."""
        return self.around(rows_of(self.denoiser, index))

    def around(self, denoiser: DenoiserFn) -> Part:
        """The same around another callable for these rows."""
        return Part(denoiser, self._whole, self._count)

    def _takes_all(self, x: Tensor, t: Tensor) -> bool:
        """Whether the denoiser works on as many rows as there are samples in all."""
        index = torch.arange(self._count, device=x.device) % len(x)
        time = t[index] if t.ndim and len(t) == len(x) else t
        try:
            self._whole(x[index], time)
        except Exception:
            return False
        return True

    def _needs_rows(self, part: int, why: str) -> _NeedsRows:
        return _NeedsRows(
            f"denoiser: it takes {self._count} samples and not {part}, as if it "
            "held a condition for each; give it a method rows(index) that "
            "returns the denoiser with the conditions of these rows, as "
            "artlib.adapters.diffusers.denoiser(condition=...) has, or one condition "
            f"for all samples ({why})"
        )
