"""``Chip``: the values that a chip keeps as 8-bit integers, on the grids that its compiler gives them.

The compiler keeps the operands and the result of each integer operation in 8 bits. What only moves values keeps their grid,
a ReLU is computed with the operation before it. Values that cannot be negative have unsigned codes where the chip has
such (``Arithmetic.unsigned``); weights have codes from -127 to 127; sigmoid and softmax have the range [0, 1].

The terms of a sum and the parts of a concatenation get quantizers of their own, as the chip brings each of them onto the
grid of the result. Where such integers come from, ``planning/requantizing.py`` finds out.

Source: the files to which tpu-mlir 1.30 lowers networks, and its interpreter; see ``docs/chips.md``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.chips import Arithmetic
from sophq_func.config.names import input_quantizer, value_quantizer, weight_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, SharedInput, Strategy
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.fake_quantize import fixed
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.scheme import override
from sophq_func.observers import fixed_range
from sophq_func.planning.strategies._base import floating_operands
from sophq_func.planning.strategies._dataflow import WEIGHTS, moves, signals

TABLES = frozenset("elu gelu hardsigmoid hardswish mish sigmoid silu softplus tanh".split())
"""Activations that are computed as tables of a result for each of the 256 codes."""

INTEGER = TABLES | frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d add avg_pool1d avg_pool2d batch_norm bmm cat conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d interpolate leaky_relu linear matmul mul prelu sub".split()
)
"""Operations whose operands and result are 8-bit integers."""

RELUS = frozenset(("relu", "relu6"))
"""Operations that the chip computes together with the one before: they change only what is below 0, or saturates."""

MAX_POOLS = frozenset(("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"))

BOUNDED = frozenset(("sigmoid", "softmax"))
"""Operations for whose results the compiler takes the range [0, 1], whatever its table says."""

NEVER_NEGATIVE = RELUS | BOUNDED | {"hardsigmoid"}

KEEP_SIGN = frozenset("adaptive_avg_pool1d adaptive_avg_pool2d add avg_pool1d avg_pool2d cat interpolate mul".split())
"""Operations that give nothing negative where no operand is negative."""

TERM_BITS = 16
"""Wide enough for a term, at most 127 times a code of 8 bits after the shift; the sum of terms is what saturates."""


def keeps_grid(graph: Graph, node: Node) -> bool:
    """Whether the result of a call is on the grid of its first operand: it moves values, or is a ReLU behind max pooling.

    Such a ReLU is computed with the pooling, which cannot change the grid. So is a ReLU whose operand other calls take.
    """
    if moves(node):
        return True
    if node.operation not in RELUS or not node.operands or not node.operands[0].value:
        return False
    operand = node.operands[0]
    is_pooled = graph.producer(operand.value).operation in MAX_POOLS
    return is_pooled or not is_taken_once(graph, operand.value)


def is_taken_once(graph: Graph, value: str) -> bool:
    """Whether one call alone takes a value."""
    return len(graph.users(value)) == 1 and not graph.values[value].output


def on_grid_of(graph: Graph, value: str) -> str:
    """The value whose grid another one is on: itself, or the one from which calls that keep the grid made it."""
    while True:
        producer = graph.producer(value)
        before = producer.operands[0] if producer.operands else None
        if before is None or not before.value or producer.told_apart or not keeps_grid(graph, producer):
            return value
        if not graph.values[before.value].floating:
            return value
        value = before.value


def stored(graph: Graph, value: str) -> str:
    """The value in whose place the chip stores a result: that of a ReLU that alone takes it, else itself."""
    if not is_taken_once(graph, value):
        return value
    user, _ = graph.users(value)[0]
    return user.outputs[0] if user.operation in RELUS and not keeps_grid(graph, user) else value


def is_integer(node: Node, requests: Requests) -> bool:
    """Whether a call computes with integers."""
    is_layer = node.is_module(*WEIGHTS, *requests.layers) and not node.is_module(nn.Embedding, nn.EmbeddingBag)
    return is_layer or node.operation in INTEGER or node.function in CONTRACTIONS or requests.listed(node)


def is_non_negative(graph: Graph, value: str) -> bool:
    """Whether a value cannot hold a number below 0, whatever the inputs of the model are."""
    node = graph.producer(on_grid_of(graph, value))
    if node.last.operation in NEVER_NEGATIVE:
        return True
    values = floating_operands(graph, node)
    has_only_values = len(values) == len(node.operands) > 0
    return node.operation in KEEP_SIGN and has_only_values and all(is_non_negative(graph, v) for v in values)


def place_chip(graph: Graph, requests: Requests) -> Placement:
    """Quantize operands and results of integer operations, and each term of a sum on its way to the grid of the sum."""
    arithmetic = requests.arithmetic
    assert arithmetic is not None, "a config refuses chips whose arithmetic is not known"
    chosen: dict[str, str] = {}
    inputs: dict[str, SharedInput] = {}
    carrying = signals(graph)
    for node in graph:
        asked = requests.asks(node)
        if asked is False or not (asked or is_integer(node, requests)):
            continue
        for value in floating_operands(graph, node):
            source = on_grid_of(graph, value)
            if source in carrying:
                chosen.setdefault(source, f"operand of {node.name}")
        for value in node.outputs:
            if value in carrying:
                chosen.setdefault(stored(graph, value), f"result of {node.name}")
        if node.operation in arithmetic.terms:
            inputs.update(terms(node, [o for o in node.operands if o.value in carrying]))
    presets = dict(value_presets(graph, chosen, requests)) | dict(weight_presets(graph, arithmetic))
    presets |= dict.fromkeys(inputs, TERM)
    return Placement(chosen, inputs=inputs, presets=presets)


TERM = Preset(
    override(bits=TERM_BITS, symmetric=True, fake_quantize=fixed()),
    "strategy Chip: a term on the grid of the result",
    inner=True,
)
"""Its step is that of the result, so that there is nothing to learn."""


def terms(node: Node, operands: list[Operand]) -> Iterator[tuple[str, SharedInput]]:
    """The quantizers on the operands of a sum or a concatenation; a single one, with a constant beside it, has none."""
    if len(operands) < 2:
        return
    for number, operand in enumerate(operands):
        why = f"term of {node.name}, which the chip brings onto the grid of the result"
        yield input_quantizer(node.name, number), SharedInput(node.name, ((node.name, operand.slot),), why)


def value_presets(graph: Graph, chosen: dict[str, str], requests: Requests) -> Iterator[tuple[str, Preset]]:
    """What the compiler decides about the grids of values."""
    arithmetic = requests.arithmetic
    assert arithmetic is not None
    unit = fixed_range(lo=0.0, hi=1.0)
    for value in chosen:
        name = value_quantizer(value)
        is_bounded = graph.producer(value).last.operation in BOUNDED
        if not requests.symmetric:
            if is_bounded:
                yield name, Preset(override(observer=unit), UNIT)
        elif arithmetic.unsigned and is_non_negative(graph, value):
            unsigned = Preset(override(symmetric=False), UNSIGNED, yields=True)
            yield name, Preset(override(observer=unit, symmetric=False), UNIT) if is_bounded else unsigned
        elif is_bounded:
            # step 1 / 127, as the compiler has it: a grid with -128 would have 1 / 127.5
            yield name, Preset(override(observer=unit, symmetric_range=True), UNIT)


UNIT = "strategy Chip: the compiler takes the range [0, 1]"
UNSIGNED = "strategy Chip: never negative, so its codes are unsigned"
NARROW = "strategy Chip: codes of weights from -127 to 127, as the compiler has them"
PER_TENSOR = "strategy Chip: codes of weights from -127 to 127, and one scale for a linear layer, as the compiler has them"


def weight_presets(graph: Graph, arithmetic: Arithmetic) -> Iterator[tuple[str, Preset]]:
    """What the compiler decides about the grids of weights."""
    narrow = Preset(override(symmetric_range=True), NARROW, yields=True)
    per_tensor = Preset(override(symmetric_range=True, granularity=PerTensor()), PER_TENSOR, yields=True)
    for node in graph:
        is_limited = node.operation == "linear" and not arithmetic.linear_channels
        names = {node.parameters.get("weight", ""), *(operand.parameter for operand in node.operands)} - {""}
        yield from ((weight_quantizer(name), per_tensor if is_limited else narrow) for name in names)


PLACEMENTS.add("Chip", Strategy(place_chip, WEIGHTS, functions=True, exact=True))
