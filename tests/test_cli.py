"""The command `artlib`: it writes what the library computes, and says what it refuses.

Run in this process by ``main(argv)``; once as a program.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

import artlib
from artlib.cli.formulas import FORMULAS
from artlib.cli.parser import main

MODULE = """
import artlib, torch

process = artlib.VE(0.01, 30.0)
target = artlib.GaussianMixture([[-1.0, 0.5], [0.8, -0.2]], [0.1, 0.3], [0.4, 0.6])
exact = target.denoiser(process)


class Exact:
    process, sample_shape = process, (2,)

    def __call__(self, x, t):
        return exact(x, t)


denoiser = Exact()
number = 3


def make():
    return Exact()


def bare(x, t):
    return exact(x, t)


class Broken(Exact):
    def __call__(self, x, t):
        return x * float("nan")


broken = Broken()


class Interrupted(Exact):
    def __call__(self, x, t):
        raise KeyboardInterrupt


interrupted = Interrupted()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with the user's module in it."""
    (tmp_path / "cli_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("cli_module", None)


def source() -> tuple[artlib.ProbabilityFlow, torch.Tensor]:
    import cli_module  # type: ignore[import-not-found]

    flow = artlib.ProbabilityFlow(cli_module.process, cli_module.denoiser)
    rng = torch.Generator().manual_seed(4)
    x_T = 30.0 * torch.randn(12, 2, generator=rng, dtype=torch.float64)
    return flow, x_T


LEARN = ["learn", "cli_module:make", "-n", "12", "--seed", "4", "--points", "24"]


def test_learn_is_the_closed_form(here: Path, capsys: Any) -> None:
    assert main([*LEARN, "-o", "s.json"]) == 0
    flow, x_T = source()
    expected = artlib.art(flow, x_T, points=24)
    found = artlib.Schedule.load(here / "s.json")
    assert torch.equal(found.grid(9), expected.grid(9))
    assert found.provenance["source"] == "cli_module:make"
    output = capsys.readouterr().out
    assert "ART                 1.000" in output  # the bound is attained
    ratio = artlib.stiffness_table(flow, x_T, points=24).held_out()
    assert f"paths it was not learned from: {ratio:.3f}" in output
    assert main([*LEARN, "-o", "p.json", "--average", "paper", "--quiet"]) == 0
    paper = artlib.art(flow, x_T, points=24, average="paper")
    assert torch.equal(artlib.Schedule.load("p.json").grid(9), paper.grid(9))


def test_zoo_networks_go_by_name(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(name: str, **options: Any) -> Any:
        asked.append((name, options))
        if name != "small-digits":
            raise ValueError(f"name: no network is called {name!r}")
        import cli_module

        return cli_module.make()

    monkeypatch.setattr(artlib.zoo, "load", load, raising=False)
    command = ["learn", "small-digits", "-n", "12", "--seed", "4", "--points", "24"]
    assert main([*command, "-o", "s.json"]) == 0
    flow, x_T = source()
    expected = artlib.art(flow, x_T, points=24)
    assert torch.equal(artlib.Schedule.load("s.json").grid(9), expected.grid(9))
    # A zoo network serves any process, so it is told which.
    own = ["--process", "ve:0.01,30", "-o", "p.json"]
    assert main([*command[:1], "zoo:small-digits", *command[2:], *own]) == 0
    assert asked == [
        ("small-digits", {}),
        ("small-digits", {"process": artlib.VE(0.01, 30.0)}),
    ]
    assert main(["learn", "other", "-o", "o.json"]) == 2
    assert "no network is called 'other'" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [40, 60, 150, 1000])
def test_budget_is_kept(here: Path, budget: int, capsys: Any) -> None:
    command = ["learn", "cli_module:make", "-n", "8", "--budget", str(budget)]
    assert main([*command, "-o", "s.json"]) == 0
    assert artlib.Schedule.load("s.json").provenance["nfe"] <= budget


def test_rl_resumes_from_its_checkpoint_to_the_bit(here: Path, capsys: Any) -> None:
    rl = ["--method", "rl", "--iterations", "60", "--steps", "6"]
    assert main([*LEARN, *rl, "-o", "straight.json"]) == 0
    checkpoint = ["--checkpoint", "run.safetensors"]
    flow, x_T = source()
    trainer = artlib.ActorCritic(flow, x_T, steps=6, seed=4, points=24)
    for record in trainer.train(60, checkpoint="run.safetensors", every=20):
        if record.iteration == 55:
            break  # the last checkpoint is of iteration 40
    assert main([*LEARN, *rl, *checkpoint, "-o", "resumed.json"]) == 0
    straight, resumed = (
        artlib.Schedule.load(f"{name}.json") for name in ("straight", "resumed")
    )
    assert straight.provenance["iterations"] == 60
    assert torch.equal(straight.grid(6), resumed.grid(6))
    # With other options it is another problem.
    other = [*rl[:-1], "7", *checkpoint, "-o", "other.json"]
    assert main([*LEARN, *other]) == 2
    assert "it belongs to another problem" in capsys.readouterr().err
    assert not (here / "other.json").exists()


def test_every_published_list_has_a_name() -> None:
    assert {f"ays-{model}" for model in artlib.rivals.AYS} < set(FORMULAS)


def test_show_prints_the_grid_and_draws(here: Path, capsys: Any) -> None:
    artlib.edm(artlib.VE(), pinned=False).save("s.json")
    assert main(["show", "s.json", "-K", "3,5", "--plot", "f.png"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    times = [float(r[1]) for r in rows if len(r) >= 3 and r[0].isdigit()]
    grids = [artlib.edm(artlib.VE(), pinned=False).grid(K) for K in (3, 5)]
    torch.testing.assert_close(
        torch.tensor(times, dtype=torch.float64), torch.cat(grids), rtol=1e-5, atol=0
    )
    assert (here / "f.png").read_bytes().startswith(b"\x89PNG")


def test_compare_is_the_error_on_matched_noise(here: Path, capsys: Any) -> None:
    argv = ["compare", "cli_module:denoiser", "edm", "edm-unpinned", "-K", "4,8"]
    argv += ["--solver", "heun", "-n", "12", "--seed", "4", "--seeds", "1"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["NFE", "7", "15"]
    flow, x_T = source()
    reference = artlib.sample(flow, x_T, solver="dopri5", rtol=1e-5, atol=1e-5)
    for line, pinned in zip(lines[2:], (True, False), strict=True):
        found = [float(word) for word in line.split()[1:] if word != "+-"][::2]
        for error, K in zip(found, (4, 8), strict=True):
            grid = artlib.edm(flow.process, pinned=pinned).grid(K)
            x = artlib.sample(flow, x_T, grid, solver="heun")
            expected = artlib.terminal_error(x, reference)
            assert error == pytest.approx(expected, abs=6e-5)


def test_compare_is_the_function_in_batches_and_full_precision(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli_module

    seen: set[tuple[int, bool]] = set()
    backend = torch.backends.cuda.matmul
    before = backend.allow_tf32

    def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add((len(x), backend.allow_tf32))
        return cli_module.exact(x, t)

    watched.process, watched.sample_shape = cli_module.process, (2,)
    monkeypatch.setattr(cli_module, "denoiser", watched)
    backend.allow_tf32 = True
    argv = ["compare", "cli_module:denoiser", "edm", "-K", "6,3,6", "-n", "300"]
    try:
        assert main([*argv, "--seeds", "2", "--seed", "4"]) == 0
    finally:
        backend.allow_tf32 = before
    assert seen == {(256, False), (44, False)}
    flow = artlib.ProbabilityFlow(cli_module.process, cli_module.exact)
    noises = []
    for seed in (4, 5):
        rng = torch.Generator().manual_seed(seed)
        noises.append(30.0 * torch.randn(300, 2, generator=rng, dtype=torch.float64))
    table = artlib.compare(
        flow,
        {"edm": artlib.edm(flow.process)},
        noises,
        {"euler": [3, 6]},
        ends=artlib.references(flow, noises),
    )
    head, row = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["NFE", "6", "3", "6"]
    cells = [
        f"{table.mean('euler', K, 'edm', 'error'):.4f} +- "
        f"{table.spread('euler', K, 'edm', 'error'):.4f}"
        for K in (6, 3, 6)
    ]
    assert row.split() == ["edm", *" ".join(cells).split()]


def test_files_of_one_name_keep_their_rows_apart(here: Path, capsys: Any) -> None:
    process = artlib.VE(0.01, 30.0)
    (here / "a").mkdir()
    artlib.edm(process).save("a/edm.json")
    artlib.kl_optimal(process).save("edm.json")
    argv = ["compare", "cli_module:denoiser", "-K", "4", "-n", "4", "--seeds", "1"]
    assert main([*argv, "a/edm.json", "edm.json", "edm", "log-snr"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["a/edm.json", "edm.json", "edm", "log-snr"]
    assert rows[0][1] == rows[2][1] != rows[1][1]
    assert main([*argv, "edm.json", "log-snr"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["edm", "log-snr"]


def test_sample_writes_what_the_library_samples(here: Path, capsys: Any) -> None:
    argv = ["sample", "cli_module:bare", "log-snr-unpinned", "-K", "6", "-n", "12"]
    argv += ["--process", "ve:0.01,30", "--shape", "2", "--seed", "4"]
    assert main([*argv, "--solver", "heun", "-o", "x.safetensors"]) == 0
    assert "NFE 11" in capsys.readouterr().out
    flow, x_T = source()
    grid = artlib.log_snr(flow.process, pinned=False).grid(6)
    expected = artlib.sample(flow, x_T, grid, solver="heun").float()
    assert torch.equal(load_file("x.safetensors")["x_0"], expected)


def test_export_text_json_and_k_diffusion(here: Path, capsys: Any) -> None:
    schedule = artlib.kl_optimal(artlib.VE())
    schedule.save("s.json")
    sigmas = schedule.to_k_diffusion(7)
    assert main(["export", "s.json", "--to", "text", "-K", "7"]) == 0
    assert torch.equal(torch.tensor(json.loads(capsys.readouterr().out)), sigmas)
    command = ["export", "s.json", "--to", "json", "-K", "7", "--denoise", "0.5"]
    assert main([*command, "-o", "list.json"]) == 0
    data = json.loads((here / "list.json").read_text())
    assert torch.equal(
        torch.tensor(data["sigmas"]), schedule.to_k_diffusion(7, denoise=0.5)
    )
    assert data["times"] == schedule.grid(14)[7:].tolist()
    assert main(["export", "s.json", "--to", "k-diffusion", "-K", "7"]) == 0
    scope: dict[str, Any] = {}
    exec(capsys.readouterr().out, scope)
    assert torch.equal(scope["sigmas"], sigmas)


def test_export_comfyui(here: Path, capsys: Any) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    export = ["export", "s.json", "--to", "comfyui", "-o", "nodes"]
    assert main(export) == 0
    assert sorted(p.name for p in (here / "nodes").iterdir()) == [
        "__init__.py",
        "s.json",
    ]
    assert main(export) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*export, "--name", "other"]) == 0
    assert (here / "nodes" / "other.json").is_file()
    before = (here / "nodes" / "other.json").read_bytes()
    artlib.log_snr(artlib.VE()).save("s.json")
    assert main([*export, "--name", "other.json"]) == 2  # the same name
    assert (here / "nodes" / "other.json").read_bytes() == before
    assert main([*export, "--name", "other.json", "--force"]) == 0
    assert (here / "nodes" / "other.json").read_bytes() == Path("s.json").read_bytes()
    assert len(list((here / "nodes").iterdir())) == 3


def test_export_comfyui_leaves_the_packages_of_others(here: Path, capsys: Any) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    foreign = here / "package" / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text("VALUABLE = 1\n")
    export = ["export", "s.json", "--to", "comfyui", "-o", "package"]
    assert main(export) == 2
    assert "__init__.py: belongs to another package" in capsys.readouterr().err
    assert [path.name for path in foreign.parent.iterdir()] == ["__init__.py"]
    assert foreign.read_text() == "VALUABLE = 1\n"
    assert main([*export, "--force"]) == 0
    assert "ARTSigmas" in foreign.read_text()
    assert main([*export[:-1], "-"]) == 2


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::artlib.ForwardModeWarning")  # its attention
def test_a_diffusers_folder_from_learning_to_export(here: Path, capsys: Any) -> None:
    diffusers = pytest.importorskip("diffusers", reason="no diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=4,
    )
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained("pipe")
    argv = ["learn", "pipe", "-o", "s.json", "-n", "2", "--budget", "40", "--quiet"]
    argv += ["--class-label", "2", "--device", "cpu"]
    assert main(argv) == 0
    schedule = artlib.Schedule.load("s.json")
    process = artlib.adapters.diffusers.scheduler_process(scheduler)
    assert schedule.process == process
    capsys.readouterr()
    argv = ["export", "s.json", "--to", "diffusers", "--scheduler", "pipe", "-K", "5"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    scheduler.set_timesteps(**found)
    torch.testing.assert_close(
        scheduler.sigmas.double(), schedule.grid(5), rtol=1e-5, atol=0
    )
    # A condition from a file is the same condition.
    save_file({"class_labels": torch.tensor([2])}, "c.safetensors")
    argv = ["learn", "pipe", "-o", "c.json", "-n", "2", "--budget", "40", "--quiet"]
    assert main([*argv, "--condition", "c.safetensors", "--device", "cpu"]) == 0
    assert torch.equal(artlib.Schedule.load("c.json").grid(5), schedule.grid(5))
    # Weights that would have to be unpickled are not touched.
    weights = here / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert main(["learn", "pipe", "-o", "n.json"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_minus_is_standard_output(here: Path, capfdbinary: Any) -> None:
    assert main([*LEARN, "-o", "s.json"]) == 0
    capfdbinary.readouterr()
    assert main([*LEARN, "-o", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == (here / "s.json").read_bytes()
    assert b"written to standard output" in err
    export = ["export", "s.json", "--to", "text", "-K", "3"]
    assert main(export) == 0
    printed = capfdbinary.readouterr().out
    assert main([*export, "-o", "-"]) == 0
    assert capfdbinary.readouterr().out == printed
    sample = ["sample", "cli_module:make", "s.json", "-K", "3", "-n", "4", "-o"]
    assert main([*sample, "x.safetensors"]) == 0
    capfdbinary.readouterr()
    assert main([*sample, "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert torch.equal(load(out)["x_0"], load_file("x.safetensors")["x_0"])
    assert b"4 samples" in err
    assert not (here / "-").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_outputs_are_checked_before_the_network_is_asked(
    here: Path, kind: str, capsys: Any
) -> None:
    artlib.edm(artlib.VE(0.01, 30.0)).save("s.json")
    os.mkdir("taken") if kind == "folder" else os.mkfifo("taken")
    # This denoiser would interrupt the program.
    learn = ["learn", "cli_module:interrupted", "--method", "rl"]
    for argv in (
        ["learn", "cli_module:interrupted", "-o", "taken", "--force"],
        [*learn, "-o", "o.json", "--checkpoint", "taken"],
        [*learn, "-o", "o.json", "--checkpoint", "-"],
        [*learn, "-o", "o.json", "--checkpoint", "./o.json"],
        [*learn, "-o", "o.json", "--checkpoint", "none/c"],
        ["sample", "cli_module:interrupted", "s.json", "-o", "taken", "--force"],
        ["export", "s.json", "--to", "text", "-K", "3", "-o", "taken", "--force"],
    ):
        assert main(argv) == 2, argv
    assert f"taken: is a {kind}" in capsys.readouterr().err
    assert not (here / "o.json").exists()


def test_samples_are_not_printed_on_a_terminal(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["sample", "cli_module:interrupted", "edm", "-o", "-"]) == 2
    assert "no text for a terminal" in capsys.readouterr().err


def program(*argv: str, **options: Any) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, "-m", "artlib.cli", *argv]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, env=environment, **both)


@pytest.mark.parametrize("steps", ["3000,3001", "2"])  # closed early, closed at the end
def test_a_reader_that_leaves_is_no_error(here: Path, steps: str) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    with program("show", "s.json", "-K", steps) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if steps == "2":
            process.stdout.close()
        else:
            process.stdout.readline()
            process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_console_of_other_letters_shows_escapes(here: Path) -> None:
    schedule = replace(artlib.edm(artlib.VE()), name="ART \N{GREEK SMALL LETTER OMEGA}")
    schedule.save("s.json")
    for encoding, shown in (("cp1252", rb"ART \u03c9:"), ("utf-8", b"ART \xcf\x89:")):
        env = {"PYTHONIOENCODING": encoding}
        with program("show", "s.json", "-K", "2", env=env) as process:
            out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.startswith(shown)


def test_what_a_file_says_does_not_command_the_terminal(
    here: Path, capsys: Any
) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    text = (here / "s.json").read_text()
    name = r'"e\u001b[2J\u0007\u009b\u202e\nartlib: all is well"'
    (here / "s.json").write_text(text.replace('"edm"', name, 1))
    (here / "\x1b[31m.json").write_text("no schedule")
    for argv in (["show", "s.json"], ["show", "\x1b[31m.json"], ["show", "\x1bx"]):
        assert main(argv) == 2  # such a name is refused when the file is read
    printed = capsys.readouterr()
    for stream in printed:
        assert all(char.isprintable() or char == "\n" for char in stream)
    assert not any(line.startswith("artlib: all") for line in printed.err.split("\n"))
    assert r"'\x1b', a character that is not to be printed" in printed.err


def test_a_byte_order_mark_is_no_part_of_a_file(here: Path, capsys: Any) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    plain = (here / "s.json").read_bytes()
    assert main(["show", "s.json"]) == 0
    expected = capsys.readouterr().out
    (here / "s.json").write_bytes(b"\xef\xbb\xbf" + plain)
    assert main(["show", "s.json"]) == 0
    assert capsys.readouterr().out == expected
    index = here / "pipe" / "model_index.json"
    index.parent.mkdir()
    for text, message in (
        ('\ufeff{"a": 1}', "names neither a unet nor"),
        ("[1]", "expected a JSON object"),
        ("[" * 100_000, "not JSON"),
    ):
        index.write_text(text, encoding="utf-8")
        assert main(["learn", "pipe", "-o", "o.json"]) == 2
        assert message in capsys.readouterr().err


BAD_MODULES = [
    ("x = 1 / 0", "f", "bad fails: ZeroDivisionError: division by zero ("),
    ("import nothing_of_this_name", "f", "No module named 'nothing_of_this_name'"),
    ("def f(:", "f", "bad fails: SyntaxError"),
    ("raise SystemExit(3)", "f", "bad fails: SystemExit: 3"),
    # Raised in artlib, which is not where the mistake is.
    ("import artlib\nartlib.edm(3)", "f", "("),
    ("def f(): raise KeyError('k')", "f", "f() fails: KeyError: 'k' ("),
    ("def f(): return 3", "f", "expected a denoiser D(x, t), or a function"),
    ("class f:\n  def __init__(self, a): ...", "f", "got a class"),
    ("def f(x, t): return x\nf.process = 've'", "f", "its .process is a str"),
    (
        "import artlib\ndef f(x, t): return x\n"
        "f.process, f.sample_shape = artlib.VE(), 3",
        "f",
        "its .sample_shape is 3, expected whole numbers",
    ),
    ("", "f", "has no 'f'"),
    ("", "", "expected module:name"),
    ("", "a-b", "expected module:name"),
    (
        "import artlib\ndef f(x, t): return {}['k']\n"
        "f.process, f.sample_shape = artlib.VE(), (2,)",
        "f",
        "KeyError: 'k' (",
    ),
]


@pytest.mark.parametrize(("text", "name", "message"), BAD_MODULES)
def test_a_module_that_fails_is_refused_in_one_sentence(
    here: Path, text: str, name: str, message: str, capsys: Any
) -> None:
    (here / "bad.py").write_text(text)
    try:
        status = main(["learn", f"bad:{name}", "-o", "o.json", "-n", "2", "--quiet"])
    finally:
        sys.modules.pop("bad", None)
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("artlib learn: error: ")
    assert message in error
    assert error.count("\n") == 1
    if message.endswith("("):
        assert f"{here / 'bad.py'}, line " in error


@pytest.mark.parametrize("source", ["bad.py:f", ":f", ".bad:f", "a/bad:f", "bad:f:g"])
def test_what_is_no_module_and_name_is_refused(
    here: Path, source: str, capsys: Any
) -> None:
    assert main(["learn", source, "-o", "o.json"]) == 2
    assert f"{source}: expected module:name" in capsys.readouterr().err


def test_a_class_is_made_a_denoiser(here: Path) -> None:
    argv = ["learn", "cli_module:Exact", *LEARN[2:], "-o"]
    assert main([*argv, "c.json"]) == 0
    assert main([*LEARN, "-o", "s.json"]) == 0
    found, expected = (artlib.Schedule.load(f"{name}.json") for name in "cs")
    assert torch.equal(found.grid(7), expected.grid(7))


REFUSED = [
    (["learn", "nowhere", "-o", "o.json"], "nowhere: "),
    (["learn", "cli_none:make", "-o", "o.json"], "No module named 'cli_none'"),
    (["learn", "cli_module:other", "-o", "o.json"], "has no 'other'"),
    (["learn", "cli_module:number", "-o", "o.json"], "expected a denoiser"),
    (["learn", "cli_module:bare", "-o", "o.json"], "pass --process"),
    (
        ["learn", "cli_module:bare", "-o", "o.json", "--process", "ve:0.01,30"],
        "pass --shape",
    ),
    ([*LEARN, "-o", "o.json", "--process", "ve:30,0.01"], "--process: cannot read"),
    ([*LEARN, "-o", "o.json", "--process", "ve:0.1,30"], "has its own, VE"),
    ([*LEARN, "-o", "o.json", "--process", "edm"], "write ve:SIGMA_MIN"),
    ([*LEARN, "-o", "none/o.json"], "there is no folder none"),
    ([*LEARN, "-o", "taken.json"], "exists already; pass --force"),
    ([*LEARN, "-o", "o.json", "--budget", "20"], "--budget: 20 evaluations are too"),
    ([*LEARN, "-o", "o.json", "--device", "cuda:77"], "--device: 'cuda:77' cannot"),
    ([*LEARN, "-o", "o.json", "--class-label", "3"], "go with a diffusers folder"),
    (["learn", "cli_module:broken", "-o", "o.json"], "NaN"),
    (["learn", ".", "-o", "o.json"], "no model_index.json"),
    (["show", "ve.json", "--plot", "f.txt"], "--plot: expected a .png"),
    (["show", "none.json"], "none.json: there is no such file"),
    (["show", "cli_module.py"], "cli_module.py"),
    (["show", "taken.json"], "taken.json"),
    (["show", "edm"], "edm: there is no such file"),
    (["compare", "cli_module:make", "ve.json", "-K", "4"], "learn it for this source"),
    (["compare", "cli_module:make", "erm", "-K", "4"], "no name of a formula (uniform"),
    (["export", "ve.json", "--to", "text"], "--steps: --to text needs"),
    (["export", "ve.json", "--to", "diffusers", "-K", "4"], "--scheduler: --to"),
    (["export", "ve.json", "--to", "comfyui"], "--output: --to comfyui writes"),
    (["export", "ve.json", "--to", "text", "-K", "4", "--denoise", "2"], "denoise: "),
    (["sample", "cli_module:make", "ve.json", "-o", "x"], "t_max"),
]


@pytest.mark.parametrize(("argv", "message"), REFUSED)
def test_refused_with_status_2(
    here: Path, argv: list[str], message: str, capsys: Any
) -> None:
    artlib.edm(artlib.VE()).save("ve.json")
    (here / "taken.json").write_text("{}")
    before = sorted(here.iterdir())
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"artlib {argv[0]}: error: ")
    assert message in printed.err
    after = [path for path in here.iterdir() if path.name != "__pycache__"]
    assert sorted(after) == before  # nothing is left behind
    assert (here / "taken.json").read_text() == "{}"


USAGE = [
    ([], "required"),
    (["teach"], "invalid choice"),
    (["learn"], "required"),
    ([*LEARN, "-o", "o", "--samples", "0"], "expected a whole number >= 1"),
    (["show", "edm", "-K", "5,x"], "expected a whole number >= 1"),
    (["export", "s", "--to", "onnx"], "invalid choice"),
]


@pytest.mark.parametrize(("argv", "message"), USAGE)
def test_usage_refused(argv: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupted_leaves_nothing(here: Path, capsys: Any) -> None:
    assert main(["learn", "cli_module:interrupted", "-o", "o.json"]) == 130
    assert not (here / "o.json").exists()


def test_failed_computation_has_status_1(
    here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: artlib.ActorCritic) -> artlib.Schedule:
        from artlib._common.errors import TrainingError

        raise TrainingError("distill: the mean clock stands still")

    monkeypatch.setattr(artlib.ActorCritic, "distill", fail)
    rl = ["--method", "rl", "--iterations", "60", "--steps", "6", "-o", "o.json"]
    assert main([*LEARN, *rl]) == 1
    assert "stands still" in capsys.readouterr().err
    assert not (here / "o.json").exists()


@pytest.mark.parametrize("command", ["learn", "show", "compare", "export", "sample"])
def test_help_teaches(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "SCHEDULE" in text or "SOURCE" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"artlib {command}" in capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100


def test_as_a_program(here: Path) -> None:
    artlib.edm(artlib.VE()).save("s.json")
    root = Path(artlib.__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "artlib.cli", "export", "s.json", "--to", "text"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(root), "PATH": ""},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("artlib export: error: --steps")


def test_tune_writes_a_plan_that_sample_runs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["cli_module:denoiser", "--quiet", "--device", "cpu"]
    limits = ["-n", "6", "--evaluations", "4", "--seconds", "0.01"]
    assert main(["tune", *common, "--nfe", "3", "-o", "p.json", *limits]) == 0
    said = capsys.readouterr().out
    assert "3 evaluations: " in said
    assert "pairs tried" in said
    plan = artlib.Plan.load(here / "p.json")
    assert plan.nfe == 3
    drawn = ["-n", "5", "--seed", "2", "-o", "x.safetensors"]
    assert main(["sample", *common, "p.json", *drawn]) == 0
    assert "NFE 3" in capsys.readouterr().out
    assert load_file(here / "x.safetensors")["x_0"].shape == (5, 2)
    several = ["tune", *common, "--nfe", "3,4", "-o", "p.json", "--force"]
    assert main(several) == 2
    assert "{nfe}" in capsys.readouterr().err
