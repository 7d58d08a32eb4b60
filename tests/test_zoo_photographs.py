"""The recipe for photographs, runs that stop at a time, and what a GPU is given."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import artlib
from artlib._common.errors import TrainingError
from artlib._common.tensor_file import StateFileError, read_state, write_state
from artlib.flow.denoisers import from_edm
from artlib.zoo import RECIPES, recipes, train
from artlib.zoo.recipes import PhotographRecipe
from artlib.zoo.training import Trainer
from artlib.zoo.unet import UNetConfig

TINY = PhotographRecipe(
    "cifar10-base",
    "cifar10",
    UNetConfig(shape=(3, 4, 4), widths=(8, 8), embedding=8),
    steps=12,
    batch=8,
    rate=2e-3,
    warm_up=3,
    ema=0.9,
)


def images(n: int = 64) -> Tensor:
    """Bright on the left, dark on the right, so that a mirror image is known."""
    rng = torch.Generator().manual_seed(0)
    slope = torch.tensor([0.9, 0.3, -0.3, -0.9]).expand(3, 4, 4)
    return slope + 0.1 * torch.randn(n, 3, 4, 4, generator=rng)


def done(trainer: Trainer) -> Trainer:
    for _ in trainer.train():
        pass
    return trainer


def same(a: Trainer, b: Trainer) -> bool:
    pairs = zip(a.average.parameters(), b.average.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# The recipe.


def test_noise_levels_are_a_normal_law_and_a_uniform_one() -> None:
    recipe = replace(TINY, far=0.3, far_range=(2.0, 50.0))
    n = 100_000
    rng = torch.Generator().manual_seed(0)
    found = recipe.levels(n, torch.device("cpu"), rng).double()
    low, high = math.log(2.0), math.log(50.0)
    for point in (-3.0, -1.2, 0.0, 1.0, 2.0, 3.0, 3.9, 4.5):
        normal = 0.5 * (1 + math.erf((point + 1.2) / 1.2 / math.sqrt(2)))
        uniform = min(1.0, max(0.0, (point - low) / (high - low)))
        share = 0.7 * normal + 0.3 * uniform
        error = math.sqrt(share * (1 - share) / n)
        assert float((found < point).double().mean()) == pytest.approx(
            share, abs=4 * error + 1e-9
        )


def test_half_of_the_images_are_mirrored_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Tensor] = []

    def caught(network: object, batch: Tensor, *_: object) -> Tensor:
        shown.append(batch)
        return torch.zeros(())

    monkeypatch.setattr(recipes, "edm_loss", caught)
    x = images(1000)
    TINY.loss(TINY.build(), x, 0.5, torch.Generator().manual_seed(1))
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(shown[0], x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(shown[0], x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert abs(sum(mirrored) - 500) < 4 * math.sqrt(250)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"far": 1.5}, r"far: expected a share in \[0, 1\], got 1.5"),
        ({"far": math.nan}, "far: expected a share"),
        ({"far_range": (0.0, 3.0)}, "far_range: expected two noise levels"),
        ({"far_range": (3.0, 2.0)}, "far_range: expected two noise levels"),
    ],
)
def test_a_share_that_is_none_is_refused(
    change: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_the_packaged_recipe_draws_the_noise_that_sampling_starts_from() -> None:
    recipe = RECIPES["cifar10-base"]
    assert isinstance(recipe, PhotographRecipe)
    rng = torch.Generator().manual_seed(0)
    levels = recipe.levels(100_000, torch.device("cpu"), rng)
    assert float((levels > math.log(20.0)).double().mean()) > 0.04
    size = sum(p.numel() for p in recipe.build().parameters())
    assert 4e6 < size < 4.5e6


def test_with_a_share_of_large_noise_the_network_is_right_there() -> None:
    """At sigma 80 the answer is the mean of the data, mirrored or not."""
    x = torch.cat([images(), images().flip(-1)])
    mean = x.mean(0)
    rng = torch.Generator().manual_seed(3)
    noise = 80 * torch.randn(64, 3, 4, 4, generator=rng)
    recipe = replace(TINY, far=0.5, steps=250, batch=16, rate=1e-2, ema=0.95)
    run = done(Trainer(recipe, x + 0.5))
    net = from_edm(artlib.VE(), run.average, sigma_data=run.sigma_data)
    with torch.no_grad():
        found = net(x[:64] + 0.5 + noise, torch.tensor(80.0))
    assert float((mean + 0.5).square().mean().sqrt()) > 0.45  # of answering 0
    assert float((found - mean - 0.5).square().mean().sqrt()) < 0.15


def test_the_rate_stays_after_the_warm_up() -> None:
    run = Trainer(TINY, images())
    rates = [run.optimizer.param_groups[0]["lr"] / TINY.rate for _ in run.train()]
    assert rates == pytest.approx([1 / 3, 2 / 3, *[1.0] * 10])


def test_a_run_may_be_continued_to_more_steps(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    for _ in Trainer(TINY, images(), steps=5).train(checkpoint=file):
        pass
    longer = Trainer(TINY, images(), steps=12)
    for _ in longer.train(checkpoint=file):
        pass
    assert longer.step == 12
    assert same(longer, done(Trainer(TINY, images())))
    other = Trainer(replace(TINY, rate=1e-3), images(), steps=12)
    with pytest.raises(StateFileError, match=r"another run \(recipe differ"):
        other.load(file)


def test_the_packaged_network_knows_the_mean_at_large_noise() -> None:
    """Within .03 of CIFAR-10's mean colour, and of its mean image where that is."""
    if "cifar10-base" not in artlib.zoo.available():
        pytest.skip("cifar10-base is not packaged yet")
    net = artlib.zoo.load("cifar10-base")
    x = net.sample_prior(32, seed=0)
    with torch.no_grad():
        found = net(x, torch.tensor(80.0)).mean(0)
    mean = 2 * torch.tensor([0.49139968, 0.48215841, 0.44653091]) - 1
    torch.testing.assert_close(found.mean((1, 2)), mean, rtol=0, atol=0.03)
    try:
        whole = artlib.zoo.cifar10("train")
    except FileNotFoundError:
        return
    image = (whole.mean(0) + whole.mean(0).flip(-1)) / 2
    assert float((found - image).square().mean().sqrt()) < 0.05


# What a GPU is given, here at tiny size on the CPU.


def test_draws_on_the_device_are_the_same_where_that_is_the_cpu() -> None:
    plain, there = (Trainer(TINY, images(), draws=d) for d in ("cpu", "device"))
    assert same(done(plain), done(there))


def test_another_place_for_draws_is_refused() -> None:
    with pytest.raises(ValueError, match="draws: expected 'cpu' or 'device'"):
        Trainer(TINY, images(), draws="gpu")  # type: ignore[arg-type]


def test_bfloat16_costs_no_more_than_its_rounding() -> None:
    """The same batches and noise: losses agree, and so do the weights."""
    long = replace(TINY, steps=60)
    exact, rough = (done(Trainer(long, images(), bf16=b)) for b in (False, True))
    assert rough.losses == pytest.approx(exact.losses, rel=0.02)
    assert not same(exact, rough)
    start, one, other = (
        torch.cat([p.detach().flatten() for p in run.average.parameters()])
        for run in (Trainer(long, images()), exact, rough)
    )
    assert other.dtype == torch.float32
    assert float((one - other).norm() / (one - start).norm()) < 0.2


def test_a_network_is_compiled_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    Trainer(TINY, images())
    assert not compiled
    run = Trainer(TINY, images(), compiled=True)
    assert compiled == [run.network]


def test_a_run_goes_on_where_its_random_numbers_cannot(tmp_path: Path) -> None:
    """As from a GPU to a CPU: the state of the generator has another size."""
    file = tmp_path / "run.safetensors"
    for step in Trainer(TINY, images()).train(checkpoint=file, every=5):
        if step == 5:
            break
    tensors, header = read_state(file, kind="artlib-zoo-training")
    tensors["rng"] = torch.zeros(16, dtype=torch.uint8)
    write_state(file, tensors, header, kind="artlib-zoo-training")
    run = Trainer(TINY, images())
    for _ in run.train(checkpoint=file):
        pass
    assert run.step == 12
    assert all(torch.isfinite(p).all() for p in run.average.parameters())


def test_an_accelerator_trains_from_the_images_there(
    accelerator: torch.device, tmp_path: Path
) -> None:
    file = tmp_path / "run.safetensors"
    on = Trainer(TINY, images(), device=accelerator, steps=4)
    for _ in on.train(checkpoint=file):
        pass
    assert on.images.device.type == accelerator.type
    home = Trainer(TINY, images(), steps=6)
    for _ in home.train(checkpoint=file):
        pass
    torch.testing.assert_close(
        next(home.average.parameters()),
        next(done(Trainer(TINY, images(), steps=6)).average.parameters()),
        rtol=1e-3,
        atol=1e-4,
    )


# Runs that stop at a time.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever the command looks at it."""
    now = iter(range(10**6))
    fake = SimpleNamespace(monotonic=lambda: float(next(now)))
    monkeypatch.setattr(train, "time", fake)
    monkeypatch.setitem(recipes.RECIPES, "cifar10-base", TINY)
    monkeypatch.setattr(train, "training_images", lambda _: images())


def command(folder: Path, *more: str) -> int:
    given = ["cifar10-base", "--quiet", "--device", "cpu", "--out", str(folder)]
    return train.main([*given, *more])


def test_a_run_that_stops_at_a_time_continues_to_the_same_bits(
    clock: object, tmp_path: Path
) -> None:
    folder = tmp_path / "boxed"
    weights = folder / "cifar10-base.safetensors"
    checkpoint = folder / "cifar10-base.checkpoint.safetensors"
    assert command(folder, "--seconds", "7") == 0
    assert checkpoint.exists()
    early = artlib.zoo.load(weights)
    steps = early.header["made"]["steps"]
    assert 0 < steps < 12
    assert not artlib.zoo.fully_trained("cifar10-base", folder)
    assert command(folder, "--minutes", "0.1") == 0
    assert steps < artlib.zoo.load(weights).header["made"]["steps"] < 12
    assert command(folder) == 0
    assert not checkpoint.exists()
    assert artlib.zoo.fully_trained("cifar10-base", folder)
    whole = done(Trainer(TINY, images()))
    for name, value in artlib.zoo.load(weights).network.state_dict().items():
        assert torch.equal(value, whole.average.state_dict()[name].half().float())
    record = json.loads((folder / "cifar10-base.json").read_text())
    assert record["made"]["steps"] == 12


def test_a_network_whose_time_is_over_is_not_begun(
    clock: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["cifar10-base", "emoji-base", "--quiet", "--out", str(tmp_path)]
    assert train.main([*given, "--device", "cpu", "--seconds", "7"]) == 0
    assert "not begun: emoji-base" in capsys.readouterr().out


def test_no_seconds_export_what_there_is(
    clock: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, "--seconds", "0") == 1
    assert re.search("too few for one step", capsys.readouterr().err)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    assert command(tmp_path, "--seconds", "7") == 0
    weights = tmp_path / "cifar10-base.safetensors"
    before = artlib.zoo.load(weights)
    weights.unlink()
    assert command(tmp_path, "--seconds", "0") == 0
    again = artlib.zoo.load(weights)
    assert again.header == before.header
    for one, other in zip(before.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (tmp_path / "cifar10-base.checkpoint.safetensors").exists()


def test_a_run_with_a_nan_is_not_kept_when_its_time_is_over(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    run = Trainer(TINY, images())
    next(run.train())
    run.pause(file)
    good = file.read_bytes()
    run._recent.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan"):
        run.pause(file)
    assert file.read_bytes() == good
