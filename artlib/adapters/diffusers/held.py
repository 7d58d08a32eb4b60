"""Schedulers that hold a schedule.

A scheduler holds a schedule by its class: the class that diffusers gave it, with the
few methods below on top, under the same name. So there is nothing that points from the
scheduler to itself, and a copy, shallow or deep, or pickled, is a scheduler of its own.

What a new scheduler is made of is the configuration, and the schedule is not part of
it. Where that would be lost without a word, there is a warning.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..._common.checks import positive_int
from ..levels import ScheduleLike, noise_levels
from .rules import coordinate, rule_for
from .setter import set_levels

_KEPT = "_artlib_schedule"


def hold(scheduler: Any, schedule: ScheduleLike) -> None:
    """Let a scheduler hold a schedule, in place of one that it held."""
    vars(scheduler)[_KEPT] = schedule
    scheduler.__class__ = _held_class(plain_class(scheduler))


def let_go(scheduler: Any) -> None:
    """Make a scheduler what it was before it held a schedule, if it does."""
    if isinstance(scheduler, _Holding):
        scheduler.__class__ = plain_class(scheduler)
        vars(scheduler).pop(_KEPT, None)


def plain_class(scheduler: Any) -> type:
    """The class of a scheduler as it was before it held a schedule."""
    kind = type(scheduler)
    return kind.__mro__[2] if issubclass(kind, _Holding) else kind


@functools.cache
def _held_class(plain: type) -> type:
    """The class of a scheduler that holds a schedule, by the name of its own."""
    names = ("__module__", "__qualname__", "__doc__")
    return type(
        plain.__name__, (_Holding, plain), {n: getattr(plain, n) for n in names}
    )


def _revive(plain: type) -> Any:
    """An empty scheduler that holds a schedule, for copies."""
    return object.__new__(_held_class(plain))


class _Holding:
    """What a scheduler does differently while it holds a schedule."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler that is made anew holds nothing."""
        return cls.__mro__[2](*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (plain_class(self),), dict(vars(self))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the grid of the schedule; only the number of steps is the caller's.

        Raises:
            ExportError: If the schedule cannot be visited with that many steps.
            ValueError: If neither a number of steps nor a list is given.
        """
        if num_inference_steps is None:
            given = timesteps if timesteps is not None else sigmas
            if given is None:
                raise ValueError(
                    "num_inference_steps: got None; say how many steps to take"
                )
            num_inference_steps = len(given)
            # Euler's lists carry the final 0, which is no step.
            if sigmas is not None and timesteps is None and float(given[-1]) == 0:
                num_inference_steps -= 1
        K = positive_int(num_inference_steps, "num_inference_steps")
        levels = noise_levels(vars(self)[_KEPT], K, coordinate(self))
        # A pipeline's mu would be undone, and no mu does the same.
        set_levels(self, plain_class(self), rule_for(self), levels, None, device)

    @property
    def config(self) -> Any:
        """The configuration, which warns when it is copied."""
        return _Config(super().config)  # type: ignore[misc]

    @property
    def init_noise_sigma(self) -> Any:
        """Factor of the noise that pipelines start from.

        That of the first level, sigma, or sigma / sqrt(1 + sigma^2) where the state is
        kept at variance 1; diffusers starts "leading" steps, and those, a little
        higher, at sqrt(1 + sigma^2) and 1.
        """
        if coordinate(self) == "flow":
            own = vars(self).get("init_noise_sigma")
            return super().init_noise_sigma if own is None else own  # type: ignore[misc]
        first = vars(self)["sigmas"][0]
        return first / (1 + first**2) ** 0.5 if rule_for(self).scaled else first

    def save_config(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers does it, with a warning."""
        _warn(
            "is saved without it: keep the schedule with schedule.save(path), and call "
            "schedule.to_diffusers(scheduler, K) after loading"
        )
        return super().save_config(*args, **kwargs)  # type: ignore[misc]


class _Config(dict[str, Any]):
    """A scheduler's configuration that says what a copy of it lacks.

    It reads and writes like the configuration itself. Whatever goes through all of it,
    as ``from_config`` does, is taken for a copy.
    """

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        object.__setattr__(self, "_own", own)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_own"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(object.__getattribute__(self, "_own"), name, value)

    def __iter__(self) -> Iterator[str]:
        _warn_of_copy()
        return super().__iter__()

    def keys(self) -> Any:
        """The names; it warns."""
        _warn_of_copy()
        return super().keys()

    def items(self) -> Any:
        """The names and values; it warns."""
        _warn_of_copy()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """A plain dictionary; it warns."""
        _warn_of_copy()
        return super().copy()

    def __repr__(self) -> str:
        return repr(object.__getattribute__(self, "_own"))

    def __reduce_ex__(self, protocol: Any) -> Any:
        _warn_of_copy()
        return dict, (dict(super().items()),)


def _warn_of_copy() -> None:
    _warn(
        "has its configuration copied, of which the schedule is no part: a scheduler "
        "made of it, by from_config, takes its own steps until "
        "schedule.to_diffusers(scheduler, K) is called on it"
    )


def _warn(what: str) -> None:
    warnings.warn(
        f"schedule: a scheduler that holds a schedule of artlib {what}", stacklevel=4
    )
