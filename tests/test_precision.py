"""TF32 is off where nearly equal numbers are compared, and only there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
from artlib import rivals
from artlib._common.precision import full_precision

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
    "art for Heun": lambda flow, x: artlib.art(
        flow, x, points=9, solver="heun", weight="local"
    ),
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


def test_threads_share_the_switch(user: tuple[bool, ...]) -> None:
    # The first to leave must not switch it on under the other.
    inside, leave = threading.Event(), threading.Event()

    def stays() -> tuple[bool, ...]:
        with full_precision():
            inside.set()
            assert leave.wait(60)
            return allowed()

    with ThreadPoolExecutor(1) as pool:
        with full_precision():
            other = pool.submit(stays)
            assert inside.wait(60)
        assert allowed() == (False, False)
        leave.set()
        assert other.result() == (False, False)
    assert allowed() == user


class Recorded(artlib.PredictedClock):
    devices: set[str]

    def start(self, flow: artlib.ProbabilityFlow, x_T: Tensor) -> None:
        super().start(flow, x_T)
        self.devices = set()

    def advance(self, k: int, t: Tensor, x: Tensor, denoised: Tensor) -> Tensor:
        assert t.dtype == torch.float64
        self.devices.add(t.device.type)
        return super().advance(k, t, x, denoised)


HOLDERS = (
    "_common.precision",
    "clocks",
    "flow.ask",
    "solvers.clocked",
    "solvers.integrate",
    "solvers.stochastic",
)
"""Modules that ask whether a device has float64."""


def test_a_device_without_float64_is_named_and_sampled_on(
    accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if accelerator.type == "cuda":
        pytest.skip("the simulated device stands for Apple's GPUs")
    for name in HOLDERS:
        monkeypatch.setattr(
            f"artlib.{name}.holds_double", lambda device: device.type == "cpu"
        )
    flow, x = PROBLEM.flow(), PROBLEM.x_T.float()
    network = artlib.from_x0(PROBLEM.process, lambda x, t: x / (1 + t))
    for f in (
        flow.with_denoiser(lambda x, t: x / (1 + t)),
        flow.with_denoiser(network),
    ):
        for solver in ("euler", "heun", "rk4", "dpmpp_2m"):
            there = artlib.sample(f, x.to(accelerator), GRID, solver=solver)
            assert there.dtype == torch.float32
            torch.testing.assert_close(
                there.cpu(), artlib.sample(f, x, GRID, solver=solver)
            )
        assert (
            artlib.sample_stochastic(f, x.to(accelerator), GRID, seed=1)
            .isfinite()
            .all()
        )
        for solver in ("euler", "heun"):
            # A clock's times are float64, so they stay where there is such a thing.
            clock = Recorded(artlib.stiffness_table(flow, PROBLEM.x_T, points=8), 4)
            there = artlib.sample(f, x.to(accelerator), clock=clock, solver=solver)
            assert clock.devices == {"cpu"}
            torch.testing.assert_close(
                there.cpu(), artlib.sample(f, x, clock=clock, solver=solver)
            )
        with pytest.raises(TypeError, match=r"x_T: it is on .*no float64"):
            f.trajectory(x.to(accelerator), [2.0, 1.0])
        with pytest.raises(TypeError, match=r"x_T: it is on .*no float64"):
            artlib.sample(f, x.to(accelerator), solver="dopri5")
