"""Fifth step: what the layer of each weight reads, and whether it reads it on a grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import value_quantizer
from sophq_func.config.site import LayerInput
from sophq_func.config.strategies import Strategy
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.strategies import moved
from sophq_func.planning.weights import WeightPlace


class Quantized(NamedTuple):
    """What is quantized how.

    Attributes:
      graph: fused.
      strategy: that placed.
      configs: by quantizer.
      inputs: quantizers before single calls, by call and operand.
    """

    graph: Graph
    strategy: Strategy
    configs: Mapping[str, QuantizerConfig]
    inputs: Mapping[tuple[str, int], str]

    def acts(self, quantizer: str) -> bool:
        """Whether there is a quantizer of this name, and it does more than observe."""
        config = self.configs.get(quantizer)
        return config is not None and not config.observe_only


def layer_inputs(quantized: Quantized, weights: Iterable[WeightPlace]) -> dict[str, tuple[LayerInput, ...]]:
    """By weight quantizer, what the layers of the weight read: each value with the quantizer in force once.

    Args:
      quantized: what is quantized how.
      weights: each weight with the calls that use it.
    """
    found = {}
    for weight in weights:
        read = (layer_input(quantized, use.node, use.read) for use in weight.uses)
        found[weight.site.quantizer] = tuple(dict.fromkeys(read))
    return found


def layer_input(quantized: Quantized, call: Node, operand: Operand | None) -> LayerInput:
    """What a call reads as one of its operands, and whose grid that is on."""
    if operand is None or not operand.value:
        return LayerInput()
    before = quantized.inputs.get((call.name, operand.slot), "")
    in_force = before if quantized.acts(before) else quantizer_of(quantized, operand)
    return LayerInput(operand.value, in_force)


def quantizer_of(quantized: Quantized, operand: Operand) -> str:
    """The quantizer whose grid a tensor is on: its own, or the nearest before what only moved it; empty without.

    Views, max pooling and dropout keep values on the grid (dropout but for a factor, while training).
    """
    at: Operand | None = operand
    while at is not None and at.value:
        own = value_quantizer(at.value)
        if quantized.acts(own):
            return own
        at = moved(quantized.graph, at)
    return ""
