"""Ratios of processor time, measured in one run (make bench).

1. `artlib.sample` against a bare loop around the same network.
2. The closed form: what it costs, by number of trajectories and by dimension, in
   network evaluations on the same batch.
3. The acceleration by forward mode (jvp) against the difference along the path.
4. ART-RL against the closed form, in seconds, evaluations and cost: by number of
   trajectories, steps and dimension, and on a GPU where there is one.
5. The closed form, GITS and LD3 (as rebuilt in `artlib.rivals`) on the same noise.
6. The exact distance on Gaussian data, and the search for the oracle.

Processor time, not time on the clock (but where a GPU works beside the processor):
others on the machine do not count. For that the bench runs on one thread. It exits
with status 1 if sampling costs more than LIMIT times the bare loop.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

import artlib

LIMIT = 1.03
STEPS = 20
ITERATIONS = 300  # of ART-RL; half of a full run, and so half its seconds
PROCESS = artlib.VE()


class Network(nn.Module):
    """A small convolutional denoiser with EDM's preconditioning."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)
        )
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1 + t**2
        noise = (t.log() / 4).to(x.dtype).expand_as(x)
        h = self.first(torch.cat([x / scale.sqrt(), noise], dim=1))
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return x / scale + t / scale.sqrt() * self.last(h)


def problem(samples: int, side: int) -> tuple[Network, Tensor]:
    """A network with fixed weights, and float32 noise of side x side pixels."""
    generator = torch.Generator().manual_seed(0)
    network = Network().requires_grad_(False)
    for weight in network.parameters():
        fan_in = weight[0].numel()
        weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
    noise = torch.randn(samples, 1, side, side, generator=generator)
    return network, PROCESS.t_max * noise


def fastest(*runs: Callable[[], object], repeats: int) -> list[float]:
    """Least processor time of each run in seconds, the runs taking turns."""
    best = [float("inf")] * len(runs)
    gc.disable()
    for _ in range(repeats + 1):  # the first round warms up, and is rarely the best
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start)
    gc.enable()
    return best


def euler_by_hand(network: Network, x: Tensor, nodes: list[float]) -> Tensor:
    for t, t_next in pairwise(nodes):
        x = x + (t_next - t) / t * (x - network(x, torch.tensor(t)))
    return x


def heun_by_hand(network: Network, x: Tensor, nodes: list[float]) -> Tensor:
    for t, t_next in pairwise(nodes):
        slope = (x - network(x, torch.tensor(t))) / t
        end = x + (t_next - t) * slope
        if t_next > 0:
            slope = (slope + (end - network(end, torch.tensor(t_next))) / t_next) / 2
            end = x + (t_next - t) * slope
        x = end
    return x


def bench_sample() -> float:
    """Print and return the worst ratio of `sample` to a bare loop."""
    network, x_T = problem(16, 28)
    flow = artlib.ProbabilityFlow(PROCESS, network)
    grid = artlib.edm(PROCESS).grid(STEPS)
    worst = 0.0
    print(f"sample / bare loop, {STEPS} steps, 16 samples of 28 x 28")
    for solver, by_hand in (("euler", euler_by_hand), ("heun", heun_by_hand)):
        ours, bare = fastest(
            partial(artlib.sample, flow, x_T, grid, solver=solver),
            partial(by_hand, network, x_T, grid.tolist()),
            repeats=10,
        )
        worst = max(worst, ours / bare)
        print(f"  {solver:6s} {ours / bare:6.3f}   (limit {LIMIT})")
    return worst


def bench_closed_form() -> None:
    """Print the cost of `art` in evaluations of the network on the same batch."""
    print("\nart(flow, x_T) by the difference, in evaluations on the same batch")
    print("  trajectories  dimension    NFE  time / evaluation  time / NFE of them")
    for samples, side in ((4, 28), (16, 28), (16, 16), (16, 8)):
        network, x_T = problem(samples, side)
        flow = artlib.ProbabilityFlow(PROCESS, network, acceleration="difference")
        nfe = artlib.stiffness_table(flow, x_T).nfe
        whole, one = fastest(
            partial(artlib.art, flow, x_T),
            partial(network, x_T, torch.tensor(1.0)),
            repeats=2,
        )
        cells = f"{samples:14d} {side**2:10d} {nfe:6d}"
        print(f"{cells} {whole / one:18.0f} {whole / one / nfe:19.2f}")


def bench_acceleration() -> None:
    """Print time and result of forward mode relative to the difference."""
    print("\njvp / difference, stiffness table of 16 trajectories")
    print("  dimension    time    lower bound of the cost")
    for side in (8, 16, 28):
        network, x_T = problem(16, side)
        tables = [
            partial(
                artlib.stiffness_table,
                artlib.ProbabilityFlow(PROCESS, network, acceleration=method),
                x_T,
            )
            for method in ("jvp", "difference")
        ]
        jvp, difference = fastest(*tables, repeats=2)
        bounds = [table().lower_bound() for table in tables]
        ratio = bounds[0] / bounds[1]
        print(f"  {side**2:9d} {jvp / difference:7.2f} {ratio:26.4f}")


def actor_critic_problem(
    dimension: int, trajectories: int, device: str = "cpu"
) -> tuple[artlib.ProbabilityFlow, Tensor]:
    """A mixture of three bumps in any number of dimensions."""
    along = torch.linspace(1, 2, dimension, dtype=torch.float64)
    means = torch.tensor([-1.0, 0.2, 1.5])[:, None] * along / along.norm()
    target = artlib.GaussianMixture(
        means.to(device),
        torch.tensor([0.3, 0.15, 0.4], dtype=torch.float64, device=device),
        torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64, device=device),
    )
    flow = artlib.ProbabilityFlow(PROCESS, target.denoiser(PROCESS))
    return flow, target.sample_prior(PROCESS, trajectories, seed=0).to(device)


def bench_actor_critic() -> None:
    """Print time, evaluations and cost of ART-RL beside the closed form's."""
    print(
        f"\nART-RL, {ITERATIONS} iterations, and the closed form; the table of |Q|"
        " included, NFE on batches of all trajectories"
    )
    print(f"{'':34}{'--- ART-RL ---':>18}{'- closed form -':>18}")
    print(
        "  trajectories  K  dimension  device     NFE  seconds      NFE  seconds"
        "  ART-RL's cost / bound"
    )
    cases = [(n, 18, 16) for n in (32, 64, 256)]
    cases += [(128, k, 16) for k in (6, 18, 36)] + [(128, 18, d) for d in (1, 64)]
    runs = [(*case, "cpu") for case in cases]
    if torch.cuda.is_available():
        runs += [(n, 18, 16, d) for n in (256, 4096) for d in ("cpu", "cuda")]
    artlib.art(*actor_critic_problem(2, 2))  # the first call is slower
    for trajectories, steps, dimension, device in runs:
        flow, x_T = actor_critic_problem(dimension, trajectories, device)
        clock = time.process_time if device == "cpu" else time.perf_counter
        start = clock()
        table = artlib.stiffness_table(flow, x_T)
        table.art()
        closed = clock() - start
        # A new flow: the first table of one finds out whether forward mode works.
        flow, x_T = actor_critic_problem(dimension, trajectories, device)
        start = clock()
        # On a GPU what counts is a large batch: all the trajectories.
        trainer = artlib.ActorCritic(flow, x_T, steps=steps, batch=trajectories)
        for _ in trainer.train(ITERATIONS):
            pass
        schedule = trainer.distill()
        seconds = clock() - start
        ratio = table.cost(schedule) / table.lower_bound()
        cells = f"{trajectories:14d} {steps:2d} {dimension:10d}  {device:6s}"
        learned = f"{trainer.nfe:7d} {seconds:8.1f}"
        print(f"{cells} {learned} {table.nfe:8d} {closed:8.2f} {ratio:22.4f}")


class Counted(nn.Module):
    """A network that counts the samples it is asked about."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.samples += len(x)
        return self.network(x, t)


def bench_rivals() -> None:
    """Print what a list for 8 steps costs by three ways, as ratios."""
    network, x_T = problem(32, 16)
    counted = Counted(network)
    flow = artlib.ProbabilityFlow(PROCESS, counted)

    def jumps() -> Tensor:
        return artlib.rivals.euler_jumps(flow, x_T, points=60, method="multistep").grid(
            8
        )

    ways: dict[str, Callable[[], object]] = {
        "closed form": lambda: artlib.art(flow, x_T).grid(8),
        "mixture for 2M": lambda: artlib.art(
            flow, x_T, solver="dpmpp_2m", steps=8
        ).grid(8),
        "GITS": jumps,
        "LD3": lambda: artlib.rivals.trained_plan(flow, x_T, 8),
    }
    jumps()  # the first call is slower
    spent, seconds = [], []
    for run in ways.values():
        counted.samples, start = 0, time.process_time()
        run()
        seconds.append(time.process_time() - start)
        spent.append(counted.samples / len(x_T))
    print(
        "\na list for 8 steps from 32 noises of 16 x 16, teachers included: "
        f"{' : '.join(ways)}\n  a gradient counts as its forward pass"
    )
    for what, row in (("evaluations a noise", spent), ("processor time", seconds)):
        ratios = " : ".join(f"{value / row[0]:.3g}" for value in row)
        print(f"  {what:20s} {ratios:>20s}   (closed form {row[0]:.3g})")


def bench_exact() -> None:
    """Print what an exact distance and an oracle cost."""
    many = torch.arange(1, 3073, dtype=torch.float64) ** -1.2
    few = torch.logspace(1, -4, 64, dtype=torch.float64)
    grid = artlib.edm(PROCESS).grid(10)
    print("\nexact W2 of one grid, 3,072 variances; oracle, 64 variances; 10 steps")
    for solver in ("euler", "heun"):
        distance = partial(artlib.gaussian_w2, PROCESS, many, grid, solver=solver)
        search = partial(artlib.oracle_grid, PROCESS, few, 10, solver=solver)
        (once,) = fastest(distance, repeats=10)
        (whole,) = fastest(search, repeats=1)
        print(f"  {solver:6s} {1e3 * once:6.2f} ms {whole:9.2f} s   (limits 10, 10)")


def main() -> None:
    torch.set_num_threads(1)
    worst = bench_sample()
    bench_closed_form()
    bench_acceleration()
    bench_actor_critic()
    bench_rivals()
    bench_exact()
    if worst > LIMIT:
        sys.exit(
            f"sample took {worst:.3f} times the bare loop, at most {LIMIT} allowed"
        )


if __name__ == "__main__":
    main()
