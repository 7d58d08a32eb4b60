"""What the commands of `artlib.cli` do; each returns nothing or raises."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import comparison
from .._common.console import printable, say
from .._common.files import write_bytes
from ..control.closed_form import StiffnessTable, stiffness_table
from ..rl.actor_critic import ActorCritic
from ..schedules.constructors import Schedule, edm, log_snr
from ..solvers.sample import nfe, sample
from .sources import (
    STDOUT,
    InputError,
    Source,
    check_free,
    deliver,
    load_schedule,
    load_source,
    parse_process,
)

_ENOUGH = 1.1
"""Of the least cost: what a schedule may cost on paths it was not learned from."""

CHECKS = 12
"""Evaluations set aside for the check of forward mode."""


def learn(args: argparse.Namespace) -> None:
    """Learn a schedule and write it."""
    team = _team(args.device)
    main = team is None or team.is_main_process
    check_free(args.output, args.force)
    _check_checkpoint(args)
    source = _source(args, team)
    x_T = source.noise(args.samples, args.seed)
    points, method, total = _plan(args.points, args.budget)
    flow = source.flow
    if team is not None:
        from ..parallel import split

        flow = split(flow, team)
    bar = tqdm(total=total, desc="paths", unit="NFE", disable=_hidden(args, main))
    with bar:
        flow = flow.with_denoiser(_Watched(flow.denoiser, bar))
        if args.method == "closed":
            table = stiffness_table(flow, x_T, points=points, method=method)
            schedule = table.art(args.average, provenance={"source": source.label})
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
        for _ in trainer.train(
            args.iterations,
            checkpoint=args.checkpoint,
            progress=not _hidden(args, main),
        ):
            pass
        schedule = trainer.distill()
    deliver(args.output, schedule.to_json())
    _report(table, schedule, args.output)


def show(args: argparse.Namespace) -> None:
    """Print grids as a table, and draw them if asked."""
    process = parse_process(args.process) if args.process else None
    if args.plot:
        figure_format = _figure_format(args.plot)
        check_free(args.plot, args.force)
    found = [load_schedule(name, process) for name in args.schedules]
    for schedule in found:
        process = schedule.process
        name = printable(schedule.name)
        say(f"{name}: {process}, last step {schedule.last_step}")
        for K in args.steps:
            grid = schedule.grid(K)
            level = process.noise_level(grid)
            say(f"  {K} steps\n{'k':>6} {'t':>12} {'sigma/alpha':>12} {'step':>12}")
            for k in range(K + 1):
                step = f"{float(grid[k] - grid[k + 1]):12.6g}" if k < K else ""
                say(f"{k:6d} {float(grid[k]):12.6g} {float(level[k]):12.6g} {step}")
    if args.plot:
        import io

        from ..plotting import plot_steps

        figure = plot_steps(_labelled(args.schedules, found), args.steps[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format=figure_format, bbox_inches="tight")
        write_bytes(args.plot, buffer.getvalue())
        say(f"figure written to {args.plot}")


def compare(args: argparse.Namespace) -> None:
    """Print the error of several schedules against NFE, on one flow."""
    source = _source(args, None)
    process = source.flow.process
    found = _labelled(
        args.schedules, [load_schedule(name, process) for name in args.schedules]
    )
    for name, schedule in found.items():
        if schedule.process != process:
            raise InputError(
                f"{name}: made for {schedule.process}, but {source.label} runs under "
                f"{process}; learn it for this source"
            )
    noises = [source.noise(args.samples, args.seed + k) for k in range(args.seeds)]
    table = comparison.compare(
        source.flow,
        found,
        noises,
        {args.solver: args.steps},
        ends=comparison.references(source.flow, noises),
        progress=not _hidden(args),
    )
    width = max(10, *(len(name) for name in found))
    print(
        f"root-mean-square error against the exact flow of {source.label}, "
        f"{args.solver}, {args.samples} samples, {args.seeds} seeds from {args.seed}, "
        "the same noise for all"
    )
    counts = [table.nfe[f"{args.solver} {K}"] for K in args.steps]
    print(f"{'NFE':{width}}" + "".join(f"{count:>20d}" for count in counts))
    for name in found:
        cells = [(args.solver, K, name, "error") for K in args.steps]
        texts = [f"{table.mean(*c):.4f} +- {table.spread(*c):.4f}" for c in cells]
        print(f"{name:{width}}" + "".join(f"{text:>20}" for text in texts))


def draw(args: argparse.Namespace) -> None:
    """Sample and write the samples."""
    from safetensors.torch import save

    team = _team(args.device)
    check_free(args.output, args.force)
    if args.output == STDOUT and sys.stdout is not None and sys.stdout.isatty():
        raise InputError(
            "--output: the samples are no text for a terminal; name a file, or send "
            "them to a program: artlib sample ... -o - | program"
        )
    source = _source(args, team)
    schedule = load_schedule(args.schedule, source.flow.process)
    grid = schedule.grid(args.steps)
    x_T = source.noise(args.samples, args.seed)
    if team is None:
        x_0 = sample(source.flow, x_T, grid, solver=args.solver)
    else:
        from .. import parallel

        flow = parallel.split(source.flow, team)
        x_0 = parallel.sample(flow, x_T, grid, solver=args.solver)
        team.end_training()
        if not team.is_main_process:
            return
    notes = {"source": source.label, "schedule": schedule.name, "solver": args.solver}
    notes |= {"nfe": str(nfe(grid, solver=args.solver)), "seed": str(args.seed)}
    content = save({"x_0": x_0.float().cpu().contiguous()}, metadata=notes)
    deliver(args.output, content)
    say(
        f"{len(x_0)} samples of shape {list(x_0.shape[1:])}, NFE {notes['nfe']}, "
        f"written to {_called(args.output)} as x_0",
        error=args.output == STDOUT,
    )


# Parts of the above.


class _Watched:
    """A denoiser that moves a progress bar; what it wraps stays visible to the flow."""

    def __init__(self, denoiser: Callable[..., Tensor], bar: Any) -> None:
        self.denoiser, self._bar = denoiser, bar

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._bar.update()
        return self.denoiser(x, t)


def _team(device: str) -> Any | None:
    """The accelerator where several processes were launched, otherwise None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    cpu = device == "cpu" or not torch.cuda.is_available()
    return Accelerator(cpu=cpu)


def _source(args: argparse.Namespace, team: Any | None) -> Source:
    if team is not None:
        device = torch.device(team.device)
    elif args.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _device(args.device)
    return load_source(
        args.source,
        process=args.process,
        shape=args.shape,
        class_label=args.class_label,
        condition=args.condition,
        guidance=args.guidance,
        device=device,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"--device: {name!r} cannot be used here: {first}") from error
    return device


def _plan(points: int, budget: int | None) -> tuple[int, str, int]:
    """Times of the table, its integrator, and the evaluations that it may take."""

    def price(n: int, each: int) -> int:
        return each * n + n + CHECKS  # the path, forward mode, and its check

    if budget is None:
        return points, "rk4", price(points, 4)
    for each, method, least in ((4, "rk4", 32), (2, "heun", 5)):
        affordable = min(points, (budget - CHECKS) // (each + 1))
        if affordable >= min(points, least):
            return affordable, method, price(affordable, each)
    raise InputError(
        f"--budget: {budget} evaluations are too few for a table of 5 times; give at "
        f"least {price(5, 2)}"
    )


def _check_checkpoint(args: argparse.Namespace) -> None:
    """Refuse, before the network is asked, a checkpoint that cannot be written."""
    if args.checkpoint is None:
        return
    if args.checkpoint == STDOUT:
        raise InputError("--checkpoint: - is no file that training could continue from")
    same = (os.path.realpath(path) for path in (args.checkpoint, args.output))
    if len(set(same)) == 1:
        raise InputError(
            f"--checkpoint: {args.checkpoint} is the schedule's file too; name another"
        )
    check_free(args.checkpoint, force=True)


def _called(path: str) -> str:
    return "standard output" if path == STDOUT else path


def _report(table: StiffnessTable, schedule: Schedule, path: str) -> None:
    bound = table.lower_bound()
    process = table.process
    lines = [
        f"{printable(schedule.name)} written to {_called(path)}; {table.nfe} network "
        "evaluations",
        "cost, in units of the least possible (open loop):",
    ]
    entries = (schedule, edm(process, pinned=False), log_snr(process, pinned=False))
    lines += [
        f"  {printable(entry.name):16} {table.cost(entry) / bound:8.3f}"
        for entry in entries
    ]
    if (paths := len(table.values)) > 1:
        ratio = table.held_out(min(8, paths))
        advice = "; more paths would help (-n)" if ratio > _ENOUGH else ""
        lines.append(
            f"the closed form on paths it was not learned from: {ratio:.3f}{advice}"
        )
    say("\n".join(lines), error=path == STDOUT)


def _labelled(names: list[str], found: list[Schedule]) -> dict[str, Schedule]:
    """Schedules by the names of their files, or as given where those coincide."""
    short = {name: Path(name).stem if os.path.isfile(name) else name for name in names}
    unique = len(set(short.values())) == len(short)
    return {
        short[name] if unique else name: schedule
        for name, schedule in zip(names, found, strict=True)
    }


def _figure_format(path: str) -> str:
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in ("png", "svg", "pdf"):
        raise InputError(f"--plot: expected a .png, .svg or .pdf file, got {path!r}")
    return suffix


def _hidden(args: argparse.Namespace, main: bool = True) -> bool:
    return bool(args.quiet) or not main or not sys.stderr.isatty()
