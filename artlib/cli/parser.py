"""The command ``artlib``: learn a schedule, look at it, compare it, hand it over.

What the exit status means is in `texts.STATUS`, which ``--help`` prints.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TextIO

from .._common.console import say
from .._common.version import __version__
from .texts import EXPORT, LEARN, MAIN, SOURCES, TUNE


class _Solvers:
    """Names of the solvers that take a grid, looked up when they are asked for.

    Nor is a command's module imported before it runs: each of them loads torch, which
    takes seconds that ``--help`` has not.
    """

    def __iter__(self) -> Iterator[str]:
        from ..solvers import SOLVERS

        return (name for name, kind in SOLVERS.items() if not kind.adaptive)

    def __contains__(self, name: object) -> bool:
        return name in list(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status, see the module. Errors of usage and ``--help`` leave by
        ``SystemExit``, as argparse does.
    """
    try:
        try:
            status = _run(_parser().parse_args(argv))
        finally:  # --help and errors of usage leave by SystemExit
            _flush()
    except BrokenPipeError:
        _leave()
        return 141
    except OSError as error:  # of the flush: what was printed did not arrive
        _leave()
        return _fail("", f"standard output: {_sentence(error)}", 1)
    return status


def _run(args: argparse.Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning(args.command)
            args.run(args)
    except KeyboardInterrupt:
        return _fail(args.command, _interrupted(args), 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        if args.debug:
            say("".join(traceback.format_exception(error)), error=True, end="")
        return _failed(args.command, error)
    return 0


def _failed(command: str, raised: Exception) -> int:
    """Say what went wrong; the exit status."""
    try:
        raise raised
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(command, _sentence(error), 2)
    except RuntimeError as error:
        return _fail(command, _sentence(error), 1)
    except Exception as error:  # of the user's own denoiser, as a rule
        return _fail(command, f"{type(error).__name__}: {_sentence(error)}", 1)


def _interrupted(args: argparse.Namespace) -> str:
    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint is not None and os.path.exists(checkpoint):
        return f"interrupted; the same command goes on from {checkpoint}"
    return "interrupted"


def _sentence(error: BaseException) -> str:
    """What an error says, and the place, if it is in the user's own module."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return f"{os.fsdecode(name)}: {error.strerror}" if name else error.strerror
    from .sources import place

    return f"{str(error) or type(error).__name__}{place(error)}"


def _show_warning(command: str) -> Callable[..., None]:
    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _tell(command, "warning", str(message))

    return show_warning


def _fail(command: str, message: str, status: int) -> int:
    _tell(command, "error", message)
    return status


def _tell(command: str, kind: str, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # one of several processes says it
        say(f"{f'artlib {command}'.strip()}: {kind}: {message}", error=True)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _leave() -> None:
    """Let the interpreter close its output without a word: nobody reads it."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # not a file
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="artlib", description=MAIN, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"artlib {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, runs: str, summary: str, text: str
    ) -> argparse.ArgumentParser:
        def run(args: argparse.Namespace) -> None:
            module, function = runs.split(".")
            getattr(import_module(f".{module}", __package__), function)(args)

        made = commands.add_parser(
            name, help=summary, description=text, formatter_class=raw
        )
        made.set_defaults(run=run)
        made.add_argument(
            "--debug", action="store_true", help="after an error, where it came from"
        )
        return made

    one = command("learn", "learn.learn", "learn a schedule", f"{LEARN}\n{SOURCES}")
    _add_source(one)
    one.add_argument(
        "-o",
        "--output",
        required=True,
        help="the schedule's file (JSON); - prints",
    )
    one.add_argument(
        "--method", choices=("closed", "rl"), default="closed", help="default: closed"
    )
    one.add_argument(
        "--average",
        choices=("open_loop", "paper"),
        default="open_loop",
        help="closed form: the optimum, or the mean of the paths' own clocks",
    )
    one.add_argument(
        "--solver",
        choices=_Solvers(),
        metavar="NAME",
        help="closed form: for this solver, the best of a few densities by the error "
        "that arrives; by default the paper's |Q|, and none is run; one of %(choices)s",
    )
    one.add_argument(
        "--weight",
        choices=("local",),
        help="with --solver: by the solver's own error where it is made, nothing run",
    )
    _add_samples(one, 64, "trajectories")
    one.add_argument(
        "--batch", type=_count, help="closed form: trajectories computed together (all)"
    )
    one.add_argument("--checkpoint", help="file to write on the way and to resume from")
    one.add_argument(
        "--points", type=_count, help="times on a path (64; 40 where densities are run)"
    )
    one.add_argument(
        "--budget", type=_count, help="at most so many network evaluations (batches)"
    )
    rl = one.add_argument_group("with --method rl")
    rl.add_argument("--iterations", type=_count, default=2000, help="(2000)")
    rl.add_argument("--steps", type=_count, default=18, help="steps of an episode (18)")
    rl.add_argument("--temperature", type=float, help="(0.02, less below 12 steps)")
    _add_common(one)

    one = command("tune", "tune.tune", "find the best sampler", f"{TUNE}\n{SOURCES}")
    _add_source(one)
    one.add_argument(
        "--nfe",
        type=_counts,
        required=True,
        help="network evaluations of a sample, or several: 5,8,10",
    )
    one.add_argument(
        "-o",
        "--output",
        required=True,
        help="the plan's file (JSON), with {nfe} in its name for several; - prints",
    )
    _add_samples(one, 96, "noises, half of them held out")
    one.add_argument("--batch", type=_count, help="noises computed together (all)")
    one.add_argument(
        "--seconds", type=float, help="no list or refinement begins later (no limit)"
    )
    one.add_argument(
        "--evaluations",
        type=_count,
        help="batched evaluations of one refinement, at most (300 runs)",
    )
    one.add_argument("--checkpoint", help="file that keeps each plan that is done")
    _add_common(one)

    one = command("show", "show.show", "print and draw schedules", SOURCES)
    one.add_argument("schedules", nargs="+", metavar="SCHEDULE")
    _add_steps(one, several=True, default=[10])
    one.add_argument(
        "--process",
        help="of formulas, for example ve:0.002,80; by default that of the files",
    )
    _add_json(one)
    one.add_argument("--plot", metavar="FILE", help="a figure: .png, .svg or .pdf")
    one.add_argument("--force", action="store_true", help="replace what is there")

    one = command(
        "compare", "commands.compare", "error against NFE on one flow", SOURCES
    )
    _add_source(one)
    one.add_argument("schedules", nargs="+", metavar="SCHEDULE")
    _add_steps(one, several=True, default=[5, 10, 20])
    _add_solver(one)
    _add_samples(one, 64, "samples per seed")
    one.add_argument("--seeds", type=_count, default=3, help="how many (3)")
    _add_json(one)
    _add_common(one, writes=False)

    one = command("export", "export.export", "hand a schedule to a framework", EXPORT)
    one.add_argument("schedule", metavar="SCHEDULE", help="a file of artlib learn")
    one.add_argument(
        "--to",
        required=True,
        choices=("text", "json", "k-diffusion", "diffusers", "comfyui"),
    )
    _add_steps(one, several=False, default=None)
    one.add_argument("-o", "--output", help="a file (- prints), for comfyui a folder")
    one.add_argument(
        "--denoise", type=float, default=1.0, help="image-to-image: share of the way"
    )
    one.add_argument("--scheduler", metavar="FOLDER", help="diffusers: its settings")
    one.add_argument("--mu", type=float, help="diffusers: of a dynamic shift")
    one.add_argument("--name", help="comfyui: name in the node's list")
    one.add_argument("--force", action="store_true", help="replace what is there")

    one = command("sample", "commands.draw", "sample with a schedule or plan", SOURCES)
    _add_source(one)
    one.add_argument(
        "schedule", metavar="SCHEDULE", help="or a plan, whose steps and solver hold"
    )
    _add_steps(one, several=False, default=10)
    _add_solver(one)
    _add_samples(one, 16, "samples")
    one.add_argument(
        "-o", "--output", required=True, help="a .safetensors file, a .png, or -"
    )
    _add_common(one)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--process", help="ve:MIN,MAX, vp:MIN,MAX or rf:MIN,MAX")
    parser.add_argument("--shape", type=_shape, help="of one sample, such as 3,32,32")
    group = parser.add_argument_group("with a diffusers folder")
    group.add_argument("--class-label", type=int, help="the class to condition on")
    group.add_argument("--condition", metavar="FILE", help="arguments, safetensors")
    group.add_argument("--guidance", type=float, default=1.0, help="its factor (1)")
    group.add_argument(
        "--guidance-rescale", type=float, default=0.0, help="its rescaled share (0)"
    )
    group.add_argument(
        "--timestep-scale",
        type=float,
        help="what the network is told of the time, in units of the scheduler's: 1e-3 "
        "for one like Flux that is not known here",
    )


def _add_samples(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument(
        "-n", "--samples", type=_count, default=default, help=f"{what} ({default})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")


def _add_steps(
    parser: argparse.ArgumentParser, *, several: bool, default: object
) -> None:
    parser.add_argument(
        "-K",
        "--steps",
        type=_counts if several else _count,
        default=default,
        help="number of steps" + (", or several: 5,10,20" if several else ""),
    )


def _add_solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solver",
        choices=_Solvers(),
        metavar="NAME",
        default="euler",
        help="default: euler; one of %(choices)s",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table"
    )


def _add_common(parser: argparse.ArgumentParser, *, writes: bool = True) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (auto)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    if writes:
        parser.add_argument(
            "--force", action="store_true", help="replace what is there"
        )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_counts(text))
