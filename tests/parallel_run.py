"""What each process of test_parallel.py does; writes what it found to a JSON file."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import artlib
from artlib import parallel


def compute(accelerator: Any) -> dict[str, Any]:
    """Closed form, ART-RL and samples on a small mixture, through a split flow."""
    process = artlib.VE(0.01, 30.0)
    means = [[-1.0, 0.5, 0.0], [0.8, -0.2, 1.0]]
    target = artlib.GaussianMixture(means, [0.1, 0.3], [0.4, 0.6])
    exact = target.denoiser(process)
    x_T = target.sample_prior(process, 9, seed=3).double()  # 9: no multiple of 2
    batches: list[int] = []

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        batches.append(len(x))
        return exact(x, t)

    flow = parallel.split(artlib.ProbabilityFlow(process, denoiser), accelerator)
    table = artlib.stiffness_table(flow, x_T, points=24)
    trainer = artlib.ActorCritic(flow, x_T, steps=6, points=24, warm_up=5)
    for _ in trainer.train(30):
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


def main(folder: Path) -> None:
    """One process of several."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = json.dumps(compute(accelerator))
    (folder / f"{accelerator.process_index}.json").write_text(found)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
