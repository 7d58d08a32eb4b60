"""Everything on an accelerator, real or simulated, against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mixture_16d
from torch import Tensor

import artlib
import artlib.zoo
from artlib import rivals
from artlib.zoo.networks import save_network
from artlib.zoo.recipes import RECIPES
from artlib.zoo.training import Trainer

PROBLEM = mixture_16d(artlib.VE(), n=6)
FLOW = PROBLEM.flow()
X_T = PROBLEM.x_T
GRID = artlib.edm(FLOW.process, pinned=False).grid(6)
TABLE = artlib.stiffness_table(FLOW, X_T, points=17)

BOTH: dict[str, Callable[[Tensor], Any]] = {
    "art": lambda x: artlib.art(FLOW, x, points=17).grid(9),
    "art, mean of the clocks": lambda x: artlib.art(
        FLOW, x, average="paper", points=17
    ).grid(9),
    "art for Heun": lambda x: artlib.art(
        FLOW, x, solver="heun", weight="local", points=17
    ).grid(9),
    "cost": lambda x: artlib.cost(FLOW, artlib.edm(FLOW.process), x, points=17),
    "bound": lambda x: artlib.lower_bound(FLOW, x, clock="feedback", points=17),
    "refine": lambda x: artlib.refine(
        artlib.edm(FLOW.process), FLOW, x, 3, solver="heun", iterations=2
    ).grid(3),
    "references": lambda x: artlib.references(FLOW, [x])[0],
    "compare": lambda x: artlib.compare(
        FLOW,
        {"EDM": artlib.edm(FLOW.process)},
        [x, x + 1.0],
        {"heun": [3]},
        ends=[0.1 * x, 0.1 * x + 0.1],
    ).curve("heun", "EDM", "error"),
    "art for the final error": lambda x: artlib.art(
        FLOW, x, weight="dual", points=9
    ).grid(9),
    "ExactClock": lambda x: artlib.sample(
        FLOW, x, clock=artlib.ExactClock(5, points=17)
    ),
    "PredictedClock": lambda x: artlib.sample(
        FLOW, x, clock=artlib.PredictedClock(TABLE, 5)
    ),
    "ancestral": lambda x: artlib.sample_stochastic(FLOW, x, GRID, seed=3),
    "churn": lambda x: artlib.sample_stochastic(
        FLOW, x, GRID, method="churn", churn=10.0, seed=3
    ),
    "Euler jumps": lambda x: rivals.euler_jumps(FLOW, x, points=17).grid(5),
    "Girsanov bound": lambda x: rivals.girsanov(FLOW, x, points=17).grid(5),
    "sliced W2": lambda x: artlib.sliced_wasserstein2(x, x + 1.0),
    "W2": lambda x: artlib.wasserstein2(x[:, 0], x[:, 1]),
    "error": lambda x: artlib.terminal_error(x, x + 1.0),
    "exact W2": lambda x: artlib.gaussian_w2(FLOW.process, x[0].abs(), GRID),
    "oracle": lambda x: artlib.oracle_grid(FLOW.process, x[0, :3].abs(), 2),
}


NOISY = {"ancestral", "churn"}


@pytest.mark.parametrize("name", BOTH)
def test_the_answer_does_not_depend_on_the_device(
    name: str, accelerator: torch.device
) -> None:
    if name in NOISY and accelerator.type == "cuda":
        pytest.skip("whose generator draws other noise")
    expected = torch.as_tensor(BOTH[name](X_T))
    found = torch.as_tensor(BOTH[name](X_T.to(accelerator))).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_references_from_a_file_are_where_the_noise_is(
    accelerator: torch.device, tmp_path: Path
) -> None:
    x = X_T.to(accelerator)
    for _ in range(2):  # made, then read
        (ends,) = artlib.references(FLOW, [x], file=tmp_path / "references")
        assert ends.device == x.device


def test_art_rl(accelerator: torch.device, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "steps": 3,
        "seed": 0,
        "batch": 4,
        "warm_up": 2,
        "points": 16,
    }
    costs = {}
    for where, x_T, device in (
        ("cpu", X_T, None),
        ("there", X_T.to(accelerator), None),
        ("states on the CPU", X_T, accelerator),
    ):
        trainer = artlib.ActorCritic(FLOW, x_T, device=device, **options)
        for record in trainer.train(3, checkpoint=tmp_path / where):
            costs[where] = record.cost
        again = artlib.ActorCritic(FLOW, x_T, device=device, **options)
        again.load(tmp_path / where)
        assert torch.equal(again.distill().grid(6), trainer.distill().grid(6))
        x = artlib.sample(FLOW, X_T.to(accelerator), clock=artlib.ActorClock(trainer))
        assert x.device.type == accelerator.type
    assert costs["there"] == costs["states on the CPU"]
    if accelerator.type != "cuda":  # whose generator draws other noise
        assert costs["there"] == pytest.approx(costs["cpu"], rel=1e-6)


def test_zoo_training_sampling_and_measures(
    accelerator: torch.device, tmp_path: Path
) -> None:
    recipe = replace(RECIPES["fashion-small"], steps=4, batch=8, warm_up=2)
    images = artlib.zoo.fashion_mnist("sample")[:64]
    weights = {}
    for device in (torch.device("cpu"), accelerator):
        folder = tmp_path / device.type
        folder.mkdir()
        for _ in range(2):  # the second time from the checkpoint of the first
            trainer = Trainer(recipe, images, device=device)
            for step in trainer.train(checkpoint=folder / "checkpoint", every=2):
                if step == 3 and not (folder / "stopped").exists():
                    (folder / "stopped").touch()
                    break
        assert trainer.step == 4
        header = {"name": "fashion-small", "sigma_data": trainer.sigma_data}
        weights[device.type] = folder / "weights.safetensors"
        save_network(weights[device.type], trainer.average, header)

    features = artlib.zoo.features("fashion", device=accelerator)
    measure = artlib.zoo.image_measure(features, images)
    found = {}
    for device, path in weights.items():
        net = artlib.zoo.load(path, device=torch.device(device))
        flow = artlib.ProbabilityFlow(net.process, net)
        x = net.sample_prior(4, seed=0)
        found[device] = artlib.sample(flow, x, artlib.edm(net.process).grid(3))
        assert found[device].device.type == device
        measure(found[device].to(accelerator))
    torch.testing.assert_close(
        found[accelerator.type].cpu(), found["cpu"], rtol=1e-2, atol=1e-2
    )


# The simulated device itself: what fails with CUDA fails there.

A, B = torch.arange(3.0), torch.ones(3)


# torch compiles derivatives of its own when the first one is asked for.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_simulated_tensors_compute_and_differentiate(simulated: torch.device) -> None:
    device = simulated
    x = A.to(device).requires_grad_()
    (x * x).sum().backward()
    assert x.grad is not None
    assert (x.device, x.grad.device) == (device, device)
    assert x.grad.tolist() == [0.0, 2.0, 4.0]
    _, slope = torch.func.jvp(torch.sin, (x,), (B.to(device),))
    torch.testing.assert_close(slope.cpu(), A.cos())
    assert float(x.detach().sum()) == 3.0
    assert x[torch.tensor([0, 2])].tolist() == [0.0, 2.0]
    assert (x + torch.tensor(1.0)).device == device  # a CPU scalar may take part
    assert torch.ones(2, device=device).cpu().device.type == "cpu"


MISTAKES: dict[str, Callable[[Tensor, torch.device], Any]] = {
    "mixed": lambda x, device: x + B,
    "mixed in a matrix product": lambda x, device: B @ x,
    "written into": lambda x, device: B.add_(x),
    "stacked": lambda x, device: torch.stack([x, B]),
    "indices there": lambda x, device: B[x.long()],
    "NumPy": lambda x, device: x.numpy(),
    "a network here": lambda x, device: torch.nn.Linear(3, 1)(x),
    "a generator here": lambda x, device: torch.rand(
        2, device=device, generator=torch.Generator().manual_seed(0)
    ),
    "a generator there": lambda x, device: torch.rand(
        2, generator=torch.Generator(device).manual_seed(0)
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_would_fail_with_cuda_fails_simulated(
    name: str, simulated: torch.device
) -> None:
    x = A.to(simulated)
    with pytest.raises((RuntimeError, TypeError)):
        MISTAKES[name](x, simulated)
