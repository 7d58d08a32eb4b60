"""The same schedule from one process and from two (gloo on the CPU)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_run import compute, make

import artlib
from artlib import parallel

pytest.importorskip("accelerate", reason="no accelerate")

HERE = Path(__file__).resolve().parent


def launch(folder: Path, processes: int) -> list[dict[str, Any]]:
    # "--multi_gpu" starts the processes, also where there is no GPU; "--cpu" would want
    # an MPI.
    options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    options += ["--main_process_port", "0"]
    script = [str(HERE / "parallel_run.py"), str(folder)]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / f"{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_find_the_schedule_of_one(tmp_path: Path) -> None:
    one = compute(Team(1, 0))
    first, second = launch(tmp_path, 2)
    assert first["processes"] == 2
    assert (one["largest_batch"], first["largest_batch"]) == (9, 5)  # split for real
    for name in ("values", "closed", "paper", "learned", "samples"):
        expected = torch.tensor(one[name], dtype=torch.float64)
        for found in (first, second):
            torch.testing.assert_close(
                torch.tensor(found[name], dtype=torch.float64),
                expected,
                rtol=1e-6,
                atol=1e-9,
            )
    # The command line, run by the same two processes; one of them wrote the file.
    learned = artlib.Schedule.load(tmp_path / "learned.json")
    rng = torch.Generator().manual_seed(0)
    x_T = 30.0 * torch.randn(9, 3, generator=rng, dtype=torch.float64)
    flow = artlib.ProbabilityFlow(make.process, make)
    expected = artlib.art(flow, x_T, points=24).grid(10)
    torch.testing.assert_close(learned.grid(10), expected, rtol=1e-6, atol=0)


class Team:
    """Stands for an accelerator where nothing is sent between processes."""

    device = torch.device("cpu")

    def __init__(self, processes: int, index: int) -> None:
        self.num_processes, self.process_index = processes, index

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        assert rows.device.type == self.device.type
        assert rows.is_contiguous()  # or NCCL refuses it
        return torch.cat([rows] * self.num_processes)


class Labelled:
    """The exact denoiser of N(m_i, 1/4), with a mean for each sample."""

    def __init__(self, means: torch.Tensor) -> None:
        self.means = means

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(self.means)
        return self.means + (x - self.means) / (1 + 4 * t**2)

    def rows(self, index: Any) -> "Labelled":
        return Labelled(self.means[index])


def labelled(n: int) -> tuple[artlib.ProbabilityFlow, torch.Tensor]:
    means = torch.linspace(-2.0, 2.0, n, dtype=torch.float64)[:, None]
    flow = artlib.ProbabilityFlow(artlib.VE(0.01, 30.0), Labelled(means))
    return flow, 30.0 * means.flip(0) + 1.0


@pytest.mark.parametrize("index", [0, 1])
def test_conditions_go_with_the_rows_of_a_process(index: int) -> None:
    flow, x_T = labelled(5)
    part = parallel.split(flow, Team(2, index))
    assert type(flow) is artlib.ProbabilityFlow  # a copy is split
    own = [[0, 1, 2], [3, 4, 4]][index]
    times = torch.logspace(1.4, -2, 17, dtype=torch.float64)
    path, whole = part.trajectory(x_T, times), flow.trajectory(x_T, times)
    for name in ("states", "denoised", "velocities"):
        found, expected = getattr(path, name)[:, :3], getattr(whole, name)[:, own]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        part.path_stiffness(whole)[:3], flow.path_stiffness(whole)[own]
    )
    grid = artlib.edm(flow.process).grid(4)
    found = parallel.sample(part, x_T, grid, solver="heun")[:3]
    expected = artlib.sample(flow, x_T, grid, solver="heun")[own]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_tolerance_reaches_the_solver() -> None:
    flow, x_T = labelled(5)
    times = torch.logspace(1.4, -2, 17, dtype=torch.float64)
    coarse = {"method": "dopri5", "rtol": 1e-3}
    found = parallel.split(flow, Team(1, 0)).trajectory(x_T, times, **coarse).states
    assert torch.equal(found, flow.trajectory(x_T, times, **coarse).states)
    fine = flow.trajectory(x_T, times, method="dopri5").states
    assert not torch.equal(found, fine)


def test_what_is_gathered_elsewhere_comes_home(accelerator: torch.device) -> None:
    flow, x_T = labelled(4)
    team = Team(1, 0)
    team.device = accelerator
    found = parallel.sample(parallel.split(flow, team), x_T, [30.0, 1.0, 0.0])
    assert found.device.type == "cpu"
    assert torch.equal(found, artlib.sample(flow, x_T, [30.0, 1.0, 0.0]))


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_row_has_one_process(n: int, processes: int) -> None:
    process = artlib.VE(0.01, 30.0)
    plain = artlib.ProbabilityFlow(process, lambda x, t: x / (1 + t**2))
    shares = [
        parallel.split(plain, Team(processes, k))._rows(n, torch.device("cpu"))
        for k in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1  # or gathering would hang
    assert torch.cat(shares)[:n].tolist() == list(range(n))


def test_a_process_that_cannot_use_forward_mode_decides_for_all() -> None:
    process = artlib.VE(0.01, 30.0)
    target = artlib.Gaussian([0.0], [[0.3]])

    class Pessimist(Team):
        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            if rows.dtype == torch.bool:
                return torch.tensor([bool(rows), True])
            return super().gather(rows)

    flow = artlib.ProbabilityFlow(process, target.denoiser(process))
    flow = parallel.split(flow, Pessimist(1, 0))
    x_T = target.sample_prior(process, 3, seed=0)
    table = artlib.stiffness_table(flow, x_T, points=24)
    assert table.acceleration == "difference"
    forced = artlib.ProbabilityFlow(
        process, target.denoiser(process), acceleration="difference"
    )
    expected = artlib.stiffness_table(forced, x_T, points=24)
    assert torch.equal(table.values, expected.values)


def test_bad_arguments_are_refused() -> None:
    flow = artlib.ProbabilityFlow(artlib.VE(), lambda x, t: x)
    with pytest.raises(TypeError, match="flow: expected a ProbabilityFlow"):
        parallel.split(lambda x, t: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"accelerator: expected an accelerate"):
        parallel.split(flow, object())
    with pytest.raises(TypeError, match="flow: expected a ParallelFlow"):
        parallel.sample(flow, torch.zeros(1, 1), [1.0, 0.0])  # type: ignore[arg-type]
