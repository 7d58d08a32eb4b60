"""Tables of chapters: stored by a full run, and compared with the code of today."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import artlib
import artlib.zoo
from artlib import book
from artlib.book import surroundings, tables

PROCESS = artlib.VE(sigma_max=20.0)


def flow_of(variance):
    law = artlib.Gaussian(torch.zeros(2), variance * torch.eye(2))
    return artlib.ProbabilityFlow(PROCESS, law.denoiser(PROCESS))


def noise(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return 20.0 * torch.randn(n, 2, generator=rng, dtype=torch.float64)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("ARTLIB_RESULTS", str(tmp_path / "notebooks" / "results"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARTLIB_FULL", raising=False)


def results_file():
    folder = Path(os.environ["ARTLIB_RESULTS"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "ch99-test.json"


def run(flow, *, schedules=None, part=None, **more):
    both = {"EDM": artlib.edm(PROCESS), "KL-optimal": artlib.kl_optimal(PROCESS)}
    return book.comparison(
        "ch99-test",
        flow,
        schedules or both,
        noise,
        {"euler": [2, 4], "heun": [3]},
        count=8,
        part={"euler": [2]} if part is None else part,
        few=4,
        **more,
    )


def test_full_run_stores_and_quick_run_reads_and_checks(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        whole = run(flow_of(1.0), measure=lambda x: {"spread": float(x.std())})
    assert not list((tmp_path / "_build").iterdir())
    capsys.readouterr()
    read = run(flow_of(1.0))
    assert read == whole
    assert set(read.cells["heun 3"]["EDM"]) == {"spread", "error", "median"}
    assert len(read.values("euler", 4, "KL-optimal", "error")) == 3
    assert "8 samples for each of 3 seeds" in capsys.readouterr().out


def test_references_under_a_shared_name_are_kept_and_taken(monkeypatch, tmp_path):
    alone = full_run(monkeypatch, flow_of(1.0))
    first = full_run(monkeypatch, flow_of(1.0), shared="both")
    (file,) = (tmp_path / "_build").iterdir()
    before = file.stat().st_mtime_ns
    second = full_run(monkeypatch, flow_of(1.0), shared="both")
    assert file.name == "both.references.safetensors"
    assert file.stat().st_mtime_ns == before
    assert alone == first == second
    with pytest.raises(ValueError, match="belongs to another comparison"):
        full_run(monkeypatch, flow_of(1.0), shared="both", rtol=1e-3)


def test_tables_are_checked_by_one_reference_of_a_flow_and_noise():
    one, other = (artlib.CountNFE(flow_of(v).denoiser) for v in (1.0, 1.1))
    flows = [flow_of(1.0).with_denoiser(counter) for counter in (one, other)]
    first = tables.reference_again(flows[0], noise(3, 5), 1e-5)
    spent = one.nfe
    again = tables.reference_again(flows[0], noise(3, 5), 1e-6)
    assert again is first
    assert one.nfe - spent < spent / 4  # what tells the two apart
    assert not torch.equal(tables.reference_again(flows[1], noise(3, 5), 1e-5), first)
    assert not torch.equal(tables.reference_again(flows[0], noise(3, 6), 1e-5), first)
    exact = noise(3, 5) / (1 + 20.0**2) ** 0.5
    assert torch.allclose(first, exact, rtol=1e-3)


def test_code_that_gives_other_numbers_is_found_out(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        run(flow_of(1.0))
    with pytest.raises(AssertionError, match="ch99-test: EDM, euler 2: the error is"):
        run(flow_of(1.1))


def full_run(monkeypatch, flow, **more):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        return run(flow, **more)


def change(path, *, by):
    """Multiply the number at a path of the stored results."""
    file = results_file()
    stored = json.loads(file.read_text())
    *way, last = path
    place = stored["results"]
    for step in way:
        place = place[step]
    if isinstance(place[last], str):  # the errors of one seed's samples
        first, _, rest = place[last].partition(" ")
        place[last] = f"{float(first) * by:.4g} {rest}"
    else:
        place[last] *= by
    file.write_text(json.dumps(stored))


CELL = ("table", "cells", "euler 2", "KL-optimal")


@pytest.mark.parametrize(
    ("path", "by", "message"),
    [
        ((*CELL, "error", 0), 1.01, "KL-optimal, euler 2: the error of the table"),
        ((*CELL, "median", 2), 1.01, "KL-optimal, euler 2: the median of the table"),
        (
            ("table", "cells", "heun 3", "EDM", "error", 1),
            1.01,
            "EDM, heun 3: the error of the table",
        ),
        (
            ("table", "samples", "euler 2", "EDM", 0),
            1.08,
            "EDM, euler 2: the error is",
        ),
        (
            ("table", "samples", "euler 4", "EDM", 2),
            1.001,
            "a stored number was changed by hand",
        ),
        ((*CELL, "spread", 1), 1.01, "a stored number was changed by hand"),
        (("table", "nfe", "heun 3"), 2, "a stored number was changed by hand"),
        (("origin", "flow", 0), 1.01, "the flow's denoiser differed in the full run"),
        (("origin", "noises", 2, 2), 1.01, "noises differed in the full run"),
    ],
)
def test_stored_numbers_that_were_changed_are_found_out(monkeypatch, path, by, message):
    full_run(monkeypatch, flow_of(1.0), measure=lambda x: {"spread": float(x.std())})
    run(flow_of(1.0))
    change(path, by=by)
    with pytest.raises(AssertionError, match=f"ch99-test: .*{message}"):
        run(flow_of(1.0))


def test_what_the_part_does_not_reach_is_found_out_too(monkeypatch):
    full_run(monkeypatch, flow_of(1.0))
    with pytest.raises(AssertionError, match="EDM, euler 2: the schedule was another"):
        run(flow_of(1.0), schedules={"EDM": artlib.uniform(PROCESS)}, part={})
    with pytest.raises(AssertionError, match="KL-optimal, euler 2: the schedule was a"):
        run(flow_of(1.0), schedules={"EDM": artlib.edm(PROCESS)}, part={})
    with pytest.raises(AssertionError, match="the flow's denoiser differed"):
        run(flow_of(1.01), part={})
    with pytest.raises(AssertionError, match="noises differed"):
        run(flow_of(1.0), seeds=(0, 1, 3), part={})
    with pytest.raises(AssertionError, match="expected 2 seeds of 8 samples"):
        run(flow_of(1.0), seeds=(0, 1), part={})


def test_a_second_full_run_computes_again(monkeypatch):
    first = full_run(monkeypatch, flow_of(1.0))
    second = full_run(monkeypatch, flow_of(4.0))
    assert second != first
    assert run(flow_of(4.0)) == second


def test_a_full_run_goes_on_and_keeps_only_what_is_asked(monkeypatch, tmp_path):
    calls = []

    def dies(x):
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return {}

    both = {"EDM": artlib.edm(PROCESS), "KL-optimal": artlib.kl_optimal(PROCESS)}
    with pytest.raises(KeyboardInterrupt):
        full_run(monkeypatch, flow_of(1.0), measure=dies)
    partial = tmp_path / "_build" / "ch99-test.partial.json"
    assert "EDM" in json.loads(partial.read_text())["cells"]["euler 2"]
    with pytest.raises(ValueError, match=r"references\.safetensors belongs to another"):
        full_run(monkeypatch, flow_of(1.1))
    only = full_run(
        monkeypatch, flow_of(1.0), schedules={"KL-optimal": both["KL-optimal"]}
    )
    assert only.labels("euler") == ["KL-optimal"]
    assert not partial.exists()


def test_without_results_the_message_says_how_to_make_them():
    with pytest.raises(FileNotFoundError, match="run the chapter at full size first"):
        run(flow_of(1.0))


@pytest.mark.parametrize("text", ['{"made": {}, "resul', "[1, 2]", '{"made": {}}'])
def test_damaged_results_are_refused_by_name(text):
    book.save_results("ch99-test", {}, seed=0)
    results_file().write_text(text)
    with pytest.raises(ValueError, match=r"ch99-test\.json: expected what save"):
        book.load_results("ch99-test")


def test_results_do_not_make_the_commit_look_changed(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for file in ("artlib/book/results.py", "notebooks/results/a.json"):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("1")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    code = repository / "artlib" / "book" / "results.py"
    monkeypatch.setattr(surroundings, "__file__", str(code))
    clean = surroundings.commit()
    assert len(clean) == 12
    (repository / "notebooks/results/a.json").write_text("2")
    assert surroundings.commit() == clean
    code.write_text("2")
    assert surroundings.commit() == clean + "+"
    # A package installed into an environment inside this repository is not of it.
    inside = tmp_path / "venv" / "site-packages" / "artlib" / "book"
    inside.mkdir(parents=True)
    monkeypatch.setattr(surroundings, "__file__", str(inside / "results.py"))
    monkeypatch.delenv("ARTLIB_COMMIT", raising=False)
    assert surroundings.commit() == "unknown"
    monkeypatch.setenv("ARTLIB_COMMIT", "0123456789ab")
    assert surroundings.commit() == "0123456789ab"


def test_a_schedule_is_learned_in_a_full_run_and_read_afterwards(monkeypatch):
    net = artlib.zoo.load("fashion-small")
    with pytest.raises(FileNotFoundError, match="make full"):
        book.learned("ch99-schedule", net)
    calls = []

    def few(flow, x_T, **options):
        calls.append(options)
        return artlib.art(flow, x_T[:2], **(options | {"points": 9}))

    monkeypatch.setattr("artlib.book.tables.art", few)
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        made = book.learned("ch99-schedule", net, solver="heun")
    # Rule and table are named: what is stored does not follow the defaults.
    assert calls == [{"solver": "heun", "weight": "local", "points": 64}]
    assert book.learned("ch99-schedule", net, solver="heun") == made
    assert len(calls) == 1
    # Of another network, noise or solver it would be another.
    with pytest.raises(AssertionError, match="ch99-schedule: solver differed"):
        book.learned("ch99-schedule", net)
    with pytest.raises(AssertionError, match="ch99-schedule: noises differed"):
        book.learned("ch99-schedule", net, solver="heun", seed=1001)
    trained = artlib.zoo.load("fashion-small")
    with torch.no_grad():
        for weight in trained.parameters():
            weight *= 1.001
    with pytest.raises(AssertionError, match="the flow's denoiser differed"):
        book.learned("ch99-schedule", trained, solver="heun")
    short = artlib.zoo.load("fashion-small", process=artlib.VE(sigma_max=20.0))
    with pytest.raises(AssertionError, match="flow's process differed"):
        book.learned("ch99-schedule", short, solver="heun")


def test_stored_grids_are_a_schedule_by_number_of_steps():
    grids = {str(K): artlib.edm(artlib.VE()).grid(K).tolist() for K in (2, 5)}
    listed = book.Listed(json.loads(json.dumps(grids)))
    assert torch.equal(listed.grid(5), artlib.edm(artlib.VE()).grid(5))
    with pytest.raises(
        ValueError, match=r"K: no list of 3 steps, there are \['2', '5'\]"
    ):
        listed.grid(3)


def test_errors_of_plans_are_the_distances_to_the_exact_ends():
    flow, x = flow_of(1.0), noise(8, 3)
    plans = {
        "EDM, heun": {5: artlib.Plan.honest(artlib.edm(PROCESS), 3, solver="heun")},
        "EDM, 2M": {
            n: artlib.Plan.honest(artlib.edm(PROCESS), n, solver="dpmpp_2m")
            for n in (3, 5)
        },
    }
    table = book.error_table(book.plan_errors(flow, plans, x, rtol=1e-8))
    assert table.nfe == {"nfe 3": 3, "nfe 5": 5}
    assert table.count == 8
    assert list(table.cells["nfe 5"]) == list(plans)
    exact = x / (1 + 20.0**2) ** 0.5
    for label, row in plans.items():
        for n, plan in row.items():
            left = artlib.sample(flow, x, plan) - exact
            errors = left.square().mean(1).sqrt()
            found = table.sample_errors("nfe", n, label)
            assert found == pytest.approx(errors.numpy(), rel=1e-3)
            rms = float(errors.square().mean().sqrt())
            assert table.mean("nfe", n, label, "error") == pytest.approx(rms, rel=1e-3)
