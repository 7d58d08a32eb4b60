"""The gallery: files and page are what the stored results make of them, and run."""

import json
from typing import Any

import build_gallery
import numpy as np
import pytest
import torch
from build_gallery import ENTRIES, FOLDER, PAGE, gallery, results

import artlib
from artlib.cli.parser import main


@pytest.fixture(scope="module")
def built() -> tuple[dict[str, str], str]:
    return gallery()


def load(file: str) -> artlib.Schedule | artlib.Plan:
    kind: Any = artlib.Plan if "tuned" in file else artlib.Schedule
    found: artlib.Schedule | artlib.Plan = kind.load(FOLDER / f"{file}.json")
    return found


def test_files_and_page_are_up_to_date(built: tuple[dict[str, str], str]) -> None:
    files, page = built
    assert PAGE.read_text(encoding="utf-8") == page, "run make gallery"
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert there == files, "run make gallery"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.file)
def test_a_file_is_what_its_chapter_learned(entry: build_gallery.Entry) -> None:
    data: Any = results(str(entry.stored[0]))
    for key in entry.stored[1:]:
        data = data[key]
    found = load(entry.file)
    if isinstance(found, artlib.Plan):
        assert found.nodes.tolist() == data["nodes"]
        assert found.told.tolist() == data["told"]
        assert found.solver == data["solver"]
    else:
        stored = artlib.Schedule.from_json(json.dumps(data))
        assert torch.equal(found.grid(7), stored.grid(7))
    made = data["provenance"]
    assert {key: found.provenance[key] for key in made} == made


def test_a_ratio_is_that_of_the_samples() -> None:
    """By numpy from the stored errors, against the best formula by each measure."""
    table = results("ch11-solver-rk4")["table"]
    nfe, row = table["nfe"]["rk4 3"], table["samples"]["rk4 3"]
    errors = {
        label: np.array(" ".join(seeds).split(), dtype=float)
        for label, seeds in row.items()
    }
    ours = errors.pop("ART for this solver")
    rivals = {k: v for k, v in errors.items() if not k.startswith("ART")}
    assert len(rivals) == 6
    rms = min(float(np.sqrt((v**2).mean())) for v in rivals.values())
    median = min(float(np.median(v)) for v in rivals.values())
    text = load("fashion-base-art-rk4").provenance["worth"][f"RK4, NFE {nfe}"]
    assert f"rms error {np.sqrt((ours**2).mean()) / rms:.2f} (" in text
    assert f"median {np.median(ours) / median:.2f} (" in text
    assert text.endswith("behind")  # what is bad is said


def test_show_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [r.split(" | ") for r in PAGE.read_text(encoding="utf-8").splitlines()]
    judged = [r for r in rows if len(r) == 8 and r[2].isdigit()]
    assert len(judged) == sum(len(entry.judged) for entry in ENTRIES)
    for entry in ENTRIES:
        assert main(["show", str(FOLDER / f"{entry.file}.json"), "-K", "5"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"network {entry.network}" in printed
        mine = [r for r in judged if r[0] == f"| {entry.file}"]
        assert len(mine) == len(entry.judged)
        for _, solver, nfe, error, rival, median, other, verdict in mine:
            assert (
                f"{solver}, NFE {nfe}: rms error {error} times that of {rival}; median "
                f"{median} times that of {other}; {verdict.removesuffix(' |')}"
            ) in printed


def test_the_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert code.count("net.sample_prior(16,") == 1
    scope: dict[str, Any] = {}
    exec(code.replace("sample_prior(16,", "sample_prior(2,"), scope)
    assert scope["images"].shape == scope["x_T"].shape
