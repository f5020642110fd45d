"""What a strategy is: weight layers, and a function from a graph to the values that get quantizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.rules import Preset
from sophq_func.core.registry import Registry


class Requests(NamedTuple):
    """What a config says about placement.

    Attributes:
      asks: whether rules make a node ask for quantizers (``True``), forbid it (``False``), or leave it to the strategy.
      listed: whether the config adds the node's class or function to the strategy's list of operations.
      layers: module classes whose weights are quantized beside those of the strategy.
      free: no chip says what grids there are.
    """

    asks: Callable[[Node], bool | None]
    listed: Callable[[Node], bool]
    layers: tuple[type[nn.Module], ...]
    free: bool


class SharedInput(NamedTuple):
    """A quantizer between a value and some of the calls that take it.

    Attributes:
      consumer: the call that it is named after and configured as: the first.
      uses: each call by name, and which of its tensors the value is there.
      why: in words.
      value: the value, if the quantizer is left out where one of the same kind sits behind it.
    """

    consumer: str
    uses: tuple[tuple[str, int], ...]
    why: str
    value: str = ""


class Placement(NamedTuple):
    """Where activation quantizers go.

    Attributes:
      chosen: value name -> why, in no particular order.
      inputs: by quantizer name, those that sit before some calls only.
      presets: by quantizer name, what the strategy knows about one, weights included.
    """

    chosen: dict[str, str]
    inputs: Mapping[str, SharedInput] = {}
    presets: Mapping[str, Preset] = {}


class Strategy(NamedTuple):
    """A way to place quantizers.

    Attributes:
      place: from a fused graph, and what the config says about placement, to a :class:`Placement`.
      weights: module classes whose weights are quantized.
      functions: whether weights of functions outside leaf modules are, too.
      rounds_bias: whether biases are rounded to multiples of input scale times weight scale.
      int4_inputs: whether layers with 4-bit weights and activations get a quantizer of their own on the input.
    """

    place: Callable[[Graph, Requests], Placement]
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
