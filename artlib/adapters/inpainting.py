r"""Inpainting with any denoiser: what is known stays, the rest is made.

With a mask m that is 1 where something is to be made and 0 where :math:`x_0` is known,

.. math:: D_m(x, t) = m\,D(x, t) + (1 - m)\,x_0

is a denoiser like any other, so that a schedule can be learned on its flow. Where m is
0 the path is :math:`\alpha x_0 + \sigma\epsilon`, with the noise that it started from,
and ends at :math:`x_0`; pipelines blend that in after every step, which is the same.
Networks that were trained for it are told mask and image as further channels instead,
see ``"concatenated"`` in `artlib.adapters.diffusers.denoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._common.checks import got, real_tensor, require_finite
from .._common.types import DenoiserFn
from ..flow.ask import check_rows
from ..flow.denoisers import Denoiser, Prediction
from ..flow.process import Process, as_time
from ..flow.rows import Rows, rows_of, take_rows

__all__ = ["InpaintingDenoiser", "inpainting"]


def inpainting(
    denoiser: DenoiserFn,
    known: Tensor,
    mask: Tensor,
    *,
    process: Process | None = None,
) -> InpaintingDenoiser:
    r"""A denoiser that keeps what is known.

    Args:
        denoiser: Any denoiser D(x, t).
        known: The known :math:`x_0`, [1, *shape] or [N, *shape].
        mask: 1 where something is to be made, 0 where ``known`` is kept, and shares of
            both between; [1 or N, *shape], an axis may be 1.
        process: Its process; by default ``denoiser.process``.

    Returns:
        The denoiser; start it from `InpaintingDenoiser.start`.

    Raises:
        TypeError: If there is no process or an argument is no tensor.
        ValueError: If the shapes do not fit, a value is not finite, or the mask leaves
            [0, 1].

    Example:
        >>> import artlib, torch
        >>> process = artlib.VE()
        >>> network = artlib.Gaussian([0.0, 0.0], torch.eye(2)).denoiser(process)
        >>> known, mask = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> net = artlib.adapters.inpainting(network, known, mask, process=process)
        >>> x_T = net.start(torch.randn(4, 2))
        >>> flow = artlib.ProbabilityFlow(net.process, net)
        >>> artlib.sample(flow, x_T, artlib.edm(process).grid(5))[:, 0]
        tensor([3., 3., 3., 3.])
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser: expected a callable D(x, t), got {got(denoiser)}")
    own = getattr(denoiser, "process", None) if process is None else process
    if not isinstance(own, Process):
        raise TypeError(
            "process: the denoiser does not say its process; pass process=, such as "
            "artlib.VE()"
        )
    return InpaintingDenoiser(denoiser, own, *_checked(known, mask))


class InpaintingDenoiser(Denoiser):
    """What `inpainting` returns.

    Args:
        denoiser: Any denoiser D(x, t).
        process: Its process.
        known: The known :math:`x_0`, [1, *shape] or [N, *shape].
        mask: 1 where something is to be made, 0 where ``known`` is kept; [1 or N,
            *shape], an axis may be 1.

    Attributes:
        process: The process to sample under.
    """

    def __init__(
        self, denoiser: DenoiserFn, process: Process, known: Tensor, mask: Tensor
    ) -> None:
        super().__init__(denoiser, process, _Kept(known, mask))
        self._kept = _Kept(known, mask)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Denoise: x [n, *shape] at time t -> [n, *shape]."""
        return self._kept(x, self._ask_itself, t)

    def _ask_itself(self, x: Tensor, t: Tensor) -> Tensor:
        denoiser: Any = self.network
        answer: Tensor = denoiser(x, t)
        return answer

    def start(self, noise: Tensor, t: float | None = None) -> Tensor:
        r"""States to start from: noise, with what is known under it.

        Args:
            noise: Standard normal draws [N, *shape].
            t: Process time, by default t_max.

        Returns:
            :math:`\sigma\epsilon + (1 - m)\,\alpha x_0` [N, *shape], in the dtype of
            the noise.
        """
        time = as_time(self.process.t_max if t is None else t)
        alpha, sigma = float(self.process.alpha(time)), float(self.process.sigma(time))
        known, mask = self._kept.on(noise)
        return sigma * noise + alpha * (1 - mask) * known

    def rows(self, index: Rows) -> InpaintingDenoiser:
        """The same for some of the samples.

        Args:
            index: Which samples, a slice or row numbers [n].
        """
        kept = self._kept.rows(index)
        network: Any = rows_of(self.network, index)
        if network is self.network and kept is self._kept:
            return self
        part = self._twin()
        part._kept = kept
        if network is not self.network:
            part._modules.pop("network", None)
            part.network = network
        return part

    def check_rows(self, count: int) -> None:
        for name, value in (("known", self._kept.known), ("mask", self._kept.mask)):
            if len(value) not in (1, count):
                raise ValueError(
                    f"{name}: {len(value)} rows for {count} samples; give one row, or "
                    "one per sample"
                )
        check_rows(self.network, count)


@dataclass(frozen=True)
class _Kept:
    """What is known, and where."""

    known: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, net: Prediction, t: Tensor) -> Tensor:
        known, mask = self.on(x)
        return mask * net(x, t) + (1 - mask) * known

    def on(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype and on the device of the states, which they have to fit.

        Raises:
            ValueError: If they do not.
        """
        for name, value in (("known", self.known), ("mask", self.mask)):
            try:
                fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"{name}: {list(value.shape)} does not fit states {list(x.shape)}; "
                    "give one row, or one per sample, of the states' shape"
                )
        return (
            self.known.to(x.dtype).to(x.device),
            self.mask.to(x.dtype).to(x.device),
        )

    def rows(self, index: Rows) -> _Kept:
        if len(self.known) == 1 and len(self.mask) == 1:
            return self
        parts = (
            value if len(value) == 1 else take_rows(value, index)
            for value in (self.known, self.mask)
        )
        return _Kept(*parts)


def _checked(known: Any, mask: Any) -> tuple[Tensor, Tensor]:
    """Both in float64, with one number of axes."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.double()
    known, mask = real_tensor(known, "known"), real_tensor(mask, "mask")
    require_finite(known, "known", "give the clean sample")
    if known.ndim < 2 or mask.ndim != known.ndim:
        raise ValueError(
            f"mask: expected known and mask with rows, [1 or N, *shape], and as many "
            f"axes, got shapes {list(known.shape)} and {list(mask.shape)}; unsqueeze "
            "what is missing"
        )
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask: expected 1 where something is to be made and 0 where it is known, "
            f"got values in [{float(mask.min()):.6g}, {float(mask.max()):.6g}]"
        )
    return known, mask
