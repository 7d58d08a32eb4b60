"""The networks of the zoo: objective, training that survives anything, weight files."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import artlib
from artlib._common import tensor_file as _state_file
from artlib._common.errors import TrainingError
from artlib._common.tensor_file import StateFileError
from artlib.flow.denoisers import from_edm
from artlib.zoo import train as command
from artlib.zoo.autoencoder import LATENT_STD, Autoencoder, AutoencoderConfig
from artlib.zoo.networks import (
    WEIGHTS,
    available,
    fully_trained,
    load,
    load_autoencoder,
    save_network,
)
from artlib.zoo.recipes import RECIPES, AutoencoderRecipe, ScoreRecipe, edm_loss
from artlib.zoo.training import Trainer
from artlib.zoo.unet import UNet, UNetConfig

TINY = ScoreRecipe(
    "tiny",
    "fashion",
    UNetConfig(shape=(1, 8, 8), widths=(8, 16), embedding=16),
    steps=60,
    batch=8,
    warm_up=5,
    ema=0.9,
)


@pytest.fixture
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.rand(40, 1, 8, 8, generator=rng) * 2 - 1


@pytest.fixture
def trained(images, tmp_path):
    return command.train(TINY, images, tmp_path, progress=False)


def randomised(network, seed=0):
    """Random weights everywhere: a fresh network is 0, which hides mistakes."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=rng)
    return network.eval().requires_grad_(False)


# The network.


def test_a_new_network_is_the_best_linear_denoiser_of_white_data():
    flow_process = artlib.VE()
    denoiser = from_edm(flow_process, UNet(TINY.config), sigma_data=0.7)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for sigma in (0.01, 0.7, 30.0):
        wiener = 0.7**2 / (0.7**2 + sigma**2) * x
        torch.testing.assert_close(denoiser(x, torch.tensor(sigma)), wiener)


def test_noise_level_as_a_number_per_sample_or_broadcast():
    network = randomised(UNet(TINY.config))
    x = torch.randn(3, 1, 8, 8)
    noise = torch.tensor([-1.0, 0.0, 0.7])
    together = network(x, noise)
    torch.testing.assert_close(network(x, noise.reshape(3, 1, 1, 1)), together)
    alone = [network(x[i : i + 1], noise[i]) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-5)
    assert float((network(x, noise[:1]) - together)[1:].abs().max()) > 1e-3


def test_a_pixel_hears_from_all_channels_and_from_afar():
    config = UNetConfig(shape=(3, 28, 20), widths=(8, 16), blocks=2, embedding=16)
    network = randomised(UNet(config))
    x = torch.randn(1, 3, 28, 20, requires_grad=True)
    network(x, torch.zeros(()))[0, 0, 14, 10].backward()
    gradient = x.grad[0].abs()
    assert float(gradient.amax((1, 2)).min()) > 1e-3
    assert float(gradient[:, 14 - 8].max()) > 1e-4


@pytest.mark.parametrize("shape", [(1, 8, 9), (1, 2, 2)])
def test_sizes_that_do_not_fold_are_refused(shape):
    with pytest.raises(ValueError, match="patch: 2"):
        UNetConfig(shape=shape)


def test_widths_that_groups_cannot_divide_are_refused():
    with pytest.raises(ValueError, match="widths: expected multiples of 8"):
        UNetConfig(shape=(1, 8, 8), widths=(12, 16))


def test_wrong_channel_count_is_refused_by_name():
    network = UNet(TINY.config)
    with pytest.raises(ValueError, match=r"x: this network takes \[n, 1, 8, 8\]"):
        network(torch.zeros(2, 3, 8, 8), torch.zeros(()))


# The objective.


def test_loss_is_the_weighted_denoising_error():
    network, sigma_data = randomised(UNet(TINY.config)).double(), 0.6
    rng = torch.Generator().manual_seed(1)
    x_0, noise = (
        torch.randn(5, 1, 8, 8, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    log_sigma = torch.randn(5, generator=rng, dtype=torch.float64)
    found = edm_loss(network, x_0, noise, log_sigma, sigma_data)
    sigma = log_sigma.exp().reshape(5, 1, 1, 1)
    denoiser = from_edm(artlib.VE(), network, sigma_data=sigma_data)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    residual = denoiser(x_0 + sigma * noise, sigma) - x_0
    torch.testing.assert_close(found, (weight * residual**2).mean())


def test_loss_of_the_zero_network_on_white_data_is_one():
    # c_out makes the target of F white with variance 1 at every noise level.
    rng = torch.Generator().manual_seed(0)
    x_0 = 0.5 * torch.randn(4000, 1, 4, 4, generator=rng)
    noise = torch.randn(x_0.shape, generator=rng)
    config = UNetConfig(shape=(1, 4, 4), widths=(8, 8), embedding=8)
    for log_sigma in (-5.0, -1.0, 3.0):
        levels = torch.full((4000,), log_sigma)
        loss = edm_loss(UNet(config), x_0, noise, levels, 0.5).detach()
        # 64,000 squares of standard normals: standard error sqrt(2 / 64000) = 0.0056
        assert abs(float(loss) - 1) < 0.025


def test_training_learns_the_posterior_mean_of_two_points():
    # Data +c or -c in all pixels: E[x_0 | x] = c tanh(c sum(x) / sigma^2).
    c, sigma = 0.5, 2.0
    signs = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
    recipe = replace(
        TINY,
        config=UNetConfig(shape=(1, 4, 4), widths=(16, 16), embedding=16),
        steps=400,
        batch=64,
        rate=4e-3,
        p_mean=0.7,
        p_std=0.2,
        ema=0.95,
    )
    trainer = Trainer(recipe, (c * signs).expand(2, 1, 4, 4).repeat(8, 1, 1, 1))
    for _ in trainer.train():
        pass
    denoiser = from_edm(
        artlib.VE(), trainer.average.eval(), sigma_data=trainer.sigma_data
    )
    rng = torch.Generator().manual_seed(5)
    noise = sigma * torch.randn(200, 1, 4, 4, generator=rng)
    x = (c * signs).repeat(100, 1, 1, 1) + noise
    exact = c * torch.tanh(c * x.sum((1, 2, 3)) / sigma**2)
    with torch.no_grad():
        found = denoiser(x, torch.tensor(sigma)).mean((1, 2, 3))
    error = float((found - exact).square().mean().sqrt())
    linear = c**2 / (c**2 + sigma**2) * x.mean((1, 2, 3))
    start = float((linear - exact).square().mean().sqrt())
    assert error < 0.2 * start, (error, start)


# Training runs.


def run(recipe, images, folder, stop=None):
    """A run that is killed after ``stop`` steps (the checkpoint is every 20th)."""
    trainer = Trainer(recipe, images)
    file = folder / "run.safetensors"
    for step in trainer.train(checkpoint=file, every=20):
        if step == stop:
            break
    return trainer


@pytest.mark.parametrize("stop", [20, 35, 59])
def test_killed_training_resumes_to_the_same_weights(images, tmp_path, stop):
    whole = Trainer(TINY, images)
    for _ in whole.train():
        pass
    run(TINY, images, tmp_path, stop)
    again = run(TINY, images, tmp_path)
    assert again.step == 60
    assert again.losses == whole.losses
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, again.average.state_dict()[name]), name
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            whole.average.parameters(), whole.network.parameters(), strict=True
        )
    )


def test_global_random_numbers_are_left_alone(images):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(iter(Trainer(TINY, images).train()))
    assert torch.equal(torch.rand(1), expected)


def test_a_checkpoint_of_another_run_is_refused(images, tmp_path):
    run(TINY, images, tmp_path, 20)
    file = tmp_path / "run.safetensors"
    before = file.read_bytes()
    other = Trainer(replace(TINY, rate=1e-2), images)
    with pytest.raises(StateFileError, match=r"another run \(recipe differ"):
        next(other.train(checkpoint=file))
    with pytest.raises(StateFileError, match=r"another run \(images differ"):
        next(Trainer(TINY, 0.5 * images).train(checkpoint=file))
    assert file.read_bytes() == before


class Poisoned(ScoreRecipe):
    """Returns NaN from a given step on."""

    after = 30

    def loss(self, network, images, sigma_data, rng):
        loss = super().loss(network, images, sigma_data, rng)
        type(self).after -= 1
        return loss if type(self).after > 0 else loss * float("nan")


def test_a_nan_loss_keeps_the_last_good_checkpoint(images, tmp_path):
    poisoned = Poisoned(**{**vars(TINY), "config": TINY.config})
    with pytest.raises(TrainingError, match="the loss is nan; lower the learning rate"):
        run(poisoned, images, tmp_path)
    kept = Trainer(TINY, images)
    kept.load(tmp_path / "run.safetensors")
    assert kept.step == 20
    assert all(torch.isfinite(p).all() for p in kept.network.parameters())


def test_a_full_disk_keeps_the_last_good_checkpoint(images, tmp_path, monkeypatch):
    written = []

    def write(path, data):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        path.write_bytes(data)

    monkeypatch.setattr(_state_file, "write_bytes", write)
    with pytest.raises(OSError, match=r"No space left.*older file is intact") as info:
        run(TINY, images, tmp_path)
    assert info.value.errno == errno.ENOSPC
    monkeypatch.undo()
    kept = Trainer(TINY, images)
    kept.load(tmp_path / "run.safetensors")
    assert kept.step == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * float("nan"), "values are NaN or infinite"),
        (lambda x: x[:, :, :4], r"expected \[N, 1, 8, 8\] for tiny"),
        (lambda x: x.long(), "expected a floating-point tensor"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(images, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer(TINY, change(images))


# Weight files.


def test_half_precision_costs_little(images, trained):
    network = load(trained)
    assert network.header["made"]["steps"] == 60
    trainer = Trainer(TINY, images)
    for _ in trainer.train():
        pass
    full = from_edm(artlib.VE(), trainer.average.eval(), sigma_data=trainer.sigma_data)
    x, t = network.sample_prior(4, seed=1), torch.tensor(1.0)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t), full(x, t), rtol=5e-3, atol=5e-3)


def test_the_record_beside_the_weights_says_how_they_were_made(trained):
    record = json.loads(trained.with_suffix(".json").read_text())
    assert record["recipe"]["steps"] == 60
    assert len(record["loss_per_50_steps"]) == 1
    assert record["parameters"] == sum(p.numel() for p in load(trained).parameters())
    assert {"date", "device", "seconds", "versions"} <= set(record["made"])
    assert not list(trained.parent.glob("*checkpoint*"))


def test_one_network_serves_every_process_through_its_noise_level(trained):
    ve = load(trained)
    for process in (artlib.VP(), artlib.RectifiedFlow(t_max=0.99)):
        other = load(trained, process=process)
        t = 0.6 * process.t_max
        alpha, level = float(process.alpha(t)), float(process.noise_level(t))
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        found = other(alpha * x, torch.tensor(t, dtype=torch.float64))
        expected = ve(x, torch.tensor(level, dtype=torch.float64))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_prior_has_the_spread_of_data_and_noise(trained):
    network = load(trained, process=artlib.VE(sigma_max=1.0))
    x = network.sample_prior(2000, seed=0)
    assert x.dtype == torch.float32
    expected = (network.sigma_data**2 + 1) ** 0.5
    assert float(x.std()) == pytest.approx(expected, rel=0.01)
    assert torch.equal(x[:3], network.sample_prior(3, seed=0))


def test_a_network_runs_the_whole_way(trained):
    network = load(trained)
    flow = artlib.ProbabilityFlow(network.process, network)
    schedule = artlib.art(flow, network.sample_prior(4), points=16, method="heun")
    x = artlib.sample(flow, network.sample_prior(2), schedule.grid(3), solver="heun")
    assert x.shape == (2, *network.sample_shape)


def test_flow_names_the_wrong_channel_count(trained):
    network = load(trained)
    flow = artlib.ProbabilityFlow(network.process, network)
    with pytest.raises(ValueError, match="check channels and size"):
        artlib.sample(flow, torch.zeros(2, 3, 8, 8), [80.0, 1.0, 0.0])


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "altered":
        data[-5] ^= 1
    else:
        data = bytearray(b"no safetensors file at all")
    target = path.with_name(f"{how}.safetensors")
    target.write_bytes(bytes(data))
    return target


@pytest.mark.parametrize("how", ["truncated", "altered", "foreign"])
def test_a_damaged_weight_file_is_refused(trained, how):
    path = damaged(trained, how)
    with pytest.raises(StateFileError, match=rf"{how}\.s.*: (truncated|damaged)"):
        load(path)


def test_files_of_another_kind_or_version_are_refused(trained, tmp_path):
    with pytest.raises(StateFileError, match="not a file of the kind"):
        load_autoencoder(trained)
    newer = tmp_path / "newer.safetensors"
    tensors, header = _state_file.read_state(trained, kind="artlib-zoo-network")
    _state_file.write_state(
        newer, tensors, header, kind="artlib-zoo-network", version=2
    )
    with pytest.raises(StateFileError, match="another version of the format"):
        load(newer)
    missing = tmp_path / "missing.safetensors"
    tensors.pop(next(iter(tensors)))
    _state_file.write_state(missing, tensors, header, kind="artlib-zoo-network")
    with pytest.raises(StateFileError, match="do not fit the network of its header"):
        load(missing)


def test_weights_beyond_half_precision_are_refused(tmp_path):
    network = UNet(TINY.config)
    with torch.no_grad():
        network.stem.weight += 1e6
    with pytest.raises(ValueError, match="half precision cannot"):
        save_network(tmp_path / "x.safetensors", network, {"name": "x"})
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_missing_weights_say_what_there_is(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"name: expected one of .*fashion-base"):
        load("fashion-bse")
    monkeypatch.setattr(artlib.zoo.networks, "WEIGHTS", tmp_path)
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path))
    monkeypatch.setitem(RECIPES, "tiny", TINY)
    with pytest.raises(FileNotFoundError, match=r"artlib\.zoo\.train tiny"):
        load("tiny")


@pytest.mark.parametrize("name", available())
def test_packaged_networks_denoise(name):
    network = load(name)
    recipe = RECIPES[name]
    asked = json.loads(json.dumps(recipe.to_dict()))
    made = network.header["recipe"]
    if not fully_trained(name):  # on a CPU: for less, the rest is the same
        asked |= {key: made[key] for key in ("steps", "batch", "rate", "ema")}
    assert made == asked
    if recipe.data == "fashion-latent":
        clean = load_autoencoder().encode(artlib.zoo.fashion_mnist("sample"))[:64]
    elif recipe.data == "cifar10":
        try:
            clean = artlib.zoo.cifar10("test")[:64]
        except FileNotFoundError as error:
            pytest.skip(str(error))
    else:
        clean = artlib.zoo.DATASETS[recipe.data]("sample")[:64]
    sigma = torch.tensor(network.sigma_data)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    x = clean + sigma * noise
    with torch.no_grad():
        error = float((network(x, sigma) - clean).square().mean())
    white = float((x / 2 - clean).square().mean())  # the best without knowing images
    assert error < (0.6 if recipe.data == "fashion-latent" else 0.25) * white


# The autoencoder.


def test_autoencoder_learns_and_its_codes_have_the_promised_spread(tmp_path):
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(60, 1, 1, 1, generator=rng) * 2 - 1  # grey squares
    images = images.expand(60, 1, 8, 8).clone()
    config = AutoencoderConfig(shape=(1, 8, 8), channels=2, width=8)
    recipe = AutoencoderRecipe(
        "grey", "fashion", config, steps=150, batch=32, rate=1e-2, warm_up=5, ema=0.9
    )
    path = command.train(recipe, images, tmp_path, progress=False)
    network = load_autoencoder(path)
    codes = network.encode(images)
    assert codes.shape == (60, 2, 2, 2)
    torch.testing.assert_close(
        codes.std((0, 2, 3)), torch.full((2,), LATENT_STD), rtol=0.01, atol=0
    )
    torch.testing.assert_close(codes.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.01)
    error = float((network.decode(codes) - images).square().mean())
    assert error < 0.1 * float(images.var())


def test_autoencoder_refuses_other_shapes():
    network = Autoencoder(AutoencoderConfig())
    with pytest.raises(ValueError, match=r"images: expected \[N, 1, 28, 28\]"):
        network.encode(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"codes: expected \[N, 4, 7, 7\]"):
        network.decode(torch.zeros(2, 1, 28, 28))


# The command.


def test_command_trains_and_prints_the_file(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "fashion-base", replace(TINY, name="fashion-base"))
    monkeypatch.setattr(command, "training_images", lambda chosen: images)
    arguments = ["fashion-base", "--out", str(tmp_path), "--device", "cpu", "--quiet"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == str(tmp_path / "fashion-base.safetensors")
    assert load(printed).name == "fashion-base"


def test_missing_trains_what_is_not_fully_trained(
    images, tmp_path, monkeypatch, capsys
):
    names = ("fashion-base", "mnist-base", "emoji-base")
    asked = {name: replace(TINY, name=name) for name in names}
    for name, chosen in asked.items():
        monkeypatch.setitem(RECIPES, name, chosen)
    monkeypatch.setattr(command, "RECIPES", asked)
    monkeypatch.setattr(command, "training_images", lambda chosen: images)
    out = ["--out", str(tmp_path), "--device", "cpu", "--quiet"]
    # Half the steps; as many images, in more steps; nothing.
    assert command.main(["fashion-base", "--steps", "30", "--ema", "0.5", *out]) == 0
    assert command.main(["mnist-base", "--steps", "120", "--batch", "4", *out]) == 0
    states = [fully_trained(name, tmp_path) for name in names]
    assert states == [False, True, False]
    kept = (tmp_path / "mnist-base.safetensors").read_bytes()
    header = load(tmp_path / "fashion-base.safetensors").header
    assert (header["made"]["steps"], header["recipe"]["ema"]) == (30, 0.5)
    capsys.readouterr()

    assert command.main(["missing", *out]) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(line).stem for line in printed] == ["fashion-base", "emoji-base"]
    assert (tmp_path / "mnist-base.safetensors").read_bytes() == kept
    assert all(fully_trained(name, tmp_path) for name in names)
    header = load(tmp_path / "fashion-base.safetensors").header
    assert (header["made"]["steps"], header["recipe"]["ema"]) == (60, TINY.ema)


def test_weights_that_do_not_say_how_they_were_made_are_left_alone(tmp_path):
    path = tmp_path / "fashion-base.safetensors"
    save_network(path, UNet(TINY.config), {"name": "fashion-base", "sigma_data": 1.0})
    assert fully_trained("fashion-base", tmp_path)


def test_command_reports_errors_and_fails(tmp_path, monkeypatch, capsys):
    def absent(chosen):
        raise FileNotFoundError("no copy of Fashion-MNIST")

    monkeypatch.setattr(command, "training_images", absent)
    assert command.main(["fashion-base", "--out", str(tmp_path)]) == 1
    assert "error: no copy of Fashion-MNIST" in capsys.readouterr().err


def test_where_the_weights_are_is_part_of_the_package():
    assert WEIGHTS.parent.name == "zoo"
