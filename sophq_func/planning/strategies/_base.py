"""Functions of a graph that several strategies use."""

from __future__ import annotations

from sophq_func.capture.graph import Graph, Node


def floating_operands(graph: Graph, node: Node) -> list[str]:
    """Names of the floating values that a node takes. Parameters and constants are no values."""
    return [o.value for o in node.operands if o.value and graph.values[o.value].floating]


def is_tensor_input(graph: Graph, node: Node) -> bool:
    """Whether a node is an input of the model with more than one axis: sophgo-mq does not quantize the others."""
    return node.kind == "input" and len(graph.values[node.name].shape) > 1
