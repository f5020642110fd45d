"""``CNN`` and ``Transformer``: the placement rules of the TPU chips (semantics.md 5.4)."""

from __future__ import annotations

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.names import value_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, Strategy
from sophq_func.numerics.scheme import override
from sophq_func.planning.strategies._base import floating_operands, is_tensor_input

MODULES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d)
OPERATIONS = frozenset(
    "abs adaptive_avg_pool2d add avg_pool2d cat celu clamp div elu gelu glu gumbel_softmax hardsigmoid hardswish "
    "interpolate layer_norm logsigmoid matmul max_pool2d mish mul prelu selu sigmoid silu softplus softshrink sub "
    "tanh".split()
)
"""What has its inputs quantized: module classes, and operations, be they modules or functions."""

NOT_SELECTED = frozenset(("floor_divide", "remainder", "type_as"))
"""Whose results are not quantized for the sake of those that take them."""

PASSED = frozenset(("relu", "relu6", "dropout", "flatten"))
"""What a value passes before it is quantized."""

TRANSFORMER_MODULES = (nn.Conv2d, nn.Linear)
TRANSFORMER_OPERATIONS = frozenset(("matmul",))
"""Whose inputs the strategy Transformer quantizes; all else it only observes."""

OBSERVED = Preset(override(observe_only=True), "strategy Transformer: no contraction reads it")

WEIGHTS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def is_passed(node: Node) -> bool:
    """Whether a value that feeds this node alone is quantized behind it."""
    return node.operation in PASSED


def is_quantized(node: Node, requests: Requests) -> bool:
    """Whether the lists above hold this node, or the config adds it to them."""
    return node.is_module(*MODULES, *requests.layers) or node.operation in OPERATIONS or requests.listed(node)


def requested_inputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """Pass A: inputs of quantized operations, unless they are the product in a ``mul`` that feeds an ``add``."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = requests.asks(node)
        if asked or (asked is None and is_quantized(node, requests) and not is_passed(node)):
            for value in floating_operands(graph, node):
                producer = graph.producer(value)
                merged = node.operation == "add" and producer.operation == "mul"
                lone = producer.kind == "input" and not is_tensor_input(graph, producer)
                if asked or not (merged or lone or producer.operation in NOT_SELECTED):
                    chosen.setdefault(value, f"input of {node.name}")
    return chosen


def requested_outputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """Pass B: results of quantized operations; where a passed operation follows, its result instead."""
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
    """Pass C: floating inputs of the model with more than one axis."""
    inputs = (node for node in graph if is_tensor_input(graph, node) and requests.asks(node) is not False)
    return {node.name: "input of the model" for node in inputs if graph.values[node.name].floating}


def transformer_inputs(graph: Graph, requests: Requests) -> dict[str, str]:
    """Pass D: inputs of convolutions, linear layers and matrix products."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = requests.asks(node)
        layer = node.is_module(*TRANSFORMER_MODULES, *requests.layers) or node.operation in TRANSFORMER_OPERATIONS
        if asked or (asked is None and (layer or requests.listed(node))):
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
    return chosen


def place_cnn(graph: Graph, requests: Requests) -> Placement:
    """Inputs and outputs of quantized operations, and the model's inputs."""
    return Placement(
        transformer_inputs(graph, requests)
        | model_inputs(graph, requests)
        | requested_outputs(graph, requests)
        | requested_inputs(graph, requests)
    )


def place_transformer(graph: Graph, requests: Requests) -> Placement:
    """Inputs of quantized operations and of the model; only those of contractions quantize, the rest observe."""
    quantized = transformer_inputs(graph, requests)
    chosen = quantized | model_inputs(graph, requests) | requested_inputs(graph, requests)
    return Placement(chosen, presets={value_quantizer(value): OBSERVED for value in chosen.keys() - quantized.keys()})


PLACEMENTS.add("CNN", Strategy(place_cnn, WEIGHTS, int4_inputs=True))
PLACEMENTS.add("Transformer", Strategy(place_transformer, WEIGHTS, int4_inputs=True))
