"""Pictures of a plan, with matplotlib (``pip install 'sophq-func[demo]'``)."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sophq_func.core.errors import PlanError, explain
from sophq_func.planning.picture import ACTIVATION_COLOR, WEIGHT_COLOR, Call, Edge
from sophq_func.planning.plan import Plan
from sophq_func.planning.text import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
LANE, ROW = 3.4, 0.95
"""Distance of neighbours, sideways and downwards, in inches."""
BOX, PILL = (2.3, 0.44), (0.62, 0.2)
"""Width and height of a call and of a quantizer, in inches."""


Point: TypeAlias = tuple[float, float]


def draw(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draw the model's graph with its quantizers, and write the picture.

    A call is a box; a fused group is one. Quantizers are colored pills: on the left of a box for its weight, below it for
    its result, above it for an input that is quantized for this call alone. Dashed ones only observe.

    Args:
      plan: any plan, also one read from JSON.
      path: of the picture; its ending, ``.png``, ``.svg`` or ``.pdf``, says the format. The folder must be there.

    Returns:
      The path. The file is written to a temporary name first, so that it is never half there.

    Raises:
      PlanError: another ending, no such folder, a plan without calls, or matplotlib is not installed.

    Example:
      >>> import tempfile, torch, sophq_func as sq
      >>> plan = sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     draw(plan, folder + "/plan.svg").stat().st_size > 1000
      True
    """
    if not isinstance(plan, Plan):
        raise PlanError(
            explain(
                "draw", "this plan is not possible", got=type(plan).__name__, allowed="a sq.Plan", fix="draw(q.plan, path)"
            )
        )
    target = Path(path)
    if target.suffix not in FORMATS:
        raise PlanError(explain("draw", "this ending is not possible", got=target.name, allowed=", ".join(FORMATS)))
    if not target.parent.is_dir():
        raise PlanError(explain("draw", "this folder is not possible", got=str(target.parent), fix="make it first"))
    if not plan.calls:
        fix = "sq.plan(sq.trace(model, args), config)"
        raise PlanError(explain("draw", "a picture is not possible", because="the plan knows no calls", fix=fix))
    figure = _figure(plan)
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    figure.savefig(partial, dpi=110)
    partial.replace(target)
    return target


def _figure(plan: Plan) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "pip install matplotlib, or render plan.to_dot() with Graphviz"
        raise PlanError(
            explain("draw", "a picture is not possible", because="matplotlib is not installed", fix=fix)
        ) from error
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
    """Lane and row of each call: rows by the longest way from an input, lanes so that a chain stays straight.

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
    for call in calls:
        before = sources[call.name]
        row = max((places[s][1] + 1 for s in before), default=0)
        heirs = [s for s in before if s not in continued] or before
        lane: float = places[max(heirs, key=lambda s: places[s][1])][0] if heirs else 0
        continued.update(before)
        shifts = (sign * step for step in range(len(calls) + 1) for sign in (1, -1))
        lane = next(lane + shift for shift in shifts if (lane + shift, row) not in taken)
        taken.add((lane, row))
        places[call.name] = (lane, row)
    return places


def _arrow(axes: Axes, source: Point, target: Point, pills: Container[Point]) -> None:
    """From below one box to above another; a way over several rows goes round what is between."""
    (x0, y0), (x1, y1) = _rim(source, 1), _rim(target, -1)
    start = (x0, y0 + PILL[1] / 2) if (x0, y0) in pills else (x0, y0)
    end = (x1, y1 - PILL[1] / 2) if (x1, y1) in pills else (x1, y1)
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": "#777777", "lw": 1.0, "shrinkA": 0, "shrinkB": 0}
    rows = (target[1] - source[1]) / ROW
    if rows > 1.5 and source[0] == target[0]:
        start, end = (x0 + BOX[0] / 2, source[1]), (x1 + BOX[0] / 2, target[1])
        style["connectionstyle"] = f"arc3,rad={-min(0.3, 1.0 / rows)}"
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def _rim(point: Point, side: int) -> Point:
    """The middle of the lower (1) or upper (-1) rim of a box."""
    return point[0], point[1] + side * BOX[1] / 2


def _box(axes: Axes, point: Point, call: Call) -> None:
    shape = "round,pad=0,rounding_size=0.2" if not call.does else "square,pad=0"
    _patch(axes, point, BOX, {"boxstyle": shape, "facecolor": "white", "edgecolor": "#333333"})
    name = call.name if len(call.name) <= 38 else f"...{call.name[-35:]}"
    axes.text(*point, f"{name}\n{call.does}" if call.does else name, ha="center", va="center", fontsize=7)


def _pills(plan: Plan, points: Mapping[str, Point]) -> dict[str, list[Point]]:
    """Where the pill of each quantizer goes; one that several calls share on their inputs is drawn at each."""
    found: dict[str, list[Point]] = {}
    for call in plan.calls:
        x, y = points[call.name]
        for i, name in enumerate(call.weights):
            found.setdefault(name, []).append((x - BOX[0] / 2 - PILL[0] / 2, y + PILL[1] * i))
    for edge in plan.edges:
        for name in edge.through:
            at, side = (edge.target, -1) if plan.site(name).operand >= 0 else (edge.source, 1)
            found.setdefault(name, []).append(_rim(points[at], side))
    return {name: list(dict.fromkeys(spots)) for name, spots in found.items()}


def _pill(axes: Axes, point: Point, plan: Plan, name: str) -> None:
    config, site = plan[name], plan.site(name)
    color = WEIGHT_COLOR if site.role == "weight" else ACTIVATION_COLOR
    style: dict[str, Any] = {"facecolor": "white" if config.observe_only else color, "edgecolor": "#333333"}
    style |= {"boxstyle": "round,pad=0,rounding_size=0.1", "linestyle": "--" if config.observe_only else "-"}
    _patch(axes, point, PILL, style)
    axes.text(*point, short(config), ha="center", va="center", fontsize=6)


def _patch(axes: Axes, center: Point, size: Point, style: dict[str, Any]) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
    axes.add_patch(FancyBboxPatch(corner, *size, linewidth=0.8, **style))
