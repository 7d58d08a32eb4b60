r"""More than one device: trajectories split over the processes of accelerate.

Reference paths and |Q| along them are all that ART spends network evaluations on, and
they are independent from trajectory to trajectory. A `ParallelFlow` integrates its own
share of the rows of ``x_T`` in every process and gathers the results, so that each of
them holds the whole table, row for row as one process would have it. Nothing is
averaged over averages: the statistics are those of all N trajectories, and the schedule
is that of one process up to round-off, whatever the number of processes.

`artlib.art`, `artlib.stiffness_table` and `artlib.ActorCritic` take such a flow as any
other; every process has to call them, with the same ``x_T``. Training in the table is
then the same in all of them, and it is enough that one does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .flow.flow import ProbabilityFlow, check_flow
from .flow.reference_path import Trajectory
from .solvers.sample import GridLike
from .solvers.sample import sample as sample_here

__all__ = ["ParallelFlow", "sample", "split"]


class ParallelFlow(ProbabilityFlow):
    """A flow whose trajectories are split over processes; make one with `split`.

    Args:
        flow: The flow of one process. What is known of its network (dtype, method of
            acceleration, doubts) is shared with it.
        accelerator: The ``accelerate.Accelerator`` that knows the processes.

    Attributes:
        accelerator: The same.
    """

    def __init__(self, flow: ProbabilityFlow, accelerator: Any) -> None:
        super().__init__(flow.process, flow.denoiser)
        vars(self).update(vars(flow))
        self.accelerator = accelerator

    def trajectory(
        self,
        x_T: Tensor,
        times: Tensor | Sequence[float],
        *,
        method: str = "rk4",
        rtol: float = 1e-6,
    ) -> Trajectory:
        n = len(x_T)
        rows = self._rows(n, x_T.device)
        own = ProbabilityFlow.trajectory(
            self.rows(rows, n), x_T[rows], times, method=method, rtol=rtol
        )
        return Trajectory(
            own.times,
            self._gather_columns(own.states, n),
            self._gather_columns(own.denoised, n),
            self._gather_columns(own.velocities, n),
        )

    def path_stiffness(self, path: Trajectory, *, forward: bool = True) -> Tensor:
        n = path.states.shape[1]
        rows = self._rows(n, path.states.device)
        own = Trajectory(
            path.times,
            path.states[:, rows],
            path.denoised[:, rows],
            path.velocities[:, rows],
        )
        part = self.rows(rows, n)
        values = ProbabilityFlow.path_stiffness(part, own, forward=forward)
        # Forward mode may work on the rows of one process and not on another's.
        differs = torch.tensor(
            [self.acceleration_method == "difference"], device=self.accelerator.device
        )
        if bool(self.accelerator.gather(differs).any()) and not bool(differs):
            self._derivative.method = "difference"
            values = ProbabilityFlow.path_stiffness(part, own, forward=forward)
        return self._gather(values, n)

    def _rows(self, n: int, device: torch.device) -> Tensor:
        """This process's rows; the last one repeats, so that all have as many."""
        share = -(-n // self.accelerator.num_processes)
        first = share * self.accelerator.process_index
        return torch.arange(first, first + share, device=device).clamp(max=n - 1)

    def _gather(self, rows: Tensor, n: int) -> Tensor:
        """All processes' rows in order, without the repeated ones."""
        home = rows.device
        gathered: Tensor = self.accelerator.gather(
            rows.to(self.accelerator.device).contiguous()
        )
        return gathered[:n].to(home)

    def _gather_columns(self, values: Tensor, n: int) -> Tensor:
        return self._gather(values.transpose(0, 1), n).transpose(0, 1).contiguous()


def split(flow: ProbabilityFlow, accelerator: Any | None = None) -> ParallelFlow:
    """The same flow, its trajectories split over all processes.

    Run the script with ``accelerate launch``; alone, it is one process and all is as
    before.

    Args:
        flow: The flow; every process has its network, on its own device.
        accelerator: An ``accelerate.Accelerator``; by default a new one.

    Returns:
        A `ParallelFlow`.

    Raises:
        TypeError: If ``flow`` is no flow or ``accelerator`` none of accelerate's.
        ImportError: If accelerate is not installed.
    """
    check_flow(flow)
    if accelerator is None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ImportError(
                "more than one process needs accelerate: install it with "
                'pip install "art-diffusion[accelerate]"'
            ) from error
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if not (hasattr(accelerator, "gather") and hasattr(accelerator, "num_processes")):
        raise TypeError(
            "accelerator: expected an accelerate.Accelerator, got "
            f"{type(accelerator).__name__}"
        )
    return ParallelFlow(flow, accelerator)


def sample(
    flow: ParallelFlow, x_T: Tensor, grid: GridLike, *, solver: str = "euler"
) -> Tensor:
    """`artlib.sample` with the samples split over processes; all get all of them.

    Args:
        flow: From `split`.
        x_T: The states of all samples, the same in every process.
        grid: K + 1 strictly descending times, the first at most ``t_max``, the last 0
            or above.
        solver: A key of `SOLVERS`, a `Solver` or a step, as in `artlib.sample`, that
            takes a grid: an adaptive one would choose other steps for every share.

    Returns:
        All samples in the order of ``x_T``, on the device of ``x_T``.

    Raises:
        TypeError: If the flow is not split.
        ValueError: As in `artlib.sample`.
    """
    if not isinstance(flow, ParallelFlow):
        raise TypeError(
            f"flow: expected a ParallelFlow, got {type(flow).__name__}; make one with "
            "artlib.parallel.split(flow)"
        )
    rows, n = flow._rows(len(x_T), x_T.device), len(x_T)
    own = sample_here(flow.rows(rows, n), x_T[rows], grid, solver=solver)
    return flow._gather(own, n)
