"""Hugging Face diffusers: schedules into schedulers, networks into denoisers.

Three lines: a denoiser of the pipeline's own network, a schedule of it, and the
pipeline's scheduler set to that schedule::

    denoiser = artlib.adapters.diffusers.denoiser(pipe.unet, pipe.scheduler)
    schedule = artlib.art(artlib.ProbabilityFlow(denoiser.process, denoiser), x_T)
    schedule.to_diffusers(pipe.scheduler, 10)      # then pipe(num_inference_steps=10)

diffusers itself is not imported here: all of it works on the objects that are given.
"""

from ..._common.errors import ExportError
from .export import pipeline_arguments, release, to_diffusers
from .hook import Hooks, tell_network
from .model import DiffusersDenoiser, denoiser, scheduler_process
from .rules import schedulers

__all__ = [
    "DiffusersDenoiser",
    "ExportError",
    "Hooks",
    "denoiser",
    "pipeline_arguments",
    "release",
    "scheduler_process",
    "schedulers",
    "tell_network",
    "to_diffusers",
]
