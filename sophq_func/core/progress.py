"""The progress of loops over many items: a bar in a terminal, a line in a notebook, rare records of a log elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from sophq_func.core.logs import PROGRESS

V = TypeVar("V")

NOTEBOOK_SECONDS = 0.2
"""Between two updates of a line in a notebook: each is a message to the browser."""

LOG_SECONDS = 30.0
"""Between two records of a log: it is read later, and kept."""


def shown(items: Iterable[V], what: str, progress: bool) -> Iterator[V]:
    """``items`` unchanged; while they are consumed, a user sees how many were.

    In a notebook a line is updated. In a terminal there is a bar, if the package ``rich`` is installed. Elsewhere nothing
    is written, but for a record of level INFO every 30 seconds and at the end, by the logger ``sophq_func.progress``.

    Args:
      items: what a loop runs over.
      what: title of the bar or line.
      progress: whether the user wants one.
    """
    if not progress:
        return iter(items)
    if _is_in_notebook():
        return _in_notebook(items, what)
    # rich takes a log for a terminal where FORCE_COLOR is set, as it is in many CI systems
    if sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        return _in_terminal(items, what)
    return _in_log(items, what)


def _is_in_notebook() -> bool:
    """Whether the code runs in a kernel of IPython, whose front end can update what it shows."""
    # a kernel has imported IPython; without one it is not imported here, as that takes long
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def _in_terminal(items: Iterable[V], what: str) -> Iterator[V]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)  # standard output belongs to the user's results
    return iter(track(items, description=what, console=console, transient=True))


def _in_notebook(items: Iterable[V], what: str) -> Iterator[V]:
    total = operator.length_hint(items)
    start = shown_at = time.monotonic()
    count = 0
    line = importlib.import_module("IPython.display").display(_bundle(what, 0, total, 0.0), raw=True, display_id=True)
    try:
        for item in items:
            yield item
            count += 1
            now = time.monotonic()
            if now - shown_at >= NOTEBOOK_SECONDS:
                shown_at = now
                line.update(_bundle(what, count, total, now - start), raw=True)
    finally:
        line.update(_bundle(what, count, total, time.monotonic() - start), raw=True)


def _bundle(what: str, count: int, total: int, seconds: float) -> dict[str, Any]:
    """The line by media type; a front end takes the richest that it can show."""
    text = _state(what, count, total, seconds)
    bar = f'<progress value="{count}" max="{total}"></progress> ' if total else ""
    return {"text/plain": text, "text/html": f"<div>{bar}{text}</div>"}


def _in_log(items: Iterable[V], what: str) -> Iterator[V]:
    total = operator.length_hint(items)
    start = said_at = time.monotonic()
    count = 0
    for item in items:
        yield item
        count += 1
        now = time.monotonic()
        if now - said_at >= LOG_SECONDS:
            said_at = now
            PROGRESS.info("%s", _state(what, count, total, now - start))
    PROGRESS.info("%s, done", _state(what, count, total, time.monotonic() - start))


def _state(what: str, count: int, total: int, seconds: float) -> str:
    """How far a loop is.

    Example:
      >>> _state("calibrate", 3, 10, 62.0), _state("calibrate", 3, 0, 0.44)
      ('calibrate: 3 of 10, 62.0 s', 'calibrate: 3, 0.4 s')
    """
    of_all = f" of {total}" if total else ""
    return f"{what}: {count}{of_all}, {seconds:.1f} s"
