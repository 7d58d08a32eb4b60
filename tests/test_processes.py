"""Processes: derivatives by autograd, inverses, the forward equation, and files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from artlib._common.errors import ScheduleFormatError
from artlib.flow import registry as _process_registry
from artlib.flow.noise_coordinate import log_level, log_level_dot, table_times
from artlib.flow.processes import (
    VE,
    VP,
    Process,
    RectifiedFlow,
    as_time,
    process_from_dict,
    register_process,
)
from artlib.schedules.constructors import Schedule, edm, uniform

PROCESSES = (
    VE(),
    VE(sigma_min=2e-4, sigma_max=3.0),
    VP(),
    VP(beta_min=2.0, beta_max=2.0),  # constant beta: the quadratic of B degenerates
    VP(t_min=1e-5),
    RectifiedFlow(),
    RectifiedFlow(t_min=0.01, t_max=0.9),
)
each_process = pytest.mark.parametrize("process", PROCESSES, ids=repr)


def times(process: Process, n: int = 41) -> Tensor:
    """Times from t_min to t_max, both included, even in the logarithm."""
    t = torch.logspace(
        math.log10(process.t_min), math.log10(process.t_max), n, dtype=torch.float64
    )
    t[0], t[-1] = process.t_min, process.t_max
    return t


def derivative(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    value = f(t).sum()
    if not value.requires_grad:  # a constant
        return torch.zeros_like(t)
    (gradient,) = torch.autograd.grad(value, t, allow_unused=True)
    return torch.zeros_like(t) if gradient is None else gradient


@each_process
def test_derivatives_equal_autograd(process: Process) -> None:
    t = times(process)
    pairs = [
        (process.alpha, process.alpha_dot),
        (process.alpha_dot, process.alpha_ddot),
        (process.sigma, process.sigma_dot),
        (process.sigma_dot, process.sigma_ddot),
        (lambda t: log_level(process, t), lambda t: log_level_dot(process, t)),
    ]
    for f, f_dot in pairs:
        torch.testing.assert_close(f_dot(t), derivative(f, t), rtol=1e-10, atol=1e-12)


def test_vp_against_its_defining_integral() -> None:
    # alpha = exp(-B/2), sigma^2 = 1 - alpha^2, with B integrated numerically.
    process = VP(beta_min=0.3, beta_max=15.0)
    for t in (1e-3, 0.1, 0.6, 1.0):
        b, _ = integrate.quad(lambda s: 0.3 + 14.7 * s, 0, t)
        assert float(process.alpha(t)) == pytest.approx(math.exp(-b / 2), rel=1e-13)
        assert float(process.sigma(t) ** 2) == pytest.approx(-math.expm1(-b), rel=1e-13)


def test_vp_keeps_its_digits_at_small_times() -> None:
    # sigma^2 = B - B^2/2 + ..., B ~ beta_min t: 1 - alpha^2 would have 4 digits left.
    process = VP()
    t = torch.tensor([1e-12, 1e-10], dtype=torch.float64)
    b = 0.1 * t + 9.95 * t**2
    torch.testing.assert_close(
        process.sigma(t), (b - b**2 / 2).sqrt(), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        process.noise_level(t), (b + b**2 / 2).sqrt(), rtol=1e-14, atol=0
    )
    # d sigma / dt ~ sqrt(beta_min / t) / 2 and its derivative -1/4 beta_min^.5 t^-1.5.
    torch.testing.assert_close(
        process.sigma_dot(t), 0.5 * (0.1 / t).sqrt(), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        process.sigma_ddot(t), -0.25 * 0.1**0.5 * t**-1.5, rtol=1e-7, atol=0
    )
    back = process.inverse_noise_level(process.noise_level(t))
    torch.testing.assert_close(back, t, rtol=1e-13, atol=0)


@each_process
def test_inverses_round_trip(process: Process) -> None:
    t = times(process)
    level, log_snr = process.noise_level(t), process.log_snr(t)
    torch.testing.assert_close(level, process.sigma(t) / process.alpha(t))
    torch.testing.assert_close(
        log_snr, 2 * torch.log(process.alpha(t) / process.sigma(t))
    )
    torch.testing.assert_close(
        process.inverse_noise_level(level), t, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(process.inverse_log_snr(log_snr), t, rtol=1e-12, atol=0)
    # And the other way round, from levels of which none is a table's.
    level = torch.tensor([1e-6, 0.3, 1.0, 7.0, 123.0], dtype=torch.float64)
    again = process.noise_level(process.inverse_noise_level(level))
    torch.testing.assert_close(again, level, rtol=1e-12, atol=0)


def test_the_end_without_signal() -> None:
    process = RectifiedFlow()
    assert float(process.noise_level(1.0)) == math.inf
    assert float(process.log_snr(1.0)) == -math.inf
    assert float(process.inverse_noise_level(math.inf)) == 1.0
    assert float(process.inverse_log_snr(-math.inf)) == 1.0
    assert math.isfinite(float(log_level(process, 1.0)))


@each_process
def test_forward_equation_has_the_stated_moments(process: Process) -> None:
    # Eq. (1): the mean solves m' = -f m, the variance V' = -2 f V + g^2; check the
    # derivatives of alpha and sigma^2 against the coefficients.
    t = times(process)[:-1] if process == RectifiedFlow() else times(process)
    f, g2 = process.drift(t), process.diffusion_squared(t)
    torch.testing.assert_close(-f * process.alpha(t), process.alpha_dot(t))
    growth = 2 * process.sigma(t) * process.sigma_dot(t)
    torch.testing.assert_close(
        -2 * f * process.sigma(t) ** 2 + g2, growth, rtol=1e-9, atol=1e-9
    )
    assert bool((g2 > 0).all())


def test_diffusion_of_vp_is_beta() -> None:
    t = torch.linspace(1e-3, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(VP().diffusion_squared(t), 0.1 + 19.9 * t)
    torch.testing.assert_close(VP().drift(t), (0.1 + 19.9 * t) / 2)


@each_process
def test_numbers_and_tensors_agree(process: Process) -> None:
    t = 0.37 * process.t_max
    for f in (
        process.alpha,
        process.sigma,
        process.alpha_dot,
        process.sigma_dot,
        process.alpha_ddot,
        process.sigma_ddot,
        process.noise_level,
        process.log_snr,
        process.drift,
        process.diffusion_squared,
    ):
        scalar = f(t)
        assert scalar.shape == ()
        assert scalar.dtype == torch.float64
        grid = f(torch.full((3, 2), t, dtype=torch.float64))
        assert grid.shape == (3, 2)
        assert bool((grid == scalar).all())
        assert f(torch.tensor([t])).dtype == torch.float32  # a tensor keeps its dtype
        assert f(torch.tensor([1])).is_floating_point()  # unless it holds integers


def test_a_number_is_not_rounded_to_float32() -> None:
    assert float(as_time(0.1)) == 0.1
    assert float(as_time(torch.tensor(0.1))) != 0.1
    t = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert as_time(t).requires_grad


@each_process
def test_json_round_trip(process: Process) -> None:
    again = process_from_dict(json.loads(json.dumps(process.to_dict())))
    assert again == process
    assert hash(again) == hash(process)
    assert len({process, again}) == 1


def test_processes_are_values() -> None:
    assert VE() != VP()
    assert VE(0.002, 80.0) != VE(0.002, 79.0)
    assert (VE(0.01, 5.0).t_min, VE(0.01, 5.0).t_max) == (0.01, 5.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        VP().beta_max = 3.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VE(sigma_min=0.0), "^sigma_min"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_min < sigma_max"),
        (lambda: VE(sigma_max=math.inf), "^sigma_max"),
        (lambda: VE(sigma_min=math.nan), "^sigma_min"),
        (lambda: VP(beta_min=-1.0), "beta_min"),
        (lambda: VP(beta_max=0.05), "beta_max"),
        (lambda: VP(beta_max=math.nan), "beta_max"),
        (lambda: RectifiedFlow(t_max=1.01), "t_max"),
        (lambda: process_from_dict({"name": "vpp"}), "vpp"),
        (lambda: process_from_dict({"name": ["vp"]}), "unknown name"),
        (lambda: process_from_dict({"name": "vp", "beta": 1}), "beta"),
        (lambda: process_from_dict({"name": "ve", "sigma_max": None}), "'ve'"),
    ],
)
def test_bad_parameters_are_named(make: Callable[[], Process], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@each_process
def test_table_times_are_even_in_the_log_level(process: Process) -> None:
    for points in (5, 64, 2049):
        t = table_times(process, points)
        assert (float(t[0]), float(t[-1])) == (process.t_max, process.t_min)
        assert bool((t[1:] < t[:-1]).all())
        gaps = log_level(process, t).diff()
        np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-6)


# Values: plain numbers, whatever kind of number came.


@pytest.mark.parametrize(
    "number",
    [
        np.float32,
        np.float64,
        torch.tensor,
        lambda x: torch.tensor([x], dtype=torch.float64),
        lambda x: np.array(x),
        lambda x: torch.nn.Parameter(torch.tensor(x), requires_grad=False),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_numbers_become_plain_floats(number: Callable[[float], Any]) -> None:
    for kind, low, high in ((VE, 0.002, 80), (VP, 0.1, 20), (RectifiedFlow, 0.01, 1)):
        made = kind(number(low), number(float(high)))
        again = kind(float(number(low)), float(number(float(high))))
        assert made == again
        assert hash(made) == hash(again)
        assert {type(v) for v in dataclasses.astuple(made)} == {float}
        assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    assert VE(1, 80) == VE(1.0, 80.0)
    assert type(VE(1, 80).sigma_max) is float


NO_NUMBERS = {
    "text": "0.1",
    "bytes": b"0.1",
    "bool": True,
    "none": None,
    "complex": 0.1 + 0.2j,
    "list": [0.1],
    "numpy text": np.str_("0.1"),
    "numpy bool": np.bool_(True),
    "numpy complex": np.complex64(0.1),
    "date": np.datetime64("2026-01-01"),
    "bool tensor": torch.tensor(True),
    "complex tensor": torch.tensor(0.1 + 0j),
    "two": torch.tensor([0.1, 0.2]),
    "graph": torch.tensor(0.1, requires_grad=True),
    "no numbers": torch.empty((), device="meta"),
    "object": object(),
}


@pytest.mark.parametrize("bad", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
def test_parameters_that_are_no_number_are_refused_by_name(bad: Any) -> None:
    for kind in (VE, VP, RectifiedFlow):
        for name in (f.name for f in dataclasses.fields(kind)):
            with pytest.raises(TypeError, match=f"^{name}: expected .* got"):
                kind(**{name: bad})
    for name, f in (("t", VP().sigma), ("level", VP().inverse_noise_level)):
        if isinstance(bad, list | Tensor) and not torch.as_tensor(bad).is_complex():
            continue  # several times, or a time with a graph, are times
        with pytest.raises(TypeError, match=f"^{name}: expected"):
            f(bad)


def test_numbers_beyond_float64_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^sigma_max: .*too large for float64"):
        VE(0.1, 10**400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coefficients_do_not_follow_the_default_device_or_dtype(
    dtype: torch.dtype,
) -> None:
    number = torch.tensor([0.3])

    def values(process: Process) -> list[Tensor]:
        names = ("alpha", "sigma", "alpha_dot", "sigma_dot", "noise_level", "log_snr")
        inverses = ("inverse_noise_level", "inverse_log_snr")
        methods = [getattr(process, name) for name in (*names, *inverses)]
        found = [f(t) for f in methods for t in (0.3, number)]
        return [*found, table_times(process, 7)]

    for process in PROCESSES:
        expected = values(process)
        torch.set_default_device("meta")
        torch.set_default_dtype(dtype)
        try:
            found = values(process)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert a.device.type == "cpu"
            assert a.dtype == b.dtype
            assert a.equal(b)


# Processes of one's own.


class Cosine(Process):
    """sigma = sin(pi t / 2), alpha = cos(pi t / 2); what it lacks follows below."""

    def alpha(self, t: Any) -> Tensor:
        return (as_time(t) * torch.pi / 2).cos()

    def sigma(self, t: Any) -> Tensor:
        return (as_time(t) * torch.pi / 2).sin()

    def alpha_dot(self, t: Any) -> Tensor:
        return -torch.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Any) -> Tensor:
        return torch.pi / 2 * self.alpha(t)

    def alpha_ddot(self, t: Any) -> Tensor:
        return -((torch.pi / 2) ** 2) * self.alpha(t)

    def sigma_ddot(self, t: Any) -> Tensor:
        return -((torch.pi / 2) ** 2) * self.sigma(t)

    def inverse_noise_level(self, level: Any) -> Tensor:
        return torch.atan(as_time(level)) * 2 / torch.pi


@dataclass(frozen=True)
class Own(Cosine):
    name: ClassVar[str] = "own"
    t_min: float = 1e-3
    t_max: float = 0.99


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    known = dict(_process_registry._PROCESSES)
    monkeypatch.setattr(_process_registry, "_PROCESSES", known)


@pytest.mark.usefixtures("registry")
def test_schedules_of_a_registered_process_are_loaded() -> None:
    process = Own(t_max=np.float32(0.9))
    assert type(process.t_max) is float  # by the class that it derives from
    text = edm(process).to_json()
    with pytest.raises(ScheduleFormatError) as info:
        Schedule.from_json(text)
    assert "'own'" in str(info.value)
    assert "register_process" in str(info.value)
    assert "damaged" not in str(info.value)
    assert Schedule.from_json(text, process=process) == edm(process)
    with pytest.raises(ScheduleFormatError, match=r"made for .*0\.89.*got .*0\.99"):
        Schedule.from_json(text, process=Own())
    assert register_process(Own) is Own
    assert register_process(Own) is Own  # again: nothing new
    again = Schedule.from_json(text)
    assert again == edm(process)
    assert again.grid(7).equal(edm(process).grid(7))


def test_a_process_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"t_min < t_max, got"):
        Own(t_max=1e-4)
    with pytest.raises(TypeError, match=r"^t_max: expected a real number"):
        Own(t_max="0.9")


class Bare(Cosine):
    name = "bare"
    t_min, t_max = 1e-3, 0.99


@dataclass
class Unhashable(Cosine):
    name: ClassVar[str] = "unhashable"
    t_min: float = 1e-3
    t_max: float = 0.99


@dataclass(frozen=True)
class Nameless(Cosine):
    t_min: float = 1e-3
    t_max: float = 0.99


@dataclass(frozen=True)
class Forgetful(Own):
    name: ClassVar[str] = "forgetful"
    power: float = 2.0

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "power": self.power + 1}


@dataclass(frozen=True)
class Derived(Own):
    name: ClassVar[str] = "derived"
    half: float = dataclasses.field(init=False, default=0.5)


@dataclass(frozen=True)
class Object(Own):
    name: ClassVar[str] = "object"
    what: Any = print


@dataclass(frozen=True)
class Taken(Own):
    name: ClassVar[str] = "ve"


@dataclass(frozen=True)
class Escaping(Own):
    name: ClassVar[str] = "own\x1b[31m"


@dataclass(frozen=True)
class Misnamed(Own):
    name: ClassVar[str] = "misnamed"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "name": "ve"}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("cls", "kind", "message"),
    [
        (Bare, TypeError, r"Bare is no dataclass.*@dataclass\(frozen=True\)"),
        (Unhashable, ValueError, r"no hash; decorate it with @dataclass\(frozen"),
        (Nameless, TypeError, "Nameless.name: expected a str"),
        (Cosine, TypeError, "Cosine.name: expected a str"),
        (Process, TypeError, "abstract; define alpha"),
        (Own(), TypeError, "pass the class, not an instance"),
        (int, TypeError, "expected a subclass"),
        (Forgetful, ValueError, "not the same when made again"),
        (Derived, ValueError, "not the same when made again.*half"),
        (Object, TypeError, "without JSON form"),
        (Taken, ValueError, "'ve' belongs to VE; choose a name of its own"),
        (Escaping, ValueError, "Escaping.name: holds"),
        (Misnamed, ValueError, "would be loaded as 've'"),
    ],
)
def test_processes_that_would_not_come_back_are_refused(
    cls: Any, kind: type[Exception], message: str
) -> None:
    before = dict(_process_registry._PROCESSES)
    with pytest.raises(kind, match=message):
        register_process(cls)
    assert before == _process_registry._PROCESSES


@pytest.mark.parametrize("cls", [Bare, Nameless, Forgetful, Object, Taken, Misnamed])
def test_schedules_that_would_not_come_back_are_refused_when_saved(cls: Any) -> None:
    schedule = uniform(cls())
    assert float(schedule.grid(3)[0]) == 0.99  # it can be used
    with pytest.raises((TypeError, ValueError), match=r"^process: "):
        schedule.to_json()


@pytest.mark.usefixtures("registry")
def test_a_definition_that_is_run_again_replaces_the_older_one() -> None:
    def define() -> type[Process]:
        @dataclass(frozen=True)
        class Own(Cosine):
            name: ClassVar[str] = "own"
            t_min: float = 1e-3
            t_max: float = 0.99

        return Own

    cell, again, local = define(), define(), define()
    cell.__qualname__ = again.__qualname__ = "Own"  # as in a notebook
    register_process(cell)
    older = uniform(cell())
    register_process(again)
    assert type(process_from_dict({"name": "own"})) is again
    assert type(Schedule.from_json(older.to_json()).process) is again
    with pytest.raises(ValueError, match="'own' belongs to Own; choose"):
        register_process(local)


@pytest.mark.usefixtures("registry")
def test_a_function_that_makes_classes_of_one_name_is_refused() -> None:
    """Unlike a cell, a function may be called for two processes at a time."""

    def define(power: float) -> type[Process]:
        @dataclass(frozen=True)
        class Own(Cosine):
            name: ClassVar[str] = "own"
            exponent: ClassVar[float] = power
            t_min: float = 1e-3
            t_max: float = 0.99

        return Own

    register_process(define(1.0))
    with pytest.raises(ValueError, match=r"'own' belongs to .*define.<locals>.Own"):
        register_process(define(2.0))
