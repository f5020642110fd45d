"""Fourth step: which biases are rounded to multiples of input scale times weight scale, and by which input's scale.

A chip adds the bias to the sum of integer products, whose step is the product of both scales (semantics.md 5.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Node
from sophq_func.config.names import value_quantizer
from sophq_func.config.site import ComputedSite, WeightSite
from sophq_func.core.operations import DROPOUTS
from sophq_func.numerics.scheme import PerChannel, PerTensor
from sophq_func.planning.checks import is_scaled_grid
from sophq_func.planning.inputs import Quantized
from sophq_func.planning.strategies import source_of
from sophq_func.planning.weights import WeightPlace

ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Biases(NamedTuple):
    """What :func:`round_biases` found.

    Attributes:
      sources: by weight quantizer, the quantizer of the layer's input, where the bias is rounded.
      notes: on layers that share a bias.
    """

    sources: Mapping[str, str]
    notes: tuple[str, ...]


def round_biases(quantized: Quantized, weights: Sequence[WeightPlace]) -> Biases:
    """Which layers' biases are rounded: where one input scale belongs to one bias.

    Args:
      quantized: what is quantized how.
      weights: each weight with the calls that use it.
    """
    # A bias that two weights share would have to be rounded to two steps.
    carriers = Counter(carrier for weight in weights for carrier in {_carrier(call) for call in weight.calls})
    sources: dict[str, str] = {}
    notes = []
    for weight in weights:
        site, calls = weight.site, weight.calls
        if not _rounds(quantized, site, calls[0]):
            continue
        inputs = {_input_quantizer(quantized, call) for call in calls}
        own = {_carrier(call) for call in calls}
        if len(inputs) == len(own) == 1 and carriers[own.pop()] == 1:
            sources[site.quantizer] = inputs.pop()
        elif inputs != {""}:
            notes.append(f"the bias behind {site.parameter} is shared, or has inputs of several scales: not rounded")
    return Biases(sources, tuple(notes))


def _carrier(node: Node) -> str:
    """Name of the tensor that takes up what rounding changes: the layer's bias, or that of the BatchNorm behind it."""
    return node.parameters.get("bias") or (node.norm.parameters["bias"] if node.norm else "")


def _rounds(quantized: Quantized, site: WeightSite | ComputedSite, node: Node) -> bool:
    """Whether the bias of a layer is rounded, if its input has one scale."""
    config = quantized.configs.get(site.quantizer)
    if config is None or not quantized.strategy.rounds_bias or not isinstance(site, WeightSite):
        return False
    has_bias = bool(site.bias or site.norm)
    layers = (*ROUNDED, nn.ConvTranspose2d) if site.norm else ROUNDED
    one_step_a_channel = config.scheme.granularity in (PerTensor(), PerChannel(site.axis))
    return has_bias and node.is_module(*layers) and is_scaled_grid(config) and one_step_a_channel


def _input_quantizer(quantized: Quantized, node: Node) -> str:
    """The quantizer whose scale the codes of a layer's input have; empty where there is none."""
    graph, operand = quantized.graph, node.operands[0]
    if quantized.strategy.functions:
        operand = source_of(graph, operand)
    while _passes(quantized, operand.value):
        operand = graph.producer(operand.value).operands[0]
    name = quantized.inputs.get((node.name, 0), value_quantizer(operand.value))
    config = quantized.configs.get(name)
    scalar = config is not None and config.scheme.granularity == PerTensor()
    return name if config is not None and scalar and is_scaled_grid(config) else ""


def _passes(quantized: Quantized, value: str) -> bool:
    """Whether a value is what a dropout, which has no quantizer of its own, made of another."""
    dropped = value and quantized.graph.producer(value).operation in DROPOUTS
    return bool(dropped) and value_quantizer(value) not in quantized.configs
