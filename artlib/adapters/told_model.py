r"""A plan's told levels for networks that are called with a noise level.

k-diffusion, ComfyUI and the EDM family ask a network D(x, sigma) for the denoised
states and count the noise in sigma. A plan that tells other levels than its nodes'
needs no other sampler for that, only a wrapper of the network: it knows the node by the
sigma that it is called with, and asks the network at the level told instead. In
coordinates :math:`x/\alpha` the states stay as they are; in those of flow matching
they become :math:`x\,(1 - s)/(1 - t)`, the same data and noise per signal at s.

Exact to the rounding of the sampler's own list of sigmas, which is in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common.checks import got
from .._common.errors import ExportError
from ..flow.processes import VE, RectifiedFlow
from ..schedules.plan import Plan
from ..solvers.solver import solver_of
from .k_diffusion import to_k_diffusion
from .levels import Coordinate, noise_levels, own_coordinate

__all__ = ["ToldModel", "told"]

_NEAR = 1e-4
"""Relative distance from a node within which a sigma is that node's."""


class ToldModel:
    """What `told` returns: called as the network is, ``model(x, sigma, ...)``.

    Everything else is asked of the network itself (``sigma_min``, ``round_sigma``,
    ``inner_model`` and so on).

    Attributes:
        model: The network.
        sigmas: The plan's nodes for the sampler, float32 [K + 1] on the CPU, the last
            one 0.
    """

    def __init__(self, plan: Plan, model: Any, coordinate: Coordinate) -> None:
        steps = plan.steps
        nodes_only = plan.with_honest_levels()
        self.model = model
        self.sigmas = to_k_diffusion(nodes_only, steps, coordinate=coordinate)
        self._nodes = noise_levels(nodes_only, steps, coordinate)[:-1]
        alpha, sigma = plan.process.alpha(plan.told), plan.process.sigma(plan.told)
        self._flow = coordinate == "flow"
        self._told = sigma / (alpha + sigma) if self._flow else sigma / alpha
        honest = plan.told == plan.nodes[:-1]
        self._told = torch.where(honest, self._nodes, self._told)

    def __getattr__(self, name: str) -> Any:
        if name == "model":  # not there yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self.model, name)

    def levels(self, sigma: Tensor) -> Tensor:
        """The levels told at some sigmas, in their shape and dtype.

        Raises:
            ValueError: If one is not a node of the plan.
        """
        asked = sigma.detach().double().cpu().reshape(-1, 1)
        off = (asked / self._nodes - 1).abs()
        near = off.argmin(1)
        worst = off.gather(1, near[:, None]).max()
        if not float(worst) < _NEAR:
            listed = ", ".join(f"{v:.6g}" for v in self._nodes.tolist())
            raise ValueError(
                f"sigma: the sampler asked at {asked.flatten().tolist()[0]:.6g}, which "
                f"is no node of the plan ({listed}); run the plan's own solver on "
                "model.sigmas, without churn"
            )
        return self._told[near].reshape(sigma.shape).to(sigma)

    def moved(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """States and sigma as the network is to see them.

        Args:
            x: States [N, *shape].
            sigma: Noise level, 0-d, [1] or [N].
        """
        s = self.levels(sigma)
        if not self._flow:
            return x, s
        signal = sigma != 1
        kept = torch.where(signal, 1 - sigma, 1)
        factor = torch.where(signal, (1 - s) / kept, 1).to(x)
        if factor.ndim:
            factor = factor.reshape(-1, *[1] * (x.ndim - 1))
        return x * factor, torch.where(signal, s, sigma)

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **options: Any) -> Any:
        """D of the states, told the plan's level in place of ``sigma``.

        Args:
            x: States [N, *shape].
            sigma: Noise level, 0-d, [1] or [N], at a node of the plan.
            *args: Passed on, such as class labels.
            **options: Passed on, such as ``extra_args`` of k-diffusion.

        Raises:
            ValueError: If ``sigma`` is no node of the plan.
        """
        x, sigma = self.moved(x, torch.as_tensor(sigma))
        return self.model(x, sigma, *args, **options)


def told(plan: Plan, model: Any, *, coordinate: Coordinate | None = None) -> ToldModel:
    """A network that is told the levels of a plan at the plan's nodes.

    Run the plan's own solver on ``model.sigmas``, from ``sigmas[0] * noise``:
    ``sample_euler`` for ``"euler"``, ``sample_dpmpp_2m`` for ``"dpmpp_2m"``; the
    sampler of EDM without churn and without its second order for ``"euler"``.

    Args:
        plan: The plan; of another process than `VE` or `RectifiedFlow` only with a
            multistep solver, for Euler's steps are those of the process's own time,
            and with a multistep solver not in the sigmas of flow matching.
        model: Called as ``model(x, sigma, ...)``, returns the denoised states: a model
            of k-diffusion, or a network of the EDM family.
        coordinate: ``"level"`` or ``"flow"``, what its sigmas are; by default what
            samplers of the plan's process use.

    Raises:
        ExportError: If the sampler's steps are not the plan's.
        TypeError: If ``plan`` is no plan or ``model`` cannot be called.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected an artlib.Plan, got {got(plan)}")
    if not callable(model):
        raise TypeError(
            f"model: expected a network called as model(x, sigma), got {got(model)}"
        )
    kind = solver_of(plan.solver)
    own = isinstance(plan.process, VE | RectifiedFlow)
    if not kind.data_form and not own:
        raise ExportError(
            f"plan: {kind.name} steps in the time of {plan.process}, the sampler in "
            "sigma, which is not the same; make the plan on flow.to_ve()"
        )
    where = coordinate or own_coordinate(plan)
    if kind.data_form and where == "flow":
        raise ExportError(
            f"plan: {kind.name} measures its steps in log(sigma / alpha), samplers of "
            "k-diffusion in log(sigma), which in flow matching is not the same; make "
            "the plan for euler, or sample with artlib.sample(flow, x_T, plan)"
        )
    if not kind.data_form and where != own_coordinate(plan):
        raise ExportError(
            f"plan: {kind.name} steps in the time of {plan.process}, and the model "
            f"counts its sigmas as {where!r}, where its steps are others; make the "
            "plan on the model's own process"
        )
    return ToldModel(plan, model, where)
