"""Denoisers: every kind of prediction leads to the same D; dtypes; the NFE counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import PROCESSES
from torch import Tensor, nn

from artlib.flow.denoisers import (
    CountNFE,
    casts_itself,
    from_edm,
    from_epsilon,
    from_score,
    from_velocity,
    from_x0,
    network_dtype,
)
from artlib.flow.flow import ProbabilityFlow
from artlib.flow.processes import VE, VP, Process, RectifiedFlow
from artlib.flow.targets import GaussianMixture

F64 = torch.float64
TARGET = GaussianMixture(
    torch.tensor([[-1.0, 0.3], [0.4, 0.9], [2.0, -1.0]], dtype=F64),
    torch.tensor([0.3, 0.05, 0.4], dtype=F64),
    torch.tensor([3.0, 2.0, 1.0], dtype=F64),
)
SIGMA_DATA = 0.7
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)


class Exact(nn.Module):
    """What a perfect network would predict, computed in float64, in its own dtype.

    ``kind`` names the prediction; like a real network it insists on its dtype.
    """

    def __init__(self, process: Process, kind: str, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.process, self.kind = process, kind
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == self.scale.dtype
        assert t.dtype in (torch.float32, torch.float64)  # never rounded further
        self.seen.append((x, t))
        return self.predict(x.double(), t.double()).to(x.dtype) * self.scale

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        p, denoise = self.process, TARGET.denoiser(self.process)
        if self.kind == "edm":  # gets c_in y and log(level) / 4, and knows no process
            level = torch.exp(4 * t)
            total = torch.sqrt(level**2 + SIGMA_DATA**2)
            y, time = x * total, p.inverse_noise_level(level)
            clean = denoise(p.alpha(time) * y, time)
            return (clean - SIGMA_DATA**2 / total**2 * y) * total / (level * SIGMA_DATA)
        clean, alpha, sigma = denoise(x, t), p.alpha(t), p.sigma(t)
        noise = (x - alpha * clean) / sigma
        return {
            "epsilon": noise,
            "score": -noise / sigma,
            "velocity": p.alpha_dot(t) * clean + p.sigma_dot(t) * noise,
            "x0": clean,
        }[self.kind]

    def denoiser(self) -> nn.Module:
        return wrap(self.process, self.kind, self)


def wrap(
    process: Process, kind: str, network: Callable[[Tensor, Tensor], Tensor]
) -> nn.Module:
    if kind == "edm":
        return from_edm(process, network, sigma_data=SIGMA_DATA)
    return {
        "epsilon": from_epsilon,
        "score": from_score,
        "velocity": from_velocity,
        "x0": from_x0,
    }[kind](process, network)


KINDS = ("epsilon", "score", "velocity", "x0", "edm")
each_kind = pytest.mark.parametrize("kind", KINDS)


def noisy(process: Process, t: float, n: int = 6) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(n, 2, generator=rng, dtype=F64)
    return process.alpha(t) * TARGET.sample(n) + process.sigma(t) * noise


@each_process
@each_kind
def test_all_predictions_give_the_exact_denoiser(kind: str, process: Process) -> None:
    denoiser = Exact(process, kind).denoiser()
    exact = TARGET.denoiser(process)
    for share in (0.97, 0.5, 0.05, 0.002):
        t = torch.tensor(share * process.t_max, dtype=F64)
        x = noisy(process, float(t))
        torch.testing.assert_close(denoiser(x, t), exact(x, t), rtol=1e-8, atol=1e-9)
    t = process.t_max * torch.tensor([[0.97], [0.5], [0.05], [0.002]], dtype=F64)
    x = noisy(process, float(t[0]), 4)
    torch.testing.assert_close(denoiser(x, t), exact(x, t), rtol=1e-8, atol=1e-9)


def test_velocity_of_a_rectified_flow_is_noise_minus_data() -> None:
    # The definition of flow matching, at the end without signal too.
    process = RectifiedFlow()
    denoiser = from_velocity(process, lambda x, t: torch.full_like(x, 0.25))
    x, t = torch.ones(3, 2, dtype=F64), torch.tensor(1.0, dtype=F64)
    torch.testing.assert_close(denoiser(x, t), x - t * 0.25)


def test_edm_preconditioning_by_hand() -> None:
    # sigma = 1.5, sigma_data = 2: c_skip 0.64, c_out 1.2, c_in 0.4, c_noise log(1.5)/4.
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return torch.full_like(x, 10.0)

    denoiser = from_edm(VE(), network, sigma_data=2.0)
    x = torch.tensor([[3.0, -1.0]], dtype=F64)
    out = denoiser(x, torch.tensor(1.5, dtype=F64))
    torch.testing.assert_close(out, 0.64 * x + 12.0)
    torch.testing.assert_close(seen[0][0], 0.4 * x)
    torch.testing.assert_close(seen[0][1], torch.tensor(1.5, dtype=F64).log() / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("process", [VE(), VP()], ids=["ve", "vp"])
@pytest.mark.parametrize("kind", ["epsilon", "score", "edm", "velocity"])
@torch.no_grad()
def test_only_the_network_is_rounded(
    kind: str, process: Process, dtype: torch.dtype
) -> None:
    # In VE at t = 0.002 the noise is 0.002 of x, less than bfloat16 resolves: a
    # denoiser that summed in the network's dtype would return pure rounding as the
    # noise. Summed in the state's, the noise is as good as the prediction.
    network = Exact(process, kind, dtype)
    flow = ProbabilityFlow(process, network.denoiser())
    assert flow.dtype == dtype
    t = process.t_min
    x = noisy(process, t)
    # What the network is told has its own rounding; its answer to that is exact.
    denoised = flow.denoise(x, t)
    seen_x, seen_t = network.seen[-1]
    answer = network.predict(seen_x.double(), seen_t.double())
    replayed = wrap(process, kind, lambda x, t: answer)
    sigma = float(process.sigma(t))
    error = (denoised - replayed(x, torch.tensor(t, dtype=F64))).abs().max() / sigma
    assert denoised.dtype == F64
    assert float(error) < 4 * torch.finfo(dtype).eps


def test_network_dtype_is_found_behind_wrappers() -> None:
    network = Exact(VE(), "x0", torch.bfloat16)
    assert network_dtype(network) == torch.bfloat16
    assert network_dtype(CountNFE(CountNFE(network))) == torch.bfloat16
    assert network_dtype(CountNFE(from_x0(VE(), network))) == torch.bfloat16
    assert network_dtype(lambda x, t: x) is None
    assert not casts_itself(CountNFE(network))
    assert casts_itself(CountNFE(from_x0(VE(), network)))
    # Moved later, it is called in its new dtype.
    denoiser = from_x0(VE(), network)
    denoiser.float()
    assert denoiser(torch.zeros(1, 2, dtype=F64), torch.tensor(1.0)).dtype == F64


def test_a_denoiser_is_a_module() -> None:
    denoiser = from_epsilon(VE(), nn.Identity())
    assert isinstance(denoiser, nn.Module)
    network = Exact(VE(), "epsilon")
    assert [*from_epsilon(VE(), network).parameters()] == [network.scale]
    from_epsilon(VE(), network).eval()
    assert not network.training


def test_gradients_reach_the_network() -> None:
    network = Exact(VE(), "velocity", torch.float32)
    x = noisy(VE(), 1.0)
    network.denoiser()(x, torch.tensor(1.0, dtype=F64)).sum().backward()
    assert network.scale.grad is not None
    assert float(network.scale.grad.abs()) > 0


def test_nfe_counts_calls() -> None:
    counter = CountNFE(TARGET.denoiser(VE()))
    x, t = noisy(VE(), 1.0), torch.tensor(1.0, dtype=F64)
    for _ in range(3):
        counter(x, t)  # a batch of six is one evaluation
    assert counter.nfe == 3
    outer = CountNFE(counter)
    torch.testing.assert_close(outer(x, t), counter(x, t))
    assert (outer.nfe, counter.nfe) == (1, 5)
    counter.reset()
    assert counter.nfe == 0
    with pytest.raises(TypeError, match="denoiser"):
        CountNFE("network")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [from_epsilon, from_score, from_velocity, from_x0, from_edm]
)
def test_arguments_in_the_wrong_order_are_refused(make: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="process"):
        make(nn.Identity(), VE())
    with pytest.raises(TypeError, match="network"):
        make(VE(), 3.0)


def test_edm_needs_a_positive_scale() -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        from_edm(VE(), nn.Identity(), sigma_data=0.0)
