"""Schedules by their names on the command line: files, formulas, standard input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..flow.processes import Process
from ..schedules import file
from ..schedules.constructors import Schedule
from ..schedules.plan import Plan
from ..schedules.shared import FILE, PLAN_FILE
from .formulas import FORMULAS, formula
from .sources import STDOUT, InputError

STDIN = STDOUT
"""In place of a schedule's name: standard input."""

_Read = TypeVar("_Read", Schedule, Plan | Schedule)

_SIZE = 1 << 26
"""Bytes of a schedule on standard input, at most; those of artlib have some 30,000."""


def load_schedule(name: str, process: Process | None = None) -> Schedule:
    """A schedule from a file or standard input, or by the name of a formula.

    Args:
        name: Path of a file or of a folder with one, `STDIN`, or one of `FORMULAS`.
        process: For which a formula is to be made.

    Raises:
        InputError: If it is none of these.
        ScheduleFormatError: If what is read is damaged or foreign.
    """
    if name == STDIN:
        return Schedule.from_json(_read(), source="standard input")
    if _is_stored(name):
        if os.path.isdir(name):
            return Schedule.from_pretrained(name)
        return Schedule.load(name)
    if name in FORMULAS and process is not None:
        return formula(name, process)
    if name in FORMULAS:
        raise InputError(
            f"{name}: there is no such file, and as a formula it needs a process: pass "
            "--process, for example ve:0.002,80"
        )
    if os.path.exists(name):
        raise InputError(f"{name}: is no file; expected one that artlib learn wrote")
    raise InputError(
        f"{name}: there is no such file, and no name of a formula "
        f"({', '.join(FORMULAS)})"
    )


def load_plan_or_schedule(name: str, process: Process | None = None) -> Plan | Schedule:
    """A plan from a file or folder, or else a schedule as in `load_schedule`.

    Args:
        name: Path of a file or of a folder with one, `STDIN`, or one of `FORMULAS`. In
            a folder with both, the schedule is meant.
        process: For which a formula is to be made.

    Raises:
        InputError: If it is none of these.
        ScheduleFormatError: If what is read is damaged or foreign.
    """
    if name == STDIN:
        text = _read()
        kind = Plan if _is_plan(text) else Schedule
        return kind.from_json(text, source="standard input")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, FILE)):
        if os.path.isfile(os.path.join(name, PLAN_FILE)):
            return Plan.from_pretrained(name)
    elif os.path.isfile(name) and _is_plan(file.read_text(name)):
        return Plan.load(name)
    return load_schedule(name, process)


def _is_plan(text: str) -> bool:
    return f'"{file.PLAN.name}"' in text[:100]


def load_schedules(
    names: Sequence[str], process: Process | None = None
) -> dict[str, Schedule]:
    """Several schedules, by labels that tell them apart; as `load_all`, and no plans.

    Raises:
        ScheduleFormatError: If one is a plan.
    """
    return _loaded(names, process, load_schedule)


def load_all(
    names: Sequence[str], process: Process | None = None
) -> dict[str, Plan | Schedule]:
    """Several schedules and plans, by labels that tell them apart.

    Args:
        names: As in `load_schedule`.
        process: For which formulas are made; by default that of the files beside them.

    Returns:
        The schedules in order, those of files by the files' names without folder and
        ending, or as given where two of those coincide.

    Raises:
        InputError: As in `load_schedule`, or if formulas stand beside files of more
            than one process.
    """
    return _loaded(names, process, load_plan_or_schedule)


def _loaded(
    names: Sequence[str],
    process: Process | None,
    load: Callable[[str, Process | None], _Read],
) -> dict[str, _Read]:
    if list(names).count(STDIN) > 1:
        raise InputError("-: standard input can be read once; save it to a file")
    formulas = [n for n in names if n != STDIN and not _is_stored(n)]
    found = {n: load(n, None) for n in names if n not in formulas}
    if process is None and formulas:
        own = list(dict.fromkeys(stored.process for stored in found.values()))
        if len(own) > 1:
            raise InputError(
                f"{formulas[0]}: the files beside it are made for {len(own)} "
                f"processes, {own[0]} and {own[1]}; pass --process"
            )
        process = own[0] if own else None
    found |= {n: load(n, process) for n in formulas}
    labels = _labels(names)
    return {labels[name]: found[name] for name in names}


def _labels(names: Sequence[str]) -> dict[str, str]:
    """What to call schedules: short names where they tell them apart."""
    short = {n: Path(n).stem if _is_stored(n) else n for n in names}
    if STDIN in short:
        short[STDIN] = "standard input"
    return short if len(set(short.values())) == len(short) else {n: n for n in names}


def _is_stored(name: str) -> bool:
    """Whether it is a file, or the folder of a schedule or a plan."""
    places = (os.path.join(name, kept) for kept in (FILE, PLAN_FILE))
    return os.path.isfile(name) or any(map(os.path.isfile, places))


def _read() -> str:
    """The text on standard input.

    Raises:
        InputError: If there is none, or more than a schedule has.
    """
    if sys.stdin is None:
        raise InputError("-: there is no standard input here; name a file")
    text = sys.stdin.read(_SIZE + 1)
    if len(text) > _SIZE:
        raise InputError("-: standard input holds more than a schedule; name a file")
    return text
