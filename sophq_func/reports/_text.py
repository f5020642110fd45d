"""A report as text: a table, plain, by rich or for a notebook, and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from sophq_func.core.tables import Table, check_width, wrapped
from sophq_func.core.texts import cell, printable
from sophq_func.reports._row import ReportRow

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from sophq_func.reports._report import Report

BAR = 12
"""Characters of the bar for a share of 1."""

RIGHT = frozenset(("share", "SQNR", "cosine", "clipped"))
"""Columns of numbers, which are aligned on the right."""

HOT = 2
"""From how many times the even share on a quantizer is marked."""

UNITS = ("KiB", "MiB", "GiB", "TiB")
"""Of sizes, each 1024 of the one before."""


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
    if share < 0.0005:  # which would be rounded to 0.0 %
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


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
    power = min(int(math.log2(count)) // 10, len(UNITS))  # 1024 is 2 ** 10
    return f"{count / 1024**power:.1f} {UNITS[power - 1]}"


def span(low: float | None, high: float | None) -> str:
    """A range in brackets."""
    return "-" if low is None or high is None else f"[{low:.4g}, {high:.4g}]"


def shrunk(before: int, after: int) -> str:
    """Two sizes with an arrow between."""
    return f"{size(before)} -> {size(after)}" if before else "-"


def headline(report: Report) -> str:
    """The sentence to read first: which quantizer makes the largest part of the error."""
    if not report.rows:
        return "Nothing is quantized."
    worst = report.rows[0]
    if worst.share == 0:
        return "No quantizer changes the output."
    return f"{printable(worst.quantizer)} makes {percent(worst.share)} of the output error"


def summary(report: Report) -> str:
    """The figures of the whole model, in one line."""
    sqnr = number(report.sqnr_db, "dB")
    sizes = shrunk(report.bytes_before, report.bytes_after)
    batches = "1 batch" if report.batches == 1 else f"{report.batches} batches"
    return f"{printable(report.model)}: output SQNR {sqnr}, parameters {sizes}; {len(report.rows)} quantizers, {batches}"


def _name(row: ReportRow) -> str:
    return f"{row.quantizer}, observes only" if row.observe_only else row.quantizer


def _bar(row: ReportRow) -> str:
    return "#" * round(BAR * row.share)


def _share(row: ReportRow) -> str:
    return percent(row.share)


def _sqnr(row: ReportRow) -> str:
    return number(row.sqnr_db, "dB")


def _cosine(row: ReportRow) -> str:
    return f"{row.cosine:.6f}"


def _clipped(row: ReportRow) -> str:
    return percent(row.clipped)


def _values(row: ReportRow) -> str:
    return span(row.low, row.high)


def _grid(row: ReportRow) -> str:
    """The grid and its range, if it has one that no tensor changes."""
    if row.clip_low is None or row.clip_high is None:
        return row.grid
    return f"{row.grid} {span(row.clip_low, row.clip_high)}"


def _size(row: ReportRow) -> str:
    return shrunk(row.bytes_before, row.bytes_after)


COLUMNS: dict[str, Callable[[ReportRow], str]] = {
    "quantizer": _name,
    "error": _bar,
    "share": _share,
    "SQNR": _sqnr,
    "cosine": _cosine,
    "clipped": _clipped,
    "values": _values,
    "grid": _grid,
    "size": _size,
}
"""The columns of a table, from left to right: the heading, and the cell of a row."""


def cells(report: Report) -> Table:
    """The rows under their headings."""
    rows = tuple(tuple(text(row) for text in COLUMNS.values()) for row in report.rows)
    return Table(headings=tuple(COLUMNS), rows=rows, right=RIGHT)


def table(report: Report, columns: str | Sequence[str] | None, width: int) -> str:
    """Rows in columns, the summary and the headline above."""
    check_width("report.table", width)
    body = cells(report).pick("report.table", columns).text(width)
    return "\n".join([*wrapped(summary(report), width), *wrapped(headline(report), width), "", body])


def notebook(report: Report) -> str:
    """Rows as a piece of HTML, the largest shares in bold."""
    hot = (i for i, row in enumerate(report.rows) if is_hot(row, report))
    return cells(report).html(headline(report), [summary(report)], hot)


def rich_table(report: Report) -> RichTable:
    """A table for rich, the largest shares in red."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    result = RichTable(box=SIMPLE_HEAD, pad_edge=False, caption=Text(summary(report)), title=Text(headline(report)))
    for name in COLUMNS:
        # a console that is too narrow breaks cells, where rich would cut them off
        result.add_column(name, overflow="fold", justify="right" if name in RIGHT else "left")
    for row in report.rows:
        texts = [Text(printable(text(row))) for text in COLUMNS.values()]
        if is_hot(row, report):
            name_cell, bar_cell, *_ = texts
            name_cell.stylize("bold red")
            bar_cell.stylize("red")
        result.add_row(*texts)
    return result


def is_hot(row: ReportRow, report: Report) -> bool:
    """Whether a quantizer's share is at least :data:`HOT` times what it would be if all had the same."""
    return row.share > 0 and row.share * len(report.rows) >= HOT


def csv_text(report: Report) -> str:
    """The rows as CSV, without histograms; ``None`` is an empty cell."""
    names = [field.name for field in fields(ReportRow) if field.name != "histogram"]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([cell(getattr(row, name)) for name in names] for row in report.rows)
    return file.getvalue()
