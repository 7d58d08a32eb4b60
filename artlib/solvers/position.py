r"""Where a run stands, which is all that a step of a solver may use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..flow.flow import ProbabilityFlow
from ..flow.processes import Process


@dataclass(frozen=True)
class Node:
    r"""A process time and what a process has there, 0-d float64 on the CPU.

    Attributes:
        t: The process time.
        alpha: Factor of the data.
        sigma: Factor of the noise.
        log_ratio: :math:`\log(\alpha/\sigma)`, half the log-SNR; infinite where there
            is no signal or no noise.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_ratio: Tensor


def nodes_of(process: Process, times: Iterable[Tensor]) -> list[Node]:
    """The nodes at some times, all computed at once."""
    nodes = torch.stack(list(times))
    alpha, sigma = process.alpha(nodes), process.sigma(nodes)
    # The ends have none, and a gradient through them would be NaN.
    finite = (alpha.detach() != 0) & (sigma.detach() != 0)
    inside = torch.where(finite, nodes, nodes.detach().median())
    levels = torch.where(finite, process.log_snr(inside) / 2, torch.inf)
    columns = (column.unbind() for column in (nodes, alpha, sigma, levels))
    return [Node(*row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Evaluated:
    """An earlier node of a run.

    Attributes:
        node: The node.
        x: The states there [N, *shape], corrected if the solver corrects them.
        denoised: What the network made of the states that it saw there.
    """

    node: Node
    x: Tensor
    denoised: Tensor

    @property
    def t(self) -> Tensor:
        """Its process time, 0-d float64."""
        return self.node.t


@dataclass
class Position:
    """The states of a run at a node, the next node, and what has been.

    Attributes:
        flow: The flow.
        x: States [N, *shape]. A solver that corrects them writes them back.
        node: The node where they are.
        next: The next node; its time is above 0 where a solver is asked.
        told: The process time whose noise level the network is told; None for that of
            the node. Without effect where there is no signal.
        left: Steps left to take, this one included.
        ends_at_zero: Whether the last of them goes to 0.
        steps: All steps of the run.
        past: Earlier nodes, the newest first, at most as many as the solver's
            ``history``, and none at which there is no signal (their log-SNR is
            infinite).
    """

    flow: ProbabilityFlow
    x: Tensor
    node: Node
    next: Node
    told: Tensor | None = None
    left: int = 1
    ends_at_zero: bool = False
    steps: int = 1
    past: tuple[Evaluated, ...] = ()
    _denoised: Tensor | None = field(default=None, repr=False)

    @property
    def t(self) -> Tensor:
        """Process time of the states, 0-d float64 on the CPU."""
        return self.node.t

    @property
    def s(self) -> Tensor:
        """Process time of the next node, below t."""
        return self.next.t

    @property
    def denoised(self) -> Tensor:
        r"""D of the states: one evaluation, made when it is first asked for.

        Told another noise level, the network sees the states that the same data and
        noise, per signal, would have there: :math:`D(x \alpha_s / \alpha_t, s)`.
        """
        if self._denoised is None:
            x, time = self.x, self.t
            if self.told is not None and self.node.alpha.item() != 0:
                process = self.flow.process
                x = x * (process.alpha(self.told) / self.node.alpha)
                time = self.told
            self._denoised = self.flow.denoise(x, time)
        return self._denoised

    @denoised.setter
    def denoised(self, known: Tensor) -> None:
        self._denoised = known

    def remembered(self) -> Evaluated:
        """What later steps may use of this node."""
        return Evaluated(self.node, self.x, self.denoised)
