"""The command `artlib` among other programs: streams, JSON, pictures, interruptions."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import artlib
from artlib.cli.parser import main
from artlib.cli.pictures import sheet

MODULE = """
import artlib

process = artlib.VE(0.01, 30.0)
target = artlib.GaussianMixture([[-1.0, 0.5], [0.8, -0.2]], [0.1, 0.3], [0.4, 0.6])
exact = target.denoiser(process)
calls, limit = 0, 10**9


class Exact:
    process, sample_shape = process, (2,)

    def __call__(self, x, t):
        global calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return exact(x, t)


class Images(Exact):
    sample_shape = (1, 4, 4)

    def __call__(self, x, t):
        return x / (1 + t.to(x) ** 2)


class Slow(Exact):
    def __call__(self, x, t):
        import sys, time
        print("asked", flush=True)
        time.sleep(60)


class Fails(Exact):
    def __call__(self, x, t):
        raise ZeroDivisionError("of the user")
"""
LEARN = ["learn", "stream_module:Exact", "-n", "12", "--seed", "4", "--points", "24"]
REFUSED = ["learn", "stream_module:Slow", "-o", "s"]
PROCESS = artlib.VE(0.01, 30.0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the user's module in it."""
    (tmp_path / "stream_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("stream_module", None)


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a text on standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def source() -> tuple[artlib.ProbabilityFlow, torch.Tensor]:
    import stream_module  # type: ignore[import-not-found]

    flow = artlib.ProbabilityFlow(PROCESS, stream_module.exact)
    rng = torch.Generator().manual_seed(4)
    return flow, 30.0 * torch.randn(12, 2, generator=rng, dtype=torch.float64)


# Names of schedules.


def test_formulas_stand_beside_files_in_their_process(here: Path, capsys: Any) -> None:
    artlib.kl_optimal(PROCESS).save("m.json")
    for names in (["m.json", "edm"], ["edm", "m.json"]):
        assert main(["show", *names, "-K", "3", "--json"]) == 0
        found = {s["label"]: s for s in json.loads(capsys.readouterr().out)}
        assert list(found) == [Path(n).stem for n in names]
        assert found["edm"]["process"] == PROCESS.to_dict()
        expected = artlib.edm(PROCESS).grid(3).tolist()
        assert found["edm"]["grids"][0]["times"] == expected
    # A process that is given comes first; several files may disagree.
    assert main(["show", "m.json", "edm", "--process", "ve:0.1,9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["process"]["sigma_max"] for s in found] == [30.0, 9.0]
    artlib.kl_optimal(artlib.VE()).save("n.json")
    assert main(["show", "m.json", "n.json", "edm"]) == 2
    assert "made for 2 processes" in capsys.readouterr().err
    assert main(["show", "m.json", "n.json"]) == 0
    capsys.readouterr()
    assert main(["show", "edm"]) == 2
    assert "as a formula it needs a process: pass --process" in capsys.readouterr().err


def test_files_of_one_name_keep_apart_in_tables(here: Path, capsys: Any) -> None:
    (here / "a").mkdir()
    artlib.edm(PROCESS).save("a/s.json")
    replace(artlib.kl_optimal(PROCESS), name="edm").save("s.json")
    assert main(["show", "a/s.json", "s.json", "-K", "2"]) == 0
    heads = [r for r in capsys.readouterr().out.splitlines() if "last step" in r]
    assert [r.split(":")[0] for r in heads] == ["edm (a/s.json)", "edm (s.json)"]
    assert main(["show", "a/s.json", "s.json", "-K", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["label"] for s in found] == ["a/s.json", "s.json"]
    assert found[0]["grids"][0]["times"] == artlib.edm(PROCESS).grid(2).tolist()


def test_minus_is_standard_input(
    here: Path, capsys: Any, typed: Callable[[str], None]
) -> None:
    schedule = artlib.kl_optimal(PROCESS)
    typed(schedule.to_json())
    assert main(["show", "-", "edm", "-K", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["label"] for s in found] == ["standard input", "edm"]
    assert found[0]["grids"][0]["times"] == schedule.grid(3).tolist()
    typed("\ufeff" + schedule.to_json())
    assert main(["export", "-", "--to", "text", "-K", "3"]) == 0
    printed = torch.tensor(json.loads(capsys.readouterr().out))
    assert torch.equal(printed, schedule.to_k_diffusion(3))
    typed(schedule.to_json())
    assert main(["export", "-", "--to", "comfyui", "-o", "nodes", "--name", "k"]) == 0
    assert artlib.Schedule.load("nodes/k.json") == schedule
    argv = ["sample", "stream_module:Exact", "-K", "4", "-n", "3", "-o"]
    typed(schedule.to_json())
    assert main([*argv, "x.safetensors", "-"]) == 0
    schedule.save("s.json")
    assert main([*argv, "y.safetensors", "s.json"]) == 0
    x, y = (load_file(f"{name}.safetensors")["x_0"] for name in "xy")
    assert torch.equal(x, y)
    capsys.readouterr()
    for text, argv, message in (
        ("", ["show", "-"], "standard input: not valid JSON"),
        ("{}", ["show", "-", "-"], "standard input can be read once"),
        ("{}", ["export", "-", "--to", "comfyui", "-o", "other"], "--name: a schedule"),
    ):
        typed(text)
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    assert not (here / "other").exists()


def test_programs_can_be_joined(here: Path) -> None:
    """learn -o - | export -: nothing but the schedule goes through the pipe."""
    artlib.kl_optimal(PROCESS).save("s.json")
    export = [sys.executable, "-m", "artlib.cli", "export", "-", "--to", "text"]
    with open("s.json", "rb") as file:
        done = subprocess.run(
            [*export, "-K", "3"], stdin=file, capture_output=True, timeout=300
        )
    assert done.stderr == b""
    expected = artlib.kl_optimal(PROCESS).to_k_diffusion(3)
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


# What comes out.


def test_show_tells_how_it_was_learned(here: Path, capsys: Any) -> None:
    assert main([*LEARN, "-o", "s.json", "--quiet"]) == 0
    notes = artlib.Schedule.load("s.json").provenance
    capsys.readouterr()
    assert main(["show", "s.json", "edm", "-K", "2"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "method closed form, average open loop" in text
    assert f"nfe {notes['nfe']}" in text
    assert "trajectories 12" in text
    assert "source stream module:Exact" in text
    assert f"cost of edm {notes['cost_of_edm']:.4g}" in text
    assert f"held out {notes['held_out']:.4g}" in text
    assert f"; artlib {artlib.__version__} 2 steps" in text
    assert "made by edm(rho=7.0, pinned=True) 2 steps" in text
    flow, x_T = source()
    table = artlib.stiffness_table(flow, x_T, points=24)
    cost = table.cost(artlib.edm(PROCESS, pinned=False)) / table.lower_bound()
    assert notes["cost_of_edm"] == pytest.approx(cost, abs=1e-3)
    assert notes["held_out"] == pytest.approx(table.held_out(8), abs=1e-3)
    # A folder that is shared is as good as a file.
    artlib.Schedule.load("s.json").save_pretrained("shared")
    assert main(["show", "shared", "edm", "-K", "2"]) == 0
    assert " ".join(capsys.readouterr().out.split()) == text
    # What a file says is one line, however it is written.
    wild = json.loads((here / "s.json").read_text())
    wild["provenance"] = {"source": "a\nb\x1b[2J", "start": {"method": "m"}, "k": None}
    (here / "w.json").write_text(json.dumps(wild))
    assert main(["show", "w.json", "-K", "2"]) == 0
    assert r"source a\nb\x1b[2J, start (m), k None" in capsys.readouterr().out


def test_levels_without_signal_are_null(here: Path, capsys: Any) -> None:
    assert main(["show", "edm", "--process", "rf", "-K", "3", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    grid = artlib.edm(artlib.RectifiedFlow()).grid(3)
    assert found["grids"][0]["times"] == grid.tolist()
    assert found["grids"][0]["levels"][0] is None
    assert found["grids"][0]["levels"][1:] == (grid / (1 - grid))[1:].tolist()


def test_compare_as_json_is_the_table(here: Path, capsys: Any) -> None:
    artlib.kl_optimal(PROCESS).save("k.json")
    argv = ["compare", "stream_module:Exact", "k.json", "edm", "-K", "6,3", "-n", "5"]
    argv += ["--seeds", "2", "--seed", "7", "--solver", "heun"]
    assert main(argv) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == [7, 8]
    assert (found["steps"], found["nfe"]) == ([6, 3], [11, 5])
    for row in rows:
        for cell, mean, spread in zip(
            found["errors"][row[0]], row[1::3], row[3::3], strict=True
        ):
            values = torch.tensor(cell, dtype=torch.float64)
            assert f"{float(values.mean()):.4f}" == mean
            assert f"{float(values.std()):.4f}" == spread


def test_samples_as_a_picture(here: Path, capsys: Any) -> None:
    argv = ["sample", "stream_module:Images", "edm", "-K", "3", "-n", "5", "-o"]
    assert main([*argv, "x.png"]) == 0
    assert "as a picture" in capsys.readouterr().out
    assert main([*argv, "x.safetensors"]) == 0
    x = load_file("x.safetensors")["x_0"]
    with Image.open("x.png") as image:
        page = torch.tensor(np.asarray(image.convert("L")).astype(int))
    # Three in a row, one pixel between them, each pixel a square of whole pixels.
    factor = page.shape[1] // 16
    assert page.shape == (11 * factor, 16 * factor)
    assert factor > 10
    for k, sample in enumerate(x):
        top, left = 1 + k // 3 * 5, 1 + k % 3 * 5
        found = page[top * factor :, left * factor :][: 4 * factor, : 4 * factor]
        wanted = ((sample[0] + 1) * 127.5).round().clamp(0, 255)
        wanted = wanted.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        assert int((found - wanted).abs().max()) <= 1  # of float32
    assert bool((page[:factor] == 255).all())
    assert bool((page[6 * factor :, 11 * factor :] == 255).all())  # no sixth


def test_colours_keep_their_places() -> None:
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, 0, 0, 1] = 1.0  # red, upper right
    image[0, 2, 1, 0] = 3.0  # blue, lower left, cut off
    with Image.open(io.BytesIO(sheet(image))) as page:
        factor = page.width // 4
        places = {
            (a, b): page.convert("RGB").getpixel(((1 + b) * factor, (1 + a) * factor))
            for a in (0, 1)
            for b in (0, 1)
        }
    assert places[0, 1] == (255, 0, 0)
    assert places[1, 0] == (0, 0, 255)
    assert places[0, 0] == places[1, 1] == (0, 0, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sample", "stream_module:Slow", "edm", "-o", "x.png"], "1 or 3 channels"),
        (["sample", "stream_module:Slow", "edm", "-o", "x.jpg"], "written as .png"),
        (["learn", "stream_module:Slow", "-o", "s.png"], "a schedule is JSON"),
        (
            [*REFUSED, "--method", "rl", "--solver", "heun"],
            "--solver: goes with --method closed",
        ),
        (
            [*REFUSED, "--solver", "rk4", "--weight", "local", "--budget", "40"],
            "give at least 82",
        ),
    ],
)
def test_refused_before_the_network_is_asked(
    here: Path, argv: list[str], message: str, capsys: Any
) -> None:
    assert main(argv) == 2  # the network would take a minute
    assert message in capsys.readouterr().err
    assert len([p for p in here.iterdir() if p.name != "__pycache__"]) == 1


def test_debug_shows_where_an_error_came_from(here: Path, capsys: Any) -> None:
    argv = ["learn", "stream_module:Fails", "-o", "s.json", "-n", "2", "--quiet"]
    assert main(argv) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main([*argv, "--debug"]) == 1
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert 'raise ZeroDivisionError("of the user")' in text
    assert text.splitlines()[-1].startswith("artlib learn: error: ZeroDivisionError")


# Learning.


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dpmpp_2m"])
def test_learn_for_a_solver(here: Path, solver: str, capsys: Any) -> None:
    """As the library does: densities run and judged, the best of them written."""
    assert main([*LEARN, "--solver", solver, "-o", "s.json"]) == 0
    flow, x_T = source()
    expected = artlib.art(flow, x_T, solver=solver, points=24)
    found = artlib.Schedule.load("s.json")
    assert torch.equal(found.grid(9), expected.grid(9))
    assert found.name == expected.name == f"ART ({solver})"
    notes = found.provenance
    assert notes["source"] == "stream_module:Exact"
    assert {**notes, "source": ""} == {**expected.provenance, "source": ""}
    text = capsys.readouterr().out
    assert f"{notes['nfe']} network evaluations" in text
    for label, behind in notes["disadvantage"].items():
        assert any(
            label in line and f"{behind:.3f}" in line for line in text.splitlines()
        )


@pytest.mark.parametrize("more", [["--budget", "300"], ["--checkpoint", "c"]])
def test_judged_runs_are_not_cut(here: Path, more: list[str], capsys: Any) -> None:
    assert main([*REFUSED, "--solver", "heun", *more]) == 2
    text = capsys.readouterr().err
    assert f"--solver: {more[0]} cannot go with it" in text
    assert "--weight local" in text
    assert main([*REFUSED, "--weight", "local"]) == 2
    assert "--weight: it says how to match a solver" in capsys.readouterr().err


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "dpmpp_2m"])
def test_learn_by_a_solvers_own_error(here: Path, solver: str, capsys: Any) -> None:
    argv = [*LEARN, "--solver", solver, "--weight", "local"]
    assert main([*argv, "-o", "s.json"]) == 0
    flow, x_T = source()
    expected = artlib.art(flow, x_T, solver=solver, weight="local", points=24)
    found = artlib.Schedule.load("s.json")
    assert torch.equal(found.grid(9), expected.grid(9))
    assert found.name == expected.name == f"ART ({solver})"
    assert found.provenance["solver"] == solver
    for budget in (92, 120, 300):
        more = ["--budget", str(budget), "-o", f"{budget}.json"]
        assert main([*argv, *more]) == 0
        assert artlib.Schedule.load(f"{budget}.json").provenance["nfe"] <= budget


def test_batches_are_the_whole(here: Path, capsys: Any) -> None:
    assert main([*LEARN, "-o", "s.json"]) == 0
    assert main([*LEARN, "-o", "b.json", "--batch", "5"]) == 0
    one, other = (artlib.Schedule.load(f"{n}.json") for n in "sb")
    torch.testing.assert_close(one.grid(9), other.grid(9), rtol=1e-9, atol=0)
    assert other.provenance["trajectories"] == 12


@pytest.mark.parametrize("more", [[], ["--solver", "heun", "--weight", "local"]])
def test_interrupted_paths_are_kept(here: Path, more: list[str], capsys: Any) -> None:
    import stream_module

    argv = [*LEARN, *more, "--checkpoint", "c.safetensors", "-o"]
    assert main([*argv, "whole.json"]) == 0
    whole, calls = artlib.Schedule.load("whole.json"), stream_module.calls
    os.remove("c.safetensors")
    stream_module.calls, stream_module.limit = 0, round(0.7 * calls)
    capsys.readouterr()
    assert main([*argv, "s.json"]) == 130
    text = capsys.readouterr().err
    assert "interrupted; the same command goes on from c.safetensors" in text
    assert not (here / "s.json").exists()
    stream_module.calls, stream_module.limit = 0, 10**9
    assert main([*argv, "s.json"]) == 0
    assert "8 of 12 trajectories found in c.safetensors" in capsys.readouterr().err
    assert stream_module.calls < 0.45 * calls
    found = artlib.Schedule.load("s.json")
    assert torch.equal(found.grid(9), whole.grid(9))
    assert found.provenance == whole.provenance
    # Other noise is another problem, and a damaged file is none.
    assert main([*argv, "o.json", "--seed", "5"]) == 2
    assert "belongs to another problem" in capsys.readouterr().err
    content = bytearray((here / "c.safetensors").read_bytes())
    content[-3] ^= 1
    (here / "c.safetensors").write_bytes(content)
    assert main([*argv, "o.json"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert not (here / "o.json").exists()


def test_interrupted_training_is_kept(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from artlib.rl.updates import Loop

    rl = [*LEARN, "--method", "rl", "--iterations", "60", "--steps", "6", "--quiet"]
    assert main([*rl, "-o", "straight.json"]) == 0
    iterate = Loop.iterate

    def interrupted(self: Loop) -> Any:
        if self.iteration == 37:
            raise KeyboardInterrupt
        return iterate(self)

    monkeypatch.setattr(Loop, "iterate", interrupted)
    checkpoint = ["--checkpoint", "c.safetensors", "-o", "resumed.json"]
    assert main([*rl, *checkpoint]) == 130
    assert "goes on from c.safetensors" in capsys.readouterr().err
    monkeypatch.setattr(Loop, "iterate", iterate)
    started: list[int] = []

    def watched(self: Loop) -> Any:
        started.append(self.iteration)
        return iterate(self)

    monkeypatch.setattr(Loop, "iterate", watched)
    assert main([*rl, *checkpoint]) == 0
    assert started[0] == 37
    straight, resumed = (
        artlib.Schedule.load(f"{name}.json") for name in ("straight", "resumed")
    )
    assert torch.equal(straight.grid(6), resumed.grid(6))


@pytest.mark.skipif(os.name != "posix", reason="no such signals")
def test_a_signal_leaves_status_130(here: Path) -> None:
    command = [sys.executable, "-m", "artlib.cli", "learn", "stream_module:Slow"]
    with subprocess.Popen(
        [*command, "-o", "s.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # What a shell starts in the background ignores the signal, and so its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"asked\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"artlib learn: error: interrupted\n"
    assert not (here / "s.json").exists()


def test_help_says_what_the_status_means(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for status in ("0", "1", "2", "130", "141"):
        assert f"\n  {status} " in text


def test_plans_are_shown_and_exported(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = artlib.VE(0.01, 30.0)
    nodes = artlib.edm(process).grid(3)
    plan = artlib.Plan(process, nodes, 0.9 * nodes[:-1], "dpmpp_2m", name="three")
    plan.save("p.json")
    plan.save_pretrained("folder")
    texts = []
    for name in ("p.json", "folder"):
        assert main(["show", name]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    head, *rows = texts[0].splitlines()
    assert head.startswith("three: ")
    assert head.endswith(", dpmpp_2m, NFE 3, told levels")
    told = [float(row.split()[4]) for row in rows[3:6]]
    assert told == pytest.approx(plan.told.tolist(), rel=1e-5)
    # Beside a schedule, in its process; and on standard input.
    assert main(["show", "p.json", "edm", "--json"]) == 0
    ours, formula = json.loads(capsys.readouterr().out)
    assert ours["told"] == pytest.approx(plan.told.tolist())
    assert ours["grids"][0]["times"] == nodes.tolist()
    assert (ours["solver"], ours["nfe"]) == ("dpmpp_2m", 3)
    assert formula["process"] == ours["process"]
    monkeypatch.setattr("sys.stdin", io.StringIO(plan.to_json()))
    assert main(["show", "-"]) == 0
    assert "told" in capsys.readouterr().out
    # Told levels are for ComfyUI's node alone; honest nodes for all.
    assert main(["export", "p.json", "--to", "comfyui", "-o", "node"]) == 0
    assert artlib.Plan.load("node/p.json").to_json() == plan.to_json()
    assert main(["export", "p.json", "--to", "text"]) == 2
    assert "tells the network other levels" in capsys.readouterr().err
    plan.with_honest_levels().save("honest.json")
    assert main(["export", "honest.json", "--to", "text"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == pytest.approx(nodes.tolist())
    assert main(["export", "honest.json", "--to", "text", "-K", "5"]) == 2
    assert main(["show", "p.json", "--plot", "x.png"]) == 2
    assert "it draws schedules" in capsys.readouterr().err
