"""What a strategy is: weight layers, and a function from a graph to the values that get quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sophq_func.graph import Graph, Node
from sophq_func.registry import Registry

Asks = Callable[[Node], bool | None]
"""Whether rules make a node ask for quantizers (``True``), forbid it (``False``), or leave it to the strategy."""


class Placement(NamedTuple):
    """Where activation quantizers go.

    Attributes:
      chosen: value name -> why, in no particular order.
      observed: the values among them that are only observed.
    """

    chosen: dict[str, str]
    observed: frozenset[str] = frozenset()


class Strategy(NamedTuple):
    """A way to place quantizers.

    Attributes:
      place: from a fused graph to a :class:`Placement`.
      weights: module classes whose weights are quantized.
      functions: whether weights of functions outside leaf modules are, too.
      rounds_bias: whether biases are rounded to multiples of input scale times weight scale.
      int4_inputs: whether layers with 4-bit weights and activations get a quantizer of their own on the input.
    """

    place: Callable[[Graph, Asks], Placement]
    weights: tuple[type[nn.Module], ...]
    functions: bool = False
    rounds_bias: bool = True
    int4_inputs: bool = False


PLACEMENTS: Registry[Strategy] = Registry("strategy")


def floating_operands(graph: Graph, node: Node) -> list[str]:
    """The floating values that a node takes; parameters and constants are not values."""
    return [o.value for o in node.operands if o.value and graph.values[o.value].floating]


def is_tensor_input(graph: Graph, node: Node) -> bool:
    """Whether a node is an input of the model with more than one axis (semantics.md 5.4, pass C)."""
    return node.kind == "input" and len(graph.values[node.name].shape) > 1
