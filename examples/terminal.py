"""What the demos share: bars that move, and files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def bars(console: Console) -> Progress:
    """A bar for each task, with the share that is done and the time it took."""
    columns = TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn()
    return Progress(*columns, console=console)


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}")
    save(temporary)
    temporary.replace(path)


def contents(folder: Path) -> str:
    """A line that names the files of a folder."""
    return f"[bold]{folder}/[/bold]: " + ", ".join(sorted(p.name for p in folder.iterdir() if p.name[0] != "."))
