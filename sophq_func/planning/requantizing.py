"""Step of a draft: where the integers come from that a chip brings onto a grid by a small multiplier and a shift.

For strategies that simulate this (``Strategy.exact``), with the chip's :class:`~sophq_func.config.chips.Arithmetic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.chips import Arithmetic
from sophq_func.config.names import weight_quantizer
from sophq_func.config.site import Requant
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.planning.inputs import Planned
from sophq_func.planning.strategies import TABLES, on_grid_of, stored

POOLS = frozenset("adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d".split())
"""Operations that divide a sum of integers by their number."""

CHANNEL_AXES: Mapping[str, int] = {"conv1d": -2, "conv2d": -3, "conv3d": -4, "linear": -1, "matmul": -1, "bmm": -1}
"""By operation, the axis of the channels of its result."""


class Exact(NamedTuple):
    """How a chip computes the values of a plan.

    Attributes:
      requants: by quantizer, where its integers come from.
      unsigned: quantizers whose codes start at 0 and have no zero point.
    """

    requants: Mapping[str, tuple[Requant, ...]]
    unsigned: frozenset[str]


NOT_EXACT = Exact({}, frozenset())


def requantize(planned: Planned, arithmetic: Arithmetic, is_symmetric: bool) -> Exact:
    """How the chip computes the values of a plan.

    Args:
      planned: what is quantized how.
      arithmetic: that of the chip.
      is_symmetric: whether grids of values have no zero point but 0; else pooling divides exactly.
    """
    found: dict[str, tuple[Requant, ...]] = {}
    for node in planned.graph:
        if len(node.outputs) != 1:
            continue
        result = planned.behind(stored(planned.graph, node.outputs[0]))
        if not planned.acts(result):
            continue
        if node.operation in arithmetic.terms:
            found.update(_terms(planned, node, result, arithmetic))
        elif node.operation in arithmetic.products and (is_symmetric or node.operation not in POOLS):
            found.update(_product(planned, node, result, arithmetic))
        elif node.operation in CHANNEL_AXES or node.operation in arithmetic.long_products:
            found.update(_layer(planned, node, result, arithmetic))
        elif node.operation in TABLES | POOLS and node.operands and (source := _grid(planned, node.operands[0])):
            found[result] = (Requant("quotient", source),)
    # in a chip's symmetric mode, affine grids are those of values that cannot be negative
    affine = [name for name, config in planned.configs.items() if not config.scheme.symmetric]
    return Exact(found, frozenset(affine if is_symmetric else ()))


def _terms(planned: Planned, node: Node, result: str, arithmetic: Arithmetic) -> Mapping[str, tuple[Requant, ...]]:
    """Those of the terms of a sum or the parts of a concatenation; and of the sum, where all terms have one shift."""
    by_term: dict[str, str] = {}
    for operand in node.operands:
        own = planned.inputs.get((node.name, operand.slot), "")
        source = _grid(planned, operand)
        if own and source:
            by_term[own] = source
    if len(by_term) < 2 or len(by_term) != sum(bool(operand.value) for operand in node.operands):
        return {}
    is_sum = node.operation != "cat" and not arithmetic.rounds_terms
    rule, truncates = ("unrounded term" if is_sum else "term"), arithmetic.truncates
    sources = list(by_term.values())
    found = {}
    for own, source in by_term.items():
        # the shift that all terms share is that of the largest, so that each term has to know the others
        others = [other for other in sources if other != source] if is_sum else []
        found[own] = tuple(Requant(rule, name, result, 1, truncates) for name in (source, *others))
    if is_sum:
        found[result] = tuple(Requant("sum", name, "", 1, truncates) for name in sources)
    return found


def _product(planned: Planned, node: Node, result: str, arithmetic: Arithmetic) -> Mapping[str, tuple[Requant, ...]]:
    """That of the result of a product of two values, or of average pooling."""
    sources = [_grid(planned, operand) for operand in node.operands]
    count = pooled(planned.graph, node) if node.operation in POOLS else 1
    if not all(sources) or not count:
        return {}
    return {result: tuple(Requant("product", source, "", count, arithmetic.truncates) for source in sources)}


def _layer(planned: Planned, node: Node, result: str, arithmetic: Arithmetic) -> Mapping[str, tuple[Requant, ...]]:
    """That of the result of a layer, or of a product of two values."""
    weight = _weight(planned, node)
    values = [_grid(planned, operand) for operand in node.operands if operand.value]
    sources = [*values, *([weight] if weight else [])]
    if len(sources) != 2 or not all(sources):
        return {}
    rule = "layer" if arithmetic.shifts == 1 else "layer in two shifts"
    axis = CHANNEL_AXES.get(node.operation, -1)
    return {result: tuple(Requant(rule, source, axis=axis) for source in sources)}


def _weight(planned: Planned, node: Node) -> str:
    """The quantizer of a layer's weight, if it has one step, or one for each output channel; else empty."""
    parameters = (node.parameters.get("weight", ""), *(operand.parameter for operand in node.operands))
    names = [weight_quantizer(parameter) for parameter in parameters if parameter]
    acting = [name for name in names if planned.acts(name)]
    if len(acting) != 1:
        return ""
    is_fitting = planned.configs[acting[0]].scheme.granularity in (PerTensor(), PerChannel(0))
    return acting[0] if is_fitting else ""


def _grid(planned: Planned, operand: Operand) -> str:
    """The quantizer on whose grid an operand is; empty without one."""
    if not operand.value:
        return ""
    name = planned.behind(on_grid_of(planned.graph, operand.value))
    return name if planned.acts(name) else ""


def pooled(graph: Graph, node: Node) -> int:
    """How many elements average pooling sums for each result; 0 where that is not known, or differs."""
    spatial = 1 if node.operation.endswith("1d") else 2
    if node.operation.startswith("adaptive"):
        before, after = node.operands[0].shape[-spatial:], graph.values[node.outputs[0]].shape[-spatial:]
        is_even = all(wide % narrow == 0 for wide, narrow in zip(before, after, strict=True))
        return prod(before) // prod(after) if is_even else 0
    options = node.options
    padding = options.get("padding", 0)
    is_padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    differs = options.get("ceil_mode") or (is_padded and not options.get("count_include_pad", True))
    if differs or options.get("divisor_override") is not None:
        return 0
    size = options.get("kernel_size", 0)
    return prod(size) if isinstance(size, tuple) else int(size) ** spatial
