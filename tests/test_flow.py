"""The flow: velocity, acceleration Q in closed form, forward mode and its failures."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROCESSES, Problem, all_problems, gaussian, mixture_1d, mixture_16d
from torch import Tensor, nn

from artlib.flow.denoisers import CountNFE, from_epsilon
from artlib.flow.flow import ProbabilityFlow, Trajectory
from artlib.flow.noise_coordinate import table_times
from artlib.flow.path_derivative import ForwardModeWarning, derivative_matrix
from artlib.flow.processes import VE, VP, Process, RectifiedFlow, as_time
from artlib.flow.targets import Gaussian

F64 = torch.float64
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
each_problem = pytest.mark.parametrize("problem", all_problems(), ids=repr)

SHARES = (1.0, 0.6, 0.1, 0.01)
"""Times as shares of t_max."""

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
FACTOR = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.3, 0.0], [-0.2, 0.5, 0.6]], dtype=F64)
GAUSSIAN = Gaussian(MEAN, FACTOR @ FACTOR.T)


def scalar(t: float) -> Tensor:
    return torch.tensor(t, dtype=F64)


def gaussian_acceleration(process: Process, x: Tensor, t: float | Tensor) -> Tensor:
    """d2x/dt2 of the closed-form path through (x, t), by differentiating it twice.

    Along an eigenvector with variance v the path is alpha m + z sqrt(alpha^2 v +
    sigma^2) with z constant. No denoiser and no velocity enters.
    """
    variances, axes = torch.linalg.eigh(GAUSSIAN.cov)
    mean = MEAN @ axes

    def spread(s: Tensor) -> Tensor:
        return torch.sqrt(process.alpha(s) ** 2 * variances + process.sigma(s) ** 2)

    start = as_time(t)
    z = (x @ axes - process.alpha(start) * mean) / spread(start)

    def path(s: Tensor) -> Tensor:
        return process.alpha(s) * mean + z * spread(s)

    def velocity(s: Tensor) -> Tensor:
        return torch.func.jvp(path, (s,), (torch.ones_like(s),))[1]

    return torch.func.jvp(velocity, (start,), (torch.ones_like(start),))[1] @ axes.T


@pytest.fixture(autouse=True)
def _first_use_of_forward_mode() -> None:
    # torch warns about itself the first time. artlib silences that around its own use,
    # which here comes before the tests' own: warnings are errors in this suite.
    flow = ProbabilityFlow(VE(), lambda x, t: torch.tanh(x))
    flow.stiffness(torch.ones(1, 1, dtype=F64), 1.0)


# Velocity.


@each_process
def test_velocity_is_the_derivative_of_the_exact_path(process: Process) -> None:
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process))
    x_T = GAUSSIAN.sample_prior(process, 6, seed=0)
    for share in SHARES:
        t = share * process.t_max
        x = GAUSSIAN.flow_map(process, x_T, process.t_max, t)
        moved, slope = torch.func.jvp(
            lambda s, x=x, t=t: GAUSSIAN.flow_map(process, x, t, s),
            (scalar(t),),
            (scalar(1.0),),
        )
        torch.testing.assert_close(moved, x)
        torch.testing.assert_close(flow.velocity(x, t), slope, rtol=1e-10, atol=1e-10)


@each_process
def test_velocity_equals_the_papers_form(process: Process) -> None:
    # Eq. (5): F = f x + g^2/2 score, and dx/dt = -F. The score comes from D by Tweedie.
    problem = mixture_1d(process)
    flow = problem.flow()
    for share in (0.9, 0.3, 0.01):
        t = scalar(share * process.t_max)
        x = problem.exact(problem.x_T, process.t_max, float(t))
        alpha, sigma = process.alpha(t), process.sigma(t)
        score = (alpha * problem.denoiser(x, t) - x) / sigma**2
        F = process.drift(t) * x + 0.5 * process.diffusion_squared(t) * score
        torch.testing.assert_close(flow.velocity(x, t), -F, rtol=1e-9, atol=1e-9)


def test_velocity_is_finite_without_signal() -> None:
    # At t = 1 of RectifiedFlow f is infinite, v = x - E x_0 is not.
    process = RectifiedFlow()
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process))
    x = GAUSSIAN.sample_prior(process, 4)
    torch.testing.assert_close(flow.velocity(x, 1.0), x - MEAN)


# Acceleration.


@each_process
@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_acceleration_of_a_gaussian(process: Process, method: Any) -> None:
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process), acceleration=method)
    x_T = GAUSSIAN.sample_prior(process, 6, seed=0)
    # The difference divides round-off by its step; where |D| >> t |dD/dt| that shows.
    rtol = 1e-9 if method == "jvp" else 1e-5
    for share in (*SHARES, process.t_min / process.t_max):
        t = share * process.t_max
        x = GAUSSIAN.flow_map(process, x_T, process.t_max, t)
        q, expected = flow.acceleration(x, t), gaussian_acceleration(process, x, t)
        scale = float(expected.abs().max())
        torch.testing.assert_close(q, expected, rtol=rtol, atol=rtol * scale)
        norms = flow.stiffness(x, t)
        assert norms.shape == (6,)
        torch.testing.assert_close(norms, q.norm(dim=1))


def test_acceleration_in_ve_by_hand() -> None:
    # x = z sqrt(t^2 + c^2), so x'' = z c^2 / (t^2 + c^2)^(3/2); c = 2, t = 1.5, z = 1.
    process = VE()
    target = Gaussian(torch.zeros(1, dtype=F64), torch.tensor([[4.0]], dtype=F64))
    flow = ProbabilityFlow(process, target.denoiser(process))
    q = flow.acceleration(torch.tensor([[2.5]], dtype=F64), 1.5)
    assert float(q) == pytest.approx(4 / 2.5**3, rel=1e-12)


def test_acceleration_is_the_total_derivative() -> None:
    # The trap of section 3: the partial derivative in t alone is another number.
    process = VE()
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process))
    x = GAUSSIAN.flow_map(process, GAUSSIAN.sample_prior(process, 6), 80.0, 10.0)
    q = flow.acceleration(x, 10.0)
    v, t = flow.velocity(x, 10.0), scalar(10.0)
    zero, one = torch.zeros_like(x), torch.ones_like(t)
    _, along = torch.func.jvp(flow.velocity, (x, t), (v, one))
    _, partial = torch.func.jvp(flow.velocity, (x, t), (zero, one))
    torch.testing.assert_close(q, along, rtol=1e-9, atol=1e-12)
    assert float(partial.norm() / q.norm()) > 100


@each_problem
def test_acceleration_equals_a_second_difference_of_the_exact_path(
    problem: Problem,
) -> None:
    # The exact flow map, differenced twice along time: no derivative of D at all.
    process, flow = problem.process, problem.flow()
    for share in (0.7, 0.2, 0.05):
        t = share * process.t_max
        h = 3e-3 * t
        at = [
            problem.exact(problem.x_T, process.t_max, t + j * h) for j in range(-2, 3)
        ]
        second = (-at[0] + 16 * at[1] - 30 * at[2] + 16 * at[3] - at[4]) / (12 * h**2)
        q = flow.acceleration(at[2], t)
        noise = 1e-13 * float(at[2].abs().max()) / h**2  # round-off of the exact map
        scale = float(q.abs().max())
        torch.testing.assert_close(q, second, rtol=1e-5, atol=1e-6 * scale + 20 * noise)


@each_process
def test_acceleration_equals_a_second_difference_of_a_dopri5_path(
    process: Process,
) -> None:
    problem = mixture_16d(process)
    flow = problem.flow()
    t = 0.3 * process.t_max
    h = 0.01 * t
    times = [process.t_max, t + 2 * h, t + h, t, t - h, t - 2 * h]
    path = flow.trajectory(problem.x_T, times, method="dopri5", rtol=1e-12)
    a, b, c, d, e = path.states[1:]
    second = (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h**2)
    torch.testing.assert_close(
        flow.acceleration(c, t), second, rtol=1e-3, atol=1e-4 * float(second.norm())
    )


@each_process
@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_path_stiffness_is_that_of_every_node(process: Process, method: Any) -> None:
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process), acceleration=method)
    x_T = GAUSSIAN.sample_prior(process, 6, seed=0)
    times = table_times(process, 128)
    column = times[:, None, None]
    states = GAUSSIAN.flow_map(process, x_T, process.t_max, column)
    denoised = flow.denoise(states.flatten(0, 1), column.expand(-1, 6, 1).flatten(0, 1))
    denoised = denoised.reshape(states.shape)
    velocities = flow.velocity_from(denoised, states, column)
    table = flow.path_stiffness(Trajectory(times, states, denoised, velocities))
    assert table.shape == (6, 128)
    exact = gaussian_acceleration(process, states, column).norm(dim=2).T
    error = (table / exact - 1).abs()
    # The difference is a five-point one on the table, one-sided at its ends.
    assert float(error.max()) < (1e-8 if method == "jvp" else 3e-3)
    assert float(error[:, 2:-2].max()) < (1e-8 if method == "jvp" else 2e-4)


def test_derivative_matrix_is_exact_for_quartics() -> None:
    nodes = torch.tensor([3.0, 2.5, 1.0, 0.7, 0.2, -1.0, -1.1], dtype=F64)
    weights = derivative_matrix(nodes)
    for power in range(5):
        expected = power * nodes ** max(power - 1, 0)
        torch.testing.assert_close(
            weights @ nodes**power, expected, rtol=1e-9, atol=1e-9
        )
    assert float((weights @ nodes**5 - 5 * nodes**4).abs().max()) > 0.1
    # Each row uses the two nodes on either side, as far as there are any.
    first = [int(row.nonzero().min()) for row in weights]
    assert first == [0, 0, 0, 1, 2, 2, 2]
    assert [int((row != 0).sum()) for row in weights] == [5] * 7
    with pytest.raises(ValueError, match="points"):
        derivative_matrix(nodes[:4])


# Networks on which forward mode fails.


class Network(nn.Module):
    """A small smooth network; ``layer`` is what it is tested for."""

    def __init__(
        self,
        layer: Callable[[Tensor], Tensor] = torch.tanh,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(3, 8, generator=rng).to(dtype))
        self.second = nn.Parameter(torch.randn(8, 3, generator=rng).to(dtype))
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x / (1 + t**2).sqrt() @ self.first) @ self.second


class NoForwardMode(torch.autograd.Function):
    """tanh with a backward and no jvp, like most hand-written kernels."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return gradient * (1 - output**2)


def rejects(x: Tensor) -> Tensor:
    result: Tensor = NoForwardMode.apply(x)
    return result


@torch.inference_mode()
def forgets(x: Tensor) -> Tensor:
    return torch.tanh(x)


def leaves_torch(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.detach().numpy()))


def half_forgets(x: Tensor) -> Tensor:
    with torch.inference_mode():
        part = torch.tanh(x[:, :4])
    return torch.cat([part, torch.tanh(x[:, 4:])], 1)


def picky(x: Tensor) -> Tensor:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise TypeError("this kernel takes plain tensors")
    return torch.tanh(x)


BAD = {f.__name__: f for f in (rejects, forgets, leaves_torch, half_forgets, picky)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layer", BAD)
def test_auto_falls_back_once_and_says_so(layer: str, dtype: torch.dtype) -> None:
    flow = ProbabilityFlow(VE(), Network(BAD[layer], dtype))
    good = ProbabilityFlow(VE(), Network(dtype=F64), acceleration="jvp")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    with pytest.warns(ForwardModeWarning, match="forward mode") as caught:
        q = flow.acceleration(x, 1.3)
    assert len(caught) == 1
    assert flow.acceleration_method == "difference"
    rtol = 1e-6 if dtype == F64 else 1e-2
    expected = good.acceleration(x, 1.3)
    torch.testing.assert_close(q, expected, rtol=rtol, atol=rtol * float(q.abs().max()))
    flow.stiffness(x, 0.4)  # no second warning: they are errors here
    shared = flow.with_denoiser(CountNFE(flow.denoiser))
    assert shared.acceleration_method == "difference"
    shared.stiffness(x, 0.4)


@pytest.mark.parametrize("layer", BAD)
def test_jvp_refuses_and_says_what_to_do(layer: str) -> None:
    flow = ProbabilityFlow(VE(), Network(BAD[layer]), acceleration="jvp")
    with pytest.raises(RuntimeError, match='acceleration="difference"'):
        flow.stiffness(torch.ones(4, 3, dtype=F64), 1.3)


@pytest.mark.parametrize("layer", BAD)
def test_difference_never_asks_for_forward_mode(layer: str) -> None:
    flow = ProbabilityFlow(VE(), Network(BAD[layer]), acceleration="difference")
    assert float(flow.stiffness(torch.ones(4, 3, dtype=F64), 1.3).min()) > 0


def test_half_precision_that_forgets_is_detected_too() -> None:
    # There the difference is mostly rounding; a derivative of exactly 0 gives it away.
    flow = ProbabilityFlow(VE(), Network(forgets, torch.bfloat16))
    x = 80 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    with pytest.warns(ForwardModeWarning):
        assert float(flow.stiffness(x, 80.0).min()) > 0


def test_a_flat_start_settles_nothing() -> None:
    # D is exactly constant beyond x = 5 (clipped): where the path starts, a derivative
    # that is dropped and a correct one are both 0. The check has to wait.
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return forgets(x.clamp(-5, 5))

    flow = ProbabilityFlow(VE(), denoiser)
    assert float(flow.stiffness(torch.full((2, 3), 70.0, dtype=F64), 60.0).max()) == 0
    assert flow.acceleration_method == "auto"
    with pytest.warns(ForwardModeWarning):
        q = flow.stiffness(torch.full((2, 3), 0.7, dtype=F64), 0.5)
    assert float(q.min()) > 0


# Networks that know their time in steps only.


def stairs(t: Tensor) -> Tensor:
    return (t * 1000).floor() / 1000 + 5e-4


STEPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "rounds": lambda t: (t * 1000).round() / 1000,
    "floors": stairs,
    "looks up": lambda t: torch.linspace(0, 1, 1001, dtype=F64)[(t * 1000).long()],
    "detaches": lambda t: t.detach(),
    "leaves torch": lambda t: torch.tensor(t.detach().tolist(), dtype=F64),
}


def stepped(kind: str | None, method: Any, process: Process | None = None) -> Any:
    process = process or VP()
    exact = GAUSSIAN.denoiser(process)

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        t = t if kind is None else STEPPED[kind](t)
        return (x - process.alpha(t) * exact(x, t)) / process.sigma(t)

    return ProbabilityFlow(process, from_epsilon(process, epsilon), acceleration=method)


@pytest.mark.parametrize("kind", STEPPED)
def test_a_network_that_knows_steps_only_is_found_along_a_path(kind: str) -> None:
    x = GAUSSIAN.sample_prior(VP(), 16, seed=0)
    times = table_times(VP(), 24)

    def table(flow: ProbabilityFlow) -> Tensor:
        return flow.path_stiffness(flow.trajectory(x, times))

    flow = stepped(kind, "auto")
    with pytest.warns(ForwardModeWarning):
        found = table(flow)
    assert flow.acceleration_method == "difference"
    assert torch.equal(found, table(stepped(kind, "difference")))
    with pytest.raises(RuntimeError, match='acceleration="difference"'):
        table(stepped(kind, "jvp"))
    smooth = stepped(None, "auto")
    table(smooth)
    assert smooth.acceleration_method == "jvp"


@pytest.mark.parametrize("method", ["auto", "difference"])
@pytest.mark.parametrize("kind", STEPPED)
def test_a_network_that_knows_steps_only_is_found_at_a_point(
    kind: str, method: Any
) -> None:
    for t in (0.9, 0.5, 0.25):
        x = GAUSSIAN.flow_map(VP(), GAUSSIAN.sample_prior(VP(), 16, seed=0), 1.0, t)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ForwardModeWarning)
            found = stepped(kind, method).stiffness(x, t)
        expected = gaussian_acceleration(VP(), x, t).norm(dim=1)
        torch.testing.assert_close(found, expected, rtol=0.25, atol=0)


def test_auto_falls_back_at_a_later_call_too() -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        if float(t) < 1.0:
            return rejects(x)
        return torch.tanh(x / (1 + t**2).sqrt())

    x = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3)
    flow = ProbabilityFlow(VE(), denoiser)
    flow.stiffness(x, 1.3)
    assert flow.acceleration_method == "jvp"
    with pytest.warns(ForwardModeWarning):
        flow.stiffness(x, 0.9)
    assert flow.acceleration_method == "difference"


# Threads.


def test_many_threads_find_what_one_finds() -> None:
    x = GAUSSIAN.sample_prior(VE(), 8, seed=0)
    times = table_times(VE(), 12)

    def table(flow: ProbabilityFlow) -> Tensor:
        return flow.path_stiffness(flow.trajectory(x, times))

    make = lambda: ProbabilityFlow(VE(), GAUSSIAN.denoiser(VE()))  # noqa: E731
    expected, shared = table(make()), make()
    with ThreadPoolExecutor(6) as pool:
        for flow in (make, lambda: shared):
            for found in pool.map(lambda _, flow=flow: table(flow()), range(6)):
                assert torch.equal(found, expected)


def test_attention_falls_back_if_its_kernel_has_no_forward_mode() -> None:
    def attention(x: Tensor) -> Tensor:
        heads = x.reshape(len(x), 1, 4, 2)
        out = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return out.reshape(len(x), 8)

    network = Network(attention)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    reference = ProbabilityFlow(VE(), network, acceleration="difference")
    flow = ProbabilityFlow(VE(), network)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ForwardModeWarning
        )  # depends on torch's version
        q = flow.stiffness(x, 1.3)
    assert flow.acceleration_method in ("jvp", "difference")
    torch.testing.assert_close(q, reference.stiffness(x, 1.3), rtol=1e-2, atol=1e-4)


def test_rounding_at_large_noise_is_no_reason_to_fall_back() -> None:
    # D = x - 80 eps in float32 has an error of 1e-5, and the difference divides it by
    # its step: much more than dD/dt. Forward mode is right all the same, in DDIM
    # coordinates (where the network hides behind a closure) too.
    problem = mixture_16d(VP(), n=32)

    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t, y = t.double(), x.double()
            p = problem.process
            noise = (y - p.alpha(t) * problem.denoiser(y, t)) / p.sigma(t)
            return noise.to(x.dtype) * self.one

    network = from_epsilon(problem.process, Noise())
    flow = ProbabilityFlow(problem.process, network, acceleration="jvp")
    exact = problem.flow()
    for t in (1.0, 0.5, 0.1):
        x = problem.exact(problem.x_T, 1.0, t)
        y = x / problem.process.alpha(scalar(t))
        level = problem.process.noise_level(t)
        torch.testing.assert_close(
            flow.stiffness(x, t), exact.stiffness(x, t), rtol=1e-3, atol=0
        )
        torch.testing.assert_close(
            flow.to_ve().stiffness(y, level),
            exact.to_ve().stiffness(y, level),
            rtol=1e-2,
            atol=0,
        )


def test_difference_in_ddim_coordinates_knows_the_networks_rounding() -> None:
    # The network hides behind a closure in to_ve; stepping as for float64 would divide
    # the rounding of float32 by 6e-6.
    flow = ProbabilityFlow(VP(), Network(), acceleration="difference").to_ve()
    exact = ProbabilityFlow(VP(), Network(dtype=F64), acceleration="jvp").to_ve()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    q = exact.acceleration(x, 1.3)
    torch.testing.assert_close(
        flow.acceleration(x, 1.3), q, rtol=1e-3, atol=1e-3 * float(q.abs().max())
    )


@pytest.mark.parametrize("method", ["auto", "difference"])
def test_no_evaluation_beyond_the_end(method: Any) -> None:
    # A network has never seen t > t_max, and RectifiedFlow has no such time.
    process = RectifiedFlow()
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t.max()))
        return torch.tanh(x + t)

    flow = ProbabilityFlow(process, watched, acceleration=method)
    x = torch.ones(2, 3, dtype=F64)
    for t in (1.0, torch.tensor([[1.0], [0.5]], dtype=F64)):
        flow.stiffness(x, t)
    assert max(seen) == 1.0


def test_a_broken_network_raises_its_own_error() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("weights")

    flow = ProbabilityFlow(VE(), broken)
    with pytest.raises(KeyError, match="weights"):
        flow.acceleration(torch.ones(2, 3), 1.0)


def test_a_derivative_that_is_nan_is_not_believed() -> None:
    # torch.where keeps the value and loses the tangent: 0 * inf.
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + torch.where(x > 1e3, (x - 2.0).abs().sqrt() * 0, 0.0)

    flow = ProbabilityFlow(VE(), denoiser)
    x = torch.tensor([[2.0, 0.5]], dtype=F64)

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x)

    expected = ProbabilityFlow(VE(), plain).acceleration(x, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ForwardModeWarning)
        q = flow.acceleration(x, 1.0)
    torch.testing.assert_close(q, expected, rtol=1e-6, atol=1e-8)


def test_a_constant_denoiser_has_straight_paths() -> None:
    def constant(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    for process in (VE(), RectifiedFlow()):
        flow = ProbabilityFlow(process, constant)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        assert float(flow.stiffness(x, 0.7 * process.t_max).max()) == 0.0
        path = flow.trajectory(x, torch.linspace(process.t_max, process.t_min, 9))
        assert float(flow.path_stiffness(path).max()) == 0.0
        # x - D shrinks in proportion to t.
        expected = 0.3 + (x - 0.3) * process.t_min / process.t_max
        torch.testing.assert_close(path.states[-1], expected)


# Modes of autograd.


@pytest.mark.parametrize("layer", [torch.tanh, torch.no_grad()(torch.tanh)])
def test_outer_inference_mode_does_not_zero_q(
    layer: Callable[[Tensor], Tensor],
) -> None:
    flow = ProbabilityFlow(VE(), Network(layer), acceleration="jvp")
    x = torch.ones(4, 3, dtype=F64)
    times = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2], dtype=F64)
    q, table = flow.stiffness(x, 1.3), flow.path_stiffness(flow.trajectory(x, times))
    assert float(q.min()) > 0
    with torch.inference_mode():
        inside = torch.ones(4, 3, dtype=F64)  # an inference tensor
        assert inside.is_inference()
        fresh = ProbabilityFlow(VE(), Network(layer), acceleration="jvp")
        assert torch.equal(fresh.stiffness(inside, torch.tensor(1.3, dtype=F64)), q)
        path = fresh.trajectory(inside, times.clone())
        assert torch.equal(fresh.path_stiffness(path), table)


def test_no_graph_is_kept() -> None:
    network = Network()
    flow = ProbabilityFlow(VE(), network)
    x = torch.ones(4, 3, dtype=F64, requires_grad=True)
    assert not flow.stiffness(x, 1.3).requires_grad
    path = flow.trajectory(x, torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2], dtype=F64))
    assert not path.states.requires_grad
    assert not path.velocities.requires_grad
    assert not flow.path_stiffness(path).requires_grad
    # velocity itself does keep one: refinement differentiates through the solver.
    flow.velocity(x, 1.3).sum().backward()
    assert network.first.grad is not None
    assert x.grad is not None


# Dtypes and per-sample times.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_network_in_its_dtype_state_in_its_own(dtype: torch.dtype) -> None:
    seen = []

    class Watched(Network):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x.dtype, t.dtype))
            return super().forward(x, t)

    flow = ProbabilityFlow(VE(), Watched(dtype=dtype))
    exact = ProbabilityFlow(VE(), Network(dtype=F64))
    assert flow.dtype == dtype
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    rtol = 20 * torch.finfo(dtype).eps
    for f, g in (
        (flow.velocity, exact.velocity),
        (flow.acceleration, exact.acceleration),
    ):
        out, reference = f(x, 1.3), g(x, 1.3)
        assert out.dtype == F64
        scale = float(reference.abs().max())
        torch.testing.assert_close(out, reference, rtol=rtol, atol=rtol * scale)
    assert set(seen) == {(dtype, torch.float32)}  # half a time would be another time
    assert flow.velocity(x.float(), 1.3).dtype == torch.float32
    assert flow.stiffness(x.float(), 1.3).dtype == torch.float32


def test_dtype_of_a_network_without_parameters_can_be_given() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float32
        return torch.tanh(x)

    flow = ProbabilityFlow(VE(), network, dtype=torch.float32)
    x = torch.ones(2, 3, dtype=F64)
    assert flow.velocity(x, 1.0).dtype == F64
    assert flow.with_denoiser(CountNFE(network)).velocity(x, 1.0).dtype == F64


@each_process
def test_float32_states(process: Process) -> None:
    # Q from dD/dt rather than from x - D: float32 loses few digits even at small t.
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process))
    for share in SHARES:
        t = share * process.t_max
        x = GAUSSIAN.flow_map(
            process, GAUSSIAN.sample_prior(process, 6), process.t_max, t
        )
        for f, rtol in ((flow.velocity, 1e-4), (flow.acceleration, 1e-3)):
            single, double = f(x.float(), t), f(x, t)
            assert single.dtype == torch.float32
            scale = float(double.abs().max())
            torch.testing.assert_close(
                single.double(), double, rtol=rtol, atol=rtol * scale
            )


@each_process
@pytest.mark.parametrize("method", ["jvp", "difference"])
def test_times_per_sample_equal_a_loop(process: Process, method: Any) -> None:
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process), acceleration=method)
    t = process.t_max * torch.tensor([0.9, 0.5, 0.1, 0.01], dtype=F64)[:, None]
    x = GAUSSIAN.flow_map(
        process, GAUSSIAN.sample_prior(process, 4), process.t_max, t.expand(4, 1)
    )
    for f in (flow.denoise, flow.velocity, flow.acceleration, flow.stiffness):
        loop = torch.cat([f(x[k : k + 1], float(t[k])) for k in range(4)])
        torch.testing.assert_close(f(x, t), loop, rtol=1e-6, atol=1e-8)


def test_samples_of_any_shape() -> None:
    process = RectifiedFlow()
    flow = ProbabilityFlow(process, lambda x, t: torch.tanh(x) * (1 - t))
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = torch.tensor([0.3, 0.8], dtype=F64).reshape(2, 1, 1, 1)
    flat = flow.stiffness(x.reshape(2, 60), t.reshape(2, 1))
    torch.testing.assert_close(flow.stiffness(x, t), flat)


# Reference trajectories.


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
@each_process
def test_trajectory_orders(process: Process, method: str, order: int) -> None:
    problem = mixture_1d(process)
    flow, errors, counts = problem.flow(), [], (20, 40, 80, 160)
    for steps in counts:
        path = flow.trajectory(problem.x_T, problem.grid(steps, 0.05), method=method)
        exact = problem.exact(problem.x_T, process.t_max, 0.05)
        errors.append(float((path.states[-1] - exact).norm()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.25), errors


@each_process
def test_dopri5_follows_its_tolerance(process: Process) -> None:
    problem = gaussian(process)
    grid = problem.grid(10, process.t_min)
    errors = []
    for rtol in (1e-4, 1e-7, 1e-10):
        path = problem.flow().trajectory(problem.x_T, grid, method="dopri5", rtol=rtol)
        exact = problem.exact(problem.x_T, process.t_max, process.t_min)
        errors.append(float((path.states[-1] - exact).abs().max()))
        assert errors[-1] < 100 * rtol
    assert errors[0] > 30 * errors[1] > 900 * errors[2]


@each_process
@pytest.mark.parametrize("method", ["heun", "rk4", "dopri5"])
def test_trajectory_holds_what_it_says(process: Process, method: str) -> None:
    problem = gaussian(process)
    flow, counter = problem.counted()
    grid = problem.grid(30, process.t_min)
    path = flow.trajectory(problem.x_T, grid, method=method)
    if method != "dopri5":  # every stage once, and D at the last node
        assert counter.nfe == 30 * {"heun": 2, "rk4": 4}[method] + 1
    assert torch.equal(path.times, grid)
    assert torch.equal(path.states[0], problem.x_T)
    for t, x, d, v in zip(
        path.times, path.states, path.denoised, path.velocities, strict=True
    ):
        torch.testing.assert_close(d, flow.denoise(x, t), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(v, flow.velocity(x, t), rtol=1e-9, atol=1e-9)


@each_process
@pytest.mark.parametrize("method", ["heun", "rk4", "dopri5"])
def test_trajectory_stays_within_its_times(process: Process, method: str) -> None:
    # torchdiffeq's dopri5 would step past the end and interpolate back; in VP, where
    # sigma is the root of a time that turned negative, that is a NaN.
    problem = gaussian(process)
    seen: list[float] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return problem.denoiser(x, t)

    flow = ProbabilityFlow(process, watched)
    times = [process.t_max, 0.5 * process.t_max, process.t_min]
    path = flow.trajectory(problem.x_T, times, method=method)
    assert bool(torch.isfinite(path.states).all())
    assert max(seen) <= process.t_max * (1 + 1e-12)
    assert min(seen) >= process.t_min * (1 - 1e-12)


def test_trajectory_is_float64_whatever_comes_in() -> None:
    process = VE()
    flow = ProbabilityFlow(process, Network())
    path = flow.trajectory(torch.ones(2, 3), [2.0, 1.0, 0.5])
    assert path.states.dtype == path.times.dtype == path.denoised.dtype == F64


# Other coordinates.


@pytest.mark.parametrize("process", [VP(), RectifiedFlow(t_max=0.95)], ids=["vp", "rf"])
def test_to_ve_is_ddim(process: Process) -> None:
    # One Euler step in sigma/alpha on x/alpha against DDIM written out by hand:
    # x' = alpha' D + sigma' (x - alpha D) / sigma.
    problem = mixture_16d(process)
    ve = problem.flow().to_ve()
    assert isinstance(ve.process, VE)
    assert ve.process.t_max == float(process.noise_level(process.t_max))
    assert ve.process.t_min == float(process.noise_level(process.t_min))
    x = problem.x_T
    for a, b in ((0.95, 0.5), (0.5, 0.1), (0.1, 0.02)):
        s, t = scalar(a * process.t_max), scalar(b * process.t_max)
        clean = problem.denoiser(x, s)
        noise = (x - process.alpha(s) * clean) / process.sigma(s)
        ddim = process.alpha(t) * clean + process.sigma(t) * noise
        start, end = process.noise_level(s), process.noise_level(t)
        y = x / process.alpha(s)
        y = y + (end - start) * ve.velocity(y, start)
        torch.testing.assert_close(process.alpha(t) * y, ddim, rtol=1e-9, atol=1e-10)
        x = ddim


@pytest.mark.parametrize("process", [VP(), RectifiedFlow(t_max=0.95)], ids=["vp", "rf"])
def test_to_ve_acceleration(process: Process) -> None:
    # For a Gaussian y = x / alpha has the path m + z sqrt(v + s^2) of plain VE.
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process)).to_ve()
    plain = VE(sigma_min=0.01, sigma_max=float(flow.process.t_max))
    for share in (0.5, 0.1, 0.01):
        t = share * process.t_max
        level = float(process.noise_level(t))
        x = GAUSSIAN.flow_map(
            process, GAUSSIAN.sample_prior(process, 6), process.t_max, t
        )
        y = x / process.alpha(scalar(t))
        torch.testing.assert_close(
            flow.acceleration(y, level),
            gaussian_acceleration(plain, y, level),
            rtol=1e-8,
            atol=1e-12,
        )


def test_to_ve_needs_a_finite_noise_level() -> None:
    flow = ProbabilityFlow(RectifiedFlow(), lambda x, t: x)
    with pytest.raises(ValueError, match=r"RectifiedFlow\(t_max=0.999\)"):
        flow.to_ve()


def test_with_denoiser_is_the_same_flow() -> None:
    problem = gaussian(VP())
    flow = problem.flow()
    counter = CountNFE(problem.denoiser)
    copy = flow.with_denoiser(counter)
    assert flow.denoiser is problem.denoiser
    assert copy.denoiser is counter
    assert copy.process == flow.process
    assert torch.equal(copy.velocity(problem.x_T, 0.5), flow.velocity(problem.x_T, 0.5))
    assert counter.nfe == 1
    copy.stiffness(problem.x_T, 0.5)
    # What one learned about forward mode the other knows: one call each for D and JVP.
    assert flow.acceleration_method == "jvp"
    counter.reset()
    copy.stiffness(problem.x_T, 0.5)
    assert counter.nfe == 2


# Errors.


def test_bad_arguments_are_named() -> None:
    process = VE()
    flow = ProbabilityFlow(process, lambda x, t: x)
    x = torch.ones(2, 3, dtype=F64)
    with pytest.raises(TypeError, match="process"):
        ProbabilityFlow("ve", lambda x, t: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="denoiser"):
        ProbabilityFlow(process, 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"denoiser: .*tuple.*unwrap"):
        ProbabilityFlow(process, lambda x, t: (x,)).denoise(x, 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"denoiser: .*\(2, 3\).*\(2, 6\)"):
        ProbabilityFlow(process, lambda x, t: torch.cat([x, x], 1)).denoise(x, 1.0)
    with pytest.raises(ValueError, match=r"method: .*'euler'"):
        flow.trajectory(x, [2.0, 1.0], method="euler")
    for times in ([1.0, 2.0], [2.0, 0.0], [81.0, 1.0], [2.0, math.nan]):
        with pytest.raises(ValueError, match="times: "):
            flow.trajectory(x, times)
    with pytest.raises(ValueError, match="x_T: "):
        flow.trajectory(torch.full((2, 3), math.nan), [2.0, 1.0])
    with pytest.raises(ValueError, match="rtol"):
        flow.trajectory(x, [2.0, 1.0], method="dopri5", rtol=0.0)


def test_a_denoiser_that_returns_nan_is_named() -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > 1.5, x, torch.full_like(x, math.nan))

    flow = ProbabilityFlow(VE(), denoiser)
    with pytest.raises(ValueError, match="denoiser"):
        flow.trajectory(torch.ones(2, 3), [2.0, 1.6, 1.0, 0.5])


def test_dopri5_names_a_nan_and_gives_up() -> None:
    def nan(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t > 40, x, torch.nan)

    x, times = GAUSSIAN.sample_prior(VE(), 4), [80.0, 1.0, 0.1]
    with pytest.raises(ValueError, match=r"NaN or infinite .* at t = \d.*denoiser"):
        ProbabilityFlow(VE(), nan).trajectory(x, times, method="dopri5")
    exact = GAUSSIAN.denoiser(VE())
    counter = CountNFE(lambda x, t: exact(x, t) + 0.05 * torch.sin(1e6 * x))
    with pytest.raises(RuntimeError, match=r"cannot reach rtol = 1e-06"):
        ProbabilityFlow(VE(), counter).trajectory(x, times, method="dopri5")
    assert counter.nfe < 4000


def test_half_precision_states_are_summed_in_single() -> None:
    flow = ProbabilityFlow(VE(), GAUSSIAN.denoiser(VE()), dtype=F64)
    x = GAUSSIAN.sample_prior(VE(), 4, seed=0).half()
    q, half = flow.stiffness(x.double(), 50.0), flow.stiffness(x, 50.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), q, rtol=1e-2, atol=0)


def test_everything_on_another_device(accelerator: torch.device) -> None:
    process = VP()
    flow = ProbabilityFlow(process, GAUSSIAN.denoiser(process))
    x = GAUSSIAN.sample_prior(process, 4)
    times = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.1], dtype=F64)
    for f in (flow.velocity, flow.stiffness):
        torch.testing.assert_close(f(x.to(accelerator), 0.7).cpu(), f(x, 0.7))
    for method in ("rk4", "dopri5"):
        path = flow.trajectory(x.to(accelerator), times, method=method)
        assert path.states.device.type == accelerator.type
        expected = flow.path_stiffness(flow.trajectory(x, times, method=method))
        torch.testing.assert_close(flow.path_stiffness(path).cpu(), expected)
