r"""The levels of a plan, told to a network of diffusers by a hook on it.

Fractional timesteps alone are not the plan: a scheduler scales the network's input, and
turns its output into a denoised sample, by the noise level of the *node*. So the hook
does three things, with :math:`\sigma` the node's level and s the one that is told:

* the input, :math:`y/\sqrt{1+\sigma^2}`, becomes :math:`y/\sqrt{1+s^2}` (with flow
  matching, :math:`x_t` becomes :math:`x_t (1-s)/(1-t)`);
* the timestep becomes that of s;
* the output becomes the one from which the scheduler computes the denoised sample that
  the network meant: for noise, :math:`\epsilon\, s/\sigma`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..._common.errors import ExportError
from ..levels import ScheduleLike
from .rules import coordinate
from .times import innermost, is_edm, is_flow, network_scale, told

_NEAR = 2e-3  # of a timestep: pipelines keep them in float32 or float16


@runtime_checkable
class PlanLike(ScheduleLike, Protocol):
    """What has nodes and told levels: `artlib.Plan`."""

    @property
    def nodes(self) -> Tensor:
        """Process times [K + 1]."""

    @property
    def told(self) -> Tensor:
        """Process times [K]."""


@dataclass
class Hooks:
    """The hooks on a network; ``remove()`` takes them off."""

    handles: list[Any]

    def remove(self) -> None:
        """Let the network be told what the scheduler says again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def tell_network(plan: PlanLike, scheduler: Any, network: nn.Module) -> Hooks:
    """Hook a network so that a scheduler set to a plan's nodes samples the plan.

    Args:
        plan: The plan.
        scheduler: The scheduler, already set to the nodes.
        network: The network that the pipeline calls, ``pipe.unet`` or
            ``pipe.transformer``.

    Returns:
        The hooks; call ``remove()`` on them for the network's own levels.

    Raises:
        ExportError: If the scheduler is of the EDM family, or its prediction type is
            not known here.
        TypeError: If ``network`` is none.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"network: expected pipe.unet or pipe.transformer, got "
            f"{type(network).__name__}; the levels are told by a hook on it"
        )
    flow, kind = is_flow(scheduler), _prediction(scheduler)
    where = coordinate(scheduler)
    process = plan.process

    def levels(times: Tensor) -> Tensor:
        alpha, sigma = process.alpha(times), process.sigma(times)
        return sigma / (alpha + sigma) if where == "flow" else sigma / alpha

    node, tell = levels(plan.nodes[:-1]), levels(plan.told)
    to_time, scale = told(scheduler), network_scale(network, scheduler)
    asked, answers = to_time(node) * scale, to_time(tell) * scale
    inner = innermost(network)
    seen: list[tuple[int, Tensor]] = []

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tuple(args), dict(kwargs)
        x, put_x = _argument(args, kwargs, 0, ("sample", "hidden_states", "x"))
        time, _ = _argument(args, kwargs, 1, ("timestep", "timesteps", "t"))
        stamp = torch.as_tensor(time).detach().double().cpu().flatten()
        gap = (asked - stamp[:1]).abs()
        k = int(gap.argmin())
        if float(gap[k]) > _NEAR * max(1.0, float(asked.max())):
            raise ExportError(
                f"plan: the network is asked at timestep {float(stamp[0]):.6g}, which "
                "is none of the plan's; run the pipeline with as many steps as the "
                "plan has, or take its hooks off with remove()"
            )
        seen.append((k, x))
        a, s = float(node[k]), float(tell[k])
        if a == s:
            return args, kwargs
        shrink = (1 - s) / (1 - a) if flow else ((1 + a * a) / (1 + s * s)) ** 0.5
        args, kwargs = put_x(x * shrink)
        stamp = torch.as_tensor(time)
        answer = torch.full_like(
            stamp,
            float(answers[k]),
            dtype=stamp.dtype if stamp.is_floating_point() else torch.float32,
        )
        _, put_time = _argument(args, kwargs, 1, ("timestep", "timesteps", "t"))
        result: tuple[tuple[Any, ...], dict[str, Any]] = put_time(answer)
        return result

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        k, x = seen.pop()
        a, s = float(node[k]), float(tell[k])
        if a == s or kind == "sample":
            return output
        return _replaced(output, _meant(_first(output), x, a, s, kind))

    return Hooks(
        [
            inner.register_forward_pre_hook(before, with_kwargs=True),
            inner.register_forward_hook(after),
        ]
    )


def _prediction(scheduler: Any) -> str:
    if is_edm(scheduler):
        raise ExportError(
            "scheduler: one of the EDM family preconditions the network by itself; "
            "sample with artlib.sample(flow, x_T, plan)"
        )
    if is_flow(scheduler):
        return "flow"
    kind = str(getattr(scheduler.config, "prediction_type", "epsilon"))
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ExportError(
            f"scheduler: its prediction type {kind!r} is not known here; sample with "
            "artlib.sample(flow, x_T, plan)"
        )
    return kind


def _meant(output: Tensor, x: Tensor, a: float, s: float, kind: str) -> Tensor:
    """The output at level ``a`` with the denoised sample of that at level ``s``."""
    if kind == "epsilon":
        return output * (s / a)
    if kind == "flow":
        denoised = x * ((1 - s) / (1 - a)) - s * output
        return (x - denoised) / a
    root = (1 + a * a) ** 0.5
    denoised = x * (root / (1 + s * s)) - output * (s / (1 + s * s) ** 0.5)
    return (x / root - denoised) * (root / a)


def _argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, names: tuple[str, ...]
) -> tuple[Any, Any]:
    """An argument by place or name, and what puts another one there."""
    if len(args) > place:

        def by_place(value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (*args[:place], value, *args[place + 1 :]), kwargs

        return args[place], by_place
    for name in names:
        if name in kwargs:

            def by_name(value: Any, name: str = name) -> Any:
                return args, {**kwargs, name: value}

            return kwargs[name], by_name
    raise ExportError(
        f"network: it is called without {names[0]}; the levels of a plan cannot be "
        "told to it by a hook, so sample with artlib.sample(flow, x_T, plan)"
    )


def _first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found


def _replaced(output: Any, first: Tensor) -> Any:
    if isinstance(output, Tensor):
        return first
    if isinstance(output, tuple):
        return (first, *output[1:])
    output.sample = first
    return output
