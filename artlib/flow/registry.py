"""The processes that schedule files may name, and how one is rebuilt from a file."""

from __future__ import annotations

import inspect
import json
from typing import Any, TypeVar

from .._common.checks import got, printable
from .process import Process, check_process

P = TypeVar("P", bound=Process)

_PROCESSES: dict[str, type[Process]] = {}
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class UnknownProcessError(ValueError):
    """A file is of a process that this program does not know."""


def register_process(cls: type[P]) -> type[P]:
    """Let schedules of your own process be loaded; a decorator of its class.

    ::

        @artlib.register_process
        @dataclass(frozen=True)
        class Cosine(artlib.Process):
            name: ClassVar[str] = "cosine"
            t_min: float = 1e-3
            t_max: float = 0.99
            ...

    A file holds the name and the parameters only, never code: the class has to be
    registered before the file is loaded, in every program that loads it.

    Args:
        cls: A concrete subclass of `Process`, whose ``to_dict`` gives its ``name`` and
            the arguments that make it again.

    Returns:
        The class itself.

    Raises:
        TypeError: If it is no concrete subclass of `Process` with a ``name``.
        ValueError: If the name belongs to another class, or a process would not be the
            same after saving and loading. Running the definition of a class again, as
            in a notebook, replaces the older one.
    """
    if not (isinstance(cls, type) and issubclass(cls, Process)):
        raise TypeError(
            f"cls: expected a subclass of artlib.Process, got {got(cls)}; pass the "
            "class, not an instance"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"cls: {cls.__name__} is abstract; define {missing}")
    name = printable(getattr(cls, "name", None), f"{cls.__name__}.name")
    known = _PROCESSES.get(name)
    if not name or (known is not None and not _redefines(cls, known)):
        whose = f"belongs to {known.__qualname__}" if known else "is empty"
        raise ValueError(
            f"{cls.__name__}.name: {name!r} {whose}; choose a name of its own"
        )
    if cls.__hash__ is None:
        raise ValueError(
            f"cls: {cls.__name__} has no hash; decorate it with "
            "@dataclass(frozen=True), below @artlib.register_process"
        )
    arguments = inspect.signature(cls).parameters.values()
    if all(a.default is not a.empty or a.kind in _STARRED for a in arguments):
        _check_round_trip(cls())  # of others when one is saved
    _PROCESSES[name] = cls
    return cls


def process_from_dict(data: dict[str, Any]) -> Process:
    """Rebuild a process from `Process.to_dict`.

    Args:
        data: ``{"name": ..., parameter: value, ...}``.

    Raises:
        ValueError: If the name is unknown, or the parameters do not fit it.
    """
    if not isinstance(data, dict):
        raise ValueError(f"process: expected an object, got {type(data).__name__}")
    name = data.get("name")
    if not isinstance(name, str) or name not in _PROCESSES:
        raise UnknownProcessError(
            f"process: unknown name {name!r}; known are {sorted(_PROCESSES)}. One of "
            "your own has to be registered before (artlib.register_process), or given "
            "to Schedule.load as process="
        )
    return _rebuild(_PROCESSES[name], data)


def saved_process(process: Process) -> dict[str, Any]:
    """`Process.to_dict`, once it is certain that it gives the same process back.

    Raises:
        TypeError: If a parameter has no JSON form, or the class is no dataclass.
        ValueError: If the process would be another one after loading.
    """
    _check_round_trip(check_process(process))
    return process.to_dict()


def same_process(process: Process, data: Any) -> Process:
    """``process`` itself, if ``data`` of a file describes it.

    Raises:
        TypeError: If it is no process.
        ValueError: If the file was made for another one.
    """
    own = json.loads(json.dumps(check_process(process).to_dict()))
    if data != own:
        raise UnknownProcessError(
            f"process: the file was made for {data}, got {own}; load it without "
            "process=, or pass the process that it was made for"
        )
    return process


def _rebuild(cls: type[Process], data: dict[str, Any]) -> Process:
    parameters = {key: value for key, value in data.items() if key != "name"}
    try:
        return cls(**parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"process: parameters do not fit {data['name']!r}: {error}"
        ) from error


def _check_round_trip(process: Process) -> None:
    """Refuse to save what would be lost or come back as something else."""
    cls = type(process)
    data = process.to_dict()
    try:
        again = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"process: {cls.__name__} has a parameter without JSON form ({error}); use "
            "numbers, text and lists, or give it a to_dict of its own"
        ) from error
    known = _PROCESSES.get(process.name, cls)
    if again.get("name") != process.name or not _redefines(cls, known):
        raise ValueError(
            f"process: {cls.__name__} would be loaded as {again.get('name')!r}, which "
            "is another process; give the class a name of its own"
        )
    try:
        same = _rebuild(cls, again) == process
    except ValueError as error:
        same, again = False, f"{again} ({error})"
    if not same:
        raise ValueError(
            f"process: {cls.__name__} is not the same when made again from its "
            f"to_dict, {again}; let to_dict give every argument, and decorate the "
            "class with @dataclass(frozen=True)"
        )


def _redefines(cls: type[Process], known: type[Process]) -> bool:
    """Whether it is the same class, or its definition was run again (a notebook)."""
    place = (cls.__module__, cls.__qualname__)
    again = place == (known.__module__, known.__qualname__)
    return cls is known or (again and "<locals>" not in cls.__qualname__)
