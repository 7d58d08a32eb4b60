"""TF32 is off where nearly equal numbers are compared, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import mixture_16d

import artlib
from artlib import rivals
from artlib._precision import full_precision

PROBLEM = mixture_16d(artlib.VE(), n=4)
GRID = artlib.edm(PROBLEM.process, pinned=False).grid(4)
BACKENDS = (torch.backends.cudnn, torch.backends.cuda.matmul)


def allowed() -> tuple[bool, ...]:
    return tuple(bool(b.allow_tf32) for b in BACKENDS)


@pytest.fixture(params=[True, False])
def user(request: pytest.FixtureRequest) -> Any:
    """The user's own settings, and those of the session put back."""
    before = allowed()
    for backend in BACKENDS:
        backend.allow_tf32 = request.param
    yield (request.param, request.param)
    for backend, value in zip(BACKENDS, before, strict=True):
        backend.allow_tf32 = value


EXACT: dict[str, Callable[[artlib.ProbabilityFlow, torch.Tensor], Any]] = {
    "Q": lambda flow, x: flow.acceleration(x, 1.0),
    "reference path": lambda flow, x: flow.trajectory(x, [80.0, 9.0, 1.0, 0.5, 0.1]),
    "reference solution": lambda flow, x: artlib.sample(flow, x, solver="dopri5"),
    "art": lambda flow, x: artlib.art(flow, x, points=17),
    "art for Heun": lambda flow, x: artlib.art(flow, x, points=9, solver="heun"),
    "art, dual": lambda flow, x: artlib.art(flow, x, points=9, weight="dual"),
    "refine": lambda flow, x: artlib.refine(
        artlib.edm(flow.process), flow, x, 2, iterations=1
    ),
    "Euler jumps": lambda flow, x: rivals.euler_jumps(flow, x, points=9),
    "Girsanov bound": lambda flow, x: rivals.girsanov(flow, x, points=9),
    "compare": lambda flow, x: artlib.compare(
        flow, {"EDM": artlib.edm(flow.process)}, [x], {"euler": [2]}, ends=[x]
    ),
}


def watched(seen: set[tuple[bool, ...]]) -> artlib.ProbabilityFlow:
    """The problem's flow, which notes the settings under which it is evaluated."""
    flow = PROBLEM.flow()

    def denoiser(x: torch.Tensor, t: Any) -> torch.Tensor:
        seen.add(allowed())
        return flow.denoiser(x, t)

    return flow.with_denoiser(denoiser)


@pytest.mark.parametrize("name", EXACT)
def test_no_tf32_where_nearly_equal_numbers_are_compared(
    name: str, user: tuple[bool, ...]
) -> None:
    seen: set[tuple[bool, ...]] = set()
    EXACT[name](watched(seen), PROBLEM.x_T)
    assert seen == {(False, False)}
    assert allowed() == user


def test_sampling_on_a_grid_leaves_the_choice_to_the_user(
    user: tuple[bool, ...],
) -> None:
    seen: set[tuple[bool, ...]] = set()
    artlib.sample(watched(seen), PROBLEM.x_T, GRID, solver="heun")
    assert seen == {user}


def test_settings_return_after_an_error_and_from_within(user: tuple[bool, ...]) -> None:
    @full_precision()
    def fails() -> None:
        with full_precision():
            assert allowed() == (False, False)
        assert allowed() == (False, False)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert allowed() == user


def test_torch_s_newer_switches_are_left_alone(monkeypatch: Any) -> None:
    class Refuses:
        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends, "cudnn", Refuses())
    with full_precision():
        assert not torch.backends.cuda.matmul.allow_tf32
