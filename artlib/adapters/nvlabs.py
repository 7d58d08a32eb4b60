r"""Networks called as ``net(x, sigma, class_labels) -> D``: NVlabs' EDM and EDM2.

Such a network is a denoiser already, with its preconditioning inside. What differs
from network to network is what it is conditioned on, which noise levels it was trained
for (``round_sigma`` of those that were trained on discrete ones), and whether a second,
lesser network guides it:

.. math:: D = D_{guide} + g\,(D_{net} - D_{guide}) ,

classifier-free guidance where the second network is the unconditional one (EDM2), and
**autoguidance** where it is a worse version of the first.

Nothing is loaded here. The published files are pickles that run code when opened; open
them where you trust them, or build the network and load safetensors into it.

References:
    Karras et al., https://arxiv.org/abs/2206.00364 (EDM), https://arxiv.org/abs/2312.02696
    (EDM2), https://arxiv.org/abs/2406.02507 (autoguidance, eq. (1)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._common.checks import finite_float
from ..flow.ask import exact_time
from ..flow.denoisers import Denoiser, itself, network_dtype
from ..flow.processes import VE
from ..flow.rows import Rows, take_rows

__all__ = ["EDMDenoiser", "denoiser"]


def denoiser(
    network: nn.Module,
    *,
    class_labels: Tensor | None = None,
    guide: nn.Module | None = None,
    guidance: float = 1.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> EDMDenoiser:
    r"""A denoiser D(x, t), t = sigma, from a network of the EDM family.

    The range is narrowed to the network's own ``sigma_min`` and ``sigma_max`` where it
    has them, and every noise level goes through its ``round_sigma``.

    Args:
        network: Called as ``network(x, sigma, class_labels)`` with sigma [N] in
            float32.
        class_labels: One-hot rows [1, c] or [N, c], or None.
        guide: A second network, called alike; if it knows no classes (its
            ``label_dim`` is 0) without labels.
        guidance: Factor g; 1 is ``network`` alone. Other factors need a ``guide``.
            The two calls count as one evaluation.
        sigma_min: Smallest noise level of the process.
        sigma_max: Largest noise level of the process.

    Raises:
        TypeError: If a network is no module or the labels no tensor.
        ValueError: If the labels do not fit ``network.label_dim`` or guidance lacks a
            guide.
    """
    return EDMDenoiser(network, class_labels, guide, guidance, sigma_min, sigma_max)


class EDMDenoiser(Denoiser):
    """What `denoiser` returns; the arguments are the same.

    Args:
        network: Called as ``network(x, sigma, class_labels)`` with sigma [N] in
            float32.
        class_labels: One-hot rows [1, c] or [N, c], or None.
        guide: A second network, called alike, or None.
        guidance: Factor g; 1 is ``network`` alone. Other factors need a ``guide``.
        sigma_min: Smallest noise level of the process.
        sigma_max: Largest noise level of the process.

    Attributes:
        process: `VE` over the network's range.
    """

    def __init__(
        self,
        network: nn.Module,
        class_labels: Tensor | None,
        guide: nn.Module | None,
        guidance: float,
        sigma_min: float,
        sigma_max: float,
    ) -> None:
        parts = {"network": network} | ({} if guide is None else {"guide": guide})
        for name, value in parts.items():
            if not isinstance(value, nn.Module):
                raise TypeError(
                    f"{name}: expected a torch module called as net(x, sigma, "
                    f"class_labels), got {type(value).__name__}"
                )
        sigma_min = finite_float(sigma_min, "sigma_min", positive=True)
        sigma_max = finite_float(sigma_max, "sigma_max", positive=True)
        low = max(sigma_min, float(getattr(network, "sigma_min", 0.0)))
        high = min(sigma_max, float(getattr(network, "sigma_max", float("inf"))))
        # A copy's answers are its own: no closure over this one.
        super().__init__(network, VE(low, high), itself)
        self.guide = guide
        self._factor = finite_float(guidance, "guidance")
        if self._factor != 1 and guide is None:
            raise ValueError(
                f"guidance: {self._factor} needs a guide; pass guide=, the "
                "unconditional or a lesser network"
            )
        self._check_labels(class_labels)
        self.register_buffer("class_labels", class_labels, persistent=False)

    def rows(self, index: Rows) -> EDMDenoiser:
        """The same with the labels of some of the samples.

        Args:
            index: Which samples, a slice or row numbers [n].
        """
        labels: Any = self.class_labels
        if labels is None or labels.shape[0] == 1:
            return self
        part = self._twin()
        part.class_labels = take_rows(labels, index)
        return part

    def check_rows(self, count: int) -> None:
        labels: Any = self.class_labels
        if labels is not None and labels.shape[0] not in (1, count):
            raise ValueError(
                f"class_labels: {labels.shape[0]} rows for {count} samples; give one "
                "row, or one per sample"
            )

    def _check_labels(self, labels: Tensor | None) -> None:
        classes = getattr(self.network, "label_dim", None)
        if labels is None:
            return
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"class_labels: expected a tensor, got {type(labels).__name__}"
            )
        if labels.ndim != 2 or (classes is not None and labels.shape[1] != classes):
            raise ValueError(
                f"class_labels: expected one-hot rows [n, {classes or 'classes'}], got "
                f"shape {tuple(labels.shape)}; torch.nn.functional.one_hot makes them"
            )

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided answer."""
        sigma = exact_time(t, x).reshape(-1)
        denoised = self._ask(self.network, x, sigma)
        if self._factor == 1 or self.guide is None:
            return denoised
        lesser = self._ask(self.guide, x, sigma)
        return lesser + self._factor * (denoised - lesser)

    def _ask(self, network: Any, x: Tensor, sigma: Tensor) -> Tensor:
        if callable(round_sigma := getattr(network, "round_sigma", None)):
            sigma = torch.as_tensor(round_sigma(sigma))
        labels: Any = self.class_labels
        if labels is not None:
            if getattr(network, "label_dim", None) == 0:
                labels = None
            else:
                self.check_rows(len(x))
                labels = labels.to(x.device).expand(len(x), -1).clone()
        dtype = network_dtype(network) or x.dtype
        told = sigma.to(torch.float32).to(x.device).repeat(len(x) // len(sigma))
        # Copies: a network may scale its input, or its time, in place.
        return network(x.to(dtype, copy=True), told, labels).to(x.dtype)
