"""``Dataflow``: operands of every contraction, and the tensors that stay in memory between kernels, once each.

What only moves data (views, slices, dropout, max pooling) passes a quantizer through: the value before it is quantized,
and nothing behind it again. Quantized are

* each operand of a convolution, linear layer, matrix product, ``einsum`` or attention,
* both terms of an element-wise ``add``, ``sub`` or ``mul`` of two tensors of one shape (residual branches and gates; masks,
  biases and position tables are broadcast and stay as they are),
* what is concatenated, stacked, averaged or normalized.

Only what comes from a weight or a floating input is: masks and positions made in the forward stay as they are.
What lies in [0, 1] by its nature (softmax, sigmoid) has that range, and where no chip is asked for an affine grid, unless
the config says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import value_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, Strategy
from sophq_func.core.operations import ALL, CONTRACTIONS, DROPOUTS, MOVES
from sophq_func.numerics.scheme import override
from sophq_func.observers import fixed_range
from sophq_func.planning.strategies._base import floating_operands

MULTIPLIERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Layers that multiply one input with a weight."""

WEIGHTS = (*MULTIPLIERS, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def contracted(node: Node, operand: Operand) -> bool:
    """Whether a function multiplies and sums this operand."""
    roles = CONTRACTIONS.get(node.function, ())
    return roles == ALL or operand.role in roles


CONTRACTING_MODULES = tuple(cls for cls in WEIGHTS if cls not in (nn.Embedding, nn.EmbeddingBag))

ELEMENTWISE = frozenset(("add", "sub", "mul"))
STORED = frozenset(
    "cat stack adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm "
    "group_norm instance_norm layer_norm rms_norm".split()
)
"""What reads its first operand, or each of a list, from memory."""

MOVING_MODULES = (nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
"""What returns elements of its first operand (or zeros), and so keeps them on the grid."""

BOUNDED = frozenset(("sigmoid", "softmax", "hardsigmoid"))
"""What lies in [0, 1] whatever the data, so that there is nothing to calibrate."""

WHY = "strategy Dataflow: lies in [0, 1]"
UNIT_RANGE = Preset(override(observer=fixed_range(lo=0.0, hi=1.0)), WHY, yields=True)
UNIT_RANGE_AFFINE = Preset(override(observer=fixed_range(lo=0.0, hi=1.0), symmetric=False), WHY, yields=True)


def moves(node: Node) -> bool:
    """Whether a node only moves data."""
    return node.operation in MOVES or node.operation in DROPOUTS or node.is_module(*MOVING_MODULES)


def moved(graph: Graph, operand: Operand) -> Operand | None:
    """The tensor whose data an operand has, if the call that made the operand only moved them; else ``None``."""
    if not operand.value:
        return None
    producer = graph.producer(operand.value)
    if not moves(producer) or not producer.operands:
        return None
    before = producer.operands[0]
    if before.value:
        # Converted from integers or booleans: the source has no grid that this could be on.
        return before if graph.values[before.value].floating else None
    return before if before.parameter else None


def source_of(graph: Graph, operand: Operand) -> Operand:
    """Where the data of an operand comes from, before everything that only moved it."""
    while (before := moved(graph, operand)) is not None:
        operand = before
    return operand


def wanted(graph: Graph, node: Node, requests: Requests) -> list[Operand]:
    """The operands of a node that ought to be on a grid."""
    if node.is_module(*CONTRACTING_MODULES, *requests.layers):
        return list(node.operands[: 2 if node.is_module(nn.Bilinear, nn.RNNCellBase) else 1])
    if node.function in CONTRACTIONS:
        return [operand for operand in node.operands if contracted(node, operand)]
    if node.operation in ELEMENTWISE:
        pair = [o for o in node.operands if o.value]
        shapes = {graph.values[o.value].shape for o in pair}
        return pair if len(pair) == 2 and len(shapes) == 1 else []
    if node.operation in STORED:
        return [o for o in node.operands if o.role.partition(".")[0] in ("0", "input", "tensors")]
    return list(node.operands) if requests.listed(node) else []


def signals(graph: Graph) -> frozenset[str]:
    """Names of the floating values that come from a weight or a floating input; the others are masks and positions."""
    found: set[str] = set()
    for node in graph:
        fed = node.kind == "input" or node.parameters or any(o.parameter or o.value in found for o in node.operands)
        found.update(value for value in node.outputs if fed and graph.values[value].floating)
    return frozenset(found)


def choose(graph: Graph, requests: Requests, wanted: Callable[[Graph, Node, Requests], Iterable[Operand]]) -> dict[str, str]:
    """Values that are the wanted operands of some node, or any operand of one that asks; each with why."""
    chosen: dict[str, str] = {}
    carrying = signals(graph)
    for node in graph:
        asked = requests.asks(node)
        if asked:
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
        elif asked is None:
            for operand in wanted(graph, node, requests):
                if operand.value in carrying:
                    chosen.setdefault(operand.value, f"operand of {node.name}")
    return chosen


def place_dataflow(graph: Graph, requests: Requests) -> Placement:
    """Every wanted operand, at its source."""
    chosen = choose(graph, requests, lambda *call: (source_of(graph, operand) for operand in wanted(*call)))
    bounded = (value for value in chosen if graph.producer(value).last.operation in BOUNDED)
    known = UNIT_RANGE_AFFINE if requests.free else UNIT_RANGE
    return Placement(chosen, presets={value_quantizer(value): known for value in bounded})


PLACEMENTS.add("Dataflow", Strategy(place_dataflow, WEIGHTS, functions=True))
