"""Functions of a graph that several strategies use."""

from __future__ import annotations

from collections.abc import Callable

from sophq_func.capture.graph import Graph, Node
from sophq_func.core.operations import CONSTANTS


def floating_operands(graph: Graph, node: Node) -> list[str]:
    """Names of the floating values that a node takes. Parameters and constants are no values."""
    return [o.value for o in node.operands if o.value and graph.values[o.value].floating]


def reached(graph: Graph, is_source: Callable[[Node], bool]) -> frozenset[str]:
    """Names of the values that depend on the numbers of some calls or inputs.

    Args:
      graph: traced, fused or not.
      is_source: whether a call or input is one of them.
    """
    found: set[str] = set()
    for node in graph:
        if node.function not in CONSTANTS and (is_source(node) or any(o.value in found for o in node.operands)):
            found.update(node.outputs)
    return frozenset(found)


def derived(graph: Graph) -> frozenset[str]:
    """Names of the values that are computed from parameters alone."""
    return reached(graph, has_parameters) - reached(graph, lambda node: node.kind == "input")


def has_parameters(node: Node) -> bool:
    """Whether a call takes a parameter or a buffer, or is that of a module that has one."""
    return bool(node.parameters) or any(operand.parameter for operand in node.operands)


def constants(graph: Graph) -> frozenset[str]:
    """Names of the values that are made of :data:`~sophq_func.core.operations.CONSTANTS` alone, such as zeros."""
    found: set[str] = set()
    for node in graph:
        is_made_of_them = bool(node.operands) and all(operand.value in found for operand in node.operands)
        if node.function in CONSTANTS or (is_made_of_them and not node.parameters):
            found.update(node.outputs)
    return frozenset(found)


def is_tensor_input(graph: Graph, node: Node) -> bool:
    """Whether a node is an input of the model with more than one axis: sophgo-mq does not quantize the others."""
    return node.kind == "input" and len(graph.values[node.name].shape) > 1
