"""A node for ComfyUI: choose a schedule and a number of steps, get SIGMAS.

And one for plans, that gives a MODEL too. The file is both; its first line is what an
installed copy is known by. `artlib.adapters.comfyui.install` copies it into a folder of
its own, as ``__init__.py`` beside the files it offers; that folder goes into ComfyUI's
``custom_nodes``, and artlib is installed into ComfyUI's Python. In the graph, connect
the node's SIGMAS to *SamplerCustom*, and to its ``model`` the MODEL that is sampled:
then the coordinate is the model's, and a schedule that leaves its range is refused.

Nothing of ComfyUI is imported. Of the MODEL only its ``model_sampling`` is looked at,
which says by the names of its classes what the network predicts. Two things are
ComfyUI's own, whatever the schedule: models with a table of training steps are told the
one nearest to a noise level, and where they start from their highest level, sigma, it
is with noise of size ``(1 + sigma**2) ** 0.5``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, cat, empty, zeros

from artlib import ExportError, Plan, Schedule
from artlib.adapters.k_diffusion import to_k_diffusion
from artlib.adapters.told_model import told

__all__ = [
    "NODE_CLASS_MAPPINGS",
    "NODE_DISPLAY_NAME_MAPPINGS",
    "ARTPlan",
    "ARTSigmas",
]

_STEPS = 10_000
_GRID = 1_000_000
"""Steps of the whole grid, of which ``denoise`` takes the last ones."""

_COORDINATES = {"of the schedule": None, "sigma / alpha": "level", "flow": "flow"}

_COUNTED_IN = {
    "EPS": "level",
    "V_PREDICTION": "level",
    "V_PREDICTION_DDPM": "level",
    "EDM": "level",
    "X0": "level",
    "COSMOS_RFLOW": "level",
    "CONST": "flow",
}
"""By the class that says what a model of ComfyUI predicts, what its sigmas are."""

_SAMPLERS = ("euler", "heun", "dpmpp_2m")
"""Solvers whose steps are those of ComfyUI's sampler of that name."""


class ARTSigmas:
    """The node: schedule file, steps and denoise in, SIGMAS out."""

    CATEGORY: ClassVar[str] = "sampling/custom_sampling/schedulers"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("SIGMAS",)
    FUNCTION: ClassVar[str] = "get_sigmas"
    FOLDER: ClassVar[Path] = Path(__file__).resolve().parent

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """What the node asks for; the schedules are the JSON files of its folder."""
        denoise = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "schedule": (cls._names(),),
                "steps": ("INT", {"default": 10, "min": 1, "max": _STEPS}),
                "denoise": ("FLOAT", denoise),
                "coordinate": (list(_COORDINATES),),
            },
            "optional": {"model": ("MODEL",)},
        }

    @classmethod
    def IS_CHANGED(
        cls,
        schedule: str | None = None,
        steps: int | None = None,
        denoise: float | None = None,
        coordinate: str | None = None,
        model: object = None,
    ) -> str:
        """What ComfyUI keeps a result by, beside the inputs: the file's content.

        What another node gives is not known yet and comes as None.

        Args:
            schedule: As in `get_sigmas`.
            steps: Not looked at; ComfyUI compares the inputs itself.
            denoise: The same.
            coordinate: The same.
            model: The same.

        Returns:
            The file's SHA-256, or that there is none; of all files where it is not
            known which one it will be.
        """
        return _content(cls.FOLDER, cls._names(), schedule)

    @classmethod
    def _names(cls) -> list[str]:
        return _files(cls.FOLDER, plans=False)

    def get_sigmas(
        self,
        schedule: str,
        steps: int,
        denoise: float = 1.0,
        coordinate: str = "of the schedule",
        model: Any = None,
    ) -> tuple[Tensor]:
        """The sigmas of ``steps`` steps.

        Args:
            schedule: Name of a file in the node's folder.
            steps: Number of steps that are taken.
            denoise: Share of the way; 0 gives an empty list, as ComfyUI's own do.
            coordinate: What the model counts noise in; one of the node's choices.
            model: The MODEL that is sampled, or None to check nothing.

        Returns:
            A tuple of float32 [steps + 1], on the CPU.

        Raises:
            ExportError: If the grid cannot be given in that coordinate, is not in the
                model's, or leaves the range of noise that the model knows.
            TypeError: If ``steps`` is no whole number.
            ValueError: If there is no such schedule, or a number is out of its range.
        """
        if schedule not in (names := self._names()):
            raise ValueError(
                f"schedule: expected the name of a file in {self.FOLDER}, one of "
                f"{names}, got {schedule!r}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps: expected a whole number, got {steps!r}")
        if not 1 <= steps <= _STEPS:
            raise ValueError(f"steps: expected 1 to {_STEPS}, got {steps}")
        if not isinstance(denoise, int | float) or not 0 <= denoise <= 1:
            raise ValueError(f"denoise: expected a share in [0, 1], got {denoise!r}")
        if steps > _GRID * denoise > 0:
            raise ValueError(
                f"denoise: {denoise} of the way in {steps} steps would need a grid of "
                f"more than {_GRID}; take fewer steps or a larger share"
            )
        if coordinate not in _COORDINATES:
            raise ValueError(
                f"coordinate: expected one of {list(_COORDINATES)}, got {coordinate!r}"
            )
        kind: Any = _COORDINATES[coordinate]
        if model is not None:
            kind = _agreed(kind, _coordinate_of(model))
        if denoise == 0:
            return (empty(0),)
        grid = Schedule.load(self.FOLDER / schedule)
        sigmas = to_k_diffusion(grid, steps, denoise=denoise, coordinate=kind)
        if model is not None:
            _check_range(sigmas, model, "schedule", schedule)
        return (sigmas,)


def _files(folder: Path, *, plans: bool) -> list[str]:
    """Names of the plans in a folder, or of all its other JSON files."""
    found = sorted(path for path in folder.glob("*.json") if path.is_file())
    return [path.name for path in found if _is_plan(path) == plans]


def _is_plan(path: Path) -> bool:
    with path.open("rb") as stream:
        return b'"artlib-plan"' in stream.read(200)


def _content(folder: Path, names: list[str], chosen: str | None) -> str:
    """What `IS_CHANGED` gives: the content of the chosen file, or of all of them."""
    if chosen is None:
        return " ".join(f"{name} {_content(folder, names, name)}" for name in names)
    if chosen not in names:
        return "missing"
    return hashlib.sha256((folder / chosen).read_bytes()).hexdigest()


def _sampling(model: Any) -> Any:
    """What a MODEL of ComfyUI says about its noise.

    Raises:
        TypeError: If it is no MODEL.
    """
    get = getattr(model, "get_model_object", None)
    if not callable(get):
        raise TypeError(
            f"model: expected a MODEL of ComfyUI, got {type(model).__name__}; connect "
            "the output of a checkpoint loader, or nothing"
        )
    return get("model_sampling")


def _coordinate_of(model: Any) -> str:
    """What a model's sigmas are.

    Raises:
        ExportError: If that is not known.
    """
    names = [kind.__name__ for kind in type(_sampling(model)).__mro__]
    known = [name for name in names if name in _COUNTED_IN]
    if not known or any(name.startswith("IMG_TO_IMG") for name in names):
        raise ExportError(
            f"model: it is not known what the sigmas of {', '.join(names[:3])} are, or "
            "it is not sampled from noise; leave the node's model unconnected to get "
            "the list all the same"
        )
    return _COUNTED_IN[known[0]]


def _agreed(wanted: str | None, own: str) -> str:
    """The model's coordinate, if no other one is asked for."""
    if wanted not in (None, own):
        named = {value: name for name, value in _COORDINATES.items()}
        raise ExportError(
            f"coordinate: {named[wanted]!r} is not that of the model, whose sigmas are "
            f"{named[own]!r}; choose 'of the schedule', which follows the model"
        )
    return own


def _check_range(sigmas: Tensor, model: Any, what: str, name: str) -> None:
    """Refuse noise that a model does not know (1e-4 for round-off).

    Args:
        sigmas: Descending, with the 0 at the end.
        model: The MODEL.
        what: What it is, "schedule" or "plan".
        name: Of its file.

    Raises:
        ExportError: If the list leaves the model's range.
    """
    sampling = _sampling(model)
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    first, last = float(sigmas[0]), float(sigmas[-2])
    if _coordinate_of(model) == "flow":
        low = 0.0  # told as it is; the table behind it has no part in that
    if first > high * (1 + 1e-4) or last < low * (1 - 1e-4):
        raise ExportError(
            f"{what}: {name} visits sigmas from {first:.6g} down to {last:.6g}, and "
            f"the model knows {low:.6g} to {high:.6g}; take a {what} that was learned "
            "on this model, or on a process of its range"
        )


class ARTPlan:
    """The node for plans: MODEL and a plan's file in, MODEL and SIGMAS out.

    The MODEL that comes out tells its network the plan's levels at the plan's nodes.
    Sample it with the plan's own solver, which the node names: ``euler``, ``heun`` or
    ``dpmpp_2m``. What ComfyUI lists as ``uni_pc``, ``ipndm`` and ``deis`` takes other
    steps than `artlib.sample`, and its ``dpmpp_2m`` does on models of flow matching.
    """

    CATEGORY: ClassVar[str] = "sampling/custom_sampling/schedulers"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "SIGMAS", "STRING")
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("model", "sigmas", "sampler_name")
    FUNCTION: ClassVar[str] = "get_model"
    FOLDER: ClassVar[Path] = Path(__file__).resolve().parent

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """What the node asks for; the plans are JSON files of its folder."""
        return {"required": {"model": ("MODEL",), "plan": (cls._names(),)}}

    @classmethod
    def IS_CHANGED(cls, model: object = None, plan: str | None = None) -> str:
        """What ComfyUI keeps a result by, beside the inputs: the file's content.

        Args:
            model: Not looked at; ComfyUI compares the inputs itself.
            plan: As in `get_model`, or None where another node gives it.

        Returns:
            As `ARTSigmas.IS_CHANGED`.
        """
        return _content(cls.FOLDER, cls._names(), plan)

    @classmethod
    def _names(cls) -> list[str]:
        return _files(cls.FOLDER, plans=True)

    def get_model(self, model: Any, plan: str) -> tuple[Any, Tensor, str]:
        """The model that is told, the sigmas, and the solver's name.

        Args:
            model: The MODEL.
            plan: Name of a file in the node's folder.

        Returns:
            A clone of the model, float32 [K + 1] on the CPU, and a name.

        Raises:
            ExportError: If no sampler of ComfyUI takes the plan's steps on this model,
                or the plan leaves the range of noise that the model knows.
            ScheduleFormatError: If the file is no plan.
            TypeError: If ``model`` is no MODEL.
            ValueError: If there is no such file.
        """
        if plan not in (names := self._names()):
            raise ValueError(
                f"plan: expected the name of a file in {self.FOLDER}, one of {names}, "
                f"got {plan!r}"
            )
        coordinate: Any = _coordinate_of(model)
        chosen = Plan.load(self.FOLDER / plan)
        solver = str(chosen.solver)
        if solver not in _SAMPLERS:
            raise ExportError(
                f"plan: no sampler of ComfyUI takes the steps of {solver}; make the "
                f"plan for one of {', '.join(_SAMPLERS)}"
            )
        patched = model.clone()
        before = patched.model_options.get("model_function_wrapper")
        # Asked for levels alone.
        levels = told(chosen, patched.clone, coordinate=coordinate)
        asked = levels.levels(levels.sigmas[:-1])
        for seen in (levels.sigmas, asked.sort(descending=True).values):
            _check_range(cat([seen[seen > 0], zeros(1)]), model, "plan", plan)

        def wrapper(apply_model: Any, given: dict[str, Any]) -> Any:
            x, sigma = levels.moved(given["input"], given["timestep"])
            if before is not None:
                return before(apply_model, {**given, "input": x, "timestep": sigma})
            return apply_model(x, sigma, **given["c"])

        patched.set_model_unet_function_wrapper(wrapper)
        return patched, levels.sigmas, solver


NODE_CLASS_MAPPINGS = {"ARTSigmas": ARTSigmas, "ARTPlan": ARTPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"ARTSigmas": "ART schedule", "ARTPlan": "ART plan"}
