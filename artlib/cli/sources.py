"""Where the command line gets flows and schedules from.

Nothing is downloaded and nothing unpickled: networks come from the zoo, from a local
diffusers folder with safetensors, or from the user's own Python module.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._common.files import check_output, write_bytes
from ..flow.flow import ProbabilityFlow
from ..flow.processes import VE, VP, Process, RectifiedFlow


class InputError(ValueError):
    """What was given on the command line cannot be used; the message says why."""


@dataclass(frozen=True)
class Source:
    """A flow together with what it takes to start it.

    Attributes:
        flow: The flow.
        shape: Shape of one sample.
        label: What to call it.
        device: Where its network is.
    """

    flow: ProbabilityFlow
    shape: tuple[int, ...]
    label: str
    device: torch.device

    def noise(self, n: int, seed: int) -> Tensor:
        """Draws of x at t_max: N(0, sigma(t_max)^2), float64, drawn on the CPU."""
        process = self.flow.process
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(n, *self.shape, generator=rng, dtype=torch.float64)
        return (z * process.sigma(process.t_max)).to(self.device)


_PROCESSES: dict[str, Callable[..., Process]] = {
    "ve": VE,
    "vp": VP,
    "rf": RectifiedFlow,
}


def parse_process(text: str) -> Process:
    """A process from ``ve:0.002,80``, ``vp:0.1,20`` or ``rf:0.001,0.99``.

    Raises:
        InputError: If it is none of these.
    """
    name, _, rest = text.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
        return _PROCESSES[name](*numbers)
    except (KeyError, TypeError, ValueError) as error:
        why = "" if isinstance(error, KeyError) else f" ({error})"
        raise InputError(
            f"--process: cannot read {text!r}{why}; write ve:SIGMA_MIN,SIGMA_MAX, "
            "vp:BETA_MIN,BETA_MAX or rf:T_MIN,T_MAX"
        ) from error


def load_source(
    name: str,
    *,
    process: str | None,
    shape: tuple[int, ...] | None,
    class_label: int | None,
    condition: str | None,
    guidance: float,
    device: torch.device,
    guidance_rescale: float = 0.0,
    timestep_scale: float | None = None,
) -> Source:
    """A flow from ``module:name``, a diffusers folder or the name of a zoo network.

    Args:
        name: Which.
        process: See `parse_process`; for a zoo network, which serves any, or a
            denoiser that does not say its own.
        shape: Overrides the source's own.
        class_label: For a class-conditional network in diffusers format.
        condition: A safetensors file with further arguments of such a network.
        guidance: Factor of classifier-free guidance.
        device: Where the network goes.
        guidance_rescale: As `artlib.adapters.diffusers.denoiser` has it.
        timestep_scale: The same.

    Raises:
        InputError: If there is no such thing, or something about it is not known.
    """
    wanted = parse_process(process) if process else None
    given = (class_label, condition, timestep_scale)
    conditioned = any(v is not None for v in given) or guidance != 1 or guidance_rescale
    own_shape: tuple[int, ...] | None
    if Path(name).is_dir():
        options = {
            "guidance": guidance,
            "guidance_rescale": guidance_rescale,
            "timestep_scale": timestep_scale,
        }
        network, own_shape = _diffusers(Path(name), class_label, condition, options)
    elif conditioned:
        raise InputError(
            "--class-label, --condition, --guidance, --guidance-rescale and "
            "--timestep-scale go with a diffusers folder; for "
            f"{name!r} build the condition into the denoiser"
        )
    elif ":" in name and not name.startswith("zoo:"):
        network, own_shape = _from_module(name)
    else:
        network, own_shape = _zoo(name.removeprefix("zoo:"), wanted)
    known = getattr(network, "process", None)
    if known is None:
        known = wanted
    elif not isinstance(known, Process):
        raise InputError(
            f"{name}: its .process is a {type(known).__name__}, expected a process of "
            "artlib, such as artlib.VE(0.002, 80)"
        )
    if wanted is not None and known != wanted:
        # Another one would be a denoiser of noise that it was not made for.
        raise InputError(f"--process: {name} has its own, {known}; leave --process out")
    if not isinstance(known, Process):
        raise InputError(
            f"{name}: it has no .process, so the noise it was trained under is not "
            "known; pass --process, for example ve:0.002,80"
        )
    sizes = own_shape if shape is None else shape
    if sizes is None:
        raise InputError(
            f"{name}: it has no .sample_shape; pass --shape, for example 3,32,32"
        )
    if not isinstance(sizes, list | tuple) or not all(
        isinstance(n, int) and n > 0 for n in sizes
    ):
        raise InputError(
            f"{name}: its .sample_shape is {sizes!r:.60}, expected whole numbers, such "
            "as (3, 32, 32)"
        )
    if isinstance(network, nn.Module):
        network = network.to(device).eval()
    flow = ProbabilityFlow(known, network)
    return Source(flow, tuple(sizes), name, device)


STDOUT = "-"
"""In place of a file's name: standard output, or for what is read standard input."""


def check_free(path: str | Path, force: bool) -> None:
    """Refuse to write over a file, or where nothing can be written.

    Args:
        path: Of a file, or `STDOUT`.
        force: Whether a file that is there may be replaced.

    Raises:
        InputError: Before anything is computed.
    """
    if path == STDOUT:
        return
    try:
        check_output(path, replace=force)
    except FileExistsError as error:
        message = f"{path}: exists already; pass --force to replace it"
        raise InputError(message) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def deliver(path: str, content: str | bytes) -> None:
    """Write what a command makes, to a file or to standard output as it is.

    Args:
        path: Of the file, or `STDOUT`.
        content: All of it; text is ASCII.
    """
    if path != STDOUT:
        write_bytes(path, content.encode() if isinstance(content, str) else content)
    elif isinstance(content, str):
        print(content, end="")
    elif sys.stdout is not None:
        sys.stdout.buffer.write(content)


def place(error: BaseException) -> str:
    """Where in the user's own code an error comes from, in brackets, or nothing."""
    others = [Path(__file__).parent.parent, Path(sys.prefix), Path(sys.base_prefix)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and not any(other in Path(frame.filename).parents for other in others)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _from_module(name: str) -> tuple[Any, Any]:
    module_name, _, attribute = name.partition(":")
    parts = [*module_name.removesuffix(".py").split("."), attribute]
    if module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise InputError(
            f"{name}: expected module:name, two names of Python without .py or a "
            "folder, such as mymodule:make"
        )
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name}: {error}; modules are looked for in the current folder and in "
            "what is installed"
        ) from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}: {module_name} fails: {_named(error)}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError as error:
        message = f"{name}: the module {module_name} has no {attribute!r}"
        raise InputError(message) from error
    made = inspect.isclass(found) or not hasattr(found, "process")
    if made and callable(found) and _takes_nothing(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise InputError(f"{name}: {attribute}() fails: {_named(error)}") from error
    if not callable(found) or inspect.isclass(found):
        what = "a class" if inspect.isclass(found) else type(found).__name__
        raise InputError(
            f"{name}: expected a denoiser D(x, t), or a function without arguments "
            f"that returns one, got {what}"
        )
    return found, getattr(found, "sample_shape", None)


def _named(error: BaseException) -> str:
    """An error of the user's module in one sentence."""
    return f"{type(error).__name__}: {error}{place(error)}"


def _takes_nothing(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(p.default is not p.empty for p in parameters)


def _zoo(name: str, process: Process | None) -> tuple[Any, tuple[int, ...] | None]:
    zoo = importlib.import_module("artlib.zoo")
    load = getattr(zoo, "load", None)
    if load is None:
        raise InputError(f"{name}: no such folder, and there is no zoo")
    try:
        network = load(name) if process is None else load(name, process=process)
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise InputError(
            f"{name}: neither a folder, nor module:name, nor a zoo network ({error})"
        ) from error
    return network, getattr(network, "sample_shape", None)


def _diffusers(
    folder: Path,
    class_label: int | None,
    condition: str | None,
    options: dict[str, float | None],
) -> tuple[Any, tuple[int, ...]]:
    """The network of a pipeline's folder as a denoiser, and its sample shape."""
    from ..adapters.diffusers import denoiser

    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"{folder}: it has no model_index.json; expected the folder that "
            "pipe.save_pretrained(...) of diffusers writes"
        )
    parts = read_json(index)
    kind = next((k for k in ("unet", "transformer") if parts.get(k)), None)
    if kind is None:
        raise InputError(f"{folder}: it names neither a unet nor a transformer")
    network = load_component(folder, kind, parts[kind], use_safetensors=True)
    scheduler = load_component(folder, "scheduler", parts.get("scheduler"))
    given, empty = _condition(class_label, condition)
    more: dict[str, Any] = dict(options)
    net = denoiser(network, scheduler, condition=given, unconditional=empty, **more)
    config = network.config
    size = getattr(config, "sample_size", None)
    channels = getattr(config, "in_channels", None)
    if size is None or channels is None:
        raise InputError(f"{folder}: its {kind} names no sample_size; pass --shape")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return net, (channels, *sides)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, with a byte-order mark or without.

    Raises:
        InputError: If it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {found!r:.60}")
    return found


def load_component(folder: Path, name: str, entry: Any, **options: Any) -> Any:
    """A part of a pipeline, by the class that model_index.json names.

    Args:
        folder: The pipeline's folder.
        name: The part's own folder in it, or empty.
        entry: ``[library, class]``.
        **options: For ``from_pretrained``.

    Raises:
        InputError: If diffusers is missing, or the part is none of its classes or
            cannot be read.
    """
    try:
        import diffusers
    except ImportError as error:
        raise InputError(
            f"{folder}: reading it needs diffusers; "
            'install it with pip install "art-diffusion[diffusers]"'
        ) from error
    library, class_name = entry if isinstance(entry, list) else (None, None)
    kind = getattr(diffusers, str(class_name), None) if library == "diffusers" else None
    if kind is None:
        raise InputError(f"{folder}: its {name} {entry!r} is no class of diffusers")
    try:
        return kind.from_pretrained(
            folder, subfolder=name, local_files_only=True, **options
        )
    except Exception as error:  # of whatever this class makes of its files
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder}/{name}: cannot be loaded: {first}") from error


def _condition(
    class_label: int | None, path: str | None
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Arguments of the network, and the same for its unconditional half."""
    given: dict[str, Tensor] = {}
    empty: dict[str, Tensor] = {}
    if class_label is not None:
        given["class_labels"] = torch.tensor([class_label])
    if path is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"--condition: {path}: {error}") from error
        for key, value in tensors.items():
            name = key.removeprefix("unconditional.")
            (given if name == key else empty)[name] = value
    return given or None, empty or None
