"""Which biases are rounded to multiples of input scale times weight scale, and by which input's scale (semantics.md 5.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.names import value_quantizer
from sophq_func.config.site import Site
from sophq_func.core.operations import DROPOUTS
from sophq_func.numerics.scheme import PerChannel, PerTensor, QuantizerConfig
from sophq_func.planning.checks import is_scaled_grid
from sophq_func.planning.strategies import Strategy, source_of

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Placed(NamedTuple):
    """What is planned so far.

    Attributes:
      graph: the fused graph.
      strategy: that placed it.
      configs: by quantizer.
      inputs: quantizers before single calls, by call and operand.
    """

    graph: Graph
    strategy: Strategy
    configs: Mapping[str, QuantizerConfig]
    inputs: Mapping[tuple[str, int], str]


def bias_sources(placed: Placed, weights: Sequence[tuple[Site, Sequence[Node]]]) -> tuple[dict[str, str], list[str]]:
    """For each weight whose layer's bias is rounded, the quantizer of the input; and notes on those that share a bias.

    A bias is rounded where one input scale belongs to one bias.
    """
    carriers = Counter(carrier for _, nodes in weights for carrier in {_carrier(node) for node in nodes})
    found, notes = {}, []
    for site, nodes in weights:
        if not _rounds(placed, site, nodes[0]):
            continue
        sources = {_input_quantizer(placed, node) for node in nodes}
        own = {_carrier(node) for node in nodes}
        if len(sources) == len(own) == 1 and carriers[own.pop()] == 1:
            found[site.quantizer] = sources.pop()
        elif sources != {""}:
            notes.append(f"the bias behind {site.parameter} is shared, or has inputs of several scales: not rounded")
    return found, notes


def _carrier(node: Node) -> str:
    """Name of the tensor that takes up what rounding changes: the layer's bias, or that of the BatchNorm behind it."""
    return node.parameters.get("bias") or (node.norm.parameters["bias"] if node.norm else "")


def _rounds(placed: Placed, site: Site, node: Node) -> bool:
    config = placed.configs.get(site.quantizer)
    layers = (*LAYERS, nn.ConvTranspose2d) if site.norm else LAYERS
    return bool(
        config is not None
        and placed.strategy.rounds_bias
        and node.is_module(*layers)
        and site.parameter
        and (site.bias or site.norm)
        and is_scaled_grid(config)
        and config.scheme.granularity in (PerTensor(), PerChannel(site.axis))
    )


def _input_quantizer(placed: Placed, node: Node) -> str:
    """The quantizer whose scale the codes of a layer's input have; empty where there is none."""
    graph, operand = placed.graph, node.operands[0]
    if placed.strategy.functions:
        operand = source_of(graph, operand)
    while _passes(placed, operand.value):
        operand = graph.producer(operand.value).operands[0]
    name = placed.inputs.get((node.name, 0), value_quantizer(operand.value))
    config = placed.configs.get(name)
    scalar = config is not None and config.scheme.granularity == PerTensor()
    return name if config is not None and scalar and is_scaled_grid(config) else ""


def _passes(placed: Placed, value: str) -> bool:
    """Whether a value is what a dropout, which has no quantizer of its own, made of another."""
    dropped = value and placed.graph.producer(value).operation in DROPOUTS
    return bool(dropped) and value_quantizer(value) not in placed.configs
