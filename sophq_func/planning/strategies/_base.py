"""Questions that several strategies ask of a graph."""

from __future__ import annotations

from sophq_func.capture.graph import Graph, Node


def floating_operands(graph: Graph, node: Node) -> list[str]:
    """The floating values that a node takes; parameters and constants are not values."""
    return [o.value for o in node.operands if o.value and graph.values[o.value].floating]


def is_tensor_input(graph: Graph, node: Node) -> bool:
    """Whether a node is an input of the model with more than one axis (semantics.md 5.4, pass C)."""
    return node.kind == "input" and len(graph.values[node.name].shape) > 1
