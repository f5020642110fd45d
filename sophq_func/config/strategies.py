"""What a strategy is, and those that there are: a :class:`QuantConfig` names one, ``planning/strategies`` has them.

A strategy sees a traced graph, which has no tensors, and says which values get quantizers. A new one is one entry in
``PLACEMENTS``, from any file::

    PLACEMENTS.add("Outputs", Strategy(place_outputs, weights=(nn.Linear,)))
    QuantConfig(strategy="Outputs")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from sophq_func.core.registry import Registry
from sophq_func.numerics.scheme import Override

if TYPE_CHECKING:
    from sophq_func.capture.graph import Graph, Node


@dataclass(frozen=True)
class Preset:
    """What a strategy knows about one quantizer. It is stronger than the chip's default; rules are stronger still.

    Attributes:
      change: the fields that it sets.
      why: in words.
      yields: whether what the config itself says about one of these fields is stronger, too.
    """

    change: Override
    why: str
    yields: bool = False


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

    chosen: Mapping[str, str]
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
