"""The command ``artlib tune``: the best sampler at a number of evaluations."""

from __future__ import annotations

import argparse

from .._common.console import say
from ..tuning import tune as search
from ..tuning import tuning_report
from .sources import STDOUT, InputError, check_free, deliver
from .surroundings import hidden, source_of


def tune(args: argparse.Namespace) -> None:
    """Find plans and write them, with a report of what was tried."""
    paths = {nfe: _path(args.output, nfe, len(args.nfe)) for nfe in args.nfe}
    for path in paths.values():
        check_free(path, args.force)
    source = source_of(args, None)
    plans = search(
        source.flow,
        source.noise(args.samples, args.seed),
        nfe=args.nfe,
        seconds=args.seconds,
        evaluations=args.evaluations,
        batch=args.batch,
        file=args.checkpoint,
        progress=not hidden(args),
    )
    for plan, path in zip(plans, paths.values(), strict=True):
        deliver(path, plan.to_json())
        where = "standard output" if path == STDOUT else path
        say(f"{tuning_report(plan)}\nwritten to {where}\n", error=path == STDOUT)


def _path(output: str, nfe: int, count: int) -> str:
    """The file of the plan for a number of evaluations."""
    if count == 1:
        return output
    if "{nfe}" not in output:
        raise InputError(
            f"--output: {count} plans need a file each; put {{nfe}} into the name, as "
            "in plan-{nfe}.json"
        )
    return output.replace("{nfe}", str(nfe))
