"""How the zoo's networks are trained: step size, moving average, clipped gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from artlib.zoo.recipes import ScoreRecipe
from artlib.zoo.training import Trainer
from artlib.zoo.unet import UNetConfig

STEPS, WARM_UP, RATE, EMA = 8, 3, 2e-3, 0.35


class Steep(ScoreRecipe):
    """The same loss, ten thousand times as steep."""

    def loss(self, *args: object) -> Tensor:
        return 1e4 * super().loss(*args)  # type: ignore[arg-type]


def trainer(kind: type[ScoreRecipe] = ScoreRecipe) -> Trainer:
    recipe = kind(
        "details",
        "mnist",
        UNetConfig(shape=(1, 4, 4), widths=(8, 8), embedding=8),
        steps=STEPS,
        batch=4,
        rate=RATE,
        warm_up=WARM_UP,
        ema=EMA,
    )
    rng = torch.Generator().manual_seed(0)
    return Trainer(recipe, torch.randn(16, 1, 4, 4, generator=rng))


def test_the_step_size_rises_for_the_warm_up_and_falls_as_a_half_cosine() -> None:
    run = trainer()
    found = [run.optimizer.param_groups[0]["lr"] for _ in run.train()]
    cosine = [RATE * math.cos(math.pi * k / STEPS / 2) ** 2 for k in range(STEPS)]
    expected = [
        cosine[0] / 3,
        cosine[1] * 2 / 3,
        *cosine[2:],
    ]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_moving_average_is_short_at_first() -> None:
    """Decays 2/11, 3/12 and 4/13, then the recipe's own."""
    run = trainer()
    decays = iter([2 / 11, 3 / 12, 4 / 13, EMA, EMA, EMA, EMA, EMA])
    expected = [p.detach().clone() for p in run.average.parameters()]
    for _ in run.train():
        decay = next(decays)
        new = run.network.parameters()
        expected = [
            decay * mean + (1 - decay) * p.detach()
            for mean, p in zip(expected, new, strict=True)
        ]
        for found, wanted in zip(run.average.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_gradients_are_clipped_to_norm_one() -> None:
    run = trainer(Steep)
    next(run.train())
    grads = [p.grad for p in run.network.parameters() if p.grad is not None]
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads))  # type: ignore[arg-type]
    assert float(norm) == pytest.approx(1, rel=1e-4)
