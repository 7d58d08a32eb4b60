"""`artlib.tune`: first among its candidates, resumable, and honest about its lead."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import artlib
from artlib import tuning

F64 = torch.float64
PROCESS = artlib.VE()
OPTIONS: dict[str, Any] = {"solvers": ("euler", "heun", "dpmpp_2m"), "evaluations": 60}


def problem(n: int, seed: int = 0) -> tuple[artlib.ProbabilityFlow, Tensor]:
    rng = torch.Generator().manual_seed(3)
    means = 1.2 * torch.randn(6, 8, generator=rng).double()
    stds = 0.1 + 0.4 * torch.rand(6, generator=rng).double()
    target = artlib.GaussianMixture(means, stds, torch.full((6,), 1 / 6, dtype=F64))
    flow = artlib.ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    return flow, target.sample_prior(PROCESS, n, seed=seed)


FOR_IT = (("euler", 5), ("heun", 3), ("dpmpp_2m", 5))
SCHEDULES = {
    "KL-optimal": artlib.kl_optimal(PROCESS),
    "EDM": artlib.edm(PROCESS, pinned=False),
}


def test_the_winner_leads_on_noise_that_none_has_seen() -> None:
    flow, x = problem(48)
    plan = artlib.tune(flow, x, nfe=5, **OPTIONS)
    assert plan.nfe == 5
    fresh = problem(96, seed=9)[1]
    ends = artlib.references(flow, [fresh])[0]

    def errors(*run: Any, **options: Any) -> np.ndarray:
        y = artlib.sample(flow, fresh, *run, **options)
        return (y - ends).square().mean(1).sqrt().numpy()

    found = errors(plan)
    for schedule in (artlib.art(flow, x[:16]), *SCHEDULES.values()):
        for solver, K in FOR_IT:
            other = errors(schedule.grid(K), solver=solver)
            assert found.mean() < other.mean()
            assert np.median(found) < np.median(other)
    notes = plan.provenance
    tried = [row["name"] for row in notes["tried"]]
    finalists = [row["name"] for row in notes["finalists"]]
    pairs, own = tried[: 3 * 6], tried[3 * 6 :]
    solvers = {name.rpartition(", ")[2] for name in finalists if name in pairs}
    assert pairs[0].rpartition(", ")[2] in solvers
    made = {f"ART for {s} and {dict(FOR_IT)[s]} steps, {s}" for s in solvers}
    assert set(own) == made
    assert len(own) == len(made) <= len(finalists)
    assert made <= set(finalists)
    assert notes["noises"] == [24, 24]
    assert notes["finalists"][0]["name"] == plan.name
    products = [row["rms"] * row["median"] for row in notes["finalists"]]
    assert products == sorted(products)
    assert ("not resolved" in artlib.tuning_report(plan)) == (
        any(notes["lead"][m][2] >= 1 for m in ("rms", "median"))
    )


def test_a_stopped_call_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, x = problem(12)
    file = tmp_path / "tuned.json"
    options = {**OPTIONS, "schedules": SCHEDULES, "evaluations": 20, "file": file}
    searched = []
    run = tuning._Search.run

    def watched(self: Any, **given: Any) -> artlib.Plan:
        searched.append(self.nfe)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return run(self, **given)

    monkeypatch.setattr(tuning._Search, "run", watched)
    with pytest.raises(KeyboardInterrupt):
        artlib.tune(flow, x, nfe=[3, 4], **options)
    three, four = artlib.tune(flow, x, nfe=[3, 4], **options)
    assert searched == [3, 4, 4]  # three is not searched again
    assert (three.nfe, four.nfe) == (3, 4)
    again = artlib.tune(flow, x, nfe=3, **options)
    assert torch.equal(again.nodes, three.nodes)
    with pytest.raises(ValueError, match="noise differs"):
        artlib.tune(flow, x + 0.1, nfe=3, **options)
    other = artlib.ProbabilityFlow(PROCESS, lambda x, t: x / (1 + t**2))
    with pytest.raises(ValueError, match="noise differs"):
        artlib.tune(other, x, nfe=3, **options)
    for what, other_choice in (
        ("solvers", ("euler",)),
        ("evaluations", 30),
        ("schedules", dict(list(SCHEDULES.items())[:1])),
    ):
        with pytest.raises(ValueError, match=f"{what} differs"):
            artlib.tune(flow, x, nfe=3, **{**options, what: other_choice})
    monkeypatch.setattr(tuning, "_REVISION", 1)
    with pytest.raises(ValueError, match="search differs"):
        artlib.tune(flow, x, nfe=3, **options)
    (tmp_path / "foreign.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not written by"):
        artlib.tune(flow, x, nfe=3, **{**options, "file": tmp_path / "foreign.json"})


def test_no_time_is_enough_for_what_is_untrained() -> None:
    flow, x = problem(12)
    plan = artlib.tune(flow, x, nfe=4, schedules=SCHEDULES, seconds=1e-6)
    assert plan.nfe == 4
    assert "refined" not in plan.name
    usual = artlib.tune(flow, x, nfe=4, solvers=("dpmpp_2m",), seconds=1e-6)
    assert len(usual.provenance["tried"]) == 6  # no list of the solver's own


def test_a_refinement_that_diverges_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverges(*_: Any, **__: Any) -> None:
        raise ValueError("the state became NaN or infinite")

    monkeypatch.setattr(tuning, "refine", diverges)
    flow, x = problem(12)
    with pytest.warns(UserWarning, match="tune: 2 refinements .* is returned"):
        plan = artlib.tune(flow, x, nfe=4, schedules=SCHEDULES, **OPTIONS)
    assert plan.nfe == 4


def test_without_signal_at_the_start() -> None:
    process = artlib.RectifiedFlow()
    target = artlib.GaussianMixture(
        torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64),
        torch.tensor([0.2, 0.3], dtype=F64),
        torch.tensor([0.5, 0.5], dtype=F64),
    )
    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    x = target.sample_prior(process, 16, seed=0)
    lists = {"uniform": artlib.uniform(process)}
    plan = artlib.tune(flow, x, nfe=3, schedules=lists, **OPTIONS)
    assert bool(torch.isfinite(artlib.sample(flow, x, plan)).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nfe": 1}, ValueError, "nfe: expected at least 2"),
        ({"nfe": []}, ValueError, "nfe"),
        ({"nfe": 4, "solvers": ("heun",)}, ValueError, "none of heun makes 4"),
        ({"nfe": 4, "solvers": ("huen",)}, ValueError, "unknown 'huen'"),
        ({"nfe": 4, "solvers": ("dopri5",)}, ValueError, "dopri5"),
        ({"nfe": 4, "solvers": (lambda x: x,)}, TypeError, "four arguments"),
        ({"nfe": 4, "schedules": {}}, TypeError, "schedules"),
        (
            {"nfe": 4, "schedules": {"a": artlib.edm(artlib.VE(sigma_max=9.0))}},
            ValueError,
            "belongs to",
        ),
        ({"nfe": 4, "seconds": -1.0}, ValueError, "seconds"),
        ({"nfe": 4, "evaluations": 0}, ValueError, "evaluations"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    flow, x = problem(4)
    with pytest.raises(error, match=message):
        artlib.tune(flow, x, **options)


def test_another_plan_has_no_report() -> None:
    plan = artlib.Plan.honest(artlib.edm(PROCESS), 4, solver="euler")
    with pytest.raises(ValueError, match="not made by"):
        artlib.tuning_report(plan)
