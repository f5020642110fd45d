"""A report as one HTML page: inline style, inline pictures, no script, no other file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sophq_func.core.texts import html
from sophq_func.reports import _svg, _text
from sophq_func.reports._row import ReportRow

if TYPE_CHECKING:
    from sophq_func.reports._report import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5b6672; --paper: #ffffff; --card: #f4f6f8; --line: #dde2e7;
  --hot: #c8102e; --hotpaper: #fdecee; --weight: #e08214; --activation: #2a6fbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #9aa6b2; --paper: #14181c; --card: #1f252b;
  --line: #333c45; --hot: #ff5c70; --hotpaper: #3a1a20; --weight: #f0a04b; --activation: #6aa9ea; } }
body { margin: 0 auto; padding: 1.5rem 2rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1rem; font-weight: 600; color: var(--soft); }
h2 { margin: 1.6rem 0 .5rem; font-size: 1rem; }
.verdict { margin: .3rem 0 0; font-size: 1.75rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
.verdict em { font-style: normal; color: var(--hot); }
.detail, .note { margin: .3rem 0; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 0; padding: 0; list-style: none; }
.cards li { background: var(--card); border-radius: .5rem; padding: .5rem .9rem; }
.cards b { display: block; font-size: 1.15rem; }
.cards span { color: var(--soft); font-size: .85rem; }
svg { display: block; }
.overview { width: 100%; border-bottom: 1px solid var(--line); }
.overview text { fill: var(--ink); font-size: 13px; font-weight: 600; }
.bar { width: 7.5rem; height: 1.1rem; background: var(--card); border-radius: .2rem; }
.bar rect { fill: var(--soft); }
.hot .bar rect, rect.hot, path.lost { fill: var(--hot); }
rect.weight, path.weight { fill: var(--weight); } rect.activation, path.activation { fill: var(--activation); }
.histogram { width: 13.75rem; height: 2.5rem; }
.histogram .end { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; vector-effect: non-scaling-stroke; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-size: .8rem; color: var(--soft); font-weight: 600; white-space: nowrap; }
th, td { padding: .45rem .7rem .45rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { padding-left: .6rem; min-width: 15rem; max-width: 22rem; }
tr.hot { background: var(--hotpaper); }
tr.hot .name { color: var(--hot); }
.name { font-weight: 650; overflow-wrap: anywhere; }
.share { font-size: 1.05rem; font-weight: 650; }
.where { color: var(--soft); font-size: .82rem; }
.where span { white-space: nowrap; }
.pill { display: inline-block; border-radius: .8rem; padding: 0 .5rem; font-size: .75rem; color: #ffffff; }
.pill.weight { background: #a85c00; } .pill.activation { background: #2a6fbb; }
"""

HEADINGS = (
    ("quantizer", ""),
    ("share of the output error", ""),
    ("", "number"),
    ("SQNR", "number"),
    ("cosine", "number"),
    ("clipped", "number"),
    ("values and grid", ""),
    ("size", "number"),
)
"""Of the table: text and CSS class of each column."""

NOTES = (
    "Share of the output error: each quantizer alone is switched on in a model that is float otherwise; the squared error "
    "of the output, by the sum over all of them. Red: at least twice the even share.",
    "SQNR and cosine compare what a quantizer sees with what it makes of it. Clipped: values more than half a step beyond "
    "the grid.",
    "Pictures: how many values there are (height: square root of the count); dashed: where the grid ends, of all channels "
    "the widest; red: values that are clipped. Weights are shown with the BatchNorm folded in.",
)
"""What a reader must know to read the table, below it."""


def page(report: Report) -> str:
    """The page as text."""
    hot = [_text.is_hot(row, report) for row in report.rows]
    title = html(f"Quantization report: {report.model}")
    body = [
        f"<h1>{title}</h1>",
        _verdict(report),
        _cards(report),
        "<h2>Share of the output error, in execution order</h2>",
        _svg.overview(report.rows, hot),
        "<h2>Each quantizer, the largest share first</h2>",
        _table(report, hot),
        *(f'<p class="note">{html(note)}</p>' for note in NOTES),
        f'<p class="note">plan {html(report.digest)}</p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    start = f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>'
    return "\n".join([start, *body, "</body></html>\n"])


def value(number: float | None, text: str) -> str:
    """A number as text, with all of its digits in an attribute for programs that read the page.

    Example:
      >>> value(0.25, "25 %")
      '<data value="0.25">25 %</data>'
    """
    return html(text) if number is None else f'<data value="{number!r}">{html(text)}</data>'


def _verdict(report: Report) -> str:
    """The sentence to read first, and the figures of the worst quantizer."""
    if not report.rows or report.rows[0].share == 0:
        return f'<p class="verdict">{html(_text.headline(report))}</p>'
    worst = report.rows[0]
    figures = [worst.grid, f"SQNR {_text.number(worst.sqnr_db, 'dB')}"]
    if worst.clipped is not None:
        figures.append(f"{_text.percent(worst.clipped)} clipped")
    if worst.where:
        figures.append(worst.where)
    name = f"<em>{_breakable(worst.quantizer)}</em>"
    share = f"<em>{html(_text.percent(worst.share))}</em>"
    detail = html(", ".join(figures))
    return f'<p class="verdict">{name} makes {share} of the output error</p><p class="detail">{detail}</p>'


def _cards(report: Report) -> str:
    """The figures of the whole model."""
    before = value(report.bytes_before, _text.size(report.bytes_before))
    after = value(report.bytes_after, _text.size(report.bytes_after))
    kept = f", {_text.percent(report.bytes_after / report.bytes_before)}" if report.bytes_before else ""
    cards = (
        (value(report.sqnr_db, _text.number(report.sqnr_db, "dB")), "SQNR of the output, all quantizers on"),
        (f"{before} &rarr; {after}", f"parameters and buffers{kept}"),
        (value(len(report.rows), str(len(report.rows))), "quantizers"),
        (value(report.batches, str(report.batches)), "batch" if report.batches == 1 else "batches"),
    )
    items = "".join(f"<li><b>{figure}</b><span>{html(text)}</span></li>" for figure, text in cards)
    return f'<ul class="cards">{items}</ul>'


def _table(report: Report, hot: list[bool]) -> str:
    head = "".join(f'<th scope="col"{_class(kind)}>{html(text)}</th>' for text, kind in HEADINGS)
    rows = "\n".join(_row(row, is_hot) for row, is_hot in zip(report.rows, hot, strict=True))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _row(row: ReportRow, is_hot: bool) -> str:
    name = f'<div class="name">{_breakable(row.quantizer)}</div>'
    cells = (
        (name + _where(row), ""),
        (_svg.bar(row.share), ""),
        (f'<span class="share">{value(row.share, _text.percent(row.share))}</span>', "number"),
        (value(row.sqnr_db, _text.number(row.sqnr_db, "dB")), "number"),
        (value(row.cosine, f"{row.cosine:.5f}"), "number"),
        (value(row.clipped, _text.percent(row.clipped)), "number"),
        (_svg.histogram(row) + _ranges(row), ""),
        (_size(row), "number"),
    )
    body = "".join(f"<td{_class(kind)}>{cell}</td>" for cell, kind in cells)
    return f"<tr{_class('hot' if is_hot else '')}>{body}</tr>"


def _where(row: ReportRow) -> str:
    """Role and place of a quantizer."""
    pill = f'<span class="pill {row.role}">{row.role}</span>'
    place = row.where.removeprefix("weight ")  # which the pill says
    if row.observe_only:
        place += ", observes only"
    return f'<div class="where">{pill} {_breakable(place)}</div>'


def _ranges(row: ReportRow) -> str:
    """The range of the values, and that of the grid, if it has one that no tensor changes."""
    values = _range(row.low, row.high)
    if row.clip_low is None or row.clip_high is None:
        return f'<div class="where">{values} as {html(row.grid)}</div>'
    ends = _range(row.clip_low, row.clip_high)
    return f'<div class="where"><span>{values} on</span> <span>{html(row.grid)} {ends}</span></div>'


def _range(low: float, high: float) -> str:
    return f"[{value(low, f'{low:.4g}')}, {value(high, f'{high:.4g}')}]"


def _size(row: ReportRow) -> str:
    if not row.bytes_before:
        return "-"
    before = value(row.bytes_before, _text.size(row.bytes_before))
    after = value(row.bytes_after, _text.size(row.bytes_after))
    return f"{before} &rarr;<br>{after}"


def _breakable(name: str) -> str:
    """A name that a browser may break behind dots and underscores."""
    return re.sub(r"([._])(?=\w)", r"\1<wbr>", html(name))


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
