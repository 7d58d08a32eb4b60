"""Schedules and plans in folders as models are shared: layout, card, no network."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import artlib

PROCESS = artlib.VE(0.01, 30.0)
FILE = "artlib_schedule.json"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def learned() -> artlib.Schedule:
    target = artlib.Gaussian([0.0, 1.0], torch.eye(2))
    flow = artlib.ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    return artlib.art(flow, target.sample_prior(PROCESS, 8, seed=0), points=16)


def test_a_folder_gives_the_schedule_back_to_the_bit(tmp_path: Path) -> None:
    schedule = learned()
    schedule.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        FILE,
    ]
    for folder in (tmp_path / "a" / "b", str(tmp_path / "a" / "b")):
        found = artlib.Schedule.from_pretrained(folder)
        assert torch.equal(found.grid(9), schedule.grid(9))
        assert found.provenance == schedule.provenance
    found = artlib.Schedule.from_pretrained(tmp_path, subfolder="a/b")
    assert found == schedule
    # The file is an ordinary one.
    assert artlib.Schedule.load(tmp_path / "a" / "b" / FILE) == schedule


def test_the_hubs_cache_is_read(tmp_path: Path) -> None:
    """A snapshot there is a folder of links to blobs."""
    artlib.edm(PROCESS).save_pretrained(tmp_path / "plain")
    blobs = tmp_path / "models--who--what" / "blobs"
    snapshot = tmp_path / "models--who--what" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (tmp_path / "plain" / FILE).rename(blobs / "abc")
    (snapshot / FILE).symlink_to(blobs / "abc")
    assert artlib.Schedule.from_pretrained(snapshot) == artlib.edm(PROCESS)


def test_the_card_says_how_it_was_learned(tmp_path: Path) -> None:
    schedule = learned()
    schedule.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: artlib\ntags:\n- ")
    assert "\n# ART\n" in text
    assert "| method | closed form |" in text
    assert f"| nfe | {schedule.provenance['nfe']} |" in text
    assert "| trajectories | 8 |" in text
    row = next(r for r in text.splitlines() if r.startswith("| ten steps |"))
    steps = json.loads(row.split("|")[2].replace("&#91;", "[").replace("&#93;", "]"))
    expected = schedule.grid(10)
    found = torch.tensor(steps, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    # Its own card is renewed with the schedule; somebody else's stays.
    artlib.edm(PROCESS).save_pretrained(tmp_path)
    assert (
        "| made by | edm(rho=7.0, pinned=True) |"
        in (tmp_path / "README.md").read_text()
    )
    (tmp_path / "README.md").write_text("# Mine\n")
    artlib.log_snr(PROCESS).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert artlib.Schedule.from_pretrained(tmp_path) == artlib.log_snr(PROCESS)


def test_what_a_schedule_says_is_text_in_the_card(tmp_path: Path) -> None:
    wild = "a | b\n---\n<script>`x`</script> [l](http://e)"
    data = json.loads(artlib.edm(PROCESS).to_json())
    data |= {"name": "<b>n</b>", "provenance": {"source": wild, "k": "a`b"}}
    schedule = artlib.Schedule.from_json(json.dumps(data))
    schedule.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    body = text.split("\n", 9)[9]
    body = body.split("# ", 1)[1].split("```", 1)[0]
    assert not any(char in body for char in "<>`[")
    assert "&#60;b&#62;n" in body
    rows = [r for r in body.splitlines() if r.startswith("|")]
    assert all(row.count("|") == 3 for row in rows)


def test_beside_a_pipeline(tmp_path: Path) -> None:
    """In the folder of its scheduler, whose files stay as they are."""
    scheduler = tmp_path / "pipe" / "scheduler"
    scheduler.mkdir(parents=True)
    (scheduler / "scheduler_config.json").write_text("{}")
    artlib.edm(PROCESS).save_pretrained(scheduler)
    found = artlib.Schedule.from_pretrained(tmp_path / "pipe", subfolder="scheduler")
    assert found == artlib.edm(PROCESS)
    assert (scheduler / "scheduler_config.json").read_text() == "{}"


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder with an artlib") as none:
        artlib.Schedule.from_pretrained("someone/something")
    assert "snapshot_download" in str(none.value)
    with pytest.raises(FileNotFoundError, match="holds no artlib_schedule"):
        artlib.Schedule.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="folder: expected a folder"):
        artlib.Schedule.from_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="folder: expected a folder"):
        artlib.edm(PROCESS).save_pretrained(None)  # type: ignore[arg-type]
    for path in ("../x", "/etc", "a/../../b"):
        with pytest.raises(ValueError, match="subfolder: expected a folder within"):
            artlib.Schedule.from_pretrained(tmp_path, subfolder=path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        artlib.edm(PROCESS).save_pretrained(tmp_path / "file")
    (tmp_path / FILE).write_text('{"format": "other"}')
    with pytest.raises(artlib.ScheduleFormatError, match="no schedule"):
        artlib.Schedule.from_pretrained(tmp_path)


def test_a_failure_leaves_the_old_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artlib.edm(PROCESS).save_pretrained(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    fresh = replace(artlib.log_snr(PROCESS), name="other")
    monkeypatch.setattr(
        "os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "x"))
    )
    with pytest.raises(OSError, match="x"):
        fresh.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


PLAN_FILE = "artlib_plan.json"


def told_plan() -> artlib.Plan:
    nodes = artlib.edm(PROCESS).grid(4)
    return artlib.Plan(PROCESS, nodes, 0.9 * nodes[:-1], "dpmpp_2m", name="four")


def test_a_folder_gives_a_plan_back_to_the_bit(tmp_path: Path) -> None:
    plan = told_plan()
    plan.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        PLAN_FILE,
    ]
    for found in (
        artlib.Plan.from_pretrained(tmp_path / "a" / "b"),
        artlib.Plan.from_pretrained(str(tmp_path), subfolder="a/b"),
        artlib.Plan.load(tmp_path / "a" / "b" / PLAN_FILE),
    ):
        assert found.to_json() == plan.to_json()
    card = (tmp_path / "a" / "b" / "README.md").read_text()
    for row in ("solver | dpmpp_2m |", "steps | 4 |", "evaluations | 4 |"):
        assert f"| {row}" in card
    row = next(r for r in card.splitlines() if r.startswith("| told |"))
    told = json.loads(row.split("|")[2].replace("&#91;", "[").replace("&#93;", "]"))
    assert told == pytest.approx(plan.told.tolist(), rel=1e-3)


def test_a_schedule_and_a_plan_share_a_folder_and_its_card(tmp_path: Path) -> None:
    schedule, plan = learned(), told_plan()
    for first, second in ((schedule, plan), (plan, schedule)):
        folder = tmp_path / type(first).__name__
        first.save_pretrained(folder)
        second.save_pretrained(folder)
        assert artlib.Schedule.from_pretrained(folder) == schedule
        assert artlib.Plan.from_pretrained(folder).to_json() == plan.to_json()
        card = (folder / "README.md").read_text()
        assert card.count("\n# ART\n") == card.count("\n# four\n") == 1
        assert card.count("library_name") == 1
        second.save_pretrained(folder)
        assert (folder / "README.md").read_text() == card
        (folder / FILE).unlink()
        plan.save_pretrained(folder)  # what is gone is no more on the card
        card = (folder / "README.md").read_text()
        assert "# ART" not in card
        assert "\n# four\n" in card
    (folder / "README.md").write_text("# Mine\n")
    plan.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_plans_refused(tmp_path: Path) -> None:
    learned().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no artlib_plan"):
        artlib.Plan.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="subfolder: expected a folder within"):
        artlib.Plan.from_pretrained(tmp_path, subfolder="..")
    with pytest.raises(TypeError, match="folder: expected a folder"):
        told_plan().save_pretrained(3)  # type: ignore[arg-type]
    (tmp_path / FILE).rename(tmp_path / PLAN_FILE)
    with pytest.raises(artlib.ScheduleFormatError, match="no plan"):
        artlib.Plan.from_pretrained(tmp_path)
