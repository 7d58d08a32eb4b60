"""How a network is called: dtype, time, copies, pickles, and answers that vary."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import artlib
from artlib.flow.ask import unwrap
from artlib.flow.denoisers import network_dtype
from artlib.flow.processes import VE, VP, RectifiedFlow

F64 = torch.float64
TARGET = artlib.Gaussian([0.0, 0.0], [[1.0, 0.3], [0.3, 0.5]])
EXACT = TARGET.denoiser(VE())
X = TARGET.sample_prior(VE(), 6, seed=0).double()
GRID = artlib.edm(VE()).grid(6)


class Linear(nn.Module):
    """A network of one layer that insists on its dtype and notes its arguments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).to(dtype)
        self.seen: list[tuple[torch.dtype, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.dtype, t.clone()))
        return self.layer(x)


class Dealing(nn.DataParallel):
    """Stands for two GPUs: deals its arguments out along their first axis."""

    def __init__(self, network: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = network

    def forward(self, *args: Tensor) -> Tensor:
        parts = zip(*(torch.chunk(x, 2) for x in args), strict=True)
        return torch.cat([self.module(*part) for part in parts])


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t


def sampled(denoiser: Any, **options: Any) -> Tensor:
    flow = artlib.ProbabilityFlow(VE(), denoiser, **options)
    return artlib.sample(flow, X.float(), GRID)


# Which dtype.


class Stored(nn.Module):
    """Weights kept in one dtype, used in another."""

    def __init__(self, stored: torch.dtype, computes: torch.dtype) -> None:
        super().__init__()
        weight = torch.eye(2).to(stored)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.computes = computes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == self.computes
        return x @ self.weight.to(self.computes)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_that_are_only_stored_are_no_dtype_to_compute_in(
    stored: torch.dtype,
) -> None:
    network = Stored(stored, torch.float32)
    assert network_dtype(network) == torch.float32
    assert sampled(network).dtype == torch.float32
    half = Stored(stored, torch.bfloat16)
    half.norm = nn.LayerNorm(2).bfloat16()
    assert network_dtype(half) == torch.bfloat16
    half.norm.float()
    half.dtype = torch.bfloat16  # as networks of diffusers declare it
    assert network_dtype(half) == torch.bfloat16
    assert sampled(half).dtype == torch.float32


def test_the_majority_decides_and_what_fails_is_corrected() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(100))  # first, and most
            self.layer = nn.Linear(2, 2).bfloat16()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x)

    assert network_dtype(Mixed()) == torch.float32  # by its weights, and wrong
    assert bool(torch.isfinite(sampled(Mixed())).all())
    big = Mixed()
    big.table = nn.Parameter(torch.zeros(1))
    assert network_dtype(big) == torch.bfloat16


# torch.compile imports what torch itself calls old.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_dtype_is_found_behind_wrappers() -> None:
    network = Linear(torch.bfloat16)

    @torch.no_grad()
    def none(x: Tensor, t: Tensor) -> Tensor:
        return x

    wrapped: list[Callable[..., Tensor]] = [
        partial(network),
        network.forward,
        Dealing(network),
        torch.compile(network),
        artlib.CountNFE(partial(network)),
    ]
    for denoiser in wrapped:
        assert network_dtype(denoiser) == torch.bfloat16
    assert network_dtype(none) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_dtype_is_named_and_refused(dtype: torch.dtype) -> None:
    network = Linear(dtype)
    hidden = {
        "bare": lambda x, t: network(x, t),
        "wrapped": artlib.from_x0(VE(), lambda x, t: network(x, t)),
    }
    for denoiser in hidden.values():
        flow = artlib.ProbabilityFlow(VE(), denoiser)
        with pytest.raises(TypeError, match=rf"ProbabilityFlow: dtype={dtype}") as told:
            artlib.sample(flow, X, GRID)
        assert str(told.value).count("it does not compute in") == 1  # said once
        flow = artlib.ProbabilityFlow(VE(), denoiser, dtype=dtype)
        assert artlib.sample(flow, X, GRID).dtype == F64


# The time.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wrap", [artlib.from_velocity, lambda p, n: n])
def test_times_are_told_in_float32_at_least(dtype: torch.dtype, wrap: Any) -> None:
    process = RectifiedFlow()
    network, grid = Linear(dtype), artlib.uniform(process).grid(7)
    flow = artlib.ProbabilityFlow(process, wrap(process, network))
    artlib.sample(flow, X.float(), grid)
    assert {kind for kind, _ in network.seen} == {dtype}
    told = torch.stack([t for _, t in network.seen])
    torch.testing.assert_close(told, grid[:-1].float(), rtol=1e-6, atol=0)


def test_a_network_that_wants_its_time_in_half_precision_gets_it_with_a_word() -> None:
    class Demanding(Linear):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layer(x * 0 + self.layer(t.reshape(1, 1).expand(len(x), 2)))

    network = Demanding(torch.bfloat16)
    counter = artlib.CountNFE(network)
    with pytest.warns(UserWarning, match=r"time t in torch\.bfloat16 only") as told:
        sampled(counter)
    assert len(told) == 1
    assert counter.nfe == 6


class WantsEach(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        return self.layer(torch.cat([x, t[:, None]], 1))


@pytest.mark.parametrize(
    "wrap", [lambda n: n, lambda n: artlib.from_epsilon(VE(), n), artlib.CountNFE]
)
def test_a_network_that_takes_one_time_per_sample_is_refused(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"0-d.*t\.reshape\(-1\)\.expand\(len\(x\)\)"):
        sampled(wrap(WantsEach()))
    network = WantsEach()
    sampled(lambda x, t: network(x, t.reshape(-1).expand(len(x))))  # the remedy


def test_data_parallel_gets_a_time_that_it_can_deal_out() -> None:
    network = Linear(torch.float32)
    sampled(Dealing(network))
    assert {tuple(t.shape) for _, t in network.seen} == {(3, 1)}


def test_an_error_of_the_network_s_own_comes_through() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        sampled(broken)


# Copies.


def dirty(x: Tensor, t: Tensor) -> Tensor:
    x *= 0.5
    t *= 2.0
    return EXACT(x / 0.5, t / 2.0)


class Buffered:
    """Writes every answer into the same memory."""

    def __init__(self) -> None:
        self.memory = torch.zeros(0)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.memory.shape != x.shape or self.memory.dtype != x.dtype:
            self.memory = torch.empty_like(x)
        return self.memory.copy_(EXACT(x, t))


RUNS: dict[str, Callable[[artlib.ProbabilityFlow, Tensor], Tensor]] = {
    **{
        s: lambda f, x, s=s: artlib.sample(f, x, GRID, solver=s)  # type: ignore[misc]
        for s in ("euler", "heun", "rk4", "dpmpp_2m")
    },
    "dopri5": lambda f, x: artlib.sample(f, x, solver="dopri5"),
    "ancestral": lambda f, x: artlib.sample_stochastic(f, x, GRID, seed=1),
    "art": lambda f, x: artlib.art(f, x, points=8).grid(8),
    "stiffness": lambda f, x: f.stiffness(x, 1.0),
    "clock": lambda f, x: artlib.sample(f, x, clock=artlib.ExactClock(4, points=8)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("kind", ["in place", "one buffer", "in place, wrapped"])
def test_a_denoiser_that_reuses_memory_changes_nothing(name: str, kind: str) -> None:
    denoiser: Any = {"in place": dirty, "one buffer": Buffered()}.get(kind)
    if denoiser is None:
        denoiser = artlib.from_x0(VE(), dirty)
    x = X.clone()
    flow = artlib.ProbabilityFlow(VE(), denoiser, acceleration="difference")
    plain = artlib.ProbabilityFlow(VE(), EXACT, acceleration="difference")
    found, expected = RUNS[name](flow, x), RUNS[name](plain, X.clone())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "make",
    [
        artlib.from_epsilon,
        artlib.from_score,
        artlib.from_velocity,
        artlib.from_x0,
        artlib.from_edm,
    ],
)
def test_denoisers_and_flows_can_be_copied_and_pickled(make: Any) -> None:
    process = VP()
    denoiser = make(process, Affine())
    flow = artlib.ProbabilityFlow(process, denoiser)
    x, t = torch.randn(3, 2), torch.tensor(0.4)
    for twin in (
        copy.deepcopy(denoiser),
        pickle.loads(pickle.dumps(denoiser)),
        copy.deepcopy(flow).denoise,
        pickle.loads(pickle.dumps(flow)).denoise,
    ):
        assert torch.equal(twin(x, t), denoiser(x, t))
    pickle.loads(pickle.dumps(flow.to_ve()))
    twin = copy.deepcopy(denoiser)
    with torch.no_grad():
        twin.network.layer.weight.zero_()
    assert not torch.equal(twin(x, t), denoiser(x, t))  # its network is its own


# Answers that vary.


class Dropping(nn.Module):
    def __init__(self, part: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).double()
        self.part = part

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.part(self.layer(x / (1 + t**2).sqrt()), self.training)


LAYER, NORM = nn.Dropout(0.5), nn.BatchNorm1d(2).double()


class Layered(Dropping):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(lambda x, training: self.extra(x))
        self.extra = copy.deepcopy(layer)


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: Layered(LAYER),
    "batch norm": lambda: Layered(NORM),
    "function": lambda: Dropping(lambda x, on: nn.functional.dropout(x, 0.5, on)),
    "drop path": lambda: Dropping(lambda x, on: x * torch.rand(len(x), 1) if on else x),
}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_a_network_in_training_mode_is_reported_once(name: str, hidden: bool) -> None:
    network = RANDOM[name]()
    if hidden and name == "batch norm":
        pytest.skip("a closure hides it, and it answers twice alike")
    denoiser: Any = (lambda x, t: network(x, t)) if hidden else network
    for run in (RUNS["euler"], RUNS["ancestral"], RUNS["art"], RUNS["stiffness"]):
        network.train()
        flow = artlib.ProbabilityFlow(VE(), denoiser, acceleration="difference")
        with pytest.warns(UserWarning, match=r"eval\(\)") as told:
            run(flow, X)
        assert len(told) == 1
        run(flow, X)
        network.eval()
        run(artlib.ProbabilityFlow(VE(), denoiser, acceleration="difference"), X)


def test_own_noise_is_found_where_something_is_learned() -> None:
    rng = torch.Generator().manual_seed(0)

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        return EXACT(x, t) * (1 + 0.1 * torch.rand(1, generator=rng))

    flow = artlib.ProbabilityFlow(VE(), noisy, acceleration="difference")
    with pytest.warns(UserWarning, match="two answers to the same input"):
        artlib.art(flow, X, points=8)


def test_a_denoiser_is_asked_twice_once() -> None:
    calls: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return EXACT(x, t)

    flow = artlib.ProbabilityFlow(VE(), denoiser, acceleration="difference")
    spent = []
    for _ in range(3):
        before = len(calls)
        artlib.art(flow, X, points=8)
        spent.append(len(calls) - before)
    assert spent[1] == spent[2] <= spent[0] - 2


@pytest.mark.parametrize(
    ("dtype", "share", "same"),
    [
        (torch.float32, 1e-4, True),
        (torch.float32, 1e-2, False),
        (torch.bfloat16, 1e-2, True),
    ],
)
def test_answers_a_rounding_apart_are_the_same(
    dtype: torch.dtype, share: float, same: bool
) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return EXACT(x.double(), t) * (1 + share * torch.rand(len(x), 1))

    flow = artlib.ProbabilityFlow(VE(), denoiser, dtype=dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        artlib.sample(flow, X, GRID)
    assert bool(told) is not same


def test_dropout_of_nothing_is_no_fault() -> None:
    network = Layered(nn.Dropout(0.0)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artlib.sample(artlib.ProbabilityFlow(VE(), network), X, GRID)


def test_training_mode_alone_and_draws_of_others_are_no_fault() -> None:
    network = Linear(torch.float32).train()
    counter = artlib.CountNFE(network)
    flow = artlib.ProbabilityFlow(VE(), counter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        artlib.sample(flow, X, GRID, callback=lambda k, t, x: torch.rand(1))
    assert counter.nfe == 6


def test_the_random_state_is_not_moved_by_looking() -> None:
    network = Dropping(lambda x, on: nn.functional.dropout(x, 0.5, on)).train()
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        flow = artlib.ProbabilityFlow(VE(), network)
        flow._doubts.told = again
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((artlib.sample(flow, X, GRID), torch.rand(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_network_with_a_method_called_denoiser_does_not_go_round_in_circles() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x

        def denoiser(self) -> Any:
            return self

    net = Net()
    assert unwrap(net)[0] is net
    flow = artlib.ProbabilityFlow(artlib.VE(), net)
    x = torch.ones(2, 3)
    assert torch.equal(flow.denoise(x, 1.0), 0.5 * x)
