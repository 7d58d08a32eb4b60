r"""One call that finds the best sampler of a flow at a budget of evaluations.

Which solver, which schedule, which levels to tell: the answer differs from network to
network and from budget to budget, and none of the rules wins everywhere. So they are
all tried, cheaply and from the same noise:

1. every solver on every untrained schedule, a run each;
2. the solvers of the best few pairs on ART's schedule for that solver and that number
   of steps too (`artlib.art` with ``solver`` and ``steps``);
3. all these told the levels of the two-number rule (`artlib.tell`);
4. for each of these solvers the better of its two schedules refined, nodes and levels,
   by gradient (`artlib.refine`), within a budget of evaluations or of seconds;
5. all that is left judged on noise that nothing so far has seen, by rms times median,
   with paired bootstrap intervals of the winner's lead in both.

All of this is ours.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ._common.checks import check_samples, finite_float, got, positive_int
from ._common.files import check_output, write_bytes
from ._common.precision import full_precision
from .comparison.bootstrap import percentiles, resample, statistic
from .control.closed_form import THRIFTY_POINTS, art, stiffness_path
from .control.few_steps import refine
from .control.matched import (
    Noise,
    Size,
    check_reference,
    check_share,
    halves,
    matched_noise,
)
from .control.stiffness import check_process
from .control.told import calibrated_levels
from .flow.flow import ProbabilityFlow, check_flow
from .schedules.constructors import Schedule, edm, kl_optimal, log_snr
from .schedules.plan import Plan
from .solvers.solver import SolverLike, solver_of

__all__ = ["SOLVERS_TRIED", "tune", "tuning_report"]

SOLVERS_TRIED = (
    "euler",
    "heun",
    "dpmpp_2m",
    "dpmpp_3m",
    "unipc",
    "unipc3",
    "ipndm2",
    "ipndm3",
    "ipndm",
)
"""The solvers that `tune` tries by default."""

LEARNING_PATHS = 32
"""Paths of the closed form, at most."""

FINALISTS = 3
"""Solvers whose best pair is told levels and refined."""

MIXTURE_RUNS = 30
"""Runs for the mixture of a solver's schedule: half of the default, for nodes are
refined from there."""

MOVING_HELD_OUT = 1 / 3
"""Share of the noise to learn from that judges refinements."""

_REVISION = 3
"""Of the search: what an earlier one found is not taken for what this one would."""


@overload
def tune(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    nfe: int,
    solvers: Sequence[SolverLike] = ...,
    schedules: Mapping[str, Schedule] | None = ...,
    seconds: float | None = ...,
    evaluations: int | None = ...,
    reference: Tensor | None = ...,
    held_out_share: float = ...,
    batch: int | None = ...,
    file: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
) -> Plan: ...


@overload
def tune(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    nfe: Sequence[int],
    solvers: Sequence[SolverLike] = ...,
    schedules: Mapping[str, Schedule] | None = ...,
    seconds: float | None = ...,
    evaluations: int | None = ...,
    reference: Tensor | None = ...,
    held_out_share: float = ...,
    batch: int | None = ...,
    file: str | os.PathLike[str] | None = ...,
    progress: bool = ...,
) -> list[Plan]: ...


def tune(
    flow: ProbabilityFlow,
    x_T: Tensor,
    *,
    nfe: int | Sequence[int],
    solvers: Sequence[SolverLike] = SOLVERS_TRIED,
    schedules: Mapping[str, Schedule] | None = None,
    seconds: float | None = None,
    evaluations: int | None = None,
    reference: Tensor | None = None,
    held_out_share: float = 0.5,
    batch: int | None = None,
    file: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Plan | list[Plan]:
    r"""The best plan for a number of network evaluations.

    Args:
        flow: The flow.
        x_T: States at ``t_max`` [N, *shape]; chapter 16 takes 96.
        nfe: Evaluations of a run, at least 2; or several numbers, which share the
            reference and the schedules.
        solvers: Solvers to try.
        schedules: Label -> schedule to try them on, and no other; by default ART in
            closed form, with the exponents 1/2 and 2/3, and for DPM-Solver++(2M) (with
            dual weights where the network passes a gradient), KL-optimal, EDM and
            log-SNR (both unpinned), and for the best few solvers ART for that solver
            and that number of steps.
        seconds: Time for the solvers' own lists and for refining, all numbers together;
            by default no limit. It is looked at before each of them, and what has been
            found by then is judged.
        evaluations: Evaluations of a batch that one refinement may spend; by default
            300 runs.
        reference: Accurate x_0 of the same ``x_T``; by default integrated here.
        held_out_share: Share of ``x_T`` that only the final judgement sees.
        batch: Samples computed together; by default all.
        file: A JSON file that keeps each finished plan, so that a stopped call goes on
            where it stopped; a file of another flow, noise or choice is refused.
        progress: Whether to show a progress bar (on stderr).

    Returns:
        A `Plan`, or one for each number. `tuning_report` says what was tried and
        whether the winner's lead is resolved; so does ``plan.provenance``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range, no solver makes that many
            evaluations, or the file belongs to another call.

    Warns:
        UserWarning: If the reference is too coarse to judge by, or the denoiser gives
            NaN on the way; the best plan known is returned then.
    """
    check_flow(flow)
    check_share(held_out_share, len(check_samples(x_T)))
    several = isinstance(nfe, Iterable) and not isinstance(nfe, str)
    budgets: list[Any] = list(nfe) if several else [nfe]  # type: ignore[arg-type]
    if isinstance(solvers, str):
        raise TypeError(
            f"solvers: expected several, got the text {solvers!r}; pass [{solvers!r}]"
        )
    for number in budgets:
        if positive_int(number, "nfe", minimum=-(1 << 62)) < 2:
            raise ValueError(
                f"nfe: expected at least 2, got {number}; one evaluation gives the "
                "mean of the data from any noise"
            )
    if not budgets or not solvers:
        raise ValueError("nfe, solvers: each needs at least one entry")
    kinds = [solver_of(s) for s in solvers]
    for number in budgets:
        if not any(_steps(kind.evaluations, number) for kind in kinds):
            raise ValueError(
                f"nfe: none of {', '.join(k.name for k in kinds)} makes {number} "
                "evaluations in whole steps; add euler or a multistep solver"
            )
    limit = math.inf
    if seconds is not None:
        limit = time.monotonic() + finite_float(seconds, "seconds", positive=True)
    spend = None if evaluations is None else positive_int(evaluations, "evaluations")
    batch = None if batch is None else positive_int(batch, "batch")
    if schedules is not None:
        if not isinstance(schedules, Mapping) or not schedules:
            raise TypeError(
                f"schedules: expected a dict of label -> schedule, got {got(schedules)}"
            )
        for schedule in schedules.values():
            check_process(schedule, flow.process)
    with full_precision():
        origin = _fingerprint(flow, x_T, kinds, schedules, held_out_share, spend)
        store = _Store(file, origin)
        todo = [number for number in budgets if store.plan(number) is None]
        if todo:
            noise = matched_noise(flow, x_T, reference, batch)
            learn, judge = halves(noise, held_out_share)
            lists = dict(schedules or _untrained(learn, batch))
            for number in todo:
                search = _Search(
                    learn,
                    judge,
                    lists,
                    kinds,
                    number,
                    limit,
                    spend,
                    matching=schedules is None,
                )
                store.keep(number, search.run(progress=progress))
        plans = [store.plan(number) for number in budgets]
    found = [plan for plan in plans if plan is not None]
    return found if several else found[0]


def tuning_report(plan: Plan) -> str:
    """What `tune` tried and how it chose, as text.

    Args:
        plan: A plan that `tune` made.

    Raises:
        ValueError: If it was made otherwise.
    """
    made = plan.provenance
    if "tried" not in made:
        raise ValueError("plan: it was not made by artlib.tune; nothing is known of it")
    rows = [f"{plan.nfe} evaluations: {plan.name}", ""]
    rows.append(f"{'on held-out noise':44s}     rms    mean  median")
    for row in made["finalists"]:
        numbers = "  ".join(f"{row[key]:6.4f}" for key in ("rms", "mean", "median"))
        rows.append(f"{row['name']:44.44s}  {numbers}")
    rows += ["", _verdict(made), f"{len(made['tried'])} pairs tried; the best of them:"]
    for row in made["tried"][:8]:
        rows.append(f"  {row['name']:42.42s}  {row['rms']:6.4f}  {row['median']:6.4f}")
    return "\n".join(rows)


def _verdict(made: Mapping[str, Any]) -> str:
    lead = made["lead"]
    if lead is None:
        return "Nothing else was judged."
    texts = [
        f"{name} {value:.3f} [{low:.3f}, {high:.3f}]"
        for name, (value, low, high) in ((n, lead[n]) for n in ("rms", "median"))
    ]
    resolved = all(lead[name][2] < 1 for name in ("rms", "median"))
    return (
        f"Over {lead['over']}: {', '.join(texts)}; the lead is "
        f"{'' if resolved else 'not '}resolved on {lead['noises']} noises."
    )


def _steps(evaluations: int, nfe: int) -> int:
    """Steps of a solver that make so many evaluations, or 0."""
    if not evaluations or (nfe + evaluations - 1) % evaluations:
        return 0
    return (nfe + evaluations - 1) // evaluations


def _untrained(noise: Noise, batch: int | None) -> dict[str, Schedule]:
    """Schedules without learning by gradient."""
    flow, x = noise.flow, noise.x[:LEARNING_PATHS]
    few = flow.rows(slice(len(x)), len(noise.x))
    process = flow.process
    table, _ = stiffness_path(
        few,
        x,
        points=THRIFTY_POINTS,
        method="multistep",
        batch=batch,
        keep=False,
        forward=False,
    )
    found = {"ART": table.art(), "ART, |Q|^(2/3)": table.art(exponent=2 / 3)}
    try:
        found["ART for 2M, dual"] = art(
            few, x, solver="dpmpp_2m", weight="dual", batch=batch
        )
    except RuntimeError:  # no gradient
        found["ART for 2M"] = art(
            few, x, solver="dpmpp_2m", weight="local", batch=batch
        )
    return {
        **found,
        "KL-optimal": kl_optimal(process),
        "EDM, unpinned": edm(process, pinned=False),
        "log-SNR, unpinned": log_snr(process, pinned=False),
    }


@dataclass
class _Candidate:
    """A plan, and its size on the noise that it was chosen by."""

    plan: Plan
    size: Size

    @property
    def score(self) -> float:
        return self.size.rms * self.size.mean


class _Search:
    """The search for one number of evaluations."""

    def __init__(
        self,
        learn: Noise,
        judge: Noise,
        schedules: Mapping[str, Schedule],
        kinds: Sequence[Any],
        nfe: int,
        limit: float,
        evaluations: int | None,
        *,
        matching: bool,
    ) -> None:
        self.learn, self.judge = learn, judge
        self.schedules, self.nfe, self.limit = dict(schedules), nfe, limit
        self.evaluations = evaluations or 300 * nfe
        self.broken = 0  # refinements that ended on NaN or infinity
        self.matching = matching  # whether the best solvers get schedules of their own
        self.kinds = [k for k in kinds if _steps(k.evaluations, nfe)]

    def run(self, *, progress: bool) -> Plan:
        pairs = [(label, k) for k in self.kinds for label in self.schedules]
        bar = tqdm(
            total=len(pairs) + (2 + 2 * self.matching) * FINALISTS,
            desc=f"tune, {self.nfe} evaluations",
            disable=not progress,
        )
        with bar:
            tried = []
            for label, kind in pairs:
                tried.append(self.untold(label, kind))
                bar.update()
            tried.sort(key=lambda c: c.score)
            if not math.isfinite(tried[0].score):
                raise ValueError(
                    f"flow: all {len(tried)} runs of {self.nfe} evaluations gave NaN "
                    "or infinity, with every solver and schedule; check the denoiser"
                )
            finalists = self.first(tried)
            starts = []
            for candidate in list(finalists):
                # It was chosen by this noise: only the held-out one can compare it.
                made = self.matched(candidate)
                finalists, tried = finalists + made, tried + made
                starts.append(min([candidate, *made], key=lambda c: c.score))
                bar.update(self.matching)
            for candidate in list(finalists):
                told = self.told(candidate)
                finalists += [] if told is None else [told]
                bar.update()
            for candidate in starts:
                refined = self.refined(candidate)
                finalists += [] if refined is None else [refined]
                bar.update()
        return self.judged(tried, finalists)

    def untold(self, label: str, kind: Any) -> _Candidate:
        schedule, K = self.schedules[label], _steps(kind.evaluations, self.nfe)
        nodes = schedule.grid(K)
        plan = Plan.made(
            schedule.process,
            nodes,
            nodes[:-1],
            kind,
            name=f"{label}, {kind.name}",
            method="honest",
            provenance={"schedule": schedule.provenance, "label": label},
        )
        return _Candidate(plan, self.learn.size(nodes, kind))

    def matched(self, pair: _Candidate) -> list[_Candidate]:
        """A pair's solver on ART's schedule for it and its steps, if there is one.

        There is none for a single step, where schedules were given, or after the time.
        """
        kind, K = solver_of(pair.plan.solver), pair.plan.steps
        if K < 2 or not self.matching or time.monotonic() > self.limit:
            return []
        label = f"ART for {kind.name} and {K} steps"
        # What will judge its refinement must not have taught the start.
        moving, _ = halves(self.learn, MOVING_HELD_OUT)
        self.schedules[label] = art(
            moving.flow,
            moving.x,
            solver=kind,
            steps=K,
            runs=MIXTURE_RUNS,
            batch=self.learn.batch,
        )
        return [self.untold(label, kind)]

    def first(self, tried: Sequence[_Candidate]) -> list[_Candidate]:
        """The best pair of each of the best solvers.

        At few steps several solvers are one; the first of them stands for all.
        """
        found: list[_Candidate] = []
        for candidate in tried:
            name = solver_of(candidate.plan.solver).name
            same = any(c.size == candidate.size for c in found)
            if not same and name not in {solver_of(c.plan.solver).name for c in found}:
                found.append(candidate)
        return found[:FINALISTS]

    def told(self, candidate: _Candidate) -> _Candidate | None:
        """Other levels told, or None if honest ones are the best."""
        plan, kind = candidate.plan, solver_of(candidate.plan.solver)
        if not kind.tellable:
            return None
        levels = calibrated_levels(self.learn, plan.nodes, kind)
        if torch.equal(levels, plan.told):
            return None
        name = f"{plan.name}, told"
        told = Plan.made(
            plan.process,
            plan.nodes,
            levels,
            kind,
            name=name,
            method="tell",
            provenance=plan.provenance,
        )
        return _Candidate(told, self.learn.size(plan.nodes, kind, levels))

    def refined(self, candidate: _Candidate) -> _Candidate | None:
        """Nodes and levels moved, or None if there is no time or no gain."""
        kind = solver_of(candidate.plan.solver)
        if time.monotonic() > self.limit or candidate.plan.steps < 2:
            return None
        start = self.schedules[candidate.plan.provenance["label"]]
        with warnings.catch_warnings(record=True) as caught:
            # No gain is no fault here; what else is said, `judged` says for all.
            warnings.simplefilter("always", UserWarning)
            try:
                plan: Plan | Schedule = refine(
                    start,
                    self.learn.flow,
                    self.learn.x,
                    candidate.plan.steps,
                    solver=kind,
                    told=kind.tellable,
                    evaluations=self.evaluations,
                    reference=self.learn.ends,
                    held_out_share=MOVING_HELD_OUT,
                    batch=self.learn.batch,
                )
            except ValueError:  # a refinement that diverges loses nothing
                self.broken += 1
                return None
        self.broken += any("gave NaN or infinity" in str(w.message) for w in caught)
        if plan.provenance["error_after"] == plan.provenance["error_before"]:
            return None  # the start came back
        name = f"{candidate.plan.name}, refined"
        nodes = (
            plan.nodes if isinstance(plan, Plan) else plan.grid(candidate.plan.steps)
        )
        told = plan.told if isinstance(plan, Plan) else nodes[:-1]
        done = Plan.made(
            start.process,
            nodes,
            told,
            kind,
            name=name,
            method="refine",
            provenance=plan.provenance,
        )
        levels = None if done.is_honest else done.told
        return _Candidate(done, self.learn.size(nodes, kind, levels))

    def judged(
        self, tried: Sequence[_Candidate], finalists: Sequence[_Candidate]
    ) -> Plan:
        """The finalist that errs least on noise that none has seen."""
        rows: list[tuple[Size, np.ndarray, Plan]] = []
        for c in finalists:
            told = None if c.plan.is_honest else c.plan.told
            errors = self.judge.errors(c.plan.nodes, c.plan.solver, told)
            rows.append((Size.of(errors), errors, c.plan))
        rows.sort(key=lambda row: row[0].rms * row[0].median)
        size, errors, best = rows[0]
        finite = math.isfinite(size.mean)
        if finite:
            check_reference(self.judge, size.mean)
        else:
            best = min(finalists, key=lambda c: c.score).plan
        lost = sum(not math.isfinite(row[0].mean) for row in rows)
        if lost or self.broken:
            warnings.warn(
                f"tune: {self.broken} refinements and {lost} of {len(rows)} finalists "
                "gave NaN or infinity, though runs before did not; the best plan "
                f"known, {best.name}, is returned. Check the denoiser",
                stacklevel=3,
            )
        lead = None
        if finite and len(rows) > 1 and len(errors) > 1:
            lead = {"over": rows[1][2].name, **_lead(errors, rows[1][1])}
        return Plan.made(
            best.process,
            best.nodes,
            best.told,
            best.solver,
            name=best.name,
            method="tune",
            provenance={
                "made_from": best.provenance,
                "finalists": [_row(plan, s) for s, _, plan in rows],
                "tried": [_row(c.plan, c.size) for c in tried],
                "lead": lead,
                "noises": [len(self.learn.x), len(self.judge.x)],
                "nfe": self.learn.counter.nfe,
            },
        )


def _row(plan: Plan, size: Size) -> dict[str, Any]:
    numbers = {"rms": size.rms, "mean": size.mean, "median": size.median}
    # JSON has no infinity; a run that diverges is listed last, as a large number.
    return {"name": plan.name, **{k: min(v, 1e30) for k, v in numbers.items()}}


def _lead(best: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Ratios of rms and median, each with a 95 % paired bootstrap interval."""
    both, found = np.stack([best, other]), {}
    for name, measure in (("rms", "error"), ("median", "median")):
        value = statistic(both, measure)
        with np.errstate(divide="ignore", invalid="ignore"):  # two exact samplers
            draws = resample(both, measure, resamples=2000, seed=0)
            ratios, ratio = draws[0] / draws[1], value[0] / value[1]
        interval = percentiles(ratio, np.nan_to_num(ratios, nan=1.0), 0.95)
        found[name] = [float(v) for v in np.nan_to_num(interval, nan=1.0)]
    return {**found, "noises": len(best)}


def _fingerprint(
    flow: ProbabilityFlow,
    x_T: Tensor,
    kinds: Sequence[Any],
    schedules: Mapping[str, Schedule] | None,
    held_out_share: float,
    evaluations: int | None,
) -> dict[str, Any]:
    """What a file has to belong to: flow, noise and choices, by a probe of the flow."""
    few = x_T[:2].detach()
    with torch.no_grad():
        level = flow.process.t_max / 3
        probe = flow.rows(slice(len(few)), len(x_T)).denoise(few, level)
    numbers = [float(y.double().norm()) for y in (x_T, probe)]
    return {
        "process": str(flow.process),
        "noise": [list(x_T.shape), *(f"{v:.6g}" for v in numbers)],
        "solvers": [k.name for k in kinds],
        "schedules": None
        if schedules is None
        else {label: s.grid(8).tolist() for label, s in schedules.items()},
        "held_out": held_out_share,
        "evaluations": evaluations,
        "search": _REVISION,
    }


class _Store:
    """Finished plans, in a file if there is one."""

    def __init__(
        self, file: str | os.PathLike[str] | None, origin: dict[str, Any]
    ) -> None:
        self.file, self.origin = file, origin
        self.plans: dict[str, str] = {}
        self.live: dict[str, Plan] = {}
        if file is None:
            return
        check_output(file)
        if not os.path.exists(file) or not os.path.getsize(file):
            return
        with open(file, encoding="utf-8") as stream:
            try:
                data = json.load(stream)
                known, self.plans = data["origin"], data["plans"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"file: {os.fspath(file)} was not written by artlib.tune; name "
                    "another one"
                ) from error
        for key, now in json.loads(json.dumps(origin)).items():
            if known.get(key) != now:
                raise ValueError(
                    f"file: {os.fspath(file)} belongs to another call, whose {key} "
                    "differs; name another file, or remove this one"
                )

    def plan(self, nfe: int) -> Plan | None:
        """The plan for a number of evaluations, if it is known."""
        if (key := str(nfe)) in self.live:
            return self.live[key]
        return Plan.from_json(self.plans[key]) if key in self.plans else None

    def keep(self, nfe: int, plan: Plan) -> None:
        """Keep a finished plan."""
        self.live[str(nfe)] = plan
        if self.file is None:
            return
        self.plans[str(nfe)] = plan.to_json()
        data = {"origin": self.origin, "plans": self.plans}
        text = json.dumps(data, indent=1, allow_nan=False)
        write_bytes(self.file, f"{text}\n".encode())
