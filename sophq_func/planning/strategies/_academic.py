"""``Academic``: the placement rules of the research target (semantics.md 5.5), whatever the strategy asked for.

Layers that read an input of the model, or make its result, have 8 bits in weight and input, whatever the config says
globally; rules may say otherwise (DoReFa and LSQ do the same; semantics.md 11, defect 44).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from sophq_func.capture.graph import Graph
from sophq_func.config.names import value_quantizer, weight_quantizer
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, Requests, Strategy
from sophq_func.numerics.scheme import override
from sophq_func.planning.strategies._base import floating_operands
from sophq_func.planning.strategies._tpu import WEIGHTS


def place_academic(graph: Graph, requests: Requests) -> Placement:
    """Inputs of linear layers and matrix products, and the results of matrix products."""
    chosen: dict[str, str] = {}
    for node in graph:
        asked = requests.asks(node)
        listed = node.is_module(nn.Linear, *requests.layers) or node.operation == "matmul" or requests.listed(node)
        if asked or (asked is None and listed):
            chosen.update({v: chosen.get(v, f"input of {node.name}") for v in floating_operands(graph, node)})
        if node.operation == "matmul":
            chosen.update({v: chosen.get(v, f"output of {node.name}") for v in node.outputs})
    return Placement(chosen, presets=dict(edges(graph, requests)))


def edges(graph: Graph, requests: Requests) -> Iterator[tuple[str, Preset]]:
    """8 bits for the weight and the input of the first and last layers."""
    for node in graph:
        values = floating_operands(graph, node)
        first = any(graph.producer(value).kind == "input" for value in values)
        last = any(graph.values[value].output for value in node.outputs)
        if node.is_module(*WEIGHTS, *requests.layers) and (first or last):
            preset = Preset(override(bits=8), f"{node.name} is {'a first' if first else 'a last'} layer")
            yield weight_quantizer(node.parameters.get("weight", "")), preset
            yield from ((value_quantizer(value), preset) for value in values)


PLACEMENTS.add("Academic", Strategy(place_academic, WEIGHTS, rounds_bias=False))
