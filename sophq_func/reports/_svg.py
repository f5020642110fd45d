"""Pictures of a report as inline SVG; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sophq_func.core.texts import html
from sophq_func.reports._row import ReportRow

WIDTH, HEIGHT = 220, 40
"""Of a histogram, in the units of its view box; the style sheet gives it the same size in pixels."""

COLUMNS_HEIGHT, LABEL_HEIGHT = 90, 24
"""Of the overview, in pixels: the columns, and the text above the tallest."""

BASELINE = 6
"""Pixels between that text and the columns."""

MARGIN = 0.02
"""Empty space on each side of a histogram, as a share of its width, so that marks at its ends can be seen."""

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
    largest = max((row.share for row in rows), default=0) or 1
    in_order = sorted(zip(rows, hot, strict=True), key=_position)
    shapes = []
    for place, (row, is_hot) in enumerate(in_order):
        title = f"{html(row.quantizer)}: {100 * row.share:.1f} %"
        kind = "hot" if is_hot else row.role
        shapes.append(_column(place, len(rows), row.share / largest, kind, title))
        if row is rows[0] and row.share:
            shapes.append(_label(place, len(rows), title))
    label = "Share of the output error, in execution order"
    height = LABEL_HEIGHT + COLUMNS_HEIGHT
    return f'<svg class="overview" height="{height}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _position(pair: tuple[ReportRow, bool]) -> int:
    row, _ = pair
    return row.position


def _column(place: int, count: int, share: float, kind: str, title: str) -> str:
    """One column of the overview: of ``count`` slots the one at ``place``, 0.8 of it wide."""
    slot = 100 / count
    height = max(share * COLUMNS_HEIGHT, 1)  # at least a line, so that it can be pointed at
    top = LABEL_HEIGHT + COLUMNS_HEIGHT - height
    left, width = (place + 0.1) * slot, 0.8 * slot
    size = f'x="{left:.3f}%" y="{top:.2f}" width="{width:.3f}%" height="{height:.2f}"'
    return f'<rect class="{kind}" {size}><title>{title}</title></rect>'


def _label(place: int, count: int, title: str) -> str:
    """The text above a column. It grows away from the nearer end of the overview, so that it stays inside."""
    if place < count / 3:
        anchor, at = "start", place + 0.1
    elif place >= 2 * count / 3:
        anchor, at = "end", place + 0.9
    else:
        anchor, at = "middle", place + 0.5
    x, y = at * (100 / count), LABEL_HEIGHT - BASELINE
    return f'<text x="{x:.3f}%" y="{y}" text-anchor="{anchor}">{title}</text>'


def histogram(row: ReportRow) -> str:
    """The values that a quantizer sees, those that are clipped in the color of a warning; marks where the grid ends."""
    if not (math.isfinite(row.low) and math.isfinite(row.high)) or not any(row.histogram):
        return ""
    left, right = _window(row)
    scale = WIDTH / (right - left)
    width, largest = (row.high - row.low) / len(row.histogram), max(row.histogram)
    bars: dict[str, list[str]] = {row.role: [], "lost": []}
    for i, count in enumerate(row.histogram):
        if count:
            start = row.low + i * width
            # the square root, so that tails can be seen beside the peak
            height = HEIGHT * math.sqrt(count / largest)
            x, drawn = (start - left) * scale, max(width * scale, 1)
            kind = "lost" if _is_beyond(row, start + width / 2) else row.role
            bars[kind].append(f"M{x:.1f} {HEIGHT}v-{height:.1f}h{drawn:.1f}v{height:.1f}z")
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
    """Ends of the picture: all values, and the grid as far as it is not much wider."""
    left, right = row.low, row.high
    # constant values have no width; a millionth of the value is above float32's rounding, and 1e-12 is for zeros
    room = SPREAD * max(right - left, abs(left) * 1e-6, 1e-12)
    if row.clip_low is not None and row.clip_high is not None:
        left = min(left, max(row.clip_low, left - room))
        right = max(right, min(row.clip_high, right + room))
    margin = MARGIN * max(right - left, room)
    return left - margin, right + margin


def _mark(end: float | None, left: float, right: float) -> str:
    """A dashed line where the grid ends; nothing where that is not in the picture."""
    if end is None or not left <= end <= right:
        return ""
    x = (end - left) * WIDTH / (right - left)
    return f'<line class="end" x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{HEIGHT}"/>'
