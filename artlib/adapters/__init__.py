"""Where schedules meet the frameworks that sample with them.

| module | to and from |
| --- | --- |
| `artlib.adapters.diffusers` | schedulers and networks of Hugging Face diffusers |
| `artlib.adapters.k_diffusion` | k-diffusion, ComfyUI and all that takes its sigmas |
| `artlib.adapters.comfyui` | a node for ComfyUI, with a schedule beside it |
| `artlib.adapters.ddpm` | your own network, trained on a table of steps (example) |
| `artlib.adapters.nvlabs` | networks called as ``net(x, sigma, class_labels)`` |

`told` wraps the network of a sampler of k-diffusion or of the EDM family, so that it is
told the levels of an `artlib.Plan`. `inpainting` keeps what is known of a sample, with
any of their networks.

None imports its framework: they work on the objects they are given. So that a damaged
grid never reaches a sampler, an export either is exact to 1e-5 or raises `ExportError`.
"""

from .._common.errors import ExportError
from . import comfyui, ddpm, diffusers, k_diffusion, nvlabs
from .inpainting import InpaintingDenoiser, inpainting
from .told_model import ToldModel, told

__all__ = [
    "ExportError",
    "InpaintingDenoiser",
    "ToldModel",
    "comfyui",
    "ddpm",
    "diffusers",
    "inpainting",
    "k_diffusion",
    "nvlabs",
    "told",
]
