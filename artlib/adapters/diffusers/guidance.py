r"""Conditions and classifier-free guidance, shared by the adapters.

With a conditional answer c and an unconditional one u the guided one is
:math:`g = u + w (c - u)`; w = 1 is the condition alone, w = 0 none of it. Both are
asked for in one call on a doubled batch, or one after the other; either counts as one
network evaluation. A rescaled answer is
:math:`\varphi\,g\,\mathrm{std}(c) / \mathrm{std}(g) + (1 - \varphi)\,g`, with the
standard deviation over each sample.

References:
    Ho and Salimans, https://arxiv.org/abs/2207.12598; Lin et al.,
    https://arxiv.org/abs/2305.08891, section 3.4 (rescaling).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..._common.checks import finite_float
from ...flow.denoisers import Denoiser
from ...flow.process import Process
from ...flow.rows import Rows, take_rows
from .times import innermost

Condition: TypeAlias = Mapping[str, Any]
"""Keyword arguments of a network: tensors with one row, or one per sample; mappings or
lists of such tensors. Shared ones (`SHARED`) and anything else pass as they are."""

BESIDE_STATE = "concatenated"
"""The name, in a condition, of what is put behind the channels of the state."""

SHARED = frozenset(
    {"freqs_cis", "image_rotary_emb", "img_ids", "rotary_emb", "txt_ids"}
)
"""Arguments of the networks of diffusers that all samples share: positions. Flux has
had a batch axis before those of tokens, [1 or N, tokens, 3]: then they are rows."""


class Guidance:
    """Calls a network under a condition.

    Args:
        condition: What the network is given beside state and time, or None.
        unconditional: The same for the unconditional half; needed where ``guidance``
            is not 1.
        guidance: The factor w, finite.
        rescale: The share phi, in [0, 1].
        together: Whether both are asked for in one call.
        shared: Names, at any depth, of conditions that samples share, beside `SHARED`.

    Raises:
        TypeError: If a condition is no mapping or ``shared`` a single string.
        ValueError: If ``guidance`` is not finite, or asks for an unconditional call
            that is not given, or the two conditions have different names, or
            ``rescale`` is outside of [0, 1], or a name in ``shared`` is no condition.
    """

    def __init__(
        self,
        condition: Condition | None,
        unconditional: Condition | None,
        guidance: float,
        *,
        rescale: float = 0.0,
        together: bool = True,
        shared: Collection[str] = (),
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
        self.rescale = finite_float(rescale, "guidance_rescale")
        if not 0 <= self.rescale <= 1:
            raise ValueError(
                f"guidance_rescale: expected a share in [0, 1], got {self.rescale}"
            )
        self.condition = dict(condition or {})
        self.unconditional = None if unconditional is None else dict(unconditional)
        self.together = bool(together)
        if isinstance(shared, str):
            raise TypeError(
                f"shared: expected a collection of names, got the string {shared!r}; "
                f"write ({shared!r},)"
            )
        unknown = set(shared) - _names(self.condition)
        if unknown:
            raise ValueError(
                f"shared: {sorted(unknown)} are no names of the condition, which has "
                f"{sorted(_names(self.condition))}"
            )
        self.shared = SHARED | set(shared)
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

    def rows(self, index: Rows) -> Guidance:
        """The guidance of some of the samples; itself if none of it is per sample.

        Args:
            index: Which samples, a slice or row numbers [n].
        """

        def cut(value: Tensor, name: str) -> Tensor:
            return value if value.shape[0] == 1 else take_rows(value, index)

        condition = self._map(self.condition, cut)
        unconditional = self.unconditional and self._map(self.unconditional, cut)
        if _same(condition, self.condition) and _same(
            unconditional, self.unconditional
        ):
            return self
        part = copy.copy(self)
        part.condition, part.unconditional = condition, unconditional
        return part

    def check_rows(self, count: int) -> None:
        """Refuse conditions that have neither one row nor one for each sample.

        Args:
            count: How many samples there are.

        Raises:
            ValueError: If there is such a one.
        """

        def fits(value: Tensor, name: str) -> Tensor:
            if value.shape[0] not in (1, count):
                raise _wrong_number(value, name, count)
            return value

        self._map(self.condition, fits)
        self._map(self.unconditional or {}, fits)

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
        condition = self._rows(self.condition, x)
        if self.factor == 1 or self.unconditional is None:
            return call(x, time, **condition)
        other = self._rows(self.unconditional, x)
        if self.together:
            both = self._join(condition, other)
            with_it, without = call(
                torch.cat([x, x]), torch.cat([time, time]), **both
            ).chunk(2)
        else:
            without = call(x, time, **other)
            with_it = call(x, time, **condition)
        guided = without + self.factor * (with_it - without)
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, guided.ndim))
        share = with_it.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (self.rescale * share + (1 - self.rescale))

    def _rows(self, condition: Condition, x: Tensor) -> dict[str, Any]:
        """Every tensor of a condition with a row per sample, on the state's device."""

        def fit(value: Tensor, name: str) -> Tensor:
            n = len(x)
            if value.shape[0] not in (1, n):
                raise _wrong_number(value, name, n)
            return value.to(x.device).expand(n, *value.shape[1:])

        def move(value: Tensor) -> Tensor:
            return value.to(x.device)

        return self._map(condition, fit, move)

    def _map(
        self,
        condition: Condition,
        per_sample: Callable[[Tensor, str], Tensor],
        common: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> dict[str, Any]:
        """A condition with functions of what is per sample and of what is shared."""

        def apply(value: Any, name: str) -> Any:
            if isinstance(value, Mapping):
                return {k: apply(v, k) for k, v in value.items()}
            if type(value) in (list, tuple):
                return type(value)(apply(v, name) for v in value)
            if not isinstance(value, Tensor):
                return value
            return (
                common(value)
                if self.is_shared(value, name)
                else per_sample(value, name)
            )

        return {name: apply(value, name) for name, value in condition.items()}

    def doubled(self, condition: Condition) -> dict[str, Any]:
        """A condition for the same samples twice, one after the other.

        Args:
            condition: With a row for each sample, as the network is given it.
        """

        def twice(value: Tensor, name: str) -> Tensor:
            return value.repeat(2, *[1] * (value.ndim - 1))

        return self._map(condition, twice)

    def is_shared(self, value: Tensor, name: str) -> bool:
        """Whether samples share a tensor, or it has a row per sample (or one row)."""
        if name in ("img_ids", "txt_ids") and value.ndim == 3:
            return False
        return value.ndim == 0 or name in self.shared

    def _join(self, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        """Two conditions one after the other, name by name."""

        def join(a: Any, b: Any, name: str) -> Any:
            if isinstance(a, dict):
                return {k: join(v, b[k], k) for k, v in a.items()}
            if type(a) in (list, tuple):
                return type(a)(join(v, w, name) for v, w in zip(a, b, strict=True))
            if not isinstance(a, Tensor) or self.is_shared(a, name):
                return a
            if a.shape != b.shape:
                raise ValueError(
                    f"unconditional: {name!r} has shape {tuple(b.shape)} and that of "
                    f"the condition {tuple(a.shape)}, which do not go into one call; "
                    "pad them alike, or ask for them one by one with together=False"
                )
            return torch.cat([a, b])

        return {name: join(value, second[name], name) for name, value in first.items()}


class GuidedDenoiser(Denoiser):
    """A denoiser whose network is asked under a condition, and again without it.

    Args:
        network: The network.
        process: The process to sample under.
        convert: From its answer to the denoised sample, as `Denoiser` has it.
        guide: How the network is called under its condition.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        process: Process,
        convert: Callable[..., Tensor],
        guide: Guidance,
    ) -> None:
        super().__init__(network, process, convert)
        self._guide = guide

    def rows(self, index: Rows) -> GuidedDenoiser:
        """The denoiser of some of the samples, for a batch that is worked on in parts.

        Args:
            index: Which samples, a slice or row numbers [n]; their rows of the
                conditions that have one per sample.

        Returns:
            A denoiser around the same network; itself where all conditions are shared.
        """
        guide = self._guide.rows(index)
        if guide is self._guide:
            return self
        part = self._twin()
        part._guide = guide
        return part

    def check_rows(self, count: int) -> None:
        self._guide.check_rows(count)

    def _given(
        self, x: Tensor, condition: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The state and the conditions as the network takes them."""
        state = x.clone()  # a network may scale its input in place
        cast = {k: cast_condition(v, x.dtype) for k, v in condition.items()}
        if BESIDE_STATE in cast:
            state = beside_state(state, cast.pop(BESIDE_STATE), self.network)
        return state, cast


def without_variance(answer: Tensor, x: Tensor) -> Tensor:
    """What a network predicts of ``x``, without the half of channels after it."""
    if answer.ndim > 1 and answer.shape[1] == 2 * x.shape[1]:
        return answer[:, : x.shape[1]]
    return answer


def beside_state(x: Tensor, channels: Any, network: Any) -> Tensor:
    """States with the channels of a condition behind their own.

    Args:
        x: States [N, C, *size], or [N, frames, C, *size] where the network has it so.
        channels: What goes behind them, of the same size.
        network: The network; a video network that counts frames first is known.

    Raises:
        ValueError: If the two do not have one size.
    """
    frames_first = type(innermost(network)).__name__.startswith("UNetSpatioTemporal")
    axis = 2 if frames_first else 1
    shapes = [
        [*value.shape[:axis], *value.shape[axis + 1 :]]
        for value in (x, channels)
        if isinstance(value, Tensor)
    ]
    if len(shapes) < 2 or shapes[0] != shapes[1]:
        found = tuple(channels.shape) if isinstance(channels, Tensor) else channels
        raise ValueError(
            f"condition: {BESIDE_STATE!r} goes behind the channels (axis {axis}) of "
            f"states {tuple(x.shape)}, so it needs their size; got {found!r:.80}: "
            "resize masks and images to the latents"
        )
    return torch.cat([x, channels], dim=axis)


def cast_condition(value: Any, dtype: torch.dtype) -> Any:
    """A condition's tensors for a network: floating ones in its dtype, all copies.

    A network may write into them. Rows that are one row repeated need no copy: torch
    refuses to write into those.
    """
    if isinstance(value, dict):
        return {name: cast_condition(inner, dtype) for name, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast_condition(inner, dtype) for inner in value)
    if not isinstance(value, Tensor):
        return value
    repeated = any(
        step == 0 and size > 1
        for step, size in zip(value.stride(), value.shape, strict=True)
    )
    kind = dtype if value.is_floating_point() else value.dtype
    return value.to(kind, copy=not repeated)


def _wrong_number(value: Tensor, name: str, count: int) -> ValueError:
    return ValueError(
        f"condition: {name!r} has shape {tuple(value.shape)}, expected one row or as "
        f"many as there are samples, {count}; name it in shared=({name!r},) if all "
        "samples share it, or take the samples that belong to its rows with "
        "denoiser.rows(slice(first, last))"
    )


def _names(condition: Condition) -> set[str]:
    """The names in a condition, at any depth."""
    found = set(condition)
    for value in condition.values():
        if isinstance(value, Mapping):
            found |= _names(value)
    return found


def _same(a: Any, b: Any) -> bool:
    """Whether two conditions hold the very same tensors."""
    if isinstance(a, Mapping):
        return all(_same(value, b[name]) for name, value in a.items())
    if type(a) in (list, tuple):
        return all(_same(v, w) for v, w in zip(a, b, strict=True))
    return a is b
