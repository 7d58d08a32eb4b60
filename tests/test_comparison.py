"""Comparisons: what they report is what sampling by hand gives, whatever happens."""

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import artlib
from artlib.comparison import bootstrap as _bootstrap
from artlib.comparison import file as _comparison_file
from artlib.comparison.compare import (
    Comparison,
    baselines,
    compare,
    nfe_ratio,
    nfe_to_quality,
)
from artlib.comparison.file import Origin
from artlib.comparison.references import references

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


def test_the_tolerance_of_references_is_relative_and_absolute(flow, noises):
    x = 1e-3 * noises[0]  # a state where the absolute one decides
    (found,) = references(flow, [x], rtol=1e-4)
    both = {"solver": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    assert torch.equal(found, artlib.sample(flow, x, **both))
    assert not torch.equal(found, artlib.sample(flow, x, **both | {"atol": 1e-6}))


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
                table.sample_errors(solver, K, label),
                torch.cat(distances) / 3**0.5,
                rtol=5e-4,
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


def test_a_clock_is_compared_as_sampling_by_hand_with_it(flow, noises):
    table = artlib.stiffness_table(flow, noises[1], points=16)
    schedules = {
        "EDM": artlib.edm(flow.process),
        "predicted": lambda K: artlib.PredictedClock(table, K),
        "exact": artlib.ExactClock,
    }
    ends, budgets = exact_ends(noises), {"euler": [3], "heun": [4]}
    found = compare(flow, schedules, noises, budgets, ends=ends, batch=30)
    for solver, K, usual in (("euler", 3, 3), ("heun", 4, 7)):
        for label in ("predicted", "exact"):
            errors = []
            for noise, end in zip(noises, ends, strict=True):
                clock = schedules[label](K)
                x = artlib.sample(flow, noise, clock=clock, solver=solver)
                errors.append(artlib.terminal_error(x, end))
            np.testing.assert_allclose(
                found.values(solver, K, label, "error"), errors, rtol=1e-6
            )
        # The exact clock walks the paths first; the other asks for nothing more.
        assert found.evaluations(solver) == [usual]
        assert found.spent(solver, K, "predicted") == usual
        assert found.spent(solver, K, "EDM") == usual
        walk = artlib.stiffness_table(flow, noises[0]).nfe
        assert found.spent(solver, K, "exact") == usual + walk
    assert f"(NFE {3 + walk})" in found.text("euler", "error")
    again = Comparison.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    single = compare(flow, {"x": artlib.ExactClock}, noises, {"euler": [3]}, ends=ends)
    assert single.nfe == {"euler 3": 3}


def test_clocks_refused(flow, noises, tmp_path):
    clocks, ends = {"own": artlib.ExactClock}, exact_ends(noises)
    with pytest.raises(ValueError, match=r"'own' is a clock.* not with 'rk4'"):
        compare(flow, clocks, noises, {"euler": [2], "rk4": [2]}, ends=ends)
    file = tmp_path / "table.json"
    with pytest.raises(ValueError, match="file: 'own' is a clock per sample"):
        compare(flow, clocks, noises, {"euler": [2]}, ends=ends, file=file)
    assert not file.exists()
    with pytest.raises(TypeError, match="'own': expected a schedule, or a function"):
        compare(flow, {"own": [80.0, 0.0]}, noises, {"euler": [2]}, ends=ends)
    with pytest.raises(TypeError, match="makes a clock, but it made"):
        compare(flow, {"own": lambda K: K}, noises, {"euler": [2]}, ends=ends)
    other = {"own": lambda K: artlib.ExactClock(K + 1)}
    with pytest.raises(ValueError, match="a clock of 3 steps for K = 2"):
        compare(flow, other, noises, {"euler": [2]}, ends=ends)


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


class Count:
    """A flow's denoiser, and how often it was called."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, 0

    def __call__(self, x, t):
        self.calls += 1
        return self.denoiser(x, t)


def other_law():
    return artlib.Gaussian(torch.zeros(3), torch.diag(1.01 * VARIANCES))


def test_a_file_of_another_problem_is_refused_and_stays(flow, noises, tmp_path):
    file, process = tmp_path / "table.json", flow.process
    schedules, budgets = {"EDM": artlib.edm(process)}, {"euler": [2]}
    ends = exact_ends(noises)
    compare(flow, schedules, noises, budgets, ends=ends, file=file)
    before = file.read_bytes()
    other = artlib.ProbabilityFlow(process, other_law().denoiser(process))
    moved = [noises[0].clone(), noises[1].clone()]
    moved[1][7, 1] += 0.1  # one number of the second seed
    exchanged = [noises[0].clone(), noises[1].clone()]
    exchanged[0][[3, 4]] = noises[0][[4, 3]]  # of the same size
    longer = artlib.VE(sigma_max=20.0 * (1 + 1e-6))
    law = artlib.Gaussian(torch.zeros(3), torch.diag(VARIANCES))
    long = artlib.ProbabilityFlow(longer, law.denoiser(longer))
    shorter = artlib.VE(sigma_max=19.0)
    short = artlib.ProbabilityFlow(shorter, other_law().denoiser(shorter))
    for run, part in (
        (
            lambda: compare(other, schedules, noises, budgets, ends=ends, file=file),
            "the flow's denoiser",
        ),
        (
            lambda: compare(flow, schedules, moved, budgets, ends=ends, file=file),
            "noises",
        ),
        (
            lambda: compare(
                flow, schedules, noises[::-1], budgets, ends=ends[::-1], file=file
            ),
            "noises",
        ),
        (
            lambda: compare(flow, schedules, exchanged, budgets, ends=ends, file=file),
            "noises",
        ),
        (
            lambda: compare(
                long,
                {"EDM": artlib.edm(longer)},
                noises,
                budgets,
                ends=ends,
                file=file,
            ),
            "the flow's process",
        ),
        (
            lambda: compare(
                flow, schedules, noises[:1], budgets, ends=ends[:1], file=file
            ),
            "noises",
        ),
        (
            lambda: compare(
                flow,
                schedules,
                [n.half() for n in noises],
                budgets,
                ends=ends,
                file=file,
            ),
            "the dtype",
        ),
        (
            lambda: compare(
                flow,
                schedules,
                noises,
                budgets,
                file=file,
                ends=[ends[0], 1.1 * ends[1]],
            ),
            "ends",
        ),
        (
            lambda: compare(
                short,
                {"EDM": artlib.edm(shorter)},
                noises,
                budgets,
                ends=ends,
                file=file,
            ),
            "the flow's process",
        ),
    ):
        with pytest.raises(ValueError, match=rf"table\.json .* comparison: {part}"):
            run()
        assert file.read_bytes() == before
    # Rounding of another processor is no other problem.
    near = [noise * (1 + 1e-9) for noise in noises]
    compare(flow, schedules, near, budgets, ends=ends, file=file)


def test_cells_of_another_grid_or_measure_are_computed_again(flow, noises, tmp_path):
    file, process, ends = tmp_path / "table.json", flow.process, exact_ends(noises)
    counter = Count(flow.denoiser)
    counted = flow.with_denoiser(counter)

    def run(schedule, steps, measure=None, label="EDM", file=file):
        counter.calls = 0
        return compare(
            counted,
            {label: schedule},
            noises,
            {"euler": steps},
            ends=ends,
            measure=measure,
            file=file,
        )

    edm, uniform = artlib.edm(process), artlib.uniform(process)
    run(edm, [2, 3])
    assert counter.calls == 2 * (2 + 3) + 3  # two seeds; and three to know the flow
    run(edm, [2, 3])
    assert counter.calls == 3
    fresh = run(uniform, [3], file=None)
    table = run(uniform, [3])
    assert table == fresh  # nothing of EDM under the label, not with 2 steps either
    assert "euler 2" not in json.loads(file.read_text())["cells"]
    assert run(uniform, [2, 3]) == run(uniform, [2, 3], file=None)

    def mean(x):
        return {"size": float(x.mean())}

    def spread(x):
        return {"size": float(x.std())}

    assert run(uniform, [2, 3], mean) == run(uniform, [2, 3], mean, file=None)
    assert run(uniform, [2, 3], spread) == run(uniform, [2, 3], spread, file=None)
    assert run(uniform, [2, 3], spread) == run(uniform, [2, 3], spread, file=None)
    run(uniform, [2, 3], spread)
    assert counter.calls == 3

    def wider(x):
        return {"size": 1.01 * float(x.std())}

    assert run(uniform, [2, 3], wider) == run(uniform, [2, 3], wider, file=None)
    run(uniform, [2, 3], spread)
    with pytest.raises(ValueError, match=r"table\.json holds 'size' of 'EDM' by ano"):
        run(edm, [2], mean, label="other")
    # Without measures, what is there of other labels stays.
    table = run(edm, [2], label="other")
    assert table.labels("euler") == ["EDM", "other"]


def test_what_others_measured_of_a_cell_stays(flow, noises, tmp_path):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})

    def mean(x):
        return {"mean": float(x.mean())}

    def spread(x):
        return {"spread": float(x.std())}

    first = compare(*arguments, ends=ends, measure=mean, file=file)
    both = compare(*arguments, measure=spread, file=file)
    assert set(both.cells["euler 2"]["EDM"]) == {"mean", "error", "median", "spread"}
    assert both.samples == first.samples
    stored = Comparison.from_dict(json.loads(file.read_text()))
    assert stored == both == compare(*arguments, ends=ends, measure=mean, file=file)


def test_references_stay_known_when_a_run_has_none(flow, noises, tmp_path):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    compare(*arguments, ends=ends, file=file)
    compare(*arguments, measure=lambda x: {"mean": float(x.mean())}, file=file)
    moved = [1.1 * end for end in ends]
    with pytest.raises(ValueError, match=r"table\.json .* comparison: ends differed"):
        compare(*arguments, ends=moved, file=file)


def test_a_run_returns_what_it_measured_itself(flow, noises, tmp_path):
    """Whatever another run writes of the same cells in the meantime."""
    file, ends = tmp_path / "table.json", exact_ends(noises)
    schedules, budgets = {"EDM": artlib.edm(flow.process)}, {"euler": [2, 3]}

    def meddling(x):
        data = json.loads(file.read_text()) if file.exists() else {"cells": {}}
        if "euler 2" in data["cells"]:
            data["cells"]["euler 2"]["EDM"]["error"][0] *= 1.5
            file.write_text(json.dumps(data))
        return {"mean": float(x.mean())}

    options = {"ends": ends, "measure": meddling}
    found = compare(flow, schedules, noises, budgets, file=file, **options)
    file.unlink()
    assert found == compare(flow, schedules, noises, budgets, **options)


def test_a_flow_is_known_again_as_far_as_its_dtype_resolves_it():
    def origin(flow, dtypes):
        return Origin(["VE", 1.0], dtypes, [[1.0]], flow, None)

    first, near = [1.0, 0.5], [1.001, 0.501]
    half, single = (["torch.float64", f"torch.{d}"] for d in ("float16", "float32"))
    assert origin(first, half).difference(origin(near, half)) is None
    assert origin(first, single).difference(origin(near, single)) is not None


def test_grids_that_differ_in_the_sixth_digit_are_two():
    process = artlib.VE(sigma_max=20.0)
    first, near, same = (
        artlib.from_grid(process, [20.0, node, 0.0])
        for node in (1.0, 1.00001, 1 + 1e-14)
    )
    key = _comparison_file.grid_key
    assert key(first, 2) == key(same, 2) != key(near, 2)


def test_a_measure_that_cannot_be_known_again_says_so(flow, noises, tmp_path):
    def only_small(x):
        raise ValueError("expected small numbers")

    with pytest.raises(ValueError, match="expected small") as found:
        compare(
            flow,
            {"EDM": artlib.edm(flow.process)},
            noises,
            {"euler": [2]},
            measure=only_small,
            file=tmp_path / "table.json",
        )
    assert "to know it again in the file" in found.value.__notes__[0]


def test_files_without_origin_are_refused_and_still_read(flow, noises, tmp_path):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    table = compare(*arguments, ends=ends)
    file.write_text(json.dumps(table.to_dict()))
    with pytest.raises(ValueError, match=r"table\.json does not say what made"):
        compare(*arguments, ends=ends, file=file)
    assert Comparison.from_dict(json.loads(file.read_text())) == table


WRITER = """
import sys, torch, artlib
label, path = sys.argv[1:]
process = artlib.VE(sigma_max=20.0)
law = artlib.Gaussian([0.0], [[1.0]])
flow = artlib.ProbabilityFlow(process, law.denoiser(process))
noise = torch.linspace(-20, 20, 6, dtype=torch.float64)[:, None]
print("ready", flush=True)
sys.stdin.readline()
artlib.compare(
    flow, {label: artlib.edm(process)}, [noise], {"euler": list(range(1, 41))},
    ends=[noise / 20], file=path,
)
"""


def test_several_writers_lose_nothing(tmp_path):
    file = tmp_path / "table.json"
    root = str(Path(artlib.__file__).resolve().parent.parent)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, label, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        for label in "AB"
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        run.communicate(timeout=120)
        assert run.returncode == 0
    table = Comparison.from_dict(json.loads(file.read_text()))
    for K in range(1, 41):
        assert set(table.cells[f"euler {K}"]) == set("AB")
        assert len(table.sample_errors("euler", K, "B")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_file_that_another_run_does_not_let_go_is_named(
    flow, noises, tmp_path, monkeypatch
):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    monkeypatch.setattr("artlib.comparison.file._PATIENCE", 0.1)
    with (
        _comparison_file._alone(file, str(file)),
        pytest.raises(TimeoutError, match=r"table\.json is being written by another"),
    ):
        compare(*arguments, ends=ends, file=file)
    compare(*arguments, ends=ends, file=file)


KILLED = """
import os, sys
from pathlib import Path
from artlib.comparison.file import _alone
with _alone(Path(sys.argv[1]), "table"):
    print("holds it", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(os.name != "posix", reason="the system has no such locks")
def test_the_lock_of_a_killed_run_hinders_nobody(flow, noises, tmp_path, monkeypatch):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(artlib.__file__).parents[1])},
    )
    assert run.stdout.readline() == "holds it\n"
    monkeypatch.setattr("artlib.comparison.file._PATIENCE", 0.1)
    with pytest.raises(TimeoutError, match="being written by another run"):
        compare(*arguments, ends=ends, file=file)
    run.kill()
    run.communicate()
    (lock,) = tmp_path.glob(".artlib-*.lock")  # it is left, but not held
    compare(*arguments, ends=ends, file=file)
    assert not lock.exists()
    assert file.is_file()


def test_without_locks_of_the_system_a_lock_file_is_one(
    flow, noises, tmp_path, monkeypatch
):
    def refuses(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    file, ends = tmp_path / "table.json", exact_ends(noises)
    arguments = (flow, {"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    monkeypatch.setattr("artlib.comparison.file._PATIENCE", 0.1)
    if _comparison_file.fcntl is not None:
        monkeypatch.setattr(_comparison_file.fcntl, "flock", refuses)
    with _comparison_file._alone(file, "table"):
        assert len(list(tmp_path.glob(".artlib-*.lock"))) == 1
        with pytest.raises(TimeoutError, match="being written by another run"):
            compare(*arguments, ends=ends, file=file)
        assert len(list(tmp_path.glob(".artlib-*.lock"))) == 1
    compare(*arguments, ends=ends, file=file)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_a_file_that_cannot_be_written_costs_nothing(flow, noises, tmp_path):
    counter = artlib.CountNFE(flow.denoiser)
    arguments = ({"EDM": artlib.edm(flow.process)}, noises, {"euler": [2]})
    for file, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "a.json", FileNotFoundError),
    ):
        with pytest.raises(error, match=str(file)):
            compare(
                flow.with_denoiser(counter),
                *arguments,
                ends=exact_ends(noises),
                file=file,
            )
    assert counter.nfe == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_measure_that_is_no_number_is_refused(flow, noises, tmp_path, value):
    file, ends = tmp_path / "table.json", exact_ends(noises)
    schedules = {"EDM": artlib.edm(flow.process)}
    for more in ({}, {"file": file}):
        with pytest.raises(ValueError, match="measure: 'm' of 'EDM' with euler, K = 2"):
            compare(
                flow,
                schedules,
                noises,
                {"euler": [2]},
                ends=ends,
                measure=lambda x: {"m": value},
                **more,
            )
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_schedule_of_another_process_is_refused(flow, noises):
    other = artlib.VE(sigma_max=19.0)
    ends = exact_ends(noises)
    for schedule in (artlib.edm(other), artlib.uniform(artlib.VP())):
        with pytest.raises(ValueError, match=r"schedules: 'S' was made for V.*convert"):
            compare(flow, {"S": schedule}, noises, {"euler": [2]}, ends=ends)


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


def test_text_prints_on_a_terminal_without_its_characters(monkeypatch):
    table = made_up(
        {(5, "ART \N{GREEK SMALL LETTER THETA}"): [0.1, 0.2], (5, "B"): [1, 2]}
    )
    for encoding, sign, label in (
        ("ascii", "+-", "ART \\u03b8"),
        ("cp1252", "\N{PLUS-MINUS SIGN}", "ART \\u03b8"),
        ("utf-8", "\N{PLUS-MINUS SIGN}", "ART \N{GREEK SMALL LETTER THETA}"),
    ):
        raw = io.BytesIO()
        terminal = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        monkeypatch.setattr("sys.stdout", terminal)
        print(table.text("euler", "median"))
        monkeypatch.undo()
        lines = raw.getvalue().decode(encoding).splitlines()
        assert lines[1].startswith(label + " ")
        assert f"0.1{sign}0" in lines[1]
        assert len({len(line) for line in lines}) == 1  # the columns stay in line


def test_quality_is_reached_where_a_power_law_says():
    nfe = np.array([3.0, 5.0, 9.0, 19.0])
    error = 2.0 * nfe**-1.7
    for goal in (0.2, 0.05, 2.0 * 9.0**-1.7):
        expected = (2.0 / goal) ** (1 / 1.7)
        assert nfe_to_quality(nfe, error, goal) == pytest.approx(expected)
    assert nfe_to_quality(nfe, error, 1.0) == 3.0
    assert np.isnan(nfe_to_quality(nfe, error, 1e-3))
    last = float(error[-1])  # reached, though rounded otherwise
    assert nfe_to_quality(nfe, error, last * (1 - 1e-15)) == pytest.approx(19.0)


def test_an_error_that_comes_back_up_does_not_count_as_reached():
    found = nfe_to_quality([1, 2, 4, 8], [1.0, 0.1, 0.4, 0.2], 0.3)
    assert 4 < found < 8
    with pytest.raises(ValueError, match="ascending"):
        nfe_to_quality([2, 1], [1.0, 0.5], 0.7)
    with pytest.raises(ValueError, match="finite numbers above 0"):
        nfe_to_quality([1, 2], [1.0, float("nan")], 0.7)
    with pytest.raises(ValueError, match="two lists of one length"):
        nfe_to_quality([1, 2], [1.0], 0.7)


def made_up(errors, *, nfe=None):
    """A table of one seed from per-sample errors {(K, label): [n]} with Euler."""
    table = Comparison(count=len(next(iter(errors.values()))))
    for (K, label), row in errors.items():
        key = f"euler {K}"
        table.nfe[key] = K
        table.samples.setdefault(key, {})[label] = [list(row)]
        table.cells.setdefault(key, {})[label] = {
            "error": [float(np.sqrt(np.mean(np.square(row))))],
            "median": [float(np.sort(row)[(len(row) - 1) // 2])],
        }
    return table


def test_errors_of_samples_make_the_numbers_of_their_cell(flow, noises):
    table = compare(
        flow,
        {"EDM": artlib.edm(flow.process), "KL": artlib.kl_optimal(flow.process)},
        [noises[0]],
        {"euler": [2, 4], "heun": [3]},
        ends=exact_ends(noises)[:1],
    )
    for key, row in table.cells.items():
        solver, K = key.split()[0], int(key.split()[1])
        for label in row:
            for measure in ("error", "median"):
                value, low, high = table.interval(solver, K, label, measure=measure)
                expected = table.mean(solver, K, label, measure)
                assert value == pytest.approx(expected, rel=5e-4)
                assert low < value < high


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = {"median": 0, "error": 0}
    runs, truth = 300, 0.8
    for run in range(runs):
        hard = np.exp(rng.normal(size=150) / 2)
        errors = {
            (5, "A"): truth * hard * np.exp(rng.normal(size=150) / 5),
            (5, "B"): hard * np.exp(rng.normal(size=150) / 5),
        }
        for measure in held:
            _, low, high = made_up(errors).ratio(
                "euler", 5, "A", "B", measure=measure, resamples=300, seed=run
            )
            held[measure] += low <= truth <= high
    for hits in held.values():  # the standard deviation of the share is 0.013
        assert 0.91 < hits / runs < 0.985


def test_pairs_of_samples_tell_more_than_two_sets():
    rng = np.random.default_rng(2)
    hard = np.exp(rng.normal(size=200))
    other = np.exp(rng.normal(size=200))
    again = 0.9 * hard * np.exp(rng.normal(size=200) / 20)
    for measure in ("median", "error"):
        paired = made_up({(5, "A"): again, (5, "B"): hard})
        apart = made_up({(5, "A"): 0.9 * other, (5, "B"): hard})
        found = paired.ratio("euler", 5, "A", "B", measure=measure)
        wide = apart.ratio("euler", 5, "A", "B", measure=measure)
        assert found.high - found.low < (wide.high - wide.low) / 3
        if measure == "error":
            assert found.high < 1
            # The intervals of the two numbers overlap all the same.
            one, two = (
                paired.interval("euler", 5, x, measure=measure) for x in ("A", "B")
            )
            assert one.high > two.low


def test_exchanged_cells_have_the_inverse_ratio_and_equal_ones_ratio_one():
    rng = np.random.default_rng(3)
    a, b = np.exp(rng.normal(size=(2, 80)))
    table = made_up({(14, "ART"): a, (18, "EDM"): b, (18, "half"): b / 2})
    for measure in ("median", "error"):
        there = table.ratio("euler", 14, "ART", ("euler", 18, "EDM"), measure=measure)
        back = table.ratio("euler", 18, "EDM", ("euler", 14, "ART"), measure=measure)
        np.testing.assert_allclose(
            (there.value, there.low, there.high),
            (1 / back.value, 1 / back.high, 1 / back.low),
            rtol=1e-14,
        )
        half = table.ratio("euler", 18, "half", "EDM", measure=measure)
        np.testing.assert_allclose(half, (0.5, 0.5, 0.5), rtol=1e-14)
        again = table.ratio("euler", 14, "ART", ("euler", 18, "EDM"), measure=measure)
        assert again == there
        assert again != table.ratio(
            "euler", 14, "ART", ("euler", 18, "EDM"), measure=measure, seed=1
        )


def test_a_verdict_is_that_of_the_worse_measure():
    rng = np.random.default_rng(5)
    hard = np.exp(rng.normal(size=200))
    # Nine in ten are nearer, one in ten far off: by the median ahead, by rms behind.
    far = np.where(np.arange(200) % 10, 0.5, 20.0)
    table = made_up(
        {(5, "half"): hard / 2, (5, "far"): far * hard, (5, "EDM"): hard}
        | {(5, "even"): hard * np.exp(rng.normal(size=200) / 5)}
    )
    assert table.verdict("euler", 5, "half", "EDM") == "ahead"
    assert table.verdict("euler", 5, "EDM", ("euler", 5, "half")) == "behind"
    assert table.verdict("euler", 5, "even", "EDM") == "open"
    assert table.verdict("euler", 5, "EDM", "EDM") == "open"
    assert table.verdict("euler", 5, "far", "EDM", measures=["median"]) == "ahead"
    assert table.verdict("euler", 5, "far", "EDM", measures=["error"]) == "behind"
    assert table.verdict("euler", 5, "far", "EDM") == "behind"
    # Of several rivals the worst.
    assert table.verdict("euler", 5, "half", ["EDM", "even"]) == "ahead"
    assert table.verdict("euler", 5, "EDM", ["even", "half"]) == "behind"
    assert table.verdict("euler", 5, "half", ["EDM", "half"]) == "open"
    with pytest.raises(ValueError, match="other: expected at least one"):
        table.verdict("euler", 5, "half", [])
    for bad in ("median", ()):
        with pytest.raises(ValueError, match="measures"):
            table.verdict("euler", 5, "half", "EDM", measures=bad)
    with pytest.raises(ValueError, match='expected "error" or "median"'):
        table.verdict("euler", 5, "half", "EDM", measures=["frechet"])


def test_nfe_ratio_is_exact_for_power_laws_and_holds_the_truth():
    rng = np.random.default_rng(4)
    hard = np.exp(rng.normal(size=60))
    counts = [5, 8, 12, 20, 30]
    errors = {(K, "EDM"): hard * K**-2.0 for K in counts}
    errors |= {(K, "ART"): 0.5 * hard * K**-2.0 for K in counts}
    for measure in ("median", "error"):
        found = nfe_ratio(
            made_up(errors), "euler", "ART", ("euler", 20, "EDM"), measure=measure
        )
        np.testing.assert_allclose(found, 0.5**0.5, rtol=1e-12)
    held, runs = 0, 150
    for _ in range(runs):
        hard = np.exp(rng.normal(size=100) / 2)
        noisy = {
            (K, label): scale * hard * K**-2.0 * np.exp(rng.normal(size=100) / 5)
            for K in counts
            for label, scale in (("EDM", 1.0), ("ART", 0.5))
        }
        value, low, high = nfe_ratio(
            made_up(noisy), "euler", "ART", ("euler", 20, "EDM"), resamples=200
        )
        median = [np.sort(noisy[K, "ART"])[49] for K in counts]
        goal = np.sort(noisy[20, "EDM"])[49]
        assert value == pytest.approx(nfe_to_quality(counts, median, goal) / 20)
        held += low <= 0.5**0.5 <= high
    assert 0.88 < held / runs < 1


def test_nfe_ratio_of_a_goal_that_is_not_reached():
    rng = np.random.default_rng(5)
    hard = np.exp(rng.normal(size=60))
    table = made_up({(K, "A"): hard * K**-1.0 for K in (4, 8)} | {(8, "B"): hard / 9})
    never = nfe_ratio(table, "euler", "A", ("euler", 8, "B"))
    assert np.isnan(never.value)
    assert never.low == never.high == np.inf
    at_once = nfe_ratio(table, "euler", "A", ("euler", 4, "A"))
    assert at_once == (1.0, 1.0, 1.0)


def test_evaluations_needed_are_those_of_the_power_laws():
    """Errors c n^-2: the same error as 35 and 19 of EDM takes sqrt(c) times as many."""
    rng = np.random.default_rng(7)
    hard = np.exp(rng.normal(size=80))
    counts = [3, 5, 8, 12, 20]
    scale = {"EDM": 1.0, "half": 0.25, "tenth": 0.01}
    errors = {
        (K, label): c * hard * K**-2.0 for K in counts for label, c in scale.items()
    }
    errors |= {(K, "goal"): hard * K**-2.0 for K in (19, 35)}
    table = made_up(errors)
    goals = {f"EDM at {K}": ("euler", K, "goal") for K in (35, 19)}
    for measure in ("median", "error"):
        found = artlib.nfe_needed(
            table, "euler", goals, labels=["half", "tenth", "EDM"], measure=measure
        )
        assert list(found) == ["half", "tenth", "EDM"]
        np.testing.assert_allclose(found["half"]["EDM at 35"], 17.5, rtol=1e-3)
        np.testing.assert_allclose(found["half"]["EDM at 19"], 9.5, rtol=1e-3)
        np.testing.assert_allclose(found["tenth"]["EDM at 35"], 3.5, rtol=1e-3)
        assert found["tenth"]["EDM at 19"].value == 3  # its first point, a bound
        assert np.isnan(found["EDM"]["EDM at 35"].value)
        assert found["EDM"]["EDM at 35"].high == np.inf
    every = artlib.nfe_needed(table, "euler", {"one": ("euler", 8, "EDM")})
    assert set(every) == {*scale, "goal"}
    assert every["EDM"]["one"].value == pytest.approx(8)
    with pytest.raises(ValueError, match="goals, labels: expected at least one each"):
        artlib.nfe_needed(table, "euler", {})


def test_files_keep_four_digits_of_every_sample_in_little_room(tmp_path):
    rng = np.random.default_rng(6)
    table = Comparison(count=48)
    for K in range(10):
        for label in range(10):
            seeds = np.exp(2 * rng.normal(size=(3, 48)) - 4)
            seeds[0, 0], seeds[1, 0], seeds[2, 0] = 0.0, 10.25, 3e-7
            rounded = [[float(f"{e:.4g}") for e in row] for row in seeds]
            table.samples.setdefault(f"euler {K}", {})[f"schedule {label}"] = rounded
    text = json.dumps(table.to_dict(), indent=1)
    assert len(text) < 135_000
    again = Comparison.from_dict(json.loads(text))
    assert again == table
    assert again.sample_errors("euler", 3, "schedule 4")[:49:48].tolist() == [0, 10.25]


def test_a_table_from_before_there_were_errors_of_samples_still_loads():
    old = {
        "cells": {"heun 3": {"EDM": {"error": [0.2], "median": [0.1]}}},
        "nfe": {"heun 3": 5},
        "count": 8,
    }
    table = Comparison.from_dict(old)
    assert table.mean("heun", 3, "EDM", "median") == 0.1
    with pytest.raises(KeyError, match="no errors of single samples for 'heun', K = 3"):
        table.interval("heun", 3, "EDM")


@pytest.mark.parametrize("held", [2**21, 7 * 31])
@pytest.mark.parametrize("measure", ["error", "median"])
@pytest.mark.parametrize("worst", [4.0, math.inf])
def test_draws_are_those_of_the_definition(monkeypatch, held, measure, worst):
    """Each draw takes n rows, the same of every cell; blocks of rows change nothing."""
    errors = np.exp(np.random.default_rng(7).normal(size=(2, 31)))
    errors[1, 3] = worst
    rows = np.random.default_rng(1).integers(31, size=(50, 31))
    expected = _bootstrap.statistic(errors[:, rows], measure)
    monkeypatch.setattr(_bootstrap, "_NUMBERS", held)
    _bootstrap._of_one_cell.cache_clear()
    found = _bootstrap.resample(errors, measure, resamples=50, seed=1)
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    again = _bootstrap.resample(errors[::-1], measure, resamples=50, seed=1)
    np.testing.assert_array_equal(again, found[::-1])


def test_the_least_is_chosen_by_its_measure():
    """One far sample makes the root mean square; the median does not see it."""
    table = made_up({(5, "A"): [1.0] * 8 + [9.0], (5, "B"): [2.0] * 9})
    assert table.least("euler", 5, ["A", "B"]) == "A"
    assert table.least("euler", 5, ["A", "B"], "error") == "B"
    assert table.least("euler", 5, ["A"], "error") == "A"
    with pytest.raises(ValueError, match="labels: expected at least one"):
        table.least("euler", 5, [])


def test_intervals_refused():
    table = made_up({(5, "A"): [0.1, 0.2], (5, "B"): [0.0, 0.3], (5, "C"): [1.0]})
    for arguments, message in (
        ({"measure": "frechet"}, "measure: expected"),
        ({"level": 1.0}, "level: expected a share between 0 and 1"),
        ({"level": float("nan")}, "level: expected a share between 0 and 1"),
        ({"resamples": 0}, "resamples: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            table.interval("euler", 5, "A", **arguments)
    with pytest.raises(ValueError, match="samples: expected at least 2"):
        table.interval("euler", 5, "C")
    with pytest.raises(ValueError, match="samples: expected as many in every cell"):
        table.ratio("euler", 5, "A", "C")
    with pytest.raises(ValueError, match=r"other: .* has median 0 on these samples"):
        table.ratio("euler", 5, "A", "B")
    rare = made_up({(5, "A"): [0.1, 0.2, 0.3], (5, "B"): [0.0, 0.3, 0.4]})
    with pytest.raises(ValueError, match=r"0 on these samples or some of them"):
        rare.ratio("euler", 5, "A", "B")  # 0.3 on all, 0 on some draws
    with pytest.raises(ValueError, match="table: the median is 0 in some cell"):
        nfe_ratio(table, "euler", "A", ("euler", 5, "B"))
    with pytest.raises(KeyError, match="label: nothing measured for 'euler', 'D'"):
        nfe_ratio(table, "euler", "D", ("euler", 5, "B"))


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
