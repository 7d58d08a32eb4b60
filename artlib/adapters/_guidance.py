r"""Conditions and classifier-free guidance, shared by the adapters.

With a conditional answer c and an unconditional one u the guided one is
:math:`u + g (c - u)`; g = 1 is the condition alone, g = 0 none of it. Both are asked
for in one call on a doubled batch, which counts as one network evaluation.

References:
    Ho and Salimans, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import finite_float
from .._rows import Rows, take_rows

Condition: TypeAlias = Mapping[str, Any]
"""Keyword arguments of a network: tensors with one row, or one per sample, or
mappings of such tensors; anything else is passed as it is."""


class Guidance:
    """Calls a network under a condition.

    Args:
        condition: What the network is given beside state and time, or None.
        unconditional: The same for the unconditional half; needed where ``guidance``
            is not 1.
        guidance: The factor g, finite.

    Raises:
        TypeError: If a condition is no mapping.
        ValueError: If ``guidance`` is not finite, or asks for an unconditional call
            that is not given, or the two conditions have different names.
    """

    def __init__(
        self,
        condition: Condition | None,
        unconditional: Condition | None,
        guidance: float,
    ) -> None:
        for value, name in (
            (condition, "condition"),
            (unconditional, "unconditional"),
        ):
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(
                    f"{name}: expected a mapping of the network's keyword arguments, "
                    f"such as {{'encoder_hidden_states': embeddings}}, got "
                    f"{type(value).__name__}"
                )
        self.factor = finite_float(guidance, "guidance")
        self.condition = dict(condition or {})
        self.unconditional = None if unconditional is None else dict(unconditional)
        if self.factor == 1:
            return
        if not self.condition or self.unconditional is None:
            raise ValueError(
                f"guidance: {self.factor} needs both condition and unconditional; give "
                "the network's arguments for an empty prompt (or for no class)"
            )
        if self.condition.keys() != self.unconditional.keys():
            raise ValueError(
                f"unconditional: expected the names {sorted(self.condition)} of the "
                f"condition, got {sorted(self.unconditional)}"
            )

    def __call__(
        self,
        call: Callable[..., Tensor],
        x: Tensor,
        time: Tensor,
    ) -> Tensor:
        """``call(x, time, **condition)``, guided.

        Args:
            call: The network.
            x: States [N, *shape].
            time: What it is told of the time [N].

        Returns:
            Its answer [N, *shape].

        Raises:
            ValueError: If a condition has neither one row nor N.
        """
        n = len(x)
        condition = _rows(self.condition, n, x.device)
        if self.factor == 1 or self.unconditional is None:
            return call(x, time, **condition)
        both = _join(condition, _rows(self.unconditional, n, x.device))
        with_it, without = call(
            torch.cat([x, x]), torch.cat([time, time]), **both
        ).chunk(2)
        return without + self.factor * (with_it - without)

    def rows(self, index: Rows, count: int) -> Guidance:
        """The same with the conditions of some of the samples.

        Args:
            index: Which samples, a slice or row numbers [n].
            count: How many there are in all.

        Raises:
            ValueError: If a condition has neither one row nor ``count``.
        """
        part = copy.copy(self)
        part.condition = _take(self.condition, index, count)
        if self.unconditional is not None:
            part.unconditional = _take(self.unconditional, index, count)
        return part


def _take(condition: Condition, index: Rows, count: int) -> dict[str, Any]:
    """Some rows of every tensor that has one for each of ``count`` samples."""
    taken: dict[str, Any] = {}
    for name, value in condition.items():
        if isinstance(value, Mapping):
            taken[name] = _take(value, index, count)
        elif _per_sample(name, value, count):
            taken[name] = take_rows(value, index)
        else:
            taken[name] = value
    return taken


def _per_sample(name: str, value: Any, n: int) -> bool:
    """Whether a condition has a row for each of ``n`` samples, and not one for all."""
    if not isinstance(value, Tensor):
        return False
    if not value.ndim or value.shape[0] not in (1, n):
        raise ValueError(
            f"condition: {name!r} has shape {tuple(value.shape)}, expected one row "
            f"or as many as there are samples, {n}"
        )
    return value.shape[0] == n


def _rows(condition: Condition, n: int, device: torch.device) -> dict[str, Any]:
    """Every tensor of a condition with ``n`` rows, on the state's device."""
    rows: dict[str, Any] = {}
    for name, value in condition.items():
        if isinstance(value, Mapping):
            rows[name] = _rows(value, n, device)
        elif not isinstance(value, Tensor):
            rows[name] = value
        else:
            _per_sample(name, value, n)
            rows[name] = value.to(device).expand(n, *value.shape[1:])
    return rows


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two conditions one after the other, name by name."""
    joined: dict[str, Any] = {}
    for name, value in first.items():
        if isinstance(value, dict):
            joined[name] = _join(value, second[name])
        elif isinstance(value, Tensor):
            joined[name] = torch.cat([value, second[name]])
        else:
            joined[name] = value
    return joined
