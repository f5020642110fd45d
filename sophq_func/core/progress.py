"""A progress bar for loops over many items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

V = TypeVar("V")


def shown(items: Iterable[V], what: str, progress: bool) -> Iterator[V]:
    """``items``, with a progress bar on a terminal where ``rich`` is installed."""
    if progress:
        try:
            from rich.console import Console
            from rich.progress import track
        except ModuleNotFoundError:
            progress = False
    if progress and (console := Console(stderr=True)).is_terminal:
        return iter(track(items, description=what, console=console, transient=True))
    return iter(items)
