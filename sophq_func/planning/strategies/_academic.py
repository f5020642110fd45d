"""``Academic``: the placement of sophgo-mq's target for research, which is a chip by name only.

A layer that reads an input of the model, or makes its result, has 8 bits in weight and input, whatever the default configs
say; rules override that. DoReFa (arXiv:1606.06160) and LSQ (arXiv:1902.08153) do the same. sophgo-mq has code for it, but
does not register that code.
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
    """Quantize the inputs of linear layers and matrix products, and the results of matrix products."""
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
    """By quantizer, the preset of 8 bits for the weights and inputs of the first and last layers."""
    for node in graph:
        values = floating_operands(graph, node)
        is_first = any(graph.producer(value).kind == "input" for value in values)
        is_last = any(graph.values[value].output for value in node.outputs)
        if node.is_module(*WEIGHTS, *requests.layers) and (is_first or is_last):
            preset = Preset(override(bits=8), f"{node.name} is {'a first' if is_first else 'a last'} layer")
            yield weight_quantizer(node.parameters.get("weight", "")), preset
            yield from ((value_quantizer(value), preset) for value in values)


PLACEMENTS.add("Academic", Strategy(place_academic, WEIGHTS, rounds_bias=False))
