"""Errors that more than one room raises."""


class ScheduleFormatError(ValueError):
    """A schedule file that cannot be used; the message names it and the remedy."""


class ExportError(ValueError):
    """A schedule cannot be exported unharmed; the message says why, and what to do."""


class TrainingError(RuntimeError):
    """Training cannot go on; the trainer is as it was before the failed iteration."""


class PausedError(RuntimeError):
    """The time given is over: what is done is in a file, and the same call goes on."""
