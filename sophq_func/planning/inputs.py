"""Fifth step: what the layer of each weight reads, and on which quantizer's grid that is."""

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


class Planned(NamedTuple):
    """What is quantized how.

    Attributes:
      graph: fused.
      strategy: which placed the quantizers.
      configs: by quantizer.
      inputs: quantizers before single calls, by the call's name and the operand's slot.
      replaced: by name of a quantizer that is left out, the one that acts in its place.
    """

    graph: Graph
    strategy: Strategy
    configs: Mapping[str, QuantizerConfig]
    inputs: Mapping[tuple[str, int], str]
    replaced: Mapping[str, str] = {}

    def behind(self, value: str) -> str:
        """The quantizer behind a value, whether there is one or not."""
        name = value_quantizer(value)
        return self.replaced.get(name, name)

    def acts(self, quantizer: str) -> bool:
        """Whether there is a quantizer of this name that rounds, and does not only observe."""
        config = self.configs.get(quantizer)
        return config is not None and not config.observe_only


def layer_inputs(planned: Planned, weights: Iterable[WeightPlace]) -> dict[str, tuple[LayerInput, ...]]:
    """By weight quantizer, what the layers of the weight read, each pair of a value and its quantizer once.

    Args:
      planned: what is quantized how.
      weights: each weight with the calls that use it.
    """
    inputs = {}
    for weight in weights:
        read = [layer_input(planned, use.node, use.read) for use in weight.uses]
        inputs[weight.site.quantizer] = tuple(dict.fromkeys(read))
    return inputs


def layer_input(planned: Planned, call: Node, operand: Operand | None) -> LayerInput:
    """What a call reads as one of its operands, and on which quantizer's grid it is."""
    if operand is None or not operand.value:
        return LayerInput()
    before_call = planned.inputs.get((call.name, operand.slot), "")
    quantizer = before_call if planned.acts(before_call) else quantizer_of(planned, operand)
    return LayerInput(operand.value, quantizer)


def quantizer_of(planned: Planned, operand: Operand) -> str:
    """The quantizer on whose grid a tensor is: that of its value, or of a value that was only moved since; empty without.

    Views, max pooling and dropout keep values on the grid (in training, dropout multiplies them by a factor).
    """
    origin: Operand | None = operand
    while origin is not None and origin.value:
        quantizer = planned.behind(origin.value)
        if planned.acts(quantizer):
            return quantizer
        origin = moved(planned.graph, origin)
    return ""
