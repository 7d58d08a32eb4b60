"""Comparisons: what they report is what sampling by hand gives, whatever happens."""

import json

import numpy as np
import pytest
import torch

import artlib
from artlib.comparison import (
    Comparison,
    baselines,
    compare,
    nfe_to_quality,
    references,
)

VARIANCES = torch.tensor([1.0, 0.3, 0.01])


@pytest.fixture(scope="module")
def flow():
    process = artlib.VE(sigma_max=20.0)
    law = artlib.Gaussian(torch.zeros(3), torch.diag(VARIANCES))
    return artlib.ProbabilityFlow(process, law.denoiser(process))


@pytest.fixture(scope="module")
def noises():
    law = artlib.Gaussian(torch.zeros(3), torch.diag(VARIANCES))
    return [law.sample_prior(artlib.VE(sigma_max=20.0), 50, seed=s) for s in (0, 1)]


def exact_ends(noises):
    start = torch.sqrt(VARIANCES + 20.0**2).double()
    return [VARIANCES.double().sqrt() / start * x for x in noises]


def test_references_are_the_exact_ends(flow, noises):
    # The last piece, from t_min = 0.002 to 0, is one Euler step: 1e-5 relative here.
    for found, exact in zip(
        references(flow, noises, batch=30), exact_ends(noises), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)


def test_error_nfe_and_measures_are_those_of_sampling_by_hand(flow, noises):
    schedules = {
        "EDM": artlib.edm(flow.process),
        "ART": artlib.art(flow, noises[0]),
    }
    ends = exact_ends(noises)
    table = compare(
        flow,
        schedules,
        noises,
        {"euler": [2, 5], "heun": [4]},
        ends=ends,
        measure=lambda x: {"spread": float(x.std())},
        batch=20,
    )
    for solver, K in (("euler", 2), ("euler", 5), ("heun", 4)):
        for label, schedule in schedules.items():
            grid = schedule.grid(K)
            x = [artlib.sample(flow, noise, grid, solver=solver) for noise in noises]
            errors = [artlib.terminal_error(a, b) for a, b in zip(x, ends, strict=True)]
            np.testing.assert_allclose(table.values(solver, K, label, "error"), errors)
            distances = [(a - b).norm(dim=1) for a, b in zip(x, ends, strict=True)]
            np.testing.assert_allclose(
                table.values(solver, K, label, "median"),
                [float(d.median()) / 3**0.5 for d in distances],
            )
            np.testing.assert_allclose(
                table.values(solver, K, label, "spread"), [float(a.std()) for a in x]
            )
            assert table.mean(solver, K, label, "error") == pytest.approx(
                sum(errors) / 2
            )
            assert table.spread(solver, K, label, "error") == pytest.approx(
                abs(errors[0] - errors[1]) / 2**0.5
            )
    assert table.evaluations("euler") == [2, 5]
    assert table.evaluations("heun") == [7]
    assert table.labels("heun") == ["EDM", "ART"]
    assert table.curve("euler", "ART", "error").shape == (2, 2)


def test_matched_noise_reproduces_exact_gaussian_w2(flow, noises):
    # On Gaussian data the map from noise to end is the same monotone scaling for all,
    # so the error with matched noise estimates W2 / sqrt(d) without bias.
    schedule, d = artlib.kl_optimal(flow.process), 3
    big = torch.randn(20_000, d, generator=torch.Generator().manual_seed(3))
    noise = torch.sqrt(VARIANCES + 20.0**2) * big.double()
    table = compare(
        flow, {"KL": schedule}, [noise], {"heun": [3]}, ends=exact_ends([noise])
    )
    grid = schedule.grid(3)
    w2 = float(artlib.gaussian_w2(flow.process, VARIANCES, grid, solver="heun"))
    found = table.mean("heun", 3, "KL", "error")
    assert found == pytest.approx(w2 / d**0.5, rel=0.02)


def test_a_stopped_comparison_goes_on_where_it_stopped(flow, noises, tmp_path):
    schedules, file = baselines(flow.process), tmp_path / "table.json"
    arguments = (flow, schedules, noises, {"euler": [2, 3]})
    ends = exact_ends(noises)
    whole = compare(*arguments, ends=ends)
    calls = []

    def dies(x):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        compare(*arguments, ends=ends, measure=dies, file=file)
    done = json.loads(file.read_text())
    assert sum(len(row) for row in done["cells"].values()) == 3
    again = compare(*arguments, ends=ends, file=file)
    assert again.to_dict() == whole.to_dict()
    assert not list(tmp_path.glob(".*"))


def test_text_has_every_schedule_with_nfe_mean_and_spread(flow, noises):
    table = compare(
        flow,
        baselines(flow.process),
        noises,
        {"heun": [2, 6]},
        ends=exact_ends(noises),
    )
    lines = table.text("heun", "error").splitlines()
    assert lines[0].split() == ["NFE", "3", "11"]
    assert [line.split()[0] for line in lines[1:]] == [
        label.split()[0] for label in baselines(flow.process)
    ]
    mean = table.mean("heun", 6, "Uniform", "error")
    assert f"{mean:.3g}±" in lines[1]
    assert Comparison.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_quality_is_reached_where_a_power_law_says():
    nfe = np.array([3.0, 5.0, 9.0, 19.0])
    error = 2.0 * nfe**-1.7
    for goal in (0.2, 0.05, 2.0 * 9.0**-1.7):
        expected = (2.0 / goal) ** (1 / 1.7)
        assert nfe_to_quality(nfe, error, goal) == pytest.approx(expected)
    assert nfe_to_quality(nfe, error, 1.0) == 3.0
    assert np.isnan(nfe_to_quality(nfe, error, 1e-3))


def test_an_error_that_comes_back_up_does_not_count_as_reached():
    found = nfe_to_quality([1, 2, 4, 8], [1.0, 0.1, 0.4, 0.2], 0.3)
    assert 4 < found < 8
    with pytest.raises(ValueError, match="ascending"):
        nfe_to_quality([2, 1], [1.0, 0.5], 0.7)
    with pytest.raises(ValueError, match="finite numbers above 0"):
        nfe_to_quality([1, 2], [1.0, float("nan")], 0.7)
    with pytest.raises(ValueError, match="two lists of one length"):
        nfe_to_quality([1, 2], [1.0], 0.7)


def test_bad_input_is_refused(flow, noises, tmp_path):
    schedules, budgets = baselines(flow.process), {"euler": [2]}
    with pytest.raises(ValueError, match="ends: nothing to measure"):
        compare(flow, schedules, noises, budgets)
    with pytest.raises(ValueError, match="ends: expected one tensor per seed"):
        compare(flow, schedules, noises, budgets, ends=exact_ends(noises)[:1])
    with pytest.raises(ValueError, match="each needs at least one entry"):
        compare(flow, {}, noises, budgets, ends=exact_ends(noises))
    with pytest.raises(ValueError, match="values are NaN"):
        compare(flow, schedules, [noises[0] * float("nan")], budgets, ends=noises[:1])
    file = tmp_path / "other.json"
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json is no comparison; delete it"):
        compare(flow, schedules, noises, budgets, ends=exact_ends(noises), file=file)
    assert file.read_text() == "[1, 2]"
    compare(
        flow, schedules, noises, budgets, ends=exact_ends(noises), file=tmp_path / "a"
    )
    fewer = [noise[:10] for noise in noises]
    with pytest.raises(ValueError, match="made with 50 samples per seed"):
        compare(
            flow,
            schedules,
            fewer,
            budgets,
            ends=exact_ends(fewer),
            file=tmp_path / "a",
        )
    with pytest.raises(KeyError, match="nothing measured for 'rk4', K = 3"):
        Comparison().values("rk4", 3, "EDM", "error")
