"""Pictures of a plan, drawn with matplotlib (``pip install 'sophq-func[demo]'``)."""

from __future__ import annotations

import io
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sophq_func.core.errors import PlanError, explain
from sophq_func.core.files import check_place, write_bytes
from sophq_func.core.public import public
from sophq_func.core.texts import printable
from sophq_func.planning.picture import ACTIVATION_COLOR, WEIGHT_COLOR, Call, Edge
from sophq_func.planning.plan import Plan
from sophq_func.planning.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNDATED: Mapping[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""By format, what leaves the date out: the same plan gives the same bytes."""

FORMATS = tuple(UNDATED)

LANE, ROW = 3.4, 0.95
"""Distance of neighbours, sideways and downwards, in inches. A lane holds a box, a pill on its left, and an arrow's bend."""

BOX, PILL = (2.3, 0.44), (0.62, 0.2)
"""Width and height of a call and of a quantizer, in inches. A box holds two lines of text in the size 7."""

DOTS_PER_INCH = 110
"""Of a picture in pixels: text of the size 6 can still be read."""

NAME_LENGTH = 38
"""Characters that a box has room for; of a longer name only the end is written."""

Style: TypeAlias = dict[str, Any]
"""Keyword arguments of a patch or an arrow of matplotlib."""

Point: TypeAlias = tuple[float, float]
"""Right and down from the first input, in inches."""


@public
def draw(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draw the model's graph with its quantizers into a file.

    A call or a fused group is a box. Quantizers are colored pills: on the left of a box for its weight, below it for its
    result, above it for an input that is quantized for this call alone. Dashed ones only observe.

    Args:
      plan: any plan, also one read from JSON.
      path: of the picture, in a folder that exists. Its ending, ``.png``, ``.svg`` or ``.pdf``, decides the format.

    Returns:
      The path. The file is written under a temporary name and then renamed, so that it is never incomplete.

    Raises:
      PlanError: another ending, a plan without calls, or matplotlib is not installed.
      StateError: no such folder, or something else than a file is at ``path``.

    Example:
      >>> import tempfile, torch, sophq_func as sq
      >>> plan = sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     draw(plan, folder + "/plan.svg").stat().st_size > 1000
      True
    """
    if not isinstance(plan, Plan):
        got, allowed, fix = type(plan).__name__, "a sq.Plan", "sq.draw(q.plan, path)"
        raise PlanError(explain("draw", "only a plan can be drawn", got=got, allowed=allowed, fix=fix))
    target = Path(path)
    if target.suffix not in FORMATS:
        allowed, fix = ", ".join(FORMATS), 'sq.draw(plan, "plan.png")'
        raise PlanError(explain("draw", "the ending of path is no format", got=target.name, allowed=allowed, fix=fix))
    check_place("draw", target)
    if not plan.calls:
        because, fix = "the plan has no calls", "sq.plan(sq.trace(model, args), config)"
        raise PlanError(explain("draw", "there is nothing to draw", because=because, fix=fix))
    figure, drawn = _figure(plan), io.BytesIO()
    with _salted():
        figure.savefig(drawn, format=target.suffix[1:], dpi=DOTS_PER_INCH, metadata=UNDATED[target.suffix])
    return write_bytes("draw", target, drawn.getvalue())


@contextmanager
def _salted() -> Iterator[None]:
    """Let matplotlib name the parts of an SVG by their contents, where it takes random numbers otherwise."""
    from matplotlib import rcParams

    # this entry alone: ``rc_context`` would undo what other threads set in the meantime
    before, rcParams["svg.hashsalt"] = rcParams["svg.hashsalt"], "sophq_func"
    try:
        yield
    finally:
        rcParams["svg.hashsalt"] = before


def _figure(plan: Plan) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install matplotlib, or render plan.to_dot() with Graphviz"
        because = "matplotlib is not installed"
        raise PlanError(explain("draw", "the picture cannot be drawn", because=because, fix=fix)) from error
    places = layout(plan.calls, plan.edges)
    lanes = [x for x, _ in places.values()]
    left, right, depth = min(lanes), max(lanes), max(y for _, y in places.values())
    size = ((right - left + 1) * LANE, (depth + 1) * ROW)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim((left - 0.5) * LANE - PILL[0] / 2, (right + 0.5) * LANE)
    axes.set_ylim((depth + 0.5) * ROW, -0.5 * ROW)
    axes.axis("off")
    points = {name: (x * LANE, y * ROW) for name, (x, y) in places.items()}
    pills = [(name, spot) for name, spots in _pills(plan, points).items() for spot in spots]
    taken = {spot for _, spot in pills}
    for source, target in dict.fromkeys((edge.source, edge.target) for edge in plan.edges):
        _arrow(axes, points[source], points[target], taken)
    for call in plan.calls:
        _box(axes, points[call.name], call)
    for name, spot in pills:
        _pill(axes, spot, plan, name)
    return figure


def layout(calls: Sequence[Call], edges: Sequence[Edge]) -> dict[str, tuple[float, int]]:
    """Lane and row of each call: the row is the longest way from an input, the lane that of the call that it continues.

    Example:
      >>> layout([Call("x", ""), Call("fc", "Linear")], [Edge("x", "fc")])
      {'x': (0, 0), 'fc': (0, 1)}
    """
    sources: dict[str, list[str]] = {call.name: [] for call in calls}
    for edge in edges:
        sources[edge.target].append(edge.source)
    places: dict[str, tuple[float, int]] = {}
    taken: set[tuple[float, int]] = set()
    continued: set[str] = set()

    def row_of(name: str) -> int:
        return places[name][1]

    for call in calls:
        before = sources[call.name]
        row = max((row_of(source) + 1 for source in before), default=0)
        # A chain stays in one lane: the call continues that of its lowest source, if no other call has continued it yet.
        candidates = [source for source in before if source not in continued] or before
        lane: float = places[max(candidates, key=row_of)][0] if candidates else 0
        continued.update(before)
        # The nearest free place: 0, 1, -1, 2, -2 and so on lanes away. There are never more lanes than calls.
        shifts = (sign * step for step in range(len(calls) + 1) for sign in (1, -1))
        lane = next(lane + shift for shift in shifts if (lane + shift, row) not in taken)
        taken.add((lane, row))
        places[call.name] = (lane, row)
    return places


def _arrow(axes: Axes, source: Point, target: Point, pills: Container[Point]) -> None:
    """An arrow from below one box to above another; in one lane and over several rows, bent around the boxes between."""
    (x0, y0), (x1, y1) = _rim(source, 1), _rim(target, -1)
    start = (x0, y0 + PILL[1] / 2) if (x0, y0) in pills else (x0, y0)
    end = (x1, y1 - PILL[1] / 2) if (x1, y1) in pills else (x1, y1)
    style: Style = {"arrowstyle": "-|>", "color": "#777777", "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
    rows = (target[1] - source[1]) / ROW
    if rows > 1.5 and source[0] == target[0]:
        start, end = (x0 + BOX[0] / 2, source[1]), (x1 + BOX[0] / 2, target[1])
        style["connectionstyle"] = f"arc3,rad={-min(0.3, 1.0 / rows)}"
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _rim(point: Point, side: int) -> Point:
    """The middle of the lower (``side`` 1) or upper (-1) rim of a box."""
    return point[0], point[1] + side * BOX[1] / 2


def _box(axes: Axes, point: Point, call: Call) -> None:
    shape = "round,pad=0,rounding_size=0.2" if not call.does else "square,pad=0"
    _patch(axes, point, BOX, {"boxstyle": shape, "facecolor": "white", "edgecolor": "#333333"})
    name = printable(call.name)
    name = name if len(name) <= NAME_LENGTH else f"...{name[3 - NAME_LENGTH :]}"
    _text(axes, point, f"{name}\n{printable(call.does)}" if call.does else name, 7)


def _pills(plan: Plan, points: Mapping[str, Point]) -> dict[str, list[Point]]:
    """By quantizer, where its pill is drawn: once at each call that uses a weight, or that reads a quantized input."""
    pills: dict[str, list[Point]] = {}
    for call in plan.calls:
        x, y = points[call.name]
        for i, name in enumerate(call.weights):
            pills.setdefault(name, []).append((x - BOX[0] / 2 - PILL[0] / 2, y + PILL[1] * i))
    for edge in plan.edges:
        for name in edge.through:
            is_before_call = plan.site(name).operand >= 0
            spot = _rim(points[edge.target], -1) if is_before_call else _rim(points[edge.source], 1)
            pills.setdefault(name, []).append(spot)
    return {name: list(dict.fromkeys(spots)) for name, spots in pills.items()}


def _pill(axes: Axes, point: Point, plan: Plan, name: str) -> None:
    config, site = plan[name], plan.site(name)
    color = WEIGHT_COLOR if site.role == "weight" else ACTIVATION_COLOR
    style: Style = {"facecolor": "white" if config.observe_only else color, "edgecolor": "#333333"}
    style |= {"boxstyle": "round,pad=0,rounding_size=0.1", "linestyle": "--" if config.observe_only else "-"}
    _patch(axes, point, PILL, style)
    _text(axes, point, printable(short(config)), 6)


def _text(axes: Axes, point: Point, text: str, size: int) -> None:
    # a name may hold dollar signs, between which matplotlib would read formulas
    axes.text(*point, text, ha="center", va="center", fontsize=size, parse_math=False)


def _patch(axes: Axes, center: Point, size: Point, style: Style) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
    axes.add_patch(FancyBboxPatch(corner, *size, linewidth=0.8, **style))
