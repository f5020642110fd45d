"""``CNN`` and ``Transformer``: the placement rules of sophgo-mq for TPU chips.

sophgo-mq collects the values in passes over the graph; each pass is a function here.
"""

from __future__ import annotations

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.names import value_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, Strategy
from sophq_func.numerics.scheme import override
from sophq_func.planning.strategies._base import floating_operands, is_tensor_input

# Module classes, and operations of modules or functions, whose inputs are quantized.
MODULES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
OPERATIONS = frozenset(
    "abs adaptive_avg_pool2d add avg_pool2d cat celu clamp div elu gelu glu gumbel_softmax hardsigmoid hardswish "
    "interpolate layer_norm logsigmoid matmul max_pool2d mish mul prelu selu sigmoid silu softplus softshrink sub "
    "tanh".split()
)

NOT_SELECTED = frozenset(("floor_divide", "remainder", "type_as"))
"""Operations whose results are not quantized as inputs of others."""

PASSED = frozenset(("relu", "relu6", "dropout", "flatten"))
"""Operations behind which a value is quantized, instead of before."""

# Operations whose inputs the strategy Transformer quantizes, beside those of layers; other values it only observes.
TRANSFORMER_OPERATIONS = frozenset(("matmul",))

OBSERVED = override(observe_only=True)
UNREAD = "strategy Transformer: no contraction reads it"

WEIGHTS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
"""Module classes whose weights are quantized."""


def is_passed(node: Node) -> bool:
    """Whether a value that a node takes is quantized behind the node."""
    return node.operation in PASSED


def is_quantized(node: Node, requests: Requests) -> bool:
    """Whether the lists above hold this node, or the config adds it to them."""
    return node.is_module(*MODULES, *requests.layers) or node.operation in OPERATIONS or requests.listed(node)


def requested_inputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """The inputs of quantized operations, without those of :func:`is_skipped`."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = requests.asks(node)
        if asked or (asked is None and is_quantized(node, requests) and not is_passed(node)):
            for value in floating_operands(graph, node):
                if asked or not is_skipped(graph, node, graph.producer(value)):
                    chosen.setdefault(value, f"input of {node.name}")
    return chosen


def is_skipped(graph: Graph, node: Node, producer: Node) -> bool:
    """Whether the result of a node is not quantized as an input of another one.

    Args:
      graph: fused.
      node: the node that takes the value.
      producer: the node that makes it.
    """
    # sophgo-mq counts on the two to be merged to one operation.
    is_multiply_add = node.operation == "add" and producer.operation == "mul"
    is_vector_input = producer.kind == "input" and not is_tensor_input(graph, producer)
    return is_multiply_add or is_vector_input or producer.operation in NOT_SELECTED


def requested_outputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """The results of quantized operations; where a passed operation follows, its result instead."""
    chosen: dict[str, str] = {}
    for node in graph:
        if requests.asks(node) is False or not is_quantized(node, requests):
            continue
        for value in node.outputs:
            for user, _ in graph.users(value):
                if is_passed(user):
                    chosen.update({v: chosen.get(v, f"output of {node.name} behind {user.name}") for v in user.outputs})
                else:
                    chosen.setdefault(value, f"output of {node.name}")
            if graph.values[value].output:
                chosen.setdefault(value, f"output of {node.name}")
    return {value: why for value, why in chosen.items() if graph.values[value].floating}


def model_inputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """The floating inputs of the model with more than one axis."""
    inputs = [node for node in graph if is_tensor_input(graph, node) and requests.asks(node) is not False]
    return {node.name: "input of the model" for node in inputs if graph.values[node.name].floating}


def is_fused_away(node: Node) -> bool:
    """Whether a layer is fused with a BatchNorm, to a class that sophgo-mq's strategy Transformer does not list.

    Its list compares classes, not their bases.
    """
    return node.is_module(nn.Conv2d, nn.Linear) and node.norm is not None


def transformer_inputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """The inputs of matrix products, and of convolutions and linear layers unless :func:`is_fused_away`."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = requests.asks(node)
        is_layer = node.is_module(nn.Conv2d, nn.Linear) and not is_fused_away(node)
        is_added = node.is_module(*requests.layers) or requests.listed(node)
        is_listed = is_layer or is_added or node.operation in TRANSFORMER_OPERATIONS
        if asked or (asked is None and is_listed):
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
    return chosen


def place_cnn(graph: Graph, requests: Requests) -> Placement:
    """Quantize inputs and results of the operations in the list, and the inputs of the model."""
    # Where passes agree on a value, the last one names the reason.
    return Placement(
        transformer_inputs(graph, requests)
        | model_inputs(graph, requests)
        | requested_outputs(graph, requests)
        | requested_inputs(graph, requests)
    )


def place_transformer(graph: Graph, requests: Requests) -> Placement:
    """Quantize inputs of convolutions, linear layers and matrix products; observe the other inputs in the list.

    As in sophgo-mq, the input of a layer that is fused with a BatchNorm counts among the others.
    """
    quantized = transformer_inputs(graph, requests)
    chosen = quantized | model_inputs(graph, requests) | requested_inputs(graph, requests)
    observed = chosen.keys() - quantized.keys()
    presets = {value_quantizer(value): Preset(OBSERVED, why_observed(graph, value)) for value in observed}
    return Placement(chosen, presets=presets)


def why_observed(graph: Graph, value: str) -> str:
    """Why the strategy Transformer only observes a value, in words."""
    fused = next((user for user, _ in graph.users(value) if is_fused_away(user)), None)
    if fused is None or fused.type is None:
        return UNREAD
    return f"strategy Transformer: {fused.name} is fused to a {fused.type.__name__}, which is not on its list"


PLACEMENTS.add("CNN", Strategy(place_cnn, WEIGHTS, int4_inputs=True))
PLACEMENTS.add("Transformer", Strategy(place_transformer, WEIGHTS, int4_inputs=True))
