"""Checkpoints and weights: a check sum or a check covers every part of a file."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import artlib
from artlib._common import tensor_file as _state_file
from artlib._common.tensor_file import StateFileError, read_state, write_state
from artlib.rl.checkpoint import CheckpointError
from artlib.zoo import train as command
from artlib.zoo.features import features
from artlib.zoo.networks import WEIGHTS, load, load_autoencoder, save_network
from artlib.zoo.recipes import ScoreRecipe
from artlib.zoo.shipped import CHECK_SUMS
from artlib.zoo.training import Trainer
from artlib.zoo.unet import UNet, UNetConfig

TINY = ScoreRecipe(
    "tiny", "fashion", UNetConfig((1, 8, 8), widths=(8, 8)), steps=60, batch=4
)


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON at the start of a safetensors file, and the bytes of its tensors."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path: Path, head: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def alter(source: Path, target: Path, *, old: bool = False, **change: Any) -> Path:
    """A copy with other fields in its header; as artlib 0.1.0 wrote it, if asked."""
    head, data = split(source)
    state = json.loads(head["__metadata__"]["state"])
    state = {k: v for k, v in {**state, **change}.items() if v is not ...}
    head["__metadata__"]["state"] = json.dumps(state)
    if old:
        del head["__metadata__"]["sha256_of_all"]
    return join(target, head, data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.safetensors"
    tensors = {"a": torch.arange(6).half().reshape(2, 3), "b": torch.ones(2)}
    header = {"x": 1, "y": [1.5, math.inf], "z": {"b": 1, "a": "text"}}
    write_state(path, tensors, header, kind="kind")
    return path


def test_the_content_counts_and_not_how_it_is_written(file: Path) -> None:
    tensors, header = read_state(file, kind="kind")
    head, data = split(file)
    state = json.loads(head["__metadata__"]["state"])
    turned = dict(reversed(state.items()))
    head["__metadata__"]["state"] = json.dumps(turned, indent=3)
    other = join(file.with_name("other.safetensors"), head, data)
    again, same = read_state(other, kind="kind")
    assert same == header
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_every_part_of_an_altered_header_is_refused(file: Path) -> None:
    def change(head: dict[str, Any], part: str) -> None:
        meta = head["__metadata__"]
        if part == "type":
            head["a"]["dtype"] = "BF16"  # as many bytes, other numbers
        elif part == "shape":
            head["a"]["shape"] = [3, 2]
        elif part == "names":
            head["c"] = head.pop("a")
        elif part == "no list":
            meta["state"] = "[" * 100_000
        elif part == "no JSON":
            meta["state"] = "{"
        elif part == "none":
            del meta["state"]
        else:
            meta["state"] = json.dumps({**json.loads(meta["state"]), part: 2})

    whole = file.read_bytes()
    parts = ["type", "shape", "names", "no list", "no JSON", "none", "x", "y", "new"]
    for part in parts:
        file.write_bytes(whole)
        head, data = split(file)
        change(head, part)
        with pytest.raises(StateFileError, match=r"file\.safetensors: .*damaged"):
            read_state(join(file, head, data), kind="kind")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, True, "1"])
def test_what_is_no_finite_number_is_none(value: Any) -> None:
    assert not _state_file.is_number(value)
    assert _state_file.is_number(0.5)
    assert not _state_file.is_number(-0.5, positive=True)


def test_a_file_with_a_nan_is_refused(tmp_path: Path) -> None:
    for bad in (math.nan, math.inf):
        write_state(tmp_path / "x", {"w": torch.tensor([1.0, bad])}, {}, kind="k")
        with pytest.raises(StateFileError, match=r"\['w'\] hold NaN"):
            read_state(tmp_path / "x", kind="k")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StateFileError, match="no safetensors file but a pipe"):
        read_state(tmp_path / "pipe", kind="kind")


# Weights.


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.safetensors")), ids=str)
def test_packaged_weights_are_known_as_a_whole(path: Path, tmp_path: Path) -> None:
    head, _ = split(path)
    kind = head["__metadata__"]["format"]
    read_state(path, kind=kind, known=CHECK_SUMS)
    if "sha256_of_all" not in head["__metadata__"]:
        assert head["__metadata__"]["sha256"] in CHECK_SUMS
    read = {
        "artlib-zoo-network": load,
        "artlib-zoo-autoencoder": load_autoencoder,
        "artlib-zoo-features": features,
        "artlib-zoo-reference": features,
    }[kind]
    copy = alter(path, tmp_path / "copy.safetensors", name="another")
    with pytest.raises(StateFileError, match=r"copy\.safetensors: damaged, its header"):
        read(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma_data": "abc"}, "'abc' for sigma_data"),
        ({"sigma_data": -1.0}, "-1.0 for sigma_data"),
        ({"sigma_data": math.nan}, "nan for sigma_data"),
        ({"sigma_data": True}, "True for sigma_data"),
        ({"sigma_data": ...}, "lacks sigma_data"),
        ({"name": 3}, "3 for name"),
        ({"config": {"other": 1}}, "do not fit the network of its header"),
        ({"config": [1]}, r"\[1\] for config"),
        ({"config": {"shape": [1, 8, 8], "patch": 0}}, "do not fit the network"),
        ({"config": {"shape": [1, 8, 8], "widths": [8, 10**9]}}, "for config"),
        ({"config": {"shape": [1, 8, 8], "widths": [8, 16]}}, "do not fit"),
        ({"config": {"shape": [1, 8, 8], "widths": [8, 8.5]}}, "do not fit"),
    ],
)
def test_fields_of_an_old_weight_file_are_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.safetensors"
    torch.manual_seed(0)
    save_network(path, UNet(TINY.config), {"name": "tiny", "sigma_data": 0.5})
    old = tmp_path / "old.safetensors"
    assert load(alter(path, old, old=True)).sigma_data == 0.5
    with pytest.raises(StateFileError, match=rf"old\.safetensors: .*{message}"):
        load(alter(path, old, old=True, **change))


@pytest.mark.parametrize(
    "change", [{"measure": ...}, {"test_accuracy": 2}, {"reference_n": "x"}]
)
def test_fields_of_an_old_feature_network_are_checked(
    change: dict[str, Any], tmp_path: Path
) -> None:
    kind = "artlib-zoo-features"
    tensors, header = read_state(WEIGHTS / "lenet-mnist.safetensors", kind=kind)
    tensors["head.bias"] = tensors["head.bias"] + 1  # no packaged one
    path, old = tmp_path / "net.safetensors", tmp_path / "old.safetensors"
    write_state(path, tensors, header, kind=kind)
    features(alter(path, old, old=True))
    with pytest.raises(StateFileError, match=f"old.*{next(iter(change))}"):
        features(alter(path, old, old=True, **change))


# Checkpoints.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": 7}, "its header says iteration 7 of 8, its optimiser"),
        ({"iteration": 3.5}, "3.5 for iteration"),
        ({"iterations": 2}, "iteration 4 of 2"),
        ({"multiplier": math.nan}, "nan for multiplier"),
        ({"multiplier": None}, "None for multiplier"),
        ({"nfe": "x"}, "'x' for nfe"),
        ({"nfe": -1}, "-1 for nfe"),
        ({"watch": [1]}, r"\[1\] for watch"),
        ({"watch": {"recent": 1.0, "best": "x", "warned": False}}, "'x' for best"),
        ({"watch": {"recent": 1.0, "best": 1.0}}, "lacks warned"),
        ({"problem": ...}, "lacks problem"),
        ({"other": 1}, "incomplete"),
    ],
)
def test_fields_of_an_old_checkpoint_are_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    process = artlib.VE(0.01, 10.0)
    target = artlib.GaussianMixture([[-1.0], [0.8]], [0.1, 0.3], [0.4, 0.6])
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    x_T = torch.linspace(-10, 10, 6, dtype=torch.float64)[:, None]

    def trainer() -> artlib.ActorCritic:
        return artlib.ActorCritic(
            flow, x_T, steps=3, points=6, hidden=2, warm_up=2, constraint="multiplier"
        )

    path, old = tmp_path / "run.safetensors", tmp_path / "old.safetensors"
    for record in trainer().train(8, checkpoint=path, every=4):
        if record.iteration == 4:
            break
    heir = trainer()
    heir.load(alter(path, old, old=True))
    assert heir.iteration == 4
    for written_by_0_1_0 in (True, False):
        heir = trainer()
        expected = message if written_by_0_1_0 else "header"
        with pytest.raises(CheckpointError, match=rf"old\.s.*{expected}"):
            heir.load(alter(path, old, old=written_by_0_1_0, **change))
        assert heir.iteration == 0


@pytest.mark.parametrize(
    "change",
    [
        {"step": 30},
        {"step": -1},
        {"step": "x"},
        {"losses": [1.0, 2.0]},
        {"losses": ["x"]},
        {"seconds": math.nan},
        {"sigma_data": ...},
        {"recipe": 1},
    ],
)
def test_fields_of_an_old_training_run_are_checked(
    change: dict[str, Any], tmp_path: Path
) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 8, 8, generator=rng)
    path, old = tmp_path / "run.safetensors", tmp_path / "old.safetensors"
    for step in Trainer(TINY, images).train(checkpoint=path, every=20):
        if step == 20:
            break
    heir = Trainer(TINY, images)
    heir.load(alter(path, old, old=True))
    assert heir.step == 20
    for written_by_0_1_0 in (True, False):
        heir = Trainer(TINY, images)
        with pytest.raises(StateFileError, match=r"old\.safetensors"):
            heir.load(alter(path, old, old=written_by_0_1_0, **change))
        assert heir.step == 0


# Where training writes.


def test_what_a_user_trains_goes_to_the_cache_and_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ARTLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(artlib.zoo.networks, "WEIGHTS", tmp_path / "package")
    monkeypatch.setitem(command.RECIPES, "tiny", TINY)
    images = torch.rand(16, 1, 8, 8)
    monkeypatch.setattr(command, "training_images", lambda chosen: images)
    seen = []
    save = _state_file.write_bytes

    def look(path: Path, data: bytes) -> None:
        seen.append(Path(path))
        save(path, data)

    monkeypatch.setattr(_state_file, "write_bytes", look)
    argv = ["tiny", "--steps", "3", "--device", "cpu", "--quiet"]
    assert command.main([*argv, "--checkpoints", str(tmp_path / "kept")]) == 0
    made = tmp_path / "data" / "zoo" / "tiny.safetensors"
    assert capsys.readouterr().out.strip() == str(made)
    assert seen == [tmp_path / "kept" / "tiny.checkpoint.safetensors", made]
    assert load("tiny").name == "tiny"
    assert not (tmp_path / "package").exists()
    made.unlink()
    made.mkdir()  # found out before anything is learned
    assert command.main(argv) == 1
    assert "is a folder" in capsys.readouterr().err
    assert len(seen) == 2
