"""What each process of test_parallel.py does; writes what it found to a JSON file."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import artlib
from artlib import cli, parallel

PROCESS = artlib.VE(0.01, 30.0)
MEANS = [[-1.0, 0.5, 0.0], [0.8, -0.2, 1.0]]
TARGET = artlib.GaussianMixture(MEANS, [0.1, 0.3], [0.4, 0.6])


def compute(accelerator: Any) -> dict[str, Any]:
    """Closed form, ART-RL and samples on a small mixture, through a split flow."""
    exact = TARGET.denoiser(PROCESS)
    x_T = TARGET.sample_prior(PROCESS, 9, seed=3).double()  # 9: no multiple of 2
    batches: list[int] = []

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return exact(x, t)

    flow = parallel.split(artlib.ProbabilityFlow(PROCESS, denoiser), accelerator)
    table = artlib.stiffness_table(flow, x_T, points=24)
    trainer = artlib.ActorCritic(flow, x_T, steps=6, points=24, warm_up=5)
    for _ in trainer.train(8):
        pass
    largest = max(batches)
    grid = table.art().grid(10)
    return {
        "processes": accelerator.num_processes,
        "largest_batch": largest,
        "values": table.values.tolist(),
        "closed": grid.tolist(),
        "paper": table.art("paper").grid(7).tolist(),
        "learned": trainer.distill().grid(7).tolist(),
        "samples": parallel.sample(flow, x_T, grid, solver="heun").tolist(),
    }


class Make:
    """The mixture as the command line takes it."""

    process, sample_shape = PROCESS, (3,)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The exact denoiser."""
        return TARGET.denoiser(PROCESS)(x, t)


make = Make()


def main(folder: Path) -> None:
    """One process of several."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = json.dumps(compute(accelerator))
    (folder / f"{accelerator.process_index}.json").write_text(found)
    # The command line ends the team, and so is the last thing that it does.
    learn = ["learn", "parallel_run:make", "-n", "9", "--points", "24", "--quiet"]
    status = cli.main([*learn, "--device", "cpu", "-o", str(folder / "learned.json")])
    sys.exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
