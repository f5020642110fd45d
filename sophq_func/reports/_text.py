"""A report as text: a table, plain or by rich, and CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sophq_func.reports._row import ReportRow

if TYPE_CHECKING:
    from rich.table import Table

    from sophq_func.reports._report import Report

BAR = 12
"""Characters of the bar that stands for a share of 1."""


def percent(share: float | None) -> str:
    """A share in percent.

    Example:
      >>> percent(0.1234), percent(0.0001), percent(0), percent(None)
      ('12.3 %', '< 0.1 %', '0 %', '-')
    """
    if share is None:
        return "-"
    if share == 0:
        return "0 %"
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def number(value: float | None, unit: str = "") -> str:
    """Four digits of a number, and a unit.

    Example:
      >>> number(1.23456, "dB"), number(math.inf, "dB"), number(None)
      ('1.235 dB', 'inf dB', '-')
    """
    return "-" if value is None else f"{value:.4g} {unit}".strip()


def size(count: int) -> str:
    """Bytes for people.

    Example:
      >>> size(0), size(900), size(2048)
      ('-', '900 B', '2.0 KiB')
    """
    if not count:
        return "-"
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def span(low: float | None, high: float | None) -> str:
    """A range in brackets."""
    return "-" if low is None or high is None else f"[{low:.4g}, {high:.4g}]"


def shrunk(before: int, after: int) -> str:
    """Two sizes with an arrow between."""
    return f"{size(before)} -> {size(after)}" if before else "-"


COLUMNS: dict[str, Callable[[ReportRow], str]] = {
    "quantizer": lambda row: row.quantizer + ", observes only" * row.observe_only,
    "error": lambda row: "#" * round(BAR * row.share),
    "share": lambda row: percent(row.share),
    "SQNR": lambda row: number(row.sqnr_db, "dB"),
    "cosine": lambda row: f"{row.cosine:.6f}",
    "clipped": lambda row: percent(row.clipped),
    "values": lambda row: span(row.low, row.high),
    "grid": lambda row: f"{row.grid} {span(row.clip_low, row.clip_high)}".removesuffix(" -"),
    "size": lambda row: shrunk(row.bytes_before, row.bytes_after),
}
RIGHT = frozenset(("share", "SQNR", "cosine", "clipped"))


def headline(report: Report) -> str:
    """The sentence to read first: who makes the most of the error."""
    if not report.rows:
        return "Nothing is quantized."
    worst = report.rows[0]
    if worst.share == 0:
        return "No quantizer changes the output."
    return f"{worst.quantizer} makes {percent(worst.share)} of the output error"


def summary(report: Report) -> str:
    """What holds for the whole model, in one line."""
    count = f"{len(report.rows)} quantizers, {report.batches} batch{'es' * (report.batches != 1)}"
    whole = f"output SQNR {number(report.sqnr_db, 'dB')}, parameters {shrunk(report.bytes_before, report.bytes_after)}"
    return f"{report.model}: {whole}; {count}"


def table(report: Report) -> str:
    """Rows in columns, the headline above: with lines between them where rich is installed, else plain."""
    body = _drawn(report) if importlib.util.find_spec("rich") else _plain(report.rows)
    return "\n".join([summary(report), headline(report), "", body])


def _plain(rows: Sequence[ReportRow]) -> str:
    lines = [list(COLUMNS), *([text(row) for text in COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [str.rjust if name in RIGHT else str.ljust for name in COLUMNS]
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True)).rstrip()
        for line in lines
    )


def rich_table(report: Report) -> Table:
    """A table for rich, the largest shares in red."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False, caption=Text(summary(report)), title=Text(headline(report)))
    for name in COLUMNS:
        made.add_column(name, no_wrap=True, justify="right" if name in RIGHT else "left")
    for row in report.rows:
        cells = [Text(text(row)) for text in COLUMNS.values()]
        if is_hot(row, report):
            cells[0].stylize("bold red")
            cells[1].stylize("red")
        made.add_row(*cells)
    return made


def is_hot(row: ReportRow, report: Report) -> bool:
    """Whether a quantizer's share is at least twice what it would be if all had the same."""
    return row.share > 0 and row.share * len(report.rows) >= 2


def _drawn(report: Report) -> str:
    from rich.console import Console

    made = rich_table(report)
    made.title = made.caption = None
    width = sum(max(len(name), *(len(text(row)) for row in report.rows), 0) + 3 for name, text in COLUMNS.items())
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(made)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines).strip("\n")


def csv_text(report: Report) -> str:
    """The rows as CSV."""
    names = [field.name for field in fields(ReportRow) if field.name != "histogram"]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([_cell(getattr(row, name)) for name in names] for row in report.rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else value
