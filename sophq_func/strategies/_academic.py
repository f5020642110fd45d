"""``Academic``: the placement rules of the research target (semantics.md 5.5), whatever the strategy asked for."""

from __future__ import annotations

from torch import nn

from sophq_func.graph import Graph
from sophq_func.strategies._base import PLACEMENTS, Asks, Placement, Strategy, floating_operands
from sophq_func.strategies._tpu import WEIGHTS


def place_academic(graph: Graph, asks: Asks) -> Placement:
    """Inputs of linear layers and matrix products, and the results of matrix products."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = asks(node)
        if asked or (asked is None and (node.is_module(nn.Linear) or node.function == "matmul")):
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
        if node.function == "matmul":
            chosen.update({v: chosen.get(v, f"output of {node.name}") for v in node.outputs})
    return Placement(chosen)


PLACEMENTS.add("Academic", Strategy(place_academic, WEIGHTS, rounds_bias=False))
