"""What ``--help`` says."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from .formulas import FORMULAS


def wrapped(names: Iterable[str]) -> str:
    """Names in lines of a help text."""
    return textwrap.fill(
        ", ".join(names),
        width=88,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


STATUS = """\
Exit status:
  0    done
  1    the computation failed on the way
  2    the command line, or what it names, cannot be used: the message says what came,
       what was expected and what to do
  130  interrupted (Ctrl-C); nothing half-written is left, and what learn --checkpoint
       has done is kept: the same command goes on from there
  141  whoever read the output has closed it
"""
"""What the program says by its exit status."""

TUNE = """\
Every solver on every untrained schedule, from the same noise; the best pairs told other
noise levels, and refined by gradient; judged on noise that none of it has seen. Writes
a plan (nodes, told levels, solver) and says what was tried and whether the winner's
lead is resolved:

  artlib tune fashion-base --nfe 8 -o plan.json
  artlib sample fashion-base plan.json -o x.png
"""

SOURCES = f"""\
A SOURCE is a network to take steps for:
  fashion-base          a network of artlib's zoo, by name
  path/to/pipeline      a folder that pipe.save_pretrained(...) of diffusers wrote
  mymodule:make         a denoiser D(x, t), or a function without arguments that makes
                        one; its attributes .process and .sample_shape say the rest,
                        or --process and --shape do
Nothing is downloaded, and nothing is unpickled.

A SCHEDULE is a file written by "artlib learn", a folder that schedule.save_pretrained
wrote, - for one on standard input, or a formula by name, for the process of the source
or of the files beside it (show, export and sample take plans of "artlib tune" too):
{wrapped(FORMULAS)}
(ays-... are published lists, each for the model that it names.)
"""

MAIN = f"""\
Where should a diffusion sampler spend its steps? Ask the model, once:

  artlib learn fashion-base -o s.json          closed form: a minute, one file
  artlib tune fashion-base --nfe 8 -o p.json   the best sampler for 8 evaluations
  artlib show s.json -K 10                     where ten steps fall
  artlib compare fashion-base s.json edm-unpinned -K 5,10,20
                                               error against NFE, matched noise
  artlib export s.json --to k-diffusion -K 10  the list for your sampler
  artlib sample fashion-base s.json -K 10 -o x.safetensors

{SOURCES}
"artlib COMMAND --help" explains each command. Several GPUs:
  accelerate launch -m artlib.cli learn SOURCE -o s.json

{STATUS}"""

LEARN = """\
Integrates reference paths from noise to data, measures how sharply they bend, and puts
the steps where bending is dear. The default, the closed form, is done after that; with
--method rl the paper's actor-critic is trained on the same table.

  artlib learn mymodule:make -o s.json --process ve:0.002,80 --shape 3,32,32
  artlib learn path/to/pipeline -o s.json --class-label 3
  artlib learn path/to/sd -o s.json --condition prompts.safetensors --guidance 7.5
  artlib learn fashion-base -o s.json --solver dpmpp_2m
  artlib learn fashion-base -o s.json --method rl --checkpoint run.safetensors

With --solver a few densities are run at 5, 10 and 20 evaluations, as artlib.art does,
and the one that is least behind is written; --weight local measures the solver's own
error along the paths instead, and goes with --budget and --checkpoint.

A condition file holds further arguments of the network, one row each or one per sample,
for example encoder_hidden_states and unconditional.encoder_hidden_states.

With --checkpoint an interrupted run, given again, goes on where it was: the closed form
with the trajectories that are left (it takes them in eight batches, or as --batch
says), the actor-critic with its next iteration.
"""

EXPORT = """\
  --to text          [80.0, ..., 0.0]: Python, JSON and most else
  --to k-diffusion   the same as a line of PyTorch
  --to json          times and sigmas with the process they belong to
  --to diffusers     the argument of pipe(...), with the scheduler's own shift, ramp and
                     final zero undone; needs --scheduler
  --to comfyui       a folder for ComfyUI/custom_nodes, for any number of steps
SCHEDULE may be a plan. Its nodes alone are its grid if it is honest; one that tells the
network other levels goes --to comfyui only, where a node tells them.
"""
