"""What tests of whole pipelines of diffusers share: small parts, and what to expect.

Whoever imports this is skipped where diffusers or transformers are missing.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import artlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers", reason="no diffusers")
transformers = pytest.importorskip("transformers", reason="no transformers")
# It says at import that an image processor would rather have torchvision.
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_vae(channels: int = 4) -> Any:
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
    ).eval()


def ours(net: Any, schedule: artlib.Schedule, x: Tensor, K: int, solver: str) -> Tensor:
    """What `artlib.sample` makes of noise of size 1."""
    flow = artlib.ProbabilityFlow(net.process, net)
    grid = schedule.grid(K)
    return artlib.sample(flow, x * float(grid[0]), grid, solver=solver)
