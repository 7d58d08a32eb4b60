"""The bar beside a long cell: when it is there, what it says, and that it goes."""

import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from artlib.book.progress import Watcher, _interactive, bar


class Places:
    """Where bars are shown, and what they showed."""

    def __init__(self) -> None:
        self.states: list[list[dict[str, str]]] = []
        self.seen = threading.Event()

    def __call__(self):
        states: list[dict[str, str]] = []
        self.states.append(states)

        def change(data: dict[str, str]) -> None:
            states.append(data)
            self.seen.set()

        return change


def test_a_short_cell_has_no_bar() -> None:
    places = Places()
    watcher = Watcher(places, {}, after=60.0)
    watcher.start("a")
    watcher.stop()
    watcher.stop()
    assert places.states == []


def test_a_long_cell_has_one_until_it_is_done() -> None:
    places = Places()
    watcher = Watcher(places, {"a": 40.0}, after=0.0, every=0.01)
    watcher.start("a")
    assert places.seen.wait(10)
    watcher.stop()
    (states,) = places.states
    assert "of about 40 s" in states[0]["text/plain"]
    assert states[-1] == {"text/plain": "", "text/html": ""}
    count = len(states)
    time.sleep(0.05)
    assert len(states) == count, "nothing is shown after the cell"


@pytest.mark.parametrize(
    ("seconds", "expected", "text"),
    [
        (7.4, None, "7 s"),
        (10.0, 20.0, "[##########..........] 10 s of about 20 s"),
        (30.0, 20.0, "[####################] 30 s of about 20 s"),
    ],
)
def test_bar_says_how_far(seconds: float, expected: float | None, text: str) -> None:
    assert bar(seconds, expected)["text/plain"] == text


def test_only_where_a_person_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = SimpleNamespace(kernel=None, user_ns={})
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert not _interactive(shell), "a program executes the notebook"
    monkeypatch.setenv("JPY_SESSION_NAME", "chapter.ipynb")
    assert _interactive(shell)
    monkeypatch.setenv("ARTLIB_PROGRESS", "0")
    assert not _interactive(shell)
    assert os.environ["ARTLIB_PROGRESS"] == "0"
