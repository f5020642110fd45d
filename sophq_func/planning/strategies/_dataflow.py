"""``Dataflow``: quantizes operands of contractions, and tensors that are kept in memory between kernels, each once.

A call that only moves data (views, slices, dropout, max pooling) keeps values on their grid: the value before it is
quantized, and not again behind it. Quantized are

* each operand of a convolution, linear layer, matrix product, ``einsum`` or attention,
* both terms of an element-wise ``add``, ``sub`` or ``mul`` of two tensors of one shape (residual branches and gates; masks,
  biases and position tables are broadcast and stay as they are),
* what is concatenated, stacked, averaged or normalized.

Only values that depend on a weight or a floating input are quantized: masks and positions made in the forward stay as they
are. The results of softmax and sigmoid lie in [0, 1], so their range is fixed to that. Without a chip their grid is affine,
as a symmetric one would leave half of its codes unused. What the config says about observer or symmetry overrides both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from torch import nn

from sophq_func.capture.graph import REPARAMETRIZE, Graph, Node, Operand
from sophq_func.config.names import value_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, Strategy
from sophq_func.core.operations import ALL, CONSTANTS, CONTRACTIONS, DROPOUTS, MOVES
from sophq_func.numerics.scheme import override
from sophq_func.observers import fixed_range
from sophq_func.planning.strategies._base import derived, floating_operands

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

# Layers whose weights are quantized.
WEIGHTS = (*MULTIPLIERS, nn.Embedding, nn.EmbeddingBag, nn.Bilinear, nn.RNNBase, nn.RNNCellBase)


def contracted(node: Node, operand: Operand) -> bool:
    """Whether a node calls a function that multiplies an operand and sums the products."""
    roles = CONTRACTIONS.get(node.function, ())
    return roles == ALL or operand.role in roles


def is_own_weight(graph: Graph, node: Node, operand: Operand) -> bool:
    """Whether a node multiplies with a parameter that a module computes: a weight, which has a quantizer of its own."""
    computed = bool(operand.value) and graph.producer(operand.value).function == REPARAMETRIZE
    return computed and node.function in CONTRACTIONS


def computed_weights(graph: Graph, node: Node, derived: Collection[str]) -> list[Operand]:
    """The operands of a function that are computed from parameters, and are the weights of a product.

    They are those that a module computes as its own parameters, and of others the first: a second one is a value, as in
    attention whose queries, keys and values are all learned.

    Args:
      graph: fused.
      node: the call of the function.
      derived: names of the values that are computed from parameters alone.
    """
    found: list[Operand] = []
    has_other = False
    for operand in node.operands:
        source = source_of(graph, operand)
        if source.value not in derived or not contracted(node, operand) or operand.kind:
            continue
        is_own = is_own_weight(graph, node, source)
        if is_own or not has_other:
            found.append(operand)
        has_other = has_other or not is_own
    return found


CONTRACTING_MODULES = tuple(cls for cls in WEIGHTS if cls not in (nn.Embedding, nn.EmbeddingBag))
"""Layers whose inputs are quantized: an embedding reads indices."""

ELEMENTWISE = frozenset(("add", "sub", "mul"))
"""Operations on two tensors whose terms are quantized."""

STORED = frozenset(
    "cat stack adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d batch_norm "
    "group_norm instance_norm layer_norm rms_norm".split()
)
"""Operations whose first operand, or each tensor of a list, is quantized, as it is kept in memory."""

MOVING_MODULES = (nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
"""Modules that return elements of their first operand, or zeros, and so keep values on the grid."""

BOUNDED = frozenset(("sigmoid", "softmax", "hardsigmoid"))
"""Operations whose results lie in [0, 1] for all data, so that there is nothing to calibrate."""

WHY = "strategy Dataflow: lies in [0, 1]"
UNIT_RANGE = Preset(override(observer=fixed_range(lo=0.0, hi=1.0)), WHY, yields=True)
UNIT_RANGE_AFFINE = Preset(override(observer=fixed_range(lo=0.0, hi=1.0), symmetric=False), WHY, yields=True)


def moves(node: Node) -> bool:
    """Whether a node only moves data."""
    return node.operation in MOVES or node.operation in DROPOUTS or node.is_module(*MOVING_MODULES)


def moved(graph: Graph, operand: Operand) -> Operand | None:
    """The tensor that a call only moved to make an operand; ``None`` if the call did more.

    ``None`` also for a call that is told apart: what it selects from a value, for one of many experts, is another value.
    """
    if not operand.value:
        return None
    producer = graph.producer(operand.value)
    if not moves(producer) or not producer.operands:
        return None
    before = producer.operands[0]
    if before.value:
        # Converted from integers or booleans: the source has no grid that this could be on.
        return before if graph.values[before.value].floating and not producer.told_apart else None
    return before if before.parameter else None


def source_of(graph: Graph, operand: Operand) -> Operand:
    """The tensor from which an operand was only moved, by any number of calls."""
    while (before := moved(graph, operand)) is not None:
        operand = before
    return operand


def wanted(graph: Graph, node: Node, requests: Requests) -> list[Operand]:
    """The operands of a node that the strategy quantizes; complex and sparse ones stay float."""
    return [operand for operand in _of_interest(graph, node, requests) if not operand.kind]


def _of_interest(graph: Graph, node: Node, requests: Requests) -> list[Operand]:
    """The operands of a node that the strategy quantizes, whatever their numbers are."""
    if node.is_module(*CONTRACTING_MODULES, *requests.layers):
        # A bilinear layer multiplies two inputs, a cell of an RNN its input and its state.
        count = 2 if node.is_module(nn.Bilinear, nn.RNNCellBase) else 1
        return list(node.operands[:count])
    if node.function in CONTRACTIONS:
        return [operand for operand in node.operands if contracted(node, operand)]
    if node.operation in ELEMENTWISE:
        pair = [operand for operand in node.operands if operand.value]
        shapes = {graph.values[operand.value].shape for operand in pair}
        return pair if len(pair) == 2 and len(shapes) == 1 else []
    if node.operation in STORED:
        # Tensors of a list have the roles "tensors.0", "tensors.1" and so on.
        return [operand for operand in node.operands if operand.role.partition(".")[0] in ("0", "input", "tensors")]
    return list(node.operands) if requests.listed(node) else []


def signals(graph: Graph) -> frozenset[str]:
    """Names of the floating values that depend on a weight or a floating input; the others are masks and positions."""
    carrying: set[str] = set()
    for node in graph:
        is_source = node.kind == "input" or bool(node.parameters)
        depends = is_source or any(operand.parameter or operand.value in carrying for operand in node.operands)
        if depends and node.function not in CONSTANTS:
            values = [graph.values[value] for value in node.outputs]
            # Complex and sparse values are not quantized, and what is computed from them may be.
            carrying.update(value.name for value in values if value.floating or value.kind)
    return frozenset(value for value in carrying if graph.values[value].floating)


def choose(graph: Graph, requests: Requests, wanted: Callable[[Graph, Node, Requests], Iterable[Operand]]) -> dict[str, str]:
    """Values to quantize, each with the reason: operands that a strategy wants, and all operands where a rule asks for it.

    Args:
      graph: fused.
      requests: what the config says.
      wanted: from a graph, one of its nodes and the requests, to the operands that the strategy quantizes.
    """
    chosen: dict[str, str] = {}
    carrying = signals(graph)
    for node in graph:
        asked = requests.asks(node)
        if asked:
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
        elif asked is None:
            for operand in wanted(graph, node, requests):
                if operand.value in carrying and not is_own_weight(graph, node, operand):
                    chosen.setdefault(operand.value, f"operand of {node.name}")
    return chosen


def place_dataflow(graph: Graph, requests: Requests) -> Placement:
    """Quantize every wanted operand where it was made, before all that only moved it."""

    computed = derived(graph)

    def sources(graph: Graph, node: Node, requests: Requests) -> list[Operand]:
        # a weight has a quantizer of its own, at the call
        weights = computed_weights(graph, node, computed) if node.function in CONTRACTIONS else []
        return [source_of(graph, operand) for operand in wanted(graph, node, requests) if operand not in weights]

    chosen = choose(graph, requests, sources)
    preset = UNIT_RANGE_AFFINE if requests.free else UNIT_RANGE
    bounded = [value for value in chosen if graph.producer(value).last.operation in BOUNDED]
    return Placement(chosen, presets={value_quantizer(value): preset for value in bounded})


PLACEMENTS.add("Dataflow", Strategy(place_dataflow, WEIGHTS, functions=True))
