"""Pictures of a report as inline SVG; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sophq_func.reports._row import ReportRow

WIDTH, HEIGHT = 220, 40
"""Of a histogram."""

TALL, LABEL = 90, 24
"""Of the overview, the height of the columns and of the text above them."""

SPREAD = 3.0
"""A grid is drawn up to this many times as wide as the values; what reaches further is cut."""


def bar(share: float) -> str:
    """A horizontal bar for a share of the error.

    Example:
      >>> '<rect width="50.00" height="10"/>' in bar(0.5)
      True
    """
    rectangle = f'<rect width="{100 * share:.2f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{rectangle}</svg>'


def overview(rows: Sequence[ReportRow], hot: Sequence[bool]) -> str:
    """The shares as columns in execution order, relative to the largest, which has its name above it."""
    step, most = 100 / max(len(rows), 1), max((row.share for row in rows), default=0) or 1
    shapes = []
    for place, (row, is_hot) in enumerate(sorted(zip(rows, hot, strict=True), key=lambda pair: pair[0].position)):
        tall = max(row.share / most * TALL, 1)
        size = f'x="{(place + 0.1) * step:.3f}%" y="{LABEL + TALL - tall:.2f}" width="{0.8 * step:.3f}%" height="{tall:.2f}"'
        title = f"{escape(row.quantizer)}: {100 * row.share:.1f} %"
        shapes.append(f'<rect class="{"hot" if is_hot else row.role}" {size}><title>{title}</title></rect>')
        if rows[0].share and row is rows[0]:
            anchor = "start" if place < len(rows) / 3 else "end" if place >= 2 * len(rows) / 3 else "middle"
            at = {"start": place + 0.1, "middle": place + 0.5, "end": place + 0.9}[anchor] * step
            shapes.append(f'<text x="{at:.3f}%" y="{LABEL - 6}" text-anchor="{anchor}">{title}</text>')
    label = "Share of the output error, in execution order"
    return f'<svg class="overview" height="{LABEL + TALL}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def histogram(row: ReportRow) -> str:
    """The values that a quantizer sees, those that are clipped in the color of a warning; marks where the grid ends."""
    if not (math.isfinite(row.low) and math.isfinite(row.high)) or not any(row.histogram):
        return ""
    left, right = _window(row)
    scale, width, top = WIDTH / (right - left), (row.high - row.low) / len(row.histogram), max(row.histogram)
    bars: dict[str, list[str]] = {row.role: [], "lost": []}
    for i, count in enumerate(row.histogram):
        if count:
            start, tall = row.low + i * width, HEIGHT * math.sqrt(count / top)
            shape = f"M{(start - left) * scale:.1f} {HEIGHT}v-{tall:.1f}h{max(width * scale, 1):.1f}v{tall:.1f}z"
            bars["lost" if _is_beyond(row, start + width / 2) else row.role].append(shape)
    paths = "".join(f'<path class="{kind}" d="{"".join(shapes)}"/>' for kind, shapes in bars.items() if shapes)
    label = f"Values from {row.low:.4g} to {row.high:.4g}"
    marks = "".join(_mark(end, left, right) for end in (row.clip_low, row.clip_high))
    return (
        f'<svg class="histogram" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{paths}{marks}</svg>'
    )


def _is_beyond(row: ReportRow, x: float) -> bool:
    """Whether a value lies more than half a step beyond the grid."""
    if row.clip_low is None or row.clip_high is None or row.step is None:
        return False
    return not row.clip_low - row.step / 2 <= x <= row.clip_high + row.step / 2


def _window(row: ReportRow) -> tuple[float, float]:
    """What is drawn: all values, and the grid as far as it is not much wider."""
    left, right = row.low, row.high
    room = SPREAD * max(right - left, abs(left) * 1e-6, 1e-12)
    if row.clip_low is not None and row.clip_high is not None:
        left = min(left, max(row.clip_low, left - room))
        right = max(right, min(row.clip_high, right + room))
    margin = 0.02 * max(right - left, room)
    return left - margin, right + margin


def _mark(end: float | None, left: float, right: float) -> str:
    """A dashed line where the grid ends; nothing where that is not in the picture."""
    if end is None or not left <= end <= right:
        return ""
    x = (end - left) * WIDTH / (right - left)
    return f'<line class="end" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{HEIGHT}"/>'
