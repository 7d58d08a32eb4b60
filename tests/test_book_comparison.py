"""Tables of chapters: stored by a full run, and compared with the code of today."""

import json
import subprocess

import pytest
import torch

import artlib
import artlib.zoo
from artlib import book

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
    monkeypatch.delenv("ARTLIB_FULL", raising=False)


def run(flow, **more):
    return book.comparison(
        "ch99-test",
        flow,
        {"EDM": artlib.edm(PROCESS), "KL-optimal": artlib.kl_optimal(PROCESS)},
        noise,
        {"euler": [2, 4], "heun": [3]},
        count=8,
        part={"euler": [2]},
        few=4,
        **more,
    )


def test_full_run_stores_and_quick_run_reads_and_checks(monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        whole = run(flow_of(1.0), measure=lambda x: {"spread": float(x.std())})
    assert (tmp_path / "_build" / "ch99-test.partial.json").is_file()
    capsys.readouterr()
    read = run(flow_of(1.0))
    assert read == whole
    assert set(read.cells["heun 3"]["EDM"]) == {"spread", "error", "median"}
    assert len(read.values("euler", 4, "KL-optimal", "error")) == 3
    assert "8 samples for each of 3 seeds" in capsys.readouterr().out


def test_code_that_gives_other_numbers_is_found_out(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        run(flow_of(1.0))
    with pytest.raises(AssertionError, match="ch99-test: EDM, euler 2: the error is"):
        run(flow_of(1.1))


def test_stored_numbers_that_were_changed_are_found_out(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        run(flow_of(1.0))
    file = tmp_path / "notebooks" / "results" / "ch99-test.json"
    stored = json.loads(file.read_text())
    stored["results"]["part"]["cells"]["euler 2"]["KL-optimal"]["error"][0] *= 1.05
    file.write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="KL-optimal, euler 2"):
        run(flow_of(1.0))


def test_without_results_the_message_says_how_to_make_them():
    with pytest.raises(FileNotFoundError, match="run the chapter at full size first"):
        run(flow_of(1.0))


def test_results_do_not_make_the_commit_look_changed(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    for file in ("artlib/book.py", "notebooks/results/a.json"):
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("1")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    monkeypatch.setattr(book, "__file__", str(repository / "artlib" / "book.py"))
    clean = book._commit()
    assert len(clean) == 12
    (repository / "notebooks/results/a.json").write_text("2")
    assert book._commit() == clean
    (repository / "artlib/book.py").write_text("2")
    assert book._commit() == clean + "+"


def test_a_schedule_is_learned_in_a_full_run_and_read_afterwards(monkeypatch):
    net = artlib.zoo.load("fashion-small")
    with pytest.raises(FileNotFoundError, match="make full"):
        book.learned("ch99-schedule", net)
    calls = []

    def few(flow, x_T, **options):
        calls.append(options)
        return artlib.art(flow, x_T[:2], points=9, **options)

    monkeypatch.setattr("artlib._book_comparison.art", few)
    with monkeypatch.context() as patch:
        patch.setenv("ARTLIB_FULL", "1")
        made = book.learned("ch99-schedule", net, solver="heun")
    assert calls == [{"solver": "heun"}]
    assert book.learned("ch99-schedule", net) == made
    assert len(calls) == 1
