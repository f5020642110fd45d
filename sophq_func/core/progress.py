"""A progress bar for loops over many items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

V = TypeVar("V")


def shown(items: Iterable[V], what: str, progress: bool) -> Iterator[V]:
    """``items`` unchanged, with a progress bar while they are consumed.

    The bar needs the optional package ``rich`` and a terminal; without them the items come without one.

    Args:
      items: what a loop runs over.
      what: title of the bar.
      progress: whether the user wants one.
    """
    if not progress:
        return iter(items)
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return iter(items)
    console = Console(stderr=True)  # standard output belongs to the user's results
    if not console.is_terminal:
        return iter(items)
    return iter(track(items, description=what, console=console, transient=True))
