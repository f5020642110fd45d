"""``Layers``: quantizes weights and inputs of convolutions and linear layers, and nothing else.

The setting of the literature on quantization-aware training (LSQ, arXiv:1902.08153, among others): each such layer
multiplies integers; additions, norms, attention products and biases stay float. The input is quantized where the layer
reads it, behind views and pooling, once where several layers read one tensor.
"""

from __future__ import annotations

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.strategies import PLACEMENTS, Placement, Requests, Strategy
from sophq_func.core.operations import LAYERS
from sophq_func.planning.strategies._dataflow import MULTIPLIERS, choose, contracted, source_of

FUNCTIONS = LAYERS.keys() - {"embedding", "embedding_bag", "bilinear"}
"""Functions that count as layers: an embedding has no input to quantize, a bilinear layer two.

``MULTIPLIERS`` leave out the modules that call these.
"""

INPUT = ("0", "input")
"""Roles of the operand that a function multiplies with its weight, given by position or by keyword."""


def read(graph: Graph, node: Node, requests: Requests) -> list[Operand]:
    """The operands of a node that the strategy quantizes.

    An input is quantized as it is read, behind all that only moved it; a weight that the model computes, before that.
    """
    # A module reads its input first; its weight is a parameter, which is quantized without being chosen here.
    if node.is_module(*MULTIPLIERS, *requests.layers):
        return [operand for operand in node.operands[:1] if not operand.kind]
    if node.function in FUNCTIONS:
        operands = [operand for operand in node.operands if contracted(node, operand) and not operand.kind]
        return [operand if operand.role in INPUT else source_of(graph, operand) for operand in operands]
    return list(node.operands) if requests.listed(node) else []


def place_layers(graph: Graph, requests: Requests) -> Placement:
    """Quantize every operand that a layer multiplies with its weight."""
    return Placement(choose(graph, requests, read))


PLACEMENTS.add("Layers", Strategy(place_layers, MULTIPLIERS, functions=True, rounds_bias=False))
