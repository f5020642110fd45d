"""Progress: items pass unchanged, and what a user sees depends on where the output goes."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sophq_func.core import progress
from sophq_func.core.progress import shown


class Clock:
    """Each look at it takes one second."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


class Notebook:
    """The part of IPython that shows things; all that was shown, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: object) -> None:
        self.shown: list[dict[str, str]] = []
        shell = SimpleNamespace(kernel=kernel)
        display = SimpleNamespace(display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell, display=display))
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        self.shown.append(bundle)
        return SimpleNamespace(update=lambda bundle, raw: self.shown.append(bundle))

    def lines(self) -> list[str]:
        return [bundle["text/plain"] for bundle in self.shown]


def test_a_notebook_shows_one_line_that_is_updated(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    notebook = Notebook(monkeypatch, kernel=object())
    assert list(shown(["a", "b"], "calibrate", True)) == ["a", "b"]
    assert notebook.lines() == [
        "calibrate: 0 of 2, 0.0 s",
        "calibrate: 1 of 2, 1.0 s",
        "calibrate: 2 of 2, 2.0 s",
        "calibrate: 2 of 2, 3.0 s",
    ]
    assert '<progress value="1" max="2">' in notebook.shown[1]["text/html"]


def test_a_notebook_is_not_updated_at_each_of_many_items(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch, kernel=object())
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    assert sum(shown((i for i in range(1000)), "sweep", True)) == 499500
    assert notebook.lines() == ["sweep: 0, 0.0 s", "sweep: 1000, 0.0 s"]
    assert "<progress" not in notebook.shown[-1]["text/html"]


def test_a_loop_that_ends_early_leaves_what_was_done(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    notebook = Notebook(monkeypatch, kernel=object())

    def broken() -> Iterator[int]:
        yield 1
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(shown(broken(), "report", True))
    assert notebook.lines()[-1].startswith("report: 1, ")


def test_a_shell_of_ipython_without_a_notebook_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch, kernel=None)
    assert list(shown([1], "calibrate", True)) == [1]
    assert notebook.shown == []


def test_a_log_gets_rare_records_and_a_file_nothing(
    caplog: pytest.LogCaptureFixture, clock: Clock, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take a file for a terminal
    with caplog.at_level(logging.INFO, logger="sophq_func"):
        assert len(list(shown(range(70), "calibrate", True))) == 70
    assert [record.getMessage() for record in caplog.records] == [
        "calibrate: 30 of 70, 30.0 s",
        "calibrate: 60 of 70, 60.0 s",
        "calibrate: 70 of 70, 71.0 s, done",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert list(shown(range(3), "calibrate", True)) == [0, 1, 2]
    assert "calibrate" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_nothing_is_shown_where_nobody_asks(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    terminal, notebook = Terminal(), Notebook(monkeypatch, kernel=object() if where == "notebook" else None)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(shown([1, 2], "calibrate", False)) == [1, 2]
    assert (terminal.getvalue(), notebook.shown) == ("", [])
