"""What a strategy is, and the registry of strategies, one of which a :class:`~sophq_func.config.rules.QuantConfig` names.

A strategy chooses the values of a traced graph that get quantizers. Those of the library are in ``planning/strategies``; a
new one is one entry in ``PLACEMENTS``, from any file; users call :func:`sophq_func.register.strategy`::

    PLACEMENTS.add("Outputs", Strategy(place_outputs, weights=(nn.Linear,)))
    QuantConfig(strategy="Outputs")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from torch import nn

from sophq_func.config.chips import Arithmetic
from sophq_func.core.public import constructor
from sophq_func.core.registry import Registry
from sophq_func.numerics.scheme import Override

if TYPE_CHECKING:
    from sophq_func.capture.graph import Graph, Node

__all__ = ["PLACEMENTS", "Placement", "Preset", "Requests", "SharedInput", "Strategy", "StrategyName"]


def __dir__() -> list[str]:
    return __all__


StrategyName: TypeAlias = Literal["CNN", "Transformer", "Chip", "Layers", "BF16Mixed", "Dataflow", "Academic"]
"""What a type checker accepts for ``QuantConfig(strategy=...)``: the names of the library's strategies."""


@constructor
@dataclass(frozen=True)
class Preset:
    """What a strategy sets in the config of one quantizer. It overrides the chip's default, and rules override it.

    Attributes:
      change: the fields that it sets.
      why: the reason, in words.
      yields: whether the preset also gives way, as a whole, to ``QuantConfig.weight`` or ``QuantConfig.activation`` where
        that sets one of the same fields.
      inner: whether the quantizer stands for integers inside a call, such as terms of a sum, which no limit of the chip
        concerns.
    """

    change: Override
    why: str
    yields: bool = False
    inner: bool = False


class Requests(NamedTuple):
    """What a config says about placement.

    Attributes:
      asks: from a node to what rules say about the quantizers around it: ``True``, its inputs are quantized; ``False``, it
        is no reason to quantize anything; ``None``, the strategy decides.
      listed: from a node to whether ``QuantConfig.operations`` has its class or function: operations whose inputs are
        quantized beside those that the strategy lists.
      layers: module classes whose weights are quantized beside ``Strategy.weights``.
      free: whether there is no chip, so that every grid is allowed.
      symmetric: whether grids of values are symmetric where nothing else is said.
      arithmetic: how the chip computes with integers; ``None`` where that is not known.
    """

    asks: Callable[[Node], bool | None]
    listed: Callable[[Node], bool]
    layers: tuple[type[nn.Module], ...]
    free: bool
    symmetric: bool = True
    arithmetic: Arithmetic | None = None


@constructor
class SharedInput(NamedTuple):
    """A quantizer between a value and some of the calls that take it.

    Attributes:
      consumer: name of the first of the calls, which names the quantizer and is what rules match.
      uses: for each call its name, and the slot of the value among its operands (``Operand.slot``).
      why: the reason, in words.
      value: name of the value, if this quantizer is left out where the value itself has a quantizer of the same kind;
        empty if it is never left out.
    """

    consumer: str
    uses: tuple[tuple[str, int], ...]
    why: str
    value: str = ""


@constructor
class Placement(NamedTuple):
    """Where activation quantizers go.

    Attributes:
      chosen: by name of a value with a quantizer, the reason for it, in words; in no particular order.
      inputs: by name of a quantizer, those that sit before some calls only.
      presets: by name of a quantizer, be it of a value or of a weight, what the strategy sets in its config.
    """

    chosen: Mapping[str, str]
    inputs: Mapping[str, SharedInput] = {}
    presets: Mapping[str, Preset] = {}


@constructor
class Strategy(NamedTuple):
    """A way to place quantizers.

    Attributes:
      place: from a fused graph, and what the config says about placement, to a :class:`Placement`.
      weights: module classes whose weights are quantized.
      functions: whether weights of functions are quantized, too: of those that the model calls outside of leaf modules,
        such as ``F.linear``.
      rounds_bias: whether biases are rounded to multiples of input scale times weight scale.
      int4_inputs: whether a layer whose weight and result rules set to 4 bits gets a quantizer of its own on the input.
      exact: whether the chip's integer multipliers are simulated (:class:`~sophq_func.config.chips.Arithmetic`).
    """

    place: Callable[[Graph, Requests], Placement]
    weights: tuple[type[nn.Module], ...]
    functions: bool = False
    rounds_bias: bool = True
    int4_inputs: bool = False
    exact: bool = False


PLACEMENTS: Registry[Strategy] = Registry("strategy")
