"""The table of chapter 16 on other flows: errors of samplers by evaluations.

    python tools/few_steps.py mnist-base --seconds 1200

Rows are published lists and ART with each solver, and the plan of `artlib.tune`;
columns are numbers of evaluations; each cell holds the errors of the same fresh noises,
one by one, so that intervals can be made of them later. There is one file a flow,
written after each cell: a run that is stopped, by its limit of seconds too, goes on
where it was.

Flows are networks of the zoo and ``shells``, a mixture in eight dimensions with an
exact denoiser that no rule here was made on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import artlib
import artlib.zoo
from artlib._common.files import write_bytes

BUDGETS = (3, 4, 5, 6, 8, 10, 12, 15, 20)
SOLVERS = ("euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "unipc3", "ipndm3")
Draw = Callable[[int, int], Tensor]


def shells() -> tuple[artlib.ProbabilityFlow, Draw]:
    """Twelve balls of three sizes on two shells in eight dimensions."""
    rng = torch.Generator().manual_seed(71)
    means = torch.randn(12, 8, generator=rng, dtype=torch.float64)
    means = means / means.norm(dim=1, keepdim=True)
    means[6:] *= 2.5
    stds = torch.tensor([0.04, 0.15, 0.4] * 4, dtype=torch.float64)
    target = artlib.GaussianMixture(
        means, stds, torch.ones(12, dtype=torch.float64) / 12
    )
    process = artlib.VE()
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    return flow, lambda n, seed: target.sample_prior(process, n, seed=seed)


def source(name: str, device: str) -> tuple[artlib.ProbabilityFlow, Draw]:
    """A flow and its noise."""
    if name == "shells":
        return shells()
    net = artlib.zoo.load(name, device=device)
    flow = artlib.ProbabilityFlow(net.process, net)
    return flow, lambda n, seed: net.sample_prior(n, seed=seed).to(device)


def steps(solver: str, nfe: int) -> int:
    """Steps of so many evaluations, 0 if there are none."""
    if solver != "heun":
        return nfe
    return (nfe + 1) // 2 if nfe % 2 else 0


class Table:
    """The cells of a flow, in a file."""

    def __init__(self, file: Path, origin: dict[str, Any]) -> None:
        self.file, self.data = file, {"origin": origin, "cells": {}, "plans": {}}
        if file.exists():
            kept = json.loads(file.read_text("utf-8"))
            if kept["origin"] != origin:
                raise SystemExit(f"{file} belongs to another call: {kept['origin']}")
            self.data = kept

    def keep(self, row: str, nfe: int, errors: Tensor, seconds: float) -> None:
        """Store a cell and write the file."""
        cell = {"errors": errors.tolist(), "seconds": round(seconds, 2)}
        self.data["cells"].setdefault(row, {})[str(nfe)] = cell
        write_bytes(self.file, (json.dumps(self.data) + "\n").encode())

    def has(self, row: str, nfe: int) -> bool:
        return str(nfe) in self.data["cells"].get(row, {})


def plan_of(
    schedule: Callable[[str], artlib.Schedule], solver: str, K: int
) -> artlib.Plan:
    """A schedule, made only where its cell is missing, as a plan of K steps."""
    return artlib.Plan.honest(schedule(solver), K, solver=solver)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("flow")
    parser.add_argument("--nfe", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--solvers", nargs="+", default=SOLVERS)
    parser.add_argument("--learn", type=int, default=96, help="noises to learn from")
    parser.add_argument("--noises", type=int, default=128, help="noises to judge on")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--spend", type=int, default=40, help="runs a refinement")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("build/few-steps"))
    args = parser.parse_args()
    limit = time.monotonic() + args.seconds
    args.folder.mkdir(parents=True, exist_ok=True)
    flow, draw = source(args.flow, args.device)
    learn, judge = draw(args.learn, 1600), draw(args.noises, 1616)
    origin = {"flow": args.flow, "learn": args.learn, "noises": args.noises}
    table = Table(args.folder / f"{args.flow}.json", origin)
    ends_file = args.folder / f"{args.flow}-{args.noises}-ends.pt"
    if not ends_file.exists():
        torch.save(artlib.references(flow, [judge], rtol=1e-4)[0], ends_file)
    ends = torch.load(ends_file)

    def run(row: str, nfe: int, make: Callable[[], artlib.Plan]) -> None:
        if table.has(row, nfe) or time.monotonic() > limit:
            return
        start = time.perf_counter()
        plan, errors = make(), []
        for k in range(0, len(judge), args.batch):
            part = slice(k, k + args.batch)
            part_of = flow.rows(part, len(judge))
            found = artlib.sample(part_of, judge[part], plan) - ends[part]
            errors.append(found.flatten(1).square().mean(1).sqrt())
        table.data["plans"][f"{row} {nfe}"] = plan.name
        table.keep(row, nfe, torch.cat(errors), time.perf_counter() - start)

    made: dict[str, artlib.Schedule] = {}

    def art(solver: str | None) -> artlib.Schedule:
        label = "ART" if solver is None else f"ART-for-{solver}"
        file = args.folder / f"{args.flow}-{label}.json"
        if label not in made and not file.exists():
            artlib.art(flow, learn, solver=solver, batch=args.batch).save(file)
        return made.setdefault(label, artlib.Schedule.load(file))

    process = flow.process
    lists: dict[str, Callable[[str], artlib.Schedule]] = {
        "EDM": lambda _: artlib.edm(process),
        "EDM unpinned": lambda _: artlib.edm(process, pinned=False),
        "log-SNR unpinned": lambda _: artlib.log_snr(process, pinned=False),
        "KL-optimal": lambda _: artlib.kl_optimal(process),
        "ART": lambda _: art(None),
        "ART for the solver": art,
    }

    def for_steps(solver: str, K: int) -> artlib.Plan:
        """A list for this number of steps."""
        found = artlib.art(flow, learn, solver=solver, steps=K, batch=args.batch)
        return artlib.Plan.honest(found, K, solver=solver)

    for solver in args.solvers:
        for label, schedule in lists.items():
            for nfe in args.nfe:
                if (K := steps(solver, nfe)) > 1:
                    run(
                        f"{label}, {solver}", nfe, partial(plan_of, schedule, solver, K)
                    )
        for nfe in args.nfe:
            if (K := steps(solver, nfe)) > 1:
                row = f"ART for the solver and K, {solver}"
                run(row, nfe, partial(for_steps, solver, K))
    left = [n for n in args.nfe if not table.has("tuned", n)]
    if left and time.monotonic() < limit:
        plans = artlib.tune(  # one call: the reference and the schedules are shared
            flow,
            learn,
            nfe=left,
            solvers=args.solvers,
            evaluations=args.spend * max(left),
            batch=args.batch,
            file=args.folder / f"{args.flow}-tuned.json",
            seconds=None
            if math.isinf(args.seconds)
            else max(limit - time.monotonic(), 1),
        )
        for nfe, plan in zip(left, plans, strict=True):
            run("tuned", nfe, partial(copy.copy, plan))
    cells = table.data["cells"]
    print(f"{args.flow}: rms / median error x 1000")
    for row, columns in cells.items():
        texts = []
        for nfe in args.nfe:
            errors = torch.tensor(columns.get(str(nfe), {}).get("errors", [math.nan]))
            rms, median = errors.square().mean().sqrt(), errors.median()
            texts.append(f"{1000 * float(rms):7.1f}/{1000 * float(median):.1f}")
        print(f"{row:32s}" + " ".join(texts))


if __name__ == "__main__":
    main()
