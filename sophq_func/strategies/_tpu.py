"""``CNN`` and ``Transformer``: the placement rules of the TPU chips (semantics.md 5.4)."""

from __future__ import annotations

from torch import nn

from sophq_func.graph import Graph, Node
from sophq_func.strategies._base import PLACEMENTS, Asks, Placement, Strategy, floating_operands, is_tensor_input

MODULES = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.BatchNorm2d,
    nn.PReLU,
    nn.Upsample,
    nn.Hardswish,
    nn.Sigmoid,
    nn.SiLU,
    nn.Tanh,
    nn.SELU,
    nn.LogSigmoid,
    nn.GELU,
    nn.GLU,
    nn.Mish,
    nn.Hardsigmoid,
    nn.Softshrink,
    nn.Softplus,
    nn.ELU,
    nn.CELU,
    nn.LayerNorm,
)
"""Modules whose inputs are quantized."""

FUNCTIONS = frozenset(
    "abs adaptive_avg_pool2d add cat celu clamp div elu gelu glu gumbel_softmax hardsigmoid hardswish interpolate "
    "layer_norm logsigmoid matmul mish mul selu sigmoid silu softplus softshrink sub tanh".split()
)
"""Functions whose inputs are quantized, by canonical name."""

PASSED_MODULES = (nn.ReLU, nn.ReLU6, nn.Dropout)
PASSED_FUNCTIONS = frozenset(("relu", "relu6", "flatten"))
"""What a value passes before it is quantized."""

TRANSFORMER_MODULES = (nn.Conv2d, nn.Linear)
TRANSFORMER_FUNCTIONS = frozenset(("matmul",))
"""Whose inputs the strategy Transformer quantizes; all else it only observes."""

WEIGHTS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def is_passed(node: Node) -> bool:
    """Whether a value that feeds this node alone is quantized behind it."""
    return node.is_module(*PASSED_MODULES) or node.function in PASSED_FUNCTIONS


def is_quantized(node: Node) -> bool:
    """Whether the lists above hold this node."""
    return node.is_module(*MODULES) or node.function in FUNCTIONS


def requested_inputs(graph: Graph, asks: Asks) -> dict[str, str]:
    """Pass A: inputs of quantized operations, unless they are the product in a ``mul`` that feeds an ``add``."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = asks(node)
        if asked or (asked is None and is_quantized(node) and not is_passed(node)):
            for value in floating_operands(graph, node):
                producer = graph.producer(value)
                merged = node.function == "add" and producer.function == "mul"
                lone = producer.kind == "input" and not is_tensor_input(graph, producer)
                if asked or not (merged or lone or producer.function == "type_as"):
                    chosen.setdefault(value, f"input of {node.name}")
    return chosen


def requested_outputs(graph: Graph, asks: Asks) -> dict[str, str]:
    """Pass B: results of quantized operations; where a passed operation follows, its result instead."""
    chosen: dict[str, str] = {}
    for node in graph:
        if asks(node) is False or not is_quantized(node):
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


def model_inputs(graph: Graph, asks: Asks) -> dict[str, str]:
    """Pass C: floating inputs of the model with more than one axis."""
    inputs = (node for node in graph if is_tensor_input(graph, node) and asks(node) is not False)
    return {node.name: "input of the model" for node in inputs if graph.values[node.name].floating}


def transformer_inputs(graph: Graph, asks: Asks) -> dict[str, str]:
    """Pass D: inputs of convolutions, linear layers and matrix products."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = asks(node)
        listed = node.is_module(*TRANSFORMER_MODULES) or node.function in TRANSFORMER_FUNCTIONS
        if asked or (asked is None and listed):
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
    return chosen


def place_cnn(graph: Graph, asks: Asks) -> Placement:
    """Inputs and outputs of quantized operations, and the model's inputs."""
    return Placement(
        transformer_inputs(graph, asks)
        | model_inputs(graph, asks)
        | requested_outputs(graph, asks)
        | requested_inputs(graph, asks)
    )


def place_transformer(graph: Graph, asks: Asks) -> Placement:
    """Inputs of quantized operations and of the model; only those of contractions quantize, the rest observe."""
    quantized = transformer_inputs(graph, asks)
    chosen = quantized | model_inputs(graph, asks) | requested_inputs(graph, asks)
    return Placement(chosen, frozenset(chosen.keys() - quantized.keys()))


PLACEMENTS.add("CNN", Strategy(place_cnn, WEIGHTS, int4_inputs=True))
PLACEMENTS.add("Transformer", Strategy(place_transformer, WEIGHTS, int4_inputs=True))
