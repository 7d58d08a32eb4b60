"""Training a network of the zoo, resumably.

One step draws a batch of images, asks the recipe for its loss, and takes an Adam step
with clipped gradients. What is kept is the exponential moving average of the weights.

On a GPU, images and network are there, the optimiser is fused and the average is taken
of all weights at once. With ``draws="device"`` the noise is drawn there too, so that no
step waits for the CPU; ``bf16`` and ``compiled`` make the network itself faster.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._common.checks import check_samples, positive_int
from .._common.errors import TrainingError
from .._common.files import check_output
from .._common.tensor_file import (
    Rule,
    StateFileError,
    check_header,
    is_count,
    is_number,
    read_state,
    write_state,
)
from .recipes import Recipe

_KIND = "artlib-zoo-training"
_CHECKED = 50
"""Steps between looks at the loss: each look waits for the device."""


_RULES: dict[str, Rule] = {
    "recipe": lambda value: isinstance(value, dict),
    "step": is_count,
    "steps": is_count,
    "losses": lambda value: isinstance(value, list) and all(map(is_number, value)),
    "seconds": lambda value: is_number(value) and value >= 0,
    "sigma_data": lambda value: is_number(value, positive=True),
}


class Trainer:
    """A training run: network, moving average, optimiser and random numbers.

    On one device and thread count a run that was stopped and continued gives the same
    bits as one that was not. A run may also be continued on another device; where its
    random numbers cannot go on there, as with ``draws="device"``, others take over.

    Args:
        recipe: What to train.
        images: The training set [N, *shape], float32.
        device: Where.
        steps: Other than the recipe's number of steps.
        draws: Where batches and noise are drawn: ``"cpu"``, the same numbers for every
            device, or ``"device"``, which is faster on a GPU.
        bf16: Whether the network computes in bfloat16 where that is safe (autocast);
            weights, loss and optimiser stay in float32.
        compiled: Whether a score network is compiled by `torch.compile` first.

    Attributes:
        network: The network as trained.
        average: Its exponential moving average.
        sigma_data: Standard deviation of the images.
        step: Steps done.
        losses: Mean loss of each `_CHECKED` steps.
        seconds: Time spent, over all the pieces of an interrupted run.

    Raises:
        ValueError: If the images are not finite or of another shape, or ``draws`` is
            no such place.
    """

    def __init__(
        self,
        recipe: Recipe,
        images: Tensor,
        *,
        device: torch.device | str = "cpu",
        steps: int | None = None,
        draws: Literal["cpu", "device"] = "cpu",
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        images = check_samples(images, "images").float()
        if tuple(images.shape[1:]) != recipe.config.shape:
            raise ValueError(
                f"images: expected [N, {', '.join(map(str, recipe.config.shape))}] for "
                f"{recipe.name}, got {tuple(images.shape)}"
            )
        if draws not in ("cpu", "device"):
            raise ValueError(f"draws: expected 'cpu' or 'device', got {draws!r}")
        self.recipe = recipe
        self.bf16 = bf16
        self.device = torch.device(device)
        self.steps = positive_int(recipe.steps if steps is None else steps, "steps")
        self.images = images.to(self.device)
        self.sigma_data = float(images.double().std())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.network = recipe.build().to(self.device)
        # A fifth faster on the CPU, and what GPUs prefer.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network)
        self.average.eval()
        if compiled:
            self.network.compile()
        self._fused = self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=recipe.rate,
            betas=(0.9, 0.99),
            fused=self._fused or None,
        )
        self._weights: list[Tensor] = list(self.network.parameters())
        self._averaged: list[Tensor] = list(self.average.parameters())
        place = self.device if draws == "device" else torch.device("cpu")
        self._rng = torch.Generator(place).manual_seed(recipe.seed)
        self.step = 0
        self.losses: list[float] = []
        self.seconds = 0.0
        self._recent = torch.zeros((), device=self.device)

    def train(
        self,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        every: int = 1000,
        progress: bool = False,
    ) -> Iterator[int]:
        """Train to the end, yielding the number of steps done after each one.

        Args:
            checkpoint: A file. If it exists, training continues from it; it is
                rewritten every ``every`` steps and at the end.
            every: Steps between checkpoints.
            progress: Whether to show a progress bar (on stderr).

        Raises:
            StateFileError: If the file is damaged or of another run.
            TrainingError: If the loss is NaN; the last checkpoint is intact.
            OSError: If a checkpoint cannot be written; the last one is intact.
        """
        if checkpoint is not None:
            check_output(checkpoint)  # now, not after hundreds of steps
            if os.path.exists(checkpoint):
                self.load(checkpoint)
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc=self.recipe.name,
            unit="step",
            disable=not progress,
        )
        with bar:
            while self.step < self.steps:
                started = time.monotonic()
                self._learn()
                self.seconds += time.monotonic() - started
                last = self.step == self.steps
                if self.step % _CHECKED == 0 or last:
                    self._look(bar)
                if checkpoint is not None and (self.step % every == 0 or last):
                    self._look(bar)
                    self.save(checkpoint)
                bar.update()
                yield self.step

    def _learn(self) -> None:
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * recipe.rate_share(self.step, self.steps)
        rng = self._rng
        shape = (recipe.batch,)
        rows = torch.randint(len(self.images), shape, generator=rng, device=rng.device)
        batch = self.images[rows.to(self.device)]
        with self._precision():
            loss = recipe.loss(self.network, batch, self.sigma_data, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self.optimizer.step()
        self.step += 1
        # A short average first: the initial weights are no part of the answer.
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._weights, 1 - decay)
        self._recent += loss.detach()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _look(self, bar: tqdm[Any]) -> None:
        """Close the running mean of the loss, and refuse NaN before it is saved."""
        done = self.step - _CHECKED * len(self.losses)
        if done <= 0:
            return
        loss = float(self._recent) / done
        if not math.isfinite(loss):
            raise self._diverged(loss)
        if done == _CHECKED:
            self.losses.append(loss)
            self._recent.zero_()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def _diverged(self, loss: float) -> TrainingError:
        return TrainingError(
            f"{self.recipe.name}, step {self.step}: the loss is {loss}; lower the "
            "learning rate, or check the images. The last checkpoint is intact"
        )

    # Checkpoints.

    def pause(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint between two looks at the loss.

        Raises:
            TrainingError: If the loss is NaN; an older checkpoint is intact.
            OSError: If it cannot be written; the same.
        """
        if not math.isfinite(float(self._recent)):
            raise self._diverged(float(self._recent))
        self.save(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, atomically.

        Raises:
            OSError: If that fails; an older checkpoint is then untouched.
        """
        header = {
            "recipe": self.recipe.to_dict(),
            "step": self.step,
            "steps": self.steps,
            "losses": self.losses,
            "seconds": self.seconds,
            "sigma_data": self.sigma_data,
        }
        write_state(path, self._tensors(), header, kind=_KIND)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint of the same recipe, length and data.

        The length may be another one if the recipe is `endless`.

        Raises:
            StateFileError: If it is damaged or of another run.
        """
        tensors, header = read_state(path, kind=_KIND)
        check_header(header, path, _RULES)
        own: dict[str, Any] = {"recipe": self.recipe.to_dict(), "steps": self.steps}
        if self.recipe.endless:
            own = {"recipe": {**own["recipe"], "steps": header["recipe"].get("steps")}}
        other = [
            name
            for name, value in own.items()
            if _plain(header.get(name)) != _plain(value)
        ]
        if not math.isclose(header["sigma_data"], self.sigma_data, rel_tol=1e-5):
            other.append("images")
        if other:
            raise StateFileError(
                f"{os.fspath(path)}: it is of another run ({', '.join(other)} differ); "
                "delete it to start again, or choose another file"
            )
        self._check_fit(tensors, header, path)
        for prefix, module in (("net.", self.network), ("ema.", self.average)):
            module.load_state_dict(_part(tensors, prefix))
        # A fused optimiser counts its steps on the device.
        counts_on = self.device if self._fused else torch.device("cpu")
        for name, parameter in self.network.named_parameters():
            if f"m.{name}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors["adam_step"].clone().to(counts_on),
                    "exp_avg": tensors[f"m.{name}"].to(parameter),
                    "exp_avg_sq": tensors[f"v.{name}"].to(parameter),
                }
        if tensors["rng"].shape == self._rng.get_state().shape:
            self._rng.set_state(tensors["rng"])
        else:  # drawn on another kind of device, whose state says nothing here
            self._rng.manual_seed(self.recipe.seed + header["step"])
        self._recent = tensors["recent"].to(self.device)
        self.step, self.losses = header["step"], header["losses"]
        self.seconds = header["seconds"]

    def _check_fit(
        self,
        tensors: dict[str, Tensor],
        header: dict[str, Any],
        path: str | os.PathLike[str],
    ) -> None:
        """Refuse tensors that are not all there, or do not fit what the header says."""
        step, wanted = header["step"], self._tensors()
        for name, parameter in self.network.named_parameters() if step else ():
            wanted |= {f"m.{name}": parameter, f"v.{name}": parameter}
        wrong = [
            name
            for name, own in wanted.items()
            if name not in tensors
            or tensors[name].dtype != own.dtype
            or (tensors[name].shape != own.shape and name != "rng")
        ]
        fits = step <= self.steps and len(header["losses"]) == step // _CHECKED
        if step:
            fits = fits and float(tensors.get("adam_step", torch.tensor(-1.0))) == step
        if wrong or not fits:
            raise StateFileError(
                f"{os.fspath(path)}: damaged, {wrong[:3] or 'its optimiser or losses'} "
                f"do not fit step {step} of its header; delete it to start again"
            )

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"net.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.average.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            if state := self.optimizer.state.get(parameter):
                tensors[f"m.{name}"] = state["exp_avg"]
                tensors[f"v.{name}"] = state["exp_avg_sq"]
                tensors["adam_step"] = state["step"]
        return {**tensors, "rng": self._rng.get_state(), "recent": self._recent}


def _plain(value: Any) -> Any:
    """A value as JSON returns it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
