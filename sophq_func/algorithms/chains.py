"""Layers between which a factor for each channel can move without changing the model, read off a trace.

A function ``f`` is positively homogeneous if ``f(c x) = c f(x)`` for ``c > 0``: ReLU is, and so are linear functions of one
channel, such as average pooling; ReLU6 and sigmoid are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from sophq_func.algorithms._layers import SPATIAL, biases_of
from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.core.operations import DROPOUTS
from sophq_func.model.weight_quantizer import WeightQuantizer

HOMOGENEOUS = DROPOUTS | frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d contiguous identity interpolate leaky_relu max_pool1d max_pool2d "
    "max_pool3d prelu relu".split()
)
"""Operations that compute each channel from the same channel, and are positively homogeneous."""

HOMOGENEOUS_MODULES = (nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
"""The same, of modules that no function does."""

FLATTENING = frozenset(("flatten", "reshape", "view"))
"""Operations that may lay the places of each channel behind each other."""


class Reader(NamedTuple):
    """A layer that reads the channels of another one.

    Attributes:
      quantizer: of its weight.
      places: how many of its input channels come from each channel of the other layer: the places that were flattened.
    """

    quantizer: WeightQuantizer
    places: int


class Chain(NamedTuple):
    """A layer, and those that alone read its output.

    Attributes:
      first: quantizer of the layer's weight.
      bias: canonical name of its bias; empty without.
      readers: the layers that read its output.
      nodes: names of the calls from the first layer to the last one before a reader.
    """

    first: WeightQuantizer
    bias: str
    readers: tuple[Reader, ...]
    nodes: frozenset[str]


class Left(NamedTuple):
    """A layer whose channels cannot be scaled.

    Attributes:
      name: quantizer of its weight.
      because: the reason.
    """

    name: str
    because: str


class UnscalableError(Exception):
    """Why a chain ends somewhere else than at layers."""


def chains_of(graph: Graph, weights: Mapping[str, WeightQuantizer]) -> tuple[list[Chain], list[Left]]:
    """The chains of a model, in execution order; and the layers from which none starts, with the reason.

    Args:
      graph: of the float model, not fused.
      weights: by quantizer.
    """
    uses = _uses(graph)
    by_parameter = {weight.site.parameter: weight for weight in weights.values()}
    chains, left = [], []
    for weight in weights.values():
        try:
            chains.append(_chain(graph, weight, by_parameter, uses))
        except UnscalableError as reason:
            left.append(Left(weight.site.quantizer, str(reason)))
    return chains, left


def _uses(graph: Graph) -> dict[str, list[Node]]:
    """By parameter, the calls that read it."""
    uses: dict[str, list[Node]] = {}
    for node in graph:
        for name in {*node.parameters.values(), *(operand.parameter for operand in node.operands)} - {""}:
            uses.setdefault(name, []).append(node)
    return uses


def _chain(
    graph: Graph, first: WeightQuantizer, by_parameter: Mapping[str, WeightQuantizer], uses: Mapping[str, list[Node]]
) -> Chain:
    bias = first.site.bias or biases_of(graph).get(first.site.parameter, "")
    node = _only_call(first, bias, uses)
    value = _only_output(graph, node)
    nodes = {node.name}
    following = graph.users(value)
    is_normed = len(following) == 1 and following[0][0].operation == "batch_norm"
    if is_normed and first.norm is None:
        raise UnscalableError("the BatchNorm behind it is not folded into its weight, and takes any factor back")
    if is_normed:
        node = following[0][0]
        nodes.add(node.name)
        value = _only_output(graph, node)
    readers = tuple(_readers(graph, value, 1, nodes, by_parameter, uses))
    if not readers:
        raise UnscalableError("nothing reads its output")
    return Chain(first, bias, readers, frozenset(nodes))


def _only_call(weight: WeightQuantizer, bias: str, uses: Mapping[str, list[Node]]) -> Node:
    """The call of a layer that is called once, and whose tensors no other call reads."""
    if weight.site.operation not in SPATIAL or not isinstance(weight.site.axis, int):
        raise UnscalableError(f"{weight.site.operation or 'its operation'} is no linear layer or convolution")
    own = [name for name in (weight.site.parameter, bias) if name]
    calls = [node for name in own for node in uses.get(name, [])]
    if len({node.name for node in calls}) != 1:
        raise UnscalableError("several calls read its weight or bias" if calls else "this run does not call it")
    return calls[0]


def _only_output(graph: Graph, node: Node) -> str:
    """The value that a call makes, unless the model returns it."""
    if len(node.outputs) != 1:
        raise UnscalableError(f"{node.name} makes several tensors")
    if graph.values[node.outputs[0]].output:
        raise UnscalableError("the model returns its output")
    return node.outputs[0]


def _readers(
    graph: Graph,
    value: str,
    places: int,
    nodes: set[str],
    by_parameter: Mapping[str, WeightQuantizer],
    uses: Mapping[str, list[Node]],
) -> Iterator[Reader]:
    """The layers that read a value, behind homogeneous calls, whose names are added to ``nodes``."""
    for node, operand in graph.users(value):
        reader = _reader(node, operand, places, by_parameter, uses)
        if reader is not None:
            yield reader
            continue
        more = _flattened(graph, node, value)
        is_homogeneous = node.operation in HOMOGENEOUS or node.is_module(*HOMOGENEOUS_MODULES)
        if more is None and not is_homogeneous:
            raise UnscalableError(
                f"its output reaches {node.name} ({node.operation or node.kind}), which a factor does not pass"
            )
        nodes.add(node.name)
        yield from _readers(graph, _only_output(graph, node), places * (more or 1), nodes, by_parameter, uses)


def _reader(
    node: Node, operand: Operand, places: int, by_parameter: Mapping[str, WeightQuantizer], uses: Mapping[str, list[Node]]
) -> Reader | None:
    """The layer that a call is, if it multiplies the operand with a weight of the plan."""
    read = [*node.parameters.values(), *(other.parameter for other in node.operands)]
    weight = next((by_parameter[name] for name in read if name in by_parameter), None)
    if weight is None or operand.slot != 0 or node.operation not in SPATIAL:
        return None
    if len({other.name for other in uses[weight.site.parameter]}) != 1 or not isinstance(weight.site.axis, int):
        raise UnscalableError(f"several calls read the weight of {node.name}, behind it")
    return Reader(weight, places)


def _flattened(graph: Graph, node: Node, value: str) -> int | None:
    """How many places of each channel a call lays behind each other; ``None`` for other calls.

    Seen by shapes: ``(N, C, ...)`` becomes ``(N, C p)``.
    """
    if node.operation not in FLATTENING or len(node.outputs) != 1:
        return None
    before, after = graph.values[value].shape, graph.values[node.outputs[0]].shape
    if len(before) < 3 or len(after) != 2 or before[0] != after[0] or after[1] % before[1]:
        return None
    return after[1] // before[1]
