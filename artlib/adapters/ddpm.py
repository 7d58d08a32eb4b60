r"""A network of one's own, trained on a table of steps: DDPM, and all after it.

Such a network was trained at T steps with a table :math:`\bar\alpha_i` and is called as
``network(x, i, **condition)``, with one step per sample, ``i`` of shape [N]. The steps
have noise levels :math:`s_i = \sqrt{(1 - \bar\alpha_i) / \bar\alpha_i}`; the process is
`VE` from the last to the first, for that is where samplers step (DDIM is Euler there).
Between the levels the step is a fraction, linear in :math:`\log s`.

A whole example, with classes, classifier-free guidance and float32::

    import torch

    import artlib
    from artlib.adapters import ddpm


    class Network(torch.nn.Module):  # in place of yours, trained to predict the noise
        def __init__(self):
            super().__init__()
            self.classes = torch.nn.Embedding(11, 16)  # ten, and one for "none"
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(2 + 1 + 16, 64),
                torch.nn.SiLU(),
                torch.nn.Linear(64, 2),
            )

        def forward(self, x, step, label):  # [N, 2], [N], [N]
            told = [x, step[:, None] / 1000, self.classes(label)]
            return self.layers(torch.cat(told, dim=1))


    network = Network().eval()
    betas = torch.linspace(1e-4, 0.02, 1000)
    labels = torch.arange(10).repeat(8)  # one for each sample
    net = ddpm.denoiser(
        network,
        torch.cumprod(1 - betas, dim=0),
        condition={"label": labels},
        unconditional={"label": torch.tensor([10])},
        guidance=3.0,
    )
    flow = artlib.ProbabilityFlow(net.process, net)
    x_T = net.process.t_max * torch.randn(80, 2)
    schedule = artlib.art(flow, x_T)
    x_0 = artlib.sample(flow, x_T, schedule.grid(10), solver="dpmpp_2m")
    print(x_0.dtype, tuple(x_0.shape), [round(t, 2) for t in schedule.grid(5).tolist()])

With other noise come other labels: the denoiser belongs to these 80 samples, or to a
part of them (``batch=``). One label for all is a condition of one row.

References:
    Ho et al., https://arxiv.org/abs/2006.11239; Salimans and Ho,
    https://arxiv.org/abs/2202.00512 (v-prediction).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from .._common.checks import got, real_tensor
from ..flow.denoisers import network_dtype
from ..flow.processes import VE
from .diffusers.guidance import Condition, Guidance, GuidedDenoiser, without_variance
from .diffusers.model import OfTable
from .diffusers.times import Steps, levels_of

__all__ = ["DDPMDenoiser", "Predicts", "denoiser"]

Predicts: TypeAlias = Literal["epsilon", "v_prediction", "sample"]
"""What a network predicts, in the words of diffusers."""


def denoiser(
    network: Callable[..., Any],
    alphas_cumprod: Tensor,
    *,
    predicts: Predicts = "epsilon",
    integers: bool = False,
    condition: Condition | None = None,
    unconditional: Condition | None = None,
    guidance: float = 1.0,
    guidance_rescale: float = 0.0,
    together: bool = True,
    shared: Collection[str] = (),
) -> DDPMDenoiser:
    r"""A denoiser D(x, t), t the noise level, from a network trained on a table.

    Args:
        network: Called as ``network(x, step, **condition)`` with x [N, *shape] of
            variance 1 in its own dtype, ``step`` [N] in float32, counted from 0; it
            returns a tensor, or a tuple with it in front. A module of half precision,
            in channels-last or from ``torch.compile`` is called as it is. If it also
            predicts a variance, that half of its channels is cut off.
        alphas_cumprod: :math:`\bar\alpha` of the training steps [T], descending from
            below 1; a last one of 0 (no signal left) counts as :math:`2^{-24}`.
        predicts: ``"epsilon"``, the noise; ``"v_prediction"``,
            :math:`\sqrt{\bar\alpha}\epsilon - \sqrt{1 - \bar\alpha}x_0`; ``"sample"``,
            :math:`x_0`.
        integers: Whether the network takes whole steps only (an embedding table). Then
            it is asked at both neighbours of a step, in one call on a doubled batch
            of int64 steps, and answers between them are interpolated. It counts as one
            evaluation.
        condition: Further arguments, with one row or one per sample; as
            `artlib.adapters.diffusers.denoiser` has them.
        unconditional: The same without the condition; needed for guidance.
        guidance: Factor of classifier-free guidance, 1 is none.
        guidance_rescale: Share in [0, 1] in which a guided prediction is scaled back
            to the standard deviation of the conditional one.
        together: Whether the answers with and without the condition are asked for in
            one call on a doubled batch.
        shared: Names, at any depth, of conditions that samples share.

    Raises:
        TypeError: If ``network`` is not callable or ``alphas_cumprod`` no list of
            numbers.
        ValueError: If the table is none, ``predicts`` is unknown, or the guidance lacks
            a condition.
    """
    if not callable(network):
        raise TypeError(
            f"network: expected a callable network(x, step, ...), got {got(network)}; "
            "the network comes before its table"
        )
    if not isinstance(predicts, str) or predicts not in get_args(Predicts):
        raise ValueError(
            f"predicts: expected one of {get_args(Predicts)}, got {predicts!r}; for a "
            "score or a velocity see artlib.from_score and artlib.from_velocity"
        )
    guide = Guidance(
        condition,
        unconditional,
        guidance,
        rescale=guidance_rescale,
        together=together,
        shared=shared,
    )
    levels = _levels(alphas_cumprod, predicts)
    return DDPMDenoiser(network, levels, predicts, bool(integers), guide)


class DDPMDenoiser(GuidedDenoiser):
    """What `denoiser` returns.

    Args:
        network: Called as ``network(x, step, **condition)`` with x [N, *shape] of
            variance 1 and ``step`` [N], counted from 0.
        levels: Noise levels of the training steps, ascending [T].
        predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        integers: Whether the network takes whole steps only.
        guide: How the network is called under its condition.

    Attributes:
        process: `VE` over the table's noise levels.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        levels: np.ndarray,
        predicts: str,
        integers: bool,
        guide: Guidance,
    ) -> None:
        process = VE(float(levels[0]), float(levels[-1]))
        super().__init__(network, process, OfTable(predicts, Steps(levels)), guide)
        self._integers = integers
        self._last = len(levels) - 1

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's answer in the dtype of ``x``, at fractional steps ``t``."""
        state = x.to(network_dtype(self.network) or x.dtype)
        step = t.to(torch.float32).to(x.device).reshape(-1).expand(len(x))
        return self._guide(self._call, state, step).to(x.dtype)

    def _call(self, x: Tensor, step: Tensor, **condition: Any) -> Tensor:
        if not self._integers:
            return self._ask_at(x, step, condition)
        low = step.detach().floor().clamp(0, self._last - 1)
        both = torch.cat([low, low + 1]).to(torch.int64)
        twice = self._guide.doubled(condition)
        lower, upper = self._ask_at(torch.cat([x, x]), both, twice).chunk(2)
        share = (step - low).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return lower + share * (upper - lower)

    def _ask_at(self, x: Tensor, step: Tensor, condition: dict[str, Any]) -> Tensor:
        state, cast = self._given(x, condition)
        # A copy: a network may scale its time in place.
        answer: Any = self.network(state, step.clone(), **cast)
        if isinstance(answer, tuple | list):
            answer = answer[0]
        if not isinstance(answer, Tensor):
            raise TypeError(
                f"network: expected it to return a tensor, got {got(answer)}; wrap it "
                "in a function that does"
            )
        return without_variance(answer, x)


def _levels(alphas_cumprod: Any, predicts: str) -> np.ndarray:
    """The noise levels of a table, checked."""
    table = real_tensor(alphas_cumprod, "alphas_cumprod").cpu().numpy()
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(
            f"alphas_cumprod: expected a list [T] of at least two training steps, got "
            f"shape {list(table.shape)}"
        )
    if predicts == "epsilon" and table[-1] == 0:
        raise ValueError(
            "alphas_cumprod: no signal is left at the last step, where the noise says "
            "nothing about the sample; such networks predict v: "
            "predicts='v_prediction'"
        )
    return levels_of(
        table,
        "alphas_cumprod",
        "so it is no table of cumulative products of 1 - beta, beginning with the "
        "least noise; torch.cumprod(1 - betas, dim=0) makes one",
    )
