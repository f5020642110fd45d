"""Default configs and limits of each chip, as data. A new chip is one entry in ``CHIPS``.

The entries are those of sophgo-mq's table of chips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

from sophq_func.core.errors import explain, raise_all
from sophq_func.core.public import constructor
from sophq_func.core.registry import Registry
from sophq_func.fake_quantize import e4m3, learnable
from sophq_func.numerics.granularity import PerChannel
from sophq_func.numerics.scheme import QScheme, QuantizerConfig
from sophq_func.observers import ema_minmax, minmax

ChipName: TypeAlias = Literal[
    "BM1688",
    "BM1684X",
    "BM1690",
    "SG2260",
    "MARS3",
    "CV183X",
    "CV182X",
    "CV181X",
    "CV180X",
    "CV186X",
    "Academic",
]
"""What a type checker accepts for ``QuantConfig(chip=...)``: the names of the chips below."""


@constructor
@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How the code that a chip's compiler makes computes with 8-bit integers, for the strategy ``Chip``.

    Attributes:
      unsigned: values that cannot be negative, such as those of a ReLU, have codes from 0 to 255; else from -127 to 127.
      terms: operations whose operands are brought onto the grid of the result by a multiplier of 7 bits each.
      rounds_terms: each term of a sum is rounded; else the sum of all terms is, with one shift.
      products: operations whose results are brought onto their grid by a multiplier of 7 bits.
      long_products: beside layers, operations for whose results a multiplier of 31 bits does so.
      truncates: multipliers of 7 bits are rounded toward 0, not to the nearest.
      shifts: how often what a multiplier of 31 bits has multiplied is shifted, and rounded each time: once or twice.
      linear_channels: linear layers can have a scale for each output channel.
    """

    unsigned: bool
    terms: tuple[str, ...]
    rounds_terms: bool
    products: tuple[str, ...]
    long_products: tuple[str, ...]
    truncates: bool
    shifts: int
    linear_channels: bool


@constructor
@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """Defaults and limits of a chip.

    Attributes:
      weight: config of every weight quantizer that neither a config nor a rule changes.
      activation: the same for activation quantizers.
      weight_bits: widths that integer quantizers of weights may have; ``None`` allows all.
      activation_bits: the same for activation quantizers.
      fake_quantizers: names of the allowed fake quantizers; ``None`` allows all.
      placement: name of the strategy that places quantizers on this chip whatever a config names; empty
        if the config decides.
      arithmetic: how it computes with integers; ``None`` where that is not known, so that the strategy ``Chip`` is refused.

    Example:
      >>> CHIPS.get("BM1688").weight_bits
      (4, 8)
    """

    weight: QuantizerConfig
    activation: QuantizerConfig
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    fake_quantizers: tuple[str, ...] | None = None
    placement: str = ""
    arithmetic: Arithmetic | None = None

    def __post_init__(self) -> None:
        raise_all([*self._problems()])

    def _problems(self) -> Iterator[str]:
        """What is wrong with the fields."""
        for role, default in (("weight", self.weight), ("activation", self.activation)):
            if not isinstance(default, QuantizerConfig):
                allowed = "a sq.QuantizerConfig"
                yield explain("ChipSpec", f"{role} is no config of a quantizer", got=default, allowed=allowed)
        for name in ("weight_bits", "activation_bits", "fake_quantizers"):
            limits = getattr(self, name)
            if not isinstance(limits, tuple | list | None):
                yield explain("ChipSpec", f"{name} is not a tuple", got=limits, allowed="a tuple, or None for no limit")
            elif name != "fake_quantizers" and not all(isinstance(bits, int) for bits in limits or ()):
                yield explain("ChipSpec", f"{name} holds no widths", got=limits, allowed="a tuple of ints, such as (4, 8)")
        if not isinstance(self.placement, str):
            yield explain("ChipSpec", "placement is no name", got=self.placement, allowed="the name of a strategy")
        if not isinstance(self.arithmetic, Arithmetic | None):
            allowed = "a sophq_func.config.chips.Arithmetic, or None"
            yield explain("ChipSpec", "arithmetic has the wrong type", got=self.arithmetic, allowed=allowed)


CHIPS: Registry[ChipSpec] = Registry("chip")

_CHANNELS = QScheme(granularity=PerChannel())
# Codes from -127 to 127, as sophgo-mq gives the weights on these chips.
_NARROW_CHANNELS = QScheme(granularity=PerChannel(), symmetric_range=True)
_WEIGHT = QuantizerConfig(scheme=_CHANNELS, observer=minmax(), fake_quantize=learnable())
_NARROW_WEIGHT = QuantizerConfig(scheme=_NARROW_CHANNELS, observer=minmax(), fake_quantize=learnable())
_FP8_WEIGHT = QuantizerConfig(scheme=_CHANNELS, observer=minmax(), fake_quantize=e4m3())
_ACTIVATION = QuantizerConfig(scheme=QScheme(), observer=ema_minmax(), fake_quantize=learnable())

# The fake quantizers of sophgo-mq. Those that only this library has are for Academic and for configs without a chip.
_FAKE_QUANTIZERS = tuple(
    "fixed learnable dorefa dsq pact tqt adaround qdrop e4m3 e5m2 fp16 bf16 fp4 gptq gptqfp4 fpxgroup".split()
)
_POOLS = ("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")

# As the lowered files of tpu-mlir 1.30 and its interpreter show: docs/chips.md.
_BM = Arithmetic(
    unsigned=True,
    terms=("add", "cat"),
    rounds_terms=True,
    products=("mul", *_POOLS),
    long_products=(),
    truncates=False,
    shifts=1,
    linear_channels=True,
)
# One scale for the weight of a linear layer, whatever the table says.
_BM_ONE_SCALE = replace(_BM, linear_channels=False)
_CV = Arithmetic(
    unsigned=False,
    terms=("add", "sub", "cat"),
    rounds_terms=False,
    products=_POOLS,
    long_products=("mul",),
    truncates=True,
    shifts=2,
    linear_channels=False,
)
_tpu = partial(ChipSpec, activation=_ACTIVATION, fake_quantizers=_FAKE_QUANTIZERS)

CHIPS.add("BM1688", _tpu(weight=_WEIGHT, weight_bits=(4, 8), activation_bits=(4, 8), arithmetic=_BM))
CHIPS.add("BM1684X", _tpu(weight=_WEIGHT, activation_bits=(8,), arithmetic=_BM))
CHIPS.add("BM1690", _tpu(weight=_WEIGHT, activation_bits=(8,), arithmetic=_BM_ONE_SCALE), "SG2260")
for _name in ("CV183X", "CV182X", "CV181X", "CV180X"):
    CHIPS.add(_name, _tpu(weight=_NARROW_WEIGHT, arithmetic=_CV))
# The compiler lowers both as it does BM1690.
for _name in ("MARS3", "CV186X"):
    CHIPS.add(_name, _tpu(weight=_NARROW_WEIGHT, arithmetic=_BM_ONE_SCALE))
CHIPS.add("Academic", ChipSpec(weight=_FP8_WEIGHT, activation=_ACTIVATION, placement="Academic"))
