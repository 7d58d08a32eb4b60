"""A bar beside cells that take long, where a person sits in front of them.

It shows how long a cell has been running, once that is over five seconds, and how long
it took when the chapters were last timed (``make status``), if it was over five seconds
then. When the cell is done the bar is gone. Where notebooks are executed by a program
(``make notebooks``, nbval) there is none, so that stored outputs do not depend on it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

AFTER = 5.0
"""Seconds of a cell without a bar."""

EVERY = 1.0
"""Seconds between two states of a bar."""

_RECORDED = "cell-seconds"


def watch() -> None:
    """From now on show a bar beside every cell of this kernel that takes long.

    No effect outside of an interactive notebook, where ``ARTLIB_PROGRESS`` is 0, and
    when called again.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not _interactive(shell) or hasattr(shell, "_artlib_watch"):
        return
    shell._artlib_watch = watcher = Watcher(_display, _seconds())
    shell.events.register(
        "pre_run_cell", lambda info: watcher.start(getattr(info, "cell_id", None))
    )
    shell.events.register("post_run_cell", lambda result: watcher.stop())


def _interactive(shell: Any) -> bool:
    """Whether a person has the notebook open: Jupyter's server, Colab or VS Code."""
    if os.environ.get("ARTLIB_PROGRESS") == "0" or not hasattr(shell, "kernel"):
        return False
    return (
        "JPY_SESSION_NAME" in os.environ
        or "google.colab" in sys.modules
        or "__vsc_ipynb_file__" in shell.user_ns
    )


def _seconds() -> dict[str, float]:
    """Seconds of the cells that took long, by id, as far as they were recorded."""
    from .results import load_results

    try:
        return dict(load_results(_RECORDED)["results"])
    except (FileNotFoundError, ValueError):
        return {}


def _display() -> Callable[[dict[str, str]], None]:
    """A place under the running cell, and how to change what it shows."""
    from IPython.display import DisplayHandle

    handle = DisplayHandle()
    handle.display({"text/plain": ""}, raw=True)
    return lambda data: handle.update(data, raw=True)


class Watcher:
    """The bar of one kernel.

    Args:
        show: Makes a place for a bar; called when a cell has run for `AFTER` seconds.
        expected: Seconds of cells by id.
        after: See `AFTER`.
        every: See `EVERY`.
    """

    def __init__(
        self,
        show: Callable[[], Callable[[dict[str, str]], None]],
        expected: Mapping[str, float],
        *,
        after: float = AFTER,
        every: float = EVERY,
    ) -> None:
        self._show = show
        self._expected = expected
        self._after = after
        self._every = every
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, cell_id: str | None) -> None:
        """A cell begins to run."""
        self.stop()
        self._done = threading.Event()
        expected = self._expected.get(cell_id or "")
        self._thread = threading.Thread(
            target=self._run, args=(self._done, expected), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """The cell is done: no bar is left."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, done: threading.Event, expected: float | None) -> None:
        begin = time.monotonic()
        if done.wait(self._after):
            return
        change = self._show()
        while True:
            change(bar(time.monotonic() - begin, expected))
            if done.wait(self._every):
                change({"text/plain": "", "text/html": ""})
                return


def bar(seconds: float, expected: float | None) -> dict[str, str]:
    """The state of a bar, for a page and as text."""
    text = f"{seconds:.0f} s"
    if expected is None:
        return {"text/plain": text, "text/html": f"<progress></progress> {text}"}
    share = min(seconds / expected, 1.0)
    text += f" of about {expected:.0f} s"
    drawn = round(20 * share)
    return {
        "text/plain": f"[{'#' * drawn}{'.' * (20 - drawn)}] {text}",
        "text/html": f'<progress value="{share:.2f}" max="1"></progress> {text}',
    }
