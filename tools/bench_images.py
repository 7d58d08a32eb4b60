"""Ratios on the trained image networks, measured in one run (part of make bench).

1. The closed form for each network: seconds, evaluations, peak memory, and its time
   in units of the bare network's for as many evaluations.
2. The sampler against the bare network, and the time per image by batch size.

On the CPU processor time on one thread, as in `bench`; on a GPU the time on the clock.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable

import torch

import artlib
import artlib.zoo
from artlib.zoo.networks import ZooDenoiser

TRAJECTORIES, POINTS = 64, 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = {"cpu": 60.0, "cuda": 2.0}
"""Seconds for the closed form of the base network."""


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Least time of a run, after one that warms up where it is repeated."""
    clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time
    best = float("inf")
    for _ in range(repeats):
        gc.collect()
        start = clock()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def peak_megabytes() -> float:
    """Peak memory of the process (CPU) or of the device's tensors so far."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_closed_form(name: str) -> float:
    """Print one network's line; returns the seconds of its closed form."""
    net = artlib.zoo.load(name, device=DEVICE)
    x_T = net.sample_prior(TRAJECTORIES, seed=0)
    t = torch.tensor(1.0, device=DEVICE)
    with torch.no_grad():
        bare = seconds(lambda: net(x_T, t))
    before = peak_megabytes()
    for acceleration in ("difference", "jvp"):
        flow = artlib.ProbabilityFlow(net.process, net, acceleration=acceleration)
        table: list[artlib.StiffnessTable] = []
        taken = seconds(
            lambda flow=flow, table=table: table.append(  # type: ignore[misc]
                artlib.stiffness_table(flow, x_T, points=POINTS)
            ),
            repeats=1,
        )
        nfe = table[0].nfe
        print(
            f"  {name:20s}{acceleration:12s}{taken:8.1f} s {nfe:6d} NFE "
            f"{taken / (nfe * bare):6.2f} x bare network, peak memory "
            f"+{peak_megabytes() - before:.0f} MB"
        )
        if acceleration == "difference":
            quickest = taken
    return quickest


def bench_sampling(net: ZooDenoiser) -> None:
    """Print sampler against bare network, by batch size."""
    flow = artlib.ProbabilityFlow(net.process, net)
    grid = artlib.edm(net.process).grid(10)
    t = torch.tensor(1.0, device=DEVICE)
    print("sampler / bare network, Euler, 10 steps; time per image and evaluation")
    for batch in (1, 4, 16, 64, 256):
        x_T = net.sample_prior(batch, seed=0)

        def bare(x: torch.Tensor = x_T) -> None:
            with torch.no_grad():
                for _ in range(10):
                    net(x, t)

        ours = seconds(lambda x=x_T: artlib.sample(flow, x, grid))  # type: ignore[misc]
        alone = seconds(bare)
        print(
            f"  batch {batch:4d}: {ours / alone:6.3f}   "
            f"{1e3 * alone / (10 * batch):8.3f} ms"
        )


def main() -> None:
    torch.set_num_threads(1)
    names = [n for n in artlib.zoo.available() if n.startswith("fashion")]
    print(f"closed form, {TRAJECTORIES} trajectories x {POINTS} points, {DEVICE.type}")
    taken = {name: bench_closed_form(name) for name in names}
    if "fashion-base" in taken:
        goal = TARGET[DEVICE.type]
        verdict = "within" if taken["fashion-base"] <= goal else "ABOVE"
        print(f"  fashion-base: {verdict} the {goal:.0f} s that are aimed at")
        bench_sampling(artlib.zoo.load("fashion-base", device=DEVICE))


if __name__ == "__main__":
    main()
