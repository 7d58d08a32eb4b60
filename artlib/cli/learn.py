"""The command ``artlib learn``: a schedule of a network, and how much it took.

With ``--checkpoint`` an interrupted run loses little. The closed form keeps the
trajectories that are done, batch by batch; ART-RL keeps the state of its training, also
when it is interrupted between two of its own checkpoints.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .._common.console import printable, say
from ..control.closed_form import StiffnessTable, art, error_table, stiffness_table
from ..flow.flow import ProbabilityFlow
from ..rl.actor_critic import ActorCritic
from ..schedules.constructors import Schedule, edm, log_snr
from ..schedules.schedule import describe_origin
from .kept import KeptTable, digest
from .sources import (
    STDOUT,
    InputError,
    Source,
    check_free,
    deliver,
)
from .surroundings import hidden, source_of, team_of

_ENOUGH = 1.1
"""Of the least cost: what a schedule may cost on paths it was not learned from."""

CHECKS = 12
"""Evaluations set aside for the check of forward mode."""

_MEASURE = {"euler": 3, "heun": 6, "rk4": 12, "dpmpp_2m": 12}
"""Evaluations that step doubling takes at each time, by solver; of others about 20."""

_PARTS = 8
"""Batches of a closed form with a checkpoint, where no size is given."""


def learn(args: argparse.Namespace) -> None:
    """Learn a schedule and write it."""
    team = team_of(args.device)
    main = team is None or team.is_main_process
    check_free(args.output, args.force)
    _check_output(args.output)
    _check_checkpoint(args, team)
    judged = _judged(args)
    points, method, total = _plan(args.points or 64, args.budget, args.solver)
    source = source_of(args, team)
    x_T = source.noise(args.samples, args.seed)
    flow = source.flow
    if team is not None:
        from ..parallel import split

        flow = split(flow, team)
    batch = _batch(args)
    parts = -(-args.samples // batch)
    total = total + (parts - 1) * (total - CHECKS)
    bar = tqdm(
        total=None if judged else total,  # how many runs there are is found on the way
        desc="paths and runs" if judged else "paths",
        unit="NFE",
        disable=hidden(args, main),
    )
    with bar:
        flow = flow.with_denoiser(_Watched(flow.denoiser, bar))
        if judged:
            _deliver_judged(args, source, flow, x_T)
            return
        if args.method == "closed":
            table = _table(args, source, flow, x_T, points, method, batch)
        else:
            trainer = ActorCritic(
                flow,
                x_T,
                steps=args.steps,
                temperature=args.temperature,
                seed=args.seed,
                points=points,
                method=method,
                device="cpu",  # small networks on a table: a GPU would wait for them
            )
            table = trainer.table
    if team is not None:
        team.end_training()  # what follows needs no other process
    if not main:
        return  # training needs no network, so one process is enough
    if args.method == "rl":
        _train(args, trainer)
        schedule = trainer.distill()
    else:
        schedule = _closed(args, table, source)
    deliver(args.output, schedule.to_json())
    _report(table, schedule, args.output)


def _judged(args: argparse.Namespace) -> bool:
    """Whether densities are run and judged, as `artlib.art` does for a solver."""
    closed = args.method == "closed" and args.average == "open_loop"
    return bool(closed and args.solver is not None and args.weight is None)


def _deliver_judged(
    args: argparse.Namespace, source: Source, flow: ProbabilityFlow, x_T: Tensor
) -> None:
    """Learn for a solver by the judged rule, write it, and say how it was chosen."""
    found = art(flow, x_T, solver=args.solver, points=args.points, batch=_batch(args))
    notes = found.provenance
    origin = describe_origin(notes["made_by"], {**notes, "source": source.label})
    schedule = replace(found, _provenance=origin)
    deliver(args.output, schedule.to_json())
    where = "standard output" if args.output == STDOUT else args.output
    steps = ", ".join(map(str, notes["steps"]))
    lines = [
        f"{printable(schedule.name)} written to {where}; {notes['nfe']} network "
        "evaluations",
        f"densities run with {steps} steps, and how far each is behind the best there, "
        "at worst:",
    ]
    ranked = sorted(notes["disadvantage"].items(), key=lambda item: item[1])
    lines += [f"  {label:44} {behind:8.3f}" for label, behind in ranked]
    say("\n".join(lines), error=args.output == STDOUT)


def _closed(
    args: argparse.Namespace, table: StiffnessTable, source: Source
) -> Schedule:
    """The closed form, with notes on where it is from and what it is worth."""
    notes: dict[str, Any] = {"source": source.label}
    if args.solver is not None:
        notes["solver"] = args.solver
    bound = table.lower_bound()
    if bound > 0:
        process = table.process
        notes["cost_of_edm"] = round(table.cost(edm(process, pinned=False)) / bound, 3)
        if len(table.values) > 1:
            notes["held_out"] = round(_held_out(table), 3)
    schedule = table.art(args.average, provenance=notes)
    if args.solver is None:
        return schedule
    return replace(schedule, name=f"{schedule.name} ({args.solver})")


def _table(
    args: argparse.Namespace,
    source: Source,
    flow: ProbabilityFlow,
    x_T: Tensor,
    points: int,
    method: str,
    batch: int,
) -> StiffnessTable:
    """What the closed form needs, also in batches that a file keeps."""
    options: dict[str, Any] = {"points": points, "method": method}

    def measure(part: ProbabilityFlow, x: Tensor) -> StiffnessTable:
        if args.solver is None:
            return stiffness_table(part, x, **options)
        return error_table(part, x, solver=args.solver, **options)

    if args.checkpoint is None:
        if args.solver is None:
            return stiffness_table(flow, x_T, batch=batch, **options)
        return error_table(flow, x_T, solver=args.solver, batch=batch, **options)
    problem = {
        "source": source.label,
        "process": source.flow.process.to_dict(),
        "condition": [args.class_label, digest(args.condition), args.guidance],
        "told": [args.guidance_rescale, args.timestep_scale],
        "solver": args.solver,
        "samples": [len(x_T), args.seed],
        **options,
    }
    kept = KeptTable(args.checkpoint, problem, x_T)
    return kept.all(flow, x_T, batch, measure, say_so=not args.quiet)


def _train(args: argparse.Namespace, trainer: ActorCritic) -> None:
    """Train to the end; an interruption keeps what is done, if there is a file."""
    records = trainer.train(
        args.iterations, checkpoint=args.checkpoint, progress=not hidden(args)
    )
    try:
        for _ in records:
            pass
    except KeyboardInterrupt:
        # An iteration is done, or it is not; between two of them the state is whole.
        if args.checkpoint is not None and trainer.iteration > 0:
            trainer.save(args.checkpoint)
        raise


class _Watched:
    """A denoiser that moves a progress bar; what it wraps stays visible to the flow."""

    def __init__(self, denoiser: Callable[..., Tensor], bar: Any) -> None:
        self.denoiser, self._bar = denoiser, bar

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._bar.update()
        return self.denoiser(x, t)

    def rows(self, index: Any) -> Any:
        """The same for some of the samples."""
        rows = getattr(self.denoiser, "rows", None)
        return _Watched(rows(index) if callable(rows) else self.denoiser, self._bar)


def _batch(args: argparse.Namespace) -> int:
    """Trajectories that are computed together."""
    if args.batch is not None:
        return min(args.batch, args.samples)
    if args.checkpoint is None or args.method == "rl":
        return int(args.samples)
    return max(1, -(-args.samples // _PARTS))


def _plan(points: int, budget: int | None, solver: str | None) -> tuple[int, str, int]:
    """Times of the table, its integrator, and the evaluations that it may take."""
    # Beside the path: its derivative in forward mode, or the solver's own steps.
    beside = 1 if solver is None else _MEASURE.get(solver, 20)

    def price(n: int, each: int) -> int:
        return (each + beside) * n + CHECKS

    if budget is None:
        return points, "rk4", price(points, 4)
    for each, method, least in ((4, "rk4", 32), (2, "heun", 5)):
        affordable = min(points, (budget - CHECKS) // (each + beside))
        if affordable >= min(points, least):
            return affordable, method, price(affordable, each)
    raise InputError(
        f"--budget: {budget} evaluations are too few for a table of 5 times; give at "
        f"least {price(5, 2)}"
    )


def _check_output(path: str) -> None:
    """Refuse to write a schedule by the name of a picture."""
    if path.lower().endswith((".png", ".svg", ".pdf", ".jpg", ".jpeg")):
        raise InputError(
            f"--output: a schedule is JSON, got {path!r}; name a .json file, and draw "
            f"it with: artlib show s.json --plot {path}"
        )


def _check_checkpoint(args: argparse.Namespace, team: Any | None) -> None:
    """Refuse what cannot go together, before the network is asked."""
    if args.method == "rl" and (args.solver or args.batch):
        option = "--solver" if args.solver else "--batch"
        raise InputError(
            f"{option}: goes with --method closed; the paper's actor-critic learns for "
            "Euler, from all trajectories at once"
        )
    if args.weight is not None and args.solver is None:
        raise InputError("--weight: it says how to match a solver; name one: --solver")
    if _judged(args):
        given = {
            "--budget": args.budget is not None,
            "--checkpoint": args.checkpoint is not None,
            "several processes": team is not None,
        }
        for what, there in given.items():
            if there:
                raise InputError(
                    f"--solver: {what} cannot go with it, for densities are run and "
                    "judged together; add --weight local, which runs none"
                )
    if args.checkpoint is None:
        return
    if args.method == "closed" and team is not None:
        raise InputError(
            "--checkpoint: with several processes it goes with --method rl only; leave "
            "it out, or learn in one process"
        )
    if args.checkpoint == STDOUT:
        raise InputError("--checkpoint: - is no file that a run could continue from")
    same = (os.path.realpath(path) for path in (args.checkpoint, args.output))
    if len(set(same)) == 1:
        raise InputError(
            f"--checkpoint: {args.checkpoint} is the schedule's file too; name another"
        )
    check_free(args.checkpoint, force=True)


def _held_out(table: StiffnessTable) -> float:
    return table.held_out(min(8, len(table.values)))


def _report(table: StiffnessTable, schedule: Schedule, path: str) -> None:
    bound = table.lower_bound()
    process = table.process
    where = "standard output" if path == STDOUT else path
    lines = [
        f"{printable(schedule.name)} written to {where}; {table.nfe} network "
        "evaluations",
        "cost, in units of the least possible (open loop):",
    ]
    entries = (schedule, edm(process, pinned=False), log_snr(process, pinned=False))
    lines += [
        f"  {printable(entry.name):16} {table.cost(entry) / bound:8.3f}"
        for entry in entries
    ]
    if len(table.values) > 1:
        ratio = _held_out(table)
        advice = "; more paths would help (-n)" if ratio > _ENOUGH else ""
        lines.append(
            f"the closed form on paths it was not learned from: {ratio:.3f}{advice}"
        )
    say("\n".join(lines), error=path == STDOUT)
