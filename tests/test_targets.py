"""Targets: denoisers against scores, quadrature and moments; the exact flow map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import PROCESSES
from scipy import stats
from torch import Tensor

from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import Empirical, Gaussian, GaussianMixture, Target

each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=F64)


FACTOR = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.3, 0.0], [-0.2, 0.5, 0.6]], dtype=F64)
MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
FULL = Gaussian(MEAN, FACTOR @ FACTOR.T)
FLAT = Gaussian(MEAN, FACTOR[:, :1] @ FACTOR[:, :1].T)  # rank 1 of 3
MIXTURE = GaussianMixture(
    torch.tensor([[-1.0, 0.3], [0.4, 0.9], [2.0, -1.0]], dtype=F64),
    torch.tensor([0.3, 0.05, 0.0], dtype=F64),  # one component is a point
    torch.tensor([3.0, 2.0, 1.0], dtype=F64),
)
CLOUD = Empirical(normal(7, 2, 3, seed=4))
TARGETS: dict[str, Target] = {
    "full": FULL,
    "singular": FLAT,
    "mixture": MIXTURE,
    "empirical": CLOUD,
}
each_target = pytest.mark.parametrize("name", TARGETS)


def log_density(target: Target, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p(x_t) up to a constant, written as sums of torch.distributions; [n]."""
    if isinstance(target, Gaussian):
        d = target.mean.numel()
        cov = alpha**2 * target.cov + sigma**2 * torch.eye(d, dtype=F64)
        law = torch.distributions.MultivariateNormal(alpha * target.mean, cov)
        return law.log_prob(x)
    if isinstance(target, GaussianMixture):
        means, stds, weights = target.means, target.stds, target.weights
    else:
        assert isinstance(target, Empirical)
        means = target.points
        stds, weights = torch.zeros(len(means), dtype=F64), torch.ones(len(means))
    x = x.flatten(1)
    parts = [
        torch.log(w)
        + torch.distributions.Normal(alpha * m, torch.sqrt((alpha * s) ** 2 + sigma**2))
        .log_prob(x)
        .sum(1)
        for m, s, w in zip(means, stds, weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), 0)


def states(target: Target, process: Process, t: float, n: int, seed: int) -> Tensor:
    """Draws of x_t, and some points well off the law."""
    rng = torch.Generator().manual_seed(seed)
    x_0 = target.sample(n, seed=rng)
    noise = torch.randn(x_0.shape, generator=rng, dtype=F64)
    x = process.alpha(t) * x_0 + process.sigma(t) * noise
    x[::4] += 2 * process.sigma(t) * torch.sign(noise[::4])
    return x


@each_process
@each_target
def test_tweedie(name: str, process: Process) -> None:
    # alpha D = x + sigma^2 grad log p(x_t), with the gradient by autograd of a density
    # that shares no line with the denoiser.
    target = TARGETS[name]
    for share in (1.0, 0.4, 0.05, 0.003):
        t = torch.tensor(share * process.t_max, dtype=F64)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = states(target, process, float(t), 16, seed=1).requires_grad_()
        (score,) = torch.autograd.grad(log_density(target, x, alpha, sigma).sum(), x)
        expected = x.detach() + sigma**2 * score
        # At t = 1 of RectifiedFlow alpha is 0 and this says only that 0 = 0.
        denoised = target.denoiser(process)(x.detach(), t)
        tolerance = 1e-11 * float(1 + x.detach().abs().max())
        torch.testing.assert_close(
            alpha * denoised, expected, rtol=1e-9, atol=tolerance
        )
        assert bool(torch.isfinite(denoised).all())


def test_no_signal_means_the_mean() -> None:
    process = RectifiedFlow()
    for target, mean in ((FULL, MEAN), (CLOUD, CLOUD.points.mean(0).reshape(2, 3))):
        denoised = target.denoiser(process)(normal(5, *target.sample_shape), 1.0)
        torch.testing.assert_close(denoised, mean.expand_as(denoised))


@each_process
def test_posterior_mean_by_quadrature(process: Process) -> None:
    # E[x_0 | x_t] on the line as a ratio of two integrals over x_0.
    weights, means, stds = [0.3, 0.2, 0.5], [-1.0, 0.2, 1.5], [0.3, 0.15, 0.4]
    mixture = GaussianMixture(torch.tensor(means, dtype=F64)[:, None], stds, weights)
    gaussian = Gaussian(
        torch.tensor([0.7], dtype=F64), torch.tensor([[1.44]], dtype=F64)
    )
    x_0 = np.linspace(-9, 9, 40_001)
    priors = {
        mixture: sum(
            w * stats.norm.pdf(x_0, m, s)
            for w, m, s in zip(weights, means, stds, strict=True)
        ),
        gaussian: stats.norm.pdf(x_0, 0.7, 1.2),
    }
    for target, prior in priors.items():
        for t in (0.9 * process.t_max, 0.3 * process.t_max, 0.02 * process.t_max):
            alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
            for x in (-1.7 * sigma - alpha, 0.4, 1.5 * alpha + sigma):
                joint = prior * stats.norm.pdf(x, alpha * x_0, sigma)
                expected = np.sum(x_0 * joint) / np.sum(joint)
                denoised = target.denoiser(process)(torch.tensor([[x]], dtype=F64), t)
                assert float(denoised) == pytest.approx(expected, rel=1e-7, abs=1e-8)


@each_process
@each_target
def test_prior_has_the_exact_moments(name: str, process: Process) -> None:
    # Mean and covariance of x at t_max, each entry within five standard errors.
    target, n = TARGETS[name], 20_000
    x = target.sample_prior(process, n, seed=5).flatten(1)
    if isinstance(target, Gaussian):
        mean, cov = target.mean, target.cov
    else:
        if isinstance(target, GaussianMixture):
            points, weights, stds = target.means, target.weights, target.stds
        else:
            assert isinstance(target, Empirical)
            points = target.points
            weights = torch.full((len(points),), 1 / len(points), dtype=F64)
            stds = torch.zeros(len(points), dtype=F64)
        mean = weights @ points
        centred = points - mean
        cov = (centred.T * weights) @ centred
        cov += (weights * stds**2).sum() * torch.eye(len(mean), dtype=F64)
    alpha, sigma = process.alpha(process.t_max), process.sigma(process.t_max)
    mean, cov = (
        alpha * mean,
        alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=F64),
    )
    error = (x.mean(0) - mean) / (torch.diag(cov) / n).sqrt()
    assert float(error.abs().max()) < 5
    products = (x - mean)[:, :, None] * (x - mean)[:, None, :]
    error = (products.mean(0) - cov) / (products.std(0) / math.sqrt(n))
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("name", ["full", "mixture", "empirical"])
def test_draws_are_reproducible(name: str) -> None:
    target, process = TARGETS[name], VE()

    def prior(seed: int | torch.Generator) -> Tensor:
        return target.sample_prior(process, 6, seed=seed)

    state = torch.random.get_rng_state()
    assert torch.equal(prior(3), prior(3))
    assert not torch.equal(prior(3), prior(4))
    rng = torch.Generator().manual_seed(3)
    assert torch.equal(prior(rng), prior(3))
    assert not torch.equal(prior(rng), prior(3))  # its state has moved on
    assert torch.equal(target.sample(6, seed=3), target.sample(6, seed=3))
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # nor is the global one used


def test_gaussian_draws_follow_the_law() -> None:
    x = FULL.sample(4000, seed=0)
    whitened = ((x - MEAN) @ torch.linalg.inv(FACTOR).T).numpy()
    for column in whitened.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    # A singular law stays on its line.
    residual = FLAT.sample(100, seed=0) - MEAN
    direction = FACTOR[:, 0] / FACTOR[:, 0].norm()
    across = residual - (residual @ direction)[:, None] * direction
    assert float(across.abs().max()) < 1e-14


# The exact flow.


@each_process
@pytest.mark.parametrize("target", [FULL, FLAT], ids=["full", "singular"])
def test_flow_map_equals_a_tight_integration(
    target: Gaussian, process: Process
) -> None:
    flow = ProbabilityFlow(process, target.denoiser(process))
    x_T = target.sample_prior(process, 5, seed=1)
    ends = [process.t_max, 0.2 * process.t_max, process.t_min]
    path = flow.trajectory(x_T, ends, method="dopri5", rtol=1e-11)
    for t, x in zip(ends, path.states, strict=True):
        exact = target.flow_map(process, x_T, process.t_max, t)
        torch.testing.assert_close(x, exact, rtol=1e-8, atol=1e-9)


@each_process
def test_flow_map_is_a_semigroup(process: Process) -> None:
    x = FULL.sample_prior(process, 5, seed=1)
    a, b, c = process.t_max, 0.3 * process.t_max, process.t_min
    two = FULL.flow_map(process, FULL.flow_map(process, x, a, b), b, c)
    torch.testing.assert_close(two, FULL.flow_map(process, x, a, c), rtol=1e-12, atol=0)
    back = FULL.flow_map(process, two, c, a)
    torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        FULL.flow_map(process, x, b, b), x, rtol=1e-13, atol=1e-13
    )


@each_process
def test_flow_map_carries_the_prior_to_the_data(process: Process) -> None:
    # Whitened by the law at t_max, unwhitened by the data's: the same normal numbers.
    x = FULL.sample_prior(process, 4000, seed=2)
    x_0 = FULL.flow_map(process, x, process.t_max, 0.0)
    whitened = ((x_0 - MEAN) @ torch.linalg.inv(FACTOR).T).numpy()
    for column in whitened.T:
        assert stats.kstest(column, "norm").pvalue > 1e-3
    # A singular law arrives on its line exactly.
    x_0 = (
        FLAT.flow_map(process, FLAT.sample_prior(process, 50), process.t_max, 0.0)
        - MEAN
    )
    direction = FACTOR[:, 0] / FACTOR[:, 0].norm()
    across = x_0 - (x_0 @ direction)[:, None] * direction
    assert float(across.abs().max()) < 1e-12


# Calling conventions.


@each_process
@each_target
def test_times_per_sample_equal_a_loop(name: str, process: Process) -> None:
    target = TARGETS[name]
    denoiser = target.denoiser(process)
    t = process.t_max * torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=F64)
    x = torch.cat(
        [states(target, process, float(s), 1, seed=k) for k, s in enumerate(t)]
    )
    column = t.reshape(-1, *[1] * len(target.sample_shape))
    loop = torch.cat([denoiser(x[k : k + 1], s) for k, s in enumerate(t)])
    torch.testing.assert_close(denoiser(x, column), loop, rtol=1e-12, atol=1e-12)
    if isinstance(target, Gaussian):
        moved = target.flow_map(process, x, column, 0.5 * column)
        loop = torch.cat(
            [
                target.flow_map(process, x[k : k + 1], s, 0.5 * s)
                for k, s in enumerate(t)
            ]
        )
        torch.testing.assert_close(moved, loop, rtol=1e-12, atol=1e-12)


@each_target
def test_float32_in_float32_out_computed_in_float64(name: str) -> None:
    target, process = TARGETS[name], VE()
    denoiser = target.denoiser(process)
    x = states(target, process, 0.01, 8, seed=0).float()
    single, double = denoiser(x, 0.01), denoiser(x.double(), 0.01)
    assert single.dtype == torch.float32
    assert torch.equal(single, double.float())
    if isinstance(target, Gaussian):
        assert target.flow_map(process, x, 0.01, 0.0).dtype == torch.float32


def test_a_python_time_is_not_rounded() -> None:
    # 0.1 in float32 is 0.1 (1 + 1.5e-8).
    process = VE()
    denoiser = FULL.denoiser(process)
    x = FULL.sample(3)
    assert torch.equal(denoiser(x, 0.1), denoiser(x, torch.tensor(0.1, dtype=F64)))
    assert torch.equal(
        FULL.flow_map(process, x, 0.1, 0.03),
        FULL.flow_map(process, x, *torch.tensor([0.1, 0.03], dtype=F64).unbind()),
    )


def test_dtype_of_draws_is_that_of_the_parameters() -> None:
    assert Gaussian([0.0], [[1.0]]).sample(2).dtype == torch.float32
    assert FULL.sample(2).dtype == torch.float64
    assert Empirical(torch.zeros(2, 1)).sample_prior(VP(), 2).dtype == torch.float32
    integers = GaussianMixture(torch.tensor([[0], [2]]), [1.0, 1.0], [1.0, 1.0])
    assert integers.sample(2).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Gaussian(torch.zeros(2), torch.ones(2)), "cov"),
        (lambda: Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0, 1]])), "symm"),
        (
            lambda: Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, -1]))),
            "eigen",
        ),
        (lambda: Gaussian(torch.tensor([math.nan]), torch.ones(1, 1)), "mean"),
        (lambda: GaussianMixture(torch.zeros(3, 2), [1.0], [1.0]), "shapes"),
        (lambda: GaussianMixture([[0.0]], [-1.0], [1.0]), "stds"),
        (lambda: GaussianMixture([[0.0]], [1.0], [0.0]), "weights"),
        (lambda: GaussianMixture([[0.0]], [1.0], [math.inf]), "weights"),
        (lambda: Empirical(torch.zeros(0, 3)), "data"),
        (lambda: Empirical(torch.full((2, 3), math.nan)), "data"),
        (lambda: FULL.denoiser(VE())(torch.zeros(4, 2), 1.0), r"x: .*\(3,\).*\(4, 2\)"),
        (lambda: FULL.sample(0), "n: "),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_bad_types_are_named() -> None:
    with pytest.raises(TypeError, match="data"):
        Empirical(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="seed"):
        FULL.sample(3, seed=0.5)  # type: ignore[arg-type]


def test_a_component_of_weight_zero_is_not_there() -> None:
    one = GaussianMixture(torch.tensor([[1.0]], dtype=F64), [0.5], [2.0])
    two = GaussianMixture(
        torch.tensor([[1.0], [5.0]], dtype=F64), [0.5, 0.1], [2.0, 0.0]
    )
    x, t = normal(6, 1), 0.3
    torch.testing.assert_close(two.denoiser(VE())(x, t), one.denoiser(VE())(x, t))
    assert float(two.sample(1000).max()) < 4.0


def test_draws_and_denoisers_on_another_device(accelerator: torch.device) -> None:
    for target in TARGETS.values():
        rng = torch.Generator(accelerator).manual_seed(0)
        x = target.sample_prior(VP(), 4, seed=rng)
        assert x.device.type == accelerator.type
        there = target.denoiser(VP())(x, 0.3)
        on_cpu = target.denoiser(VP())(x.cpu(), 0.3)
        torch.testing.assert_close(there.cpu(), on_cpu, rtol=1e-9, atol=1e-9)


NO_NUMBERS = {
    "text": "12",
    "texts": ["1", "2"],
    "bools": [True, False],
    "mask": torch.tensor([True, False]),
    "complex": torch.tensor([1j, 0.0]),
    "complex list": [1j, 0.0],
    "none": None,
    "nones": [None, 1.0],
    "dates": np.array(["2026-01-01"] * 2, "M8[D]"),
    "no numbers": torch.empty(2, device="meta"),
}


@pytest.mark.parametrize("bad", NO_NUMBERS.values(), ids=NO_NUMBERS.keys())
def test_parameters_that_are_no_numbers_are_refused_by_name(bad: Any) -> None:
    for name, make in {
        "mean": lambda: Gaussian(bad, [[1.0, 0.0], [0.0, 1.0]]),
        "cov": lambda: Gaussian([0.0, 0.0], bad),
        "means": lambda: GaussianMixture(bad, [1.0, 1.0], [1.0, 1.0]),
        "stds": lambda: GaussianMixture([[0.0], [1.0]], bad, [1.0, 1.0]),
        "weights": lambda: GaussianMixture([[0.0], [1.0]], [1.0, 1.0], bad),
        "data": lambda: Empirical(bad),
    }.items():
        with pytest.raises(TypeError, match=rf"^{name}(\[\d\])?: expected .*, got"):
            make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gaussian([[0.0], 1.0], [[1.0]]), "mean: .*different lengths"),
        (lambda: FULL.denoiser(VE), r"process: .*call it: VE\(\)"),
        (lambda: FULL.sample_prior("ve", 3), "process: expected an artlib process"),
        (lambda: FULL.sample(True), "n: expected an integer, got True"),
        (lambda: FULL.sample(2.0), r"n: expected an integer, got 2\.0 of type float"),
        (lambda: FULL.sample(2, seed=None), "seed: .*got None; pass seed=0"),
        (lambda: FULL.sample(2, seed=2**70), "seed: expected an integer of 64 bits"),
        (lambda: FULL.denoiser(VE())([[0.0] * 3], 1.0), "x: expected a floating-point"),
        (lambda: FULL.denoiser(VE())(torch.ones(2, 3).int(), 1.0), "x: .*dtype int32"),
        (lambda: FULL.denoiser(VE())(torch.tensor(1.0), 1.0), "x: expected samples"),
        (lambda: FULL.denoiser(VE())(torch.ones(2, 3), "1"), "t: expected a number"),
        (lambda: FULL.denoiser(VE())(torch.ones(2, 3), True), "t: expected a number"),
        # Three times for samples of three numbers: not one for each number.
        (
            lambda: FULL.denoiser(VE())(torch.ones(3, 3), torch.ones(3)),
            r"t: .*\[n, 1\].*reshape\(-1, 1\)",
        ),
        (lambda: FULL.flow_map(VE(), torch.ones(2, 3), 1.0, 1j), "t_to: expected"),
        (lambda: FULL.flow_map(VE(), torch.ones(2, 3), None, 0.0), "t_from: expected"),
        (
            lambda: FULL.flow_map(VE(), torch.ones(2, 2), 1.0, 0.0),
            "x: expected samples",
        ),
        (lambda: FULL.flow_map(None, torch.ones(2, 3), 1.0, 0.0), "process: .*None"),
        (lambda: Empirical([[0.0]]), r"data: expected a torch.Tensor.*as_tensor"),
        (
            lambda: Empirical(torch.ones(2, 2).to(torch.float8_e5m2)),
            "data: .*only stores; pass data.float",
        ),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_arrays_of_any_layout_are_the_parameters(as_a_user: None) -> None:
    whole = np.array([2.0, -1.0, 0.5])[::-1]
    for mean in (whole, whole.astype(">f8"), list(whole), whole.astype("f4")):
        law = Gaussian(mean, np.eye(3))
        assert law.mean.tolist() == [0.5, -1.0, 2.0]
        assert law.dtype == torch.float64  # that of cov


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_laws_do_not_follow_the_default_device_or_dtype(dtype: torch.dtype) -> None:
    x = normal(4, 2)

    def use() -> list[Tensor]:
        found = []
        for law in (
            Gaussian([0.1, -0.2], [[1.0, 0.3], [0.3, 0.7]]),
            GaussianMixture([[0.1, 0.2], [1.3, 0.7]], [0.1, 0.3], [0.3, 0.6]),
            Empirical(x),
        ):
            found += [law.denoiser(p)(x, 0.3) for p in (VE(), VP(), RectifiedFlow())]
            law.dtype = F64  # of draws, where no tensor says it: torch's default
            found += [law.sample(3), law.sample_prior(VP(), 3)]
            if isinstance(law, Gaussian):
                found += [law.flow_map(VP(), x, 0.9, 0.1), law.mean, law.cov]
        return found

    expected = use()
    torch.set_default_device("meta")
    torch.set_default_dtype(dtype)
    try:
        found = use()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.equal(b)
