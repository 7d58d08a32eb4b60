r"""Conditions and classifier-free guidance, shared by the adapters.

With a conditional answer c and an unconditional one u the guided one is
:math:`u + g (c - u)`; g = 1 is the condition alone, g = 0 none of it. Both are asked
for in one call on a doubled batch, which counts as one network evaluation.

References:
    Ho and Salimans, https://arxiv.org/abs/2207.12598.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import finite_float

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


def _rows(condition: Condition, n: int, device: torch.device) -> dict[str, Any]:
    """Every tensor of a condition with ``n`` rows, on the state's device."""
    rows: dict[str, Any] = {}
    for name, value in condition.items():
        if isinstance(value, Mapping):
            rows[name] = _rows(value, n, device)
        elif not isinstance(value, Tensor):
            rows[name] = value
        elif value.ndim and value.shape[0] in (1, n):
            rows[name] = value.to(device).expand(n, *value.shape[1:])
        else:
            raise ValueError(
                f"condition: {name!r} has shape {tuple(value.shape)}, expected one row "
                f"or as many as there are samples, {n}"
            )
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
