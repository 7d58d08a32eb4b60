r"""The class `Plan`: K steps of one solver, its nodes and the levels that are told.

A schedule gives a grid for any number of steps. What is made for one number of them is
a plan: the nodes that the sampler visits, the solver that takes the steps, and the
noise level that the network is told at each node. Telling another level than the
node's is a second control of the sampler (`artlib.tell`); a plan that does not use it
is called honest.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._common.checks import as_grid, positive_int, real_tensor
from .._common.errors import ExportError, ScheduleFormatError
from ..flow.processes import Process, check_process
from ..flow.registry import UnknownProcessError, process_from_dict, saved_process
from ..solvers.sample import nfe
from ..solvers.solver import SOLVERS, Solver, SolverLike, solver_of
from . import file, shared
from .schedule import Schedule, check_labels, describe_origin


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """K steps for one solver; made by `artlib.tell`, `artlib.refine`, `artlib.tune`.

    ``artlib.sample(flow, x_T, plan)`` takes them, with the plan's own solver.

    Attributes:
        process: The noising process in whose time it runs.
        nodes: Process times [K + 1], float64, strictly descending from t_max to 0.
        told: Process times [K] whose noise levels the network is told at the first K
            nodes, float64, within (0, t_max]; the nodes themselves if honest.
        solver: The solver. Only one of `artlib.solvers.SOLVERS` can be saved.
        name: A label, in one line.

    Raises:
        TypeError: If a field is of another type.
        ValueError: If the nodes are no grid of the process, or a level is not finite,
            not positive or above t_max, or the solver cannot be told levels.
    """

    process: Process
    nodes: Tensor
    told: Tensor
    solver: SolverLike
    name: str = "plan"
    _provenance: str = field(default="{}")

    def __post_init__(self) -> None:
        process = check_process(self.process)
        nodes = as_grid(self.nodes, "nodes").clone()
        if abs(float(nodes[0]) / process.t_max - 1) > 1e-6 or float(nodes[-1]) != 0:
            raise ValueError(
                f"nodes: they run from {float(nodes[0]):.6g} to "
                f"{float(nodes[-1]):.6g}, expected t_max = {process.t_max:.6g} of "
                f"{process} to 0"
            )
        told = real_tensor(self.told, "told", "a sequence of numbers").cpu().clone()
        if told.shape != nodes[:-1].shape:
            raise ValueError(
                f"told: expected a level for each of the {len(nodes) - 1} steps, got "
                f"shape {tuple(told.shape)}"
            )
        good = torch.isfinite(told) & (told > 0) & (told <= process.t_max * (1 + 1e-6))
        if not bool(good.all()):
            k = int((~good).nonzero()[0])
            raise ValueError(
                f"told: level {k} is {float(told[k])}, expected a time within (0, "
                f"t_max = {process.t_max:.6g}] of the process"
            )
        kind = solver_of(self.solver)
        if not torch.equal(told, nodes[:-1]) and not kind.tellable:
            raise ValueError(
                f"solver: {kind.name} cannot be told levels, for it makes several "
                "evaluations a step or one's own; pass the nodes, or use euler or a "
                "multistep solver"
            )
        check_labels(self.name, self._provenance)
        if SOLVERS.get(kind.name) == kind:
            object.__setattr__(self, "solver", kind.name)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "told", told)

    @classmethod
    def honest(cls, schedule: Schedule, K: int, *, solver: SolverLike) -> Plan:
        """The K-step grid of a schedule for a solver; the levels told are the nodes'.

        Args:
            schedule: The schedule.
            K: Number of steps.
            solver: The solver.

        Raises:
            TypeError: If ``solver`` is none.
            ValueError: If ``K`` < 1, or the solver takes no grid.
        """
        nodes = schedule.grid(K)
        name = f"{schedule.name}, {solver_of(solver).name}"
        origin = describe_origin("honest", {"schedule": schedule.provenance})
        return cls(schedule.process, nodes, nodes[:-1], solver, name, origin)

    @classmethod
    def made(
        cls,
        process: Process,
        nodes: Tensor,
        told: Tensor,
        solver: SolverLike,
        *,
        name: str,
        method: str,
        provenance: dict[str, Any],
    ) -> Plan:
        """A plan with its provenance as a dictionary, JSON-able."""
        origin = describe_origin(method, provenance)
        return cls(process, nodes, told, solver, name, origin)

    @property
    def steps(self) -> int:
        """K, the number of steps."""
        return len(self.told)

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return nfe(self.nodes, solver=self.solver)

    @property
    def is_honest(self) -> bool:
        """Whether every level that is told is that of its node."""
        return torch.equal(self.told, self.nodes[:-1])

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made, and by which version; a copy."""
        result: dict[str, Any] = json.loads(self._provenance)
        return result

    def grid(self, K: int) -> Tensor:
        """The nodes, for whoever asks for a grid.

        Args:
            K: The plan's own number of steps.

        Raises:
            ValueError: If it is another number, or the plan is told levels, which a
                grid would lose.
        """
        if positive_int(K, "K") != self.steps:
            raise ValueError(f"K: this plan has {self.steps} steps, got {K}")
        if not self.is_honest:
            raise ValueError(
                "plan: its grid alone is not the plan, for it tells the network other "
                "levels; sample with artlib.sample(flow, x_T, plan)"
            )
        return self.nodes.clone()

    def to_diffusers(
        self, scheduler: Any, network: Any = None, *, device: Any = None
    ) -> Any:
        """Set a scheduler of diffusers to the nodes, and tell the network the levels.

        The solver stays the scheduler's: EulerDiscrete for ``"euler"``,
        DPMSolverMultistep for ``"dpmpp_2m"``, UniPCMultistep for ``"unipc"``.

        Args:
            scheduler: See `Schedule.to_diffusers`.
            network: ``pipe.unet`` or ``pipe.transformer``; needed unless the plan is
                honest, for a scheduler alone cannot tell it other levels.
            device: Where the scheduler's timesteps go.

        Returns:
            The hooks on the network, with ``remove()``; None if the plan is honest.

        Raises:
            ExportError: If the scheduler cannot visit the nodes, or the levels cannot
                be told. Nothing is changed then.
        """
        from ..adapters.diffusers import release, tell_network, to_diffusers

        if not self.is_honest and network is None:
            raise ExportError(
                "network: the plan tells other noise levels than those of its nodes, "
                "which takes a hook on the network; pass network=pipe.unet (or "
                "pipe.transformer)"
            )
        to_diffusers(self.with_honest_levels(), scheduler, self.steps, device=device)
        if self.is_honest:
            return None
        try:
            return tell_network(self, scheduler, network)
        except BaseException:
            release(scheduler)
            raise

    def with_honest_levels(self) -> Plan:
        """The plan without its told levels, which gives its grid to who asks."""
        nodes = self.nodes
        return Plan(self.process, nodes, nodes[:-1], self.solver, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Its content, JSON-able: what `save` writes.

        Raises:
            ValueError: If the solver is one's own, which a file cannot hold.
        """
        kind = solver_of(self.solver)
        if SOLVERS.get(kind.name) != kind:
            raise ValueError(
                f"solver: {kind.name} is your own, and a file holds data only; save "
                "plan.nodes and plan.told beside your solver"
            )
        return {
            "name": self.name,
            "process": saved_process(self.process),
            "solver": kind.name,
            "nodes": self.nodes.tolist(),
            "told": self.told.tolist(),
            "provenance": self.provenance,
        }

    def to_json(self) -> str:
        """The text that `save` writes."""
        return file.dumps(self.to_dict(), file.PLAN)

    @classmethod
    def from_json(cls, text: str, *, source: str = "text") -> Plan:
        """Read what `to_json` gave.

        Args:
            text: The text.
            source: Its name, for messages.

        Raises:
            ScheduleFormatError: If it is no plan, or an incomplete or newer one.
        """
        data = file.loads(text, source, file.PLAN)
        try:
            return cls(
                process_from_dict(data["process"]),
                torch.tensor(data["nodes"], dtype=torch.float64, device="cpu"),
                torch.tensor(data["told"], dtype=torch.float64, device="cpu"),
                data["solver"],
                data["name"],
                json.dumps(data["provenance"]),
            )
        except (KeyError, TypeError, ValueError, UnknownProcessError) as error:
            raise ScheduleFormatError(
                f"{source}: {error}; write it again with Plan.save"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, atomically.

        Raises:
            OSError: If the file cannot be written; the old one then stands.
            ValueError: If the solver is one's own.
        """
        file.write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            ScheduleFormatError: If it is no plan.
        """
        return cls.from_json(file.read_text(path), source=os.fspath(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the plan into a folder, in the layout that the Hub shares.

        ``artlib_plan.json``, and a card ``README.md`` that says how it was made, unless
        the folder has one of its own. It may be the folder of a pipeline, or one with a
        schedule; plans of other numbers of steps need folders of their own.

        Args:
            folder: Made if missing.

        Raises:
            OSError: If it cannot be written to; an older plan is then untouched.
            TypeError: If it is no path.
            ValueError: If the solver is one's own, see `to_dict`.
        """
        target = shared.folder_of(folder, "folder")
        text = self.to_json()
        card = shared.plan_card(self.name, self.facts(), self.provenance)
        shared.write_folder(target, shared.PLAN_FILE, text, card)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, subfolder: str = ""
    ) -> Plan:
        """Read a plan from a folder that `save_pretrained` wrote.

        Nothing is downloaded: the folder is on this machine, such as one that
        ``huggingface_hub.snapshot_download`` returns.

        Args:
            folder: The folder.
            subfolder: Within it, for one of several plans.

        Raises:
            FileNotFoundError: If there is no plan in it.
            ScheduleFormatError: If it is none that this version can use.
            TypeError: If ``folder`` is no path.
            ValueError: If ``subfolder`` leads out of it.
        """
        place = shared.folder_of(folder, "folder", subfolder)
        return cls.load(shared.find(place, shared.PLAN_FILE))

    def facts(self) -> dict[str, str]:
        """What it is, in words: process, solver, evaluations, nodes, levels told."""
        return {
            "process": str(self.process),
            "solver": solver_of(self.solver).name,
            "steps": str(self.steps),
            "evaluations": str(self.nfe),
            "nodes": shared.as_list(self.nodes.tolist()),
            "told": "the nodes"
            if self.is_honest
            else shared.as_list(self.told.tolist()),
        }

    def __repr__(self) -> str:
        kind: Solver = solver_of(self.solver)
        levels = "honest" if self.is_honest else "told"
        return f"Plan({self.name!r}, {self.steps} steps of {kind.name}, {levels})"
