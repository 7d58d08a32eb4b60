"""The trained networks: weight files, and from a name to a denoiser.

Weights are half-precision safetensors with everything that is needed to use them in
the header (size of the network, standard deviation of its data, how it was trained).
A clone has those that were trained for this book under ``artlib/zoo/weights``; how each
one was trained, its loss curve, time and device stand beside it as JSON. Without a
clone they are fetched when first asked for (`artlib.zoo.cache`). They are kept in the
folder of `trained_folder`, where what a user trains is written and found too.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._common.tensor_file import (
    StateFileError,
    check_header,
    is_count,
    is_number,
    is_text,
    read_state,
    write_state,
)
from ..flow.denoisers import Denoiser, from_edm
from ..flow.processes import VE, Process
from .autoencoder import Autoencoder, AutoencoderConfig
from .cache import fetch, folders, kept
from .recipes import RECIPES, AutoencoderRecipe, recipe
from .shipped import CHECK_SUMS, shipped
from .unet import UNet, UNetConfig

_KIND = "artlib-zoo-network"
_AUTOENCODER_KIND = "artlib-zoo-autoencoder"
_FOLDER = "zoo"  # in the user's cache

WEIGHTS = Path(__file__).parent / "weights"
"""Where a clone has the packaged weights."""


def trained_folder() -> Path:
    """Where weights that a user trains are put and found: beside the data sets' cache.

    Raises:
        FileNotFoundError: If there is no such place.
    """
    if not (places := folders()):
        raise FileNotFoundError(
            "this user has no home folder; set ARTLIB_DATA to one, or name a folder "
            "with --out"
        )
    return places[0] / _FOLDER


def weight_file(name: str) -> Path | None:
    """The weight file of a network, fetched if it is packaged and not here.

    Returns:
        The file of the clone, or one that was trained or fetched here; None if there
        is none of that name.

    Raises:
        ConnectionError: If it cannot be fetched.
        ValueError: If another file came.
        OSError: If it cannot be kept.
    """
    if (here := _weights_here(name)) is not None:
        return here
    path = _shipped_path(name)
    return fetch(path, _FOLDER) if path in shipped() else None


def _weights_here(name: str) -> Path | None:
    """The weight file of a network on this machine, or None."""
    if (packaged := WEIGHTS / f"{name}.safetensors").is_file():
        return packaged
    return kept(_shipped_path(name), _FOLDER)


def _shipped_path(name: str) -> str:
    return f"weights/{name}.safetensors"


class ZooDenoiser(Denoiser):
    r"""A score network of the zoo as a denoiser ``D(x, t)`` of a process.

    Args:
        network: The raw network F.
        process: The process to sample under.
        header: Of its weight file.

    Attributes:
        name: Under which `load` finds it.
        sample_shape: Shape of a sample (channels, height, width).
        sigma_data: Standard deviation of its data.
        header: All that is known of it: recipe, training, data.
    """

    def __init__(self, network: UNet, process: Process, header: dict[str, Any]) -> None:
        sigma_data = float(header["sigma_data"])
        plain = from_edm(process, network, sigma_data=sigma_data)
        super().__init__(network, process, plain._convert)
        self.name: str = header["name"]
        self.sample_shape: tuple[int, int, int] = network.config.shape
        self.sigma_data = sigma_data
        self.header = header

    def sample_prior(
        self,
        n: int,
        *,
        seed: int | torch.Generator = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        r"""Noise at ``t_max``: :math:`N(0, \alpha^2\sigma_d^2 + \sigma^2)` per pixel.

        The exact prior is that of the data, whose mean and correlations matter little
        at :math:`\sigma_{max} \gg \sigma_d`.

        Args:
            n: Number of samples.
            seed: A seed or a CPU generator; equal on all devices.
            dtype: By default float32.

        Returns:
            [n, *sample_shape], on the device of the network.
        """
        rng = (
            seed
            if isinstance(seed, torch.Generator)
            else torch.Generator().manual_seed(seed)
        )
        z = torch.randn(n, *self.sample_shape, generator=rng, dtype=torch.float64)
        alpha, sigma = (
            float(f(self.process.t_max))
            for f in (self.process.alpha, self.process.sigma)
        )
        x = (alpha**2 * self.sigma_data**2 + sigma**2) ** 0.5 * z
        device = next(self.parameters()).device
        return x.to(device, dtype or torch.float32)


def load(
    name: str | os.PathLike[str],
    *,
    process: Process | None = None,
    device: torch.device | str = "cpu",
) -> ZooDenoiser:
    """A trained network as a denoiser.

    Args:
        name: A key of `RECIPES` whose weights are packaged or were trained here, or
            the path of a weight file written by ``python -m artlib.zoo.train``.
        process: The process to sample under, by default ``VE(0.002, 80)``; an EDM
            network serves any process through its noise level.
        device: Where to put it.

    Returns:
        A `ZooDenoiser` in single precision, in evaluation mode, without gradients in
        its parameters.

    Raises:
        ValueError: If there is no network of that name, or what was fetched is
            another file.
        FileNotFoundError: If its weights are not packaged: they have to be trained.
        ConnectionError: If they are packaged, not on this machine, and cannot be
            fetched; the message says what to do.
        StateFileError: If the weight file is damaged or not what it should be.

    Example:
        >>> import artlib
        >>> net = artlib.zoo.load("fashion-base")
        >>> flow = artlib.ProbabilityFlow(net.process, net)
    """
    path = _path(name)
    tensors, header = read_state(path, kind=_KIND, known=CHECK_SUMS)
    check_header(
        header,
        path,
        {
            "name": is_text,
            "sigma_data": lambda value: is_number(value, positive=True),
            "config": _is_size,
        },
    )
    network = _rebuild(
        lambda: UNet(UNetConfig.from_dict(header["config"])), tensors, path
    )
    return ZooDenoiser(network, process or VE(), header).to(device).eval()


def load_autoencoder(
    name: str | os.PathLike[str] = "fashion-autoencoder",
    *,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """A trained autoencoder.

    Args:
        name: A key of `RECIPES` whose weights are packaged or were trained here, or
            the path of a weight file written by ``python -m artlib.zoo.train``.
        device: Where to put it.

    Raises:
        ValueError: If there is no network of that name, or what was fetched is
            another file.
        FileNotFoundError: If its weights are not packaged: they have to be trained.
        ConnectionError: If they are packaged, not on this machine, and cannot be
            fetched; the message says what to do.
        StateFileError: If the weight file is damaged or not what it should be.
    """
    path = _path(name)
    tensors, header = read_state(path, kind=_AUTOENCODER_KIND, known=CHECK_SUMS)
    check_header(header, path, {"config": _is_size})
    network = _rebuild(
        lambda: Autoencoder(AutoencoderConfig.from_dict(header["config"])),
        tensors,
        path,
    )
    return network.to(device)


_Network = TypeVar("_Network", UNet, Autoencoder)

# Far above any network of the zoo; a header that asks for more is no such network's.
_LARGEST = 4096


def _is_size(config: Any) -> bool:
    """Whether a configuration holds numbers in which a network may be counted."""
    if not isinstance(config, dict):
        return False
    numbers: list[Any] = []
    for value in config.values():
        numbers += value if isinstance(value, list) else [value]
    return all(is_number(n) and 0 <= n <= _LARGEST for n in numbers)


def _rebuild(
    make: Callable[[], _Network], tensors: dict[str, Tensor], path: Path
) -> _Network:
    """A network with the weights of a file, frozen; refused if they do not fit."""
    try:
        # Without memory for it, as long as it is not known to be the right one.
        with torch.device("meta"):
            wanted = {key: t.shape for key, t in make().state_dict().items()}
        found = {key: t.shape for key, t in tensors.items()}
        wrong = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
        if wrong:
            raise ValueError(f"of another shape, missing or too many: {wrong[:3]}")
        network = make()
        network.load_state_dict({key: t.float() for key, t in tensors.items()})
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StateFileError(
            f"{path}: its weights do not fit the network of its header; train or fetch "
            f"it again ({str(error).splitlines()[0]})"
        ) from error
    network.requires_grad_(False).eval()
    return network


def available() -> list[str]:
    """Names of the score networks whose weights are packaged."""
    listed = shipped()
    return [
        name
        for name, made in RECIPES.items()
        if not isinstance(made, AutoencoderRecipe)
        and (
            _shipped_path(name) in listed or (WEIGHTS / f"{name}.safetensors").is_file()
        )
    ]


def fully_trained(name: str, folder: Path | None = None) -> bool:
    """Whether a network has been trained on as many images as its recipe asks for.

    A network may be packaged before that: trained for less, where there was no GPU.

    Args:
        name: A key of `RECIPES`.
        folder: Where its weights are; by default where `load` finds them on this
            machine, without fetching anything.

    Returns:
        False also if there are no weights; True if these do not say how they were made.

    Raises:
        ValueError: If there is no such recipe.
        StateFileError: If the weight file is damaged.
    """
    asked = recipe(name)
    path = folder / f"{name}.safetensors" if folder else _weights_here(name)
    if path is None or not path.is_file():
        return False
    autoencoder = isinstance(asked, AutoencoderRecipe)
    kind = _AUTOENCODER_KIND if autoencoder else _KIND
    _, header = read_state(path, kind=kind, known=CHECK_SUMS)
    if not {"made", "recipe"} <= header.keys():
        return True
    check_header(
        header,
        path,
        {
            "made": lambda made: isinstance(made, dict) and is_count(made.get("steps")),
            "recipe": lambda r: isinstance(r, dict) and is_count(r.get("batch")),
        },
    )
    seen = header["made"]["steps"] * header["recipe"]["batch"]
    return bool(seen >= asked.steps * asked.batch)


def save_network(
    path: str | os.PathLike[str], network: UNet | Autoencoder, header: dict[str, Any]
) -> None:
    """Write a weight file: half precision, atomically.

    Args:
        path: The file.
        network: Usually the moving average of a training run.
        header: ``name``, ``sigma_data`` and whatever else is known of it.

    Raises:
        OSError: If it cannot be written; an older file is then untouched.
        ValueError: If a weight is beyond half precision.
    """
    tensors = {key: t.half() for key, t in network.state_dict().items()}
    beyond = [key for key, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if beyond:
        raise ValueError(
            f"network: {beyond[:3]} hold values that half precision cannot; the "
            "training diverged, lower its learning rate"
        )
    header = {**header, "config": network.config.to_dict()}
    kind = _KIND if isinstance(network, UNet) else _AUTOENCODER_KIND
    write_state(path, tensors, header, kind=kind)


def _path(name: str | os.PathLike[str]) -> Path:
    if Path(name).suffix == ".safetensors":
        return Path(name)
    if str(name) not in RECIPES:
        raise ValueError(
            f"name: expected one of {list(RECIPES)} or the path of a .safetensors "
            f"file, got {str(name)!r}"
        )
    path = weight_file(str(name))
    if path is None:
        raise FileNotFoundError(
            f"{name}: its weights are not packaged; train it with: "
            f"python -m artlib.zoo.train {name}"
        )
    return path
