"""Fourth step of a draft: which biases are rounded, and with the scale of which input.

A chip adds the bias to a sum of products of integers, each of which stands for ``input scale * weight scale``. So the bias
is rounded to a multiple of that product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Node
from sophq_func.config.site import ComputedSite, WeightSite
from sophq_func.core.operations import DROPOUTS
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.planning.checks import is_scaled_grid
from sophq_func.planning.inputs import Planned
from sophq_func.planning.strategies import source_of
from sophq_func.planning.weights import WeightPlace

ROUNDED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose bias is rounded; with a BatchNorm behind, also that of ``nn.ConvTranspose2d``, as in sophgo-mq."""


class Biases(NamedTuple):
    """Which biases are rounded.

    Attributes:
      sources: by weight quantizer, for layers whose bias is rounded, the quantizer of the layer's input.
      notes: remarks on biases that cannot be rounded.
    """

    sources: Mapping[str, str]
    notes: tuple[str, ...]


def round_biases(planned: Planned, weights: Sequence[WeightPlace]) -> Biases:
    """Find the layers whose bias is rounded: those with one input scale, one weight and one bias that belong together.

    Args:
      planned: what is quantized how.
      weights: each weight with the calls that use it.
    """
    # A bias that two weights share would have to be rounded to two steps.
    weights_of_bias: Counter[str] = Counter()
    for weight in weights:
        weights_of_bias.update({_bias_of(call) for call in weight.calls})
    sources: dict[str, str] = {}
    notes = []
    for weight in weights:
        site, calls = weight.site, weight.calls
        if not _is_rounded(planned, site, calls[0]):
            continue
        inputs = {_input_quantizer(planned, call) for call in calls}
        biases = {_bias_of(call) for call in calls}
        is_shared = len(biases) > 1 or any(weights_of_bias[bias] > 1 for bias in biases)
        if len(inputs) == 1 and not is_shared:
            sources[site.quantizer] = inputs.pop()
        elif inputs != {""}:  # without any input scale there is nothing to round with, and nothing to remark
            notes.append(f"the bias behind {site.parameter} is shared, or has inputs of several scales: not rounded")
    return Biases(sources, tuple(notes))


def _bias_of(node: Node) -> str:
    """Name of the parameter that is rounded: the layer's bias, else that of the BatchNorm behind it; empty without both."""
    if bias := node.parameters.get("bias"):
        return bias
    return node.norm.parameters["bias"] if node.norm else ""


def _is_rounded(planned: Planned, site: WeightSite | ComputedSite, node: Node) -> bool:
    """Whether the bias of a layer is rounded, provided that its input has one scale."""
    config = planned.configs.get(site.quantizer)
    if config is None or not planned.strategy.rounds_bias or not isinstance(site, WeightSite):
        return False
    has_bias = bool(site.bias or site.norm)
    layers = (*ROUNDED, nn.ConvTranspose2d) if site.norm else ROUNDED
    one_step_a_channel = config.scheme.granularity in (PerTensor(), PerChannel(site.axis))
    return has_bias and node.is_module(*layers) and is_scaled_grid(config) and one_step_a_channel


def _input_quantizer(planned: Planned, node: Node) -> str:
    """The quantizer that gives the scale of a layer's input; empty if there is none with one scale."""
    graph, operand = planned.graph, node.operands[0]
    if planned.strategy.functions:
        # Such a strategy quantizes a value where it is made, before the calls that only move it.
        operand = source_of(graph, operand)
    while _is_bare_dropout(planned, operand.value):
        operand = graph.producer(operand.value).operands[0]
    # A quantizer before the first operand (slot 0) of this call comes before that of the value.
    name = planned.inputs.get((node.name, 0), planned.behind(operand.value))
    config = planned.configs.get(name)
    if config is None or config.scheme.granularity != PerTensor() or not is_scaled_grid(config):
        return ""
    return name


def _is_bare_dropout(planned: Planned, value: str) -> bool:
    """Whether a value is the result of a dropout, and has no quantizer."""
    if not value or planned.behind(value) in planned.configs:
        return False
    return planned.graph.producer(value).operation in DROPOUTS
