"""What each chip takes for granted and what it allows, as data (semantics.md 2). A new chip is one entry."""

from __future__ import annotations

from dataclasses import dataclass

from sophq_func.fake_quantize import e4m3, learnable
from sophq_func.observers import ema_minmax, minmax
from sophq_func.registry import Registry
from sophq_func.scheme import PerChannel, QScheme, QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """Defaults and limits of a chip.

    Attributes:
      weight, activation: config of every quantizer that no rule changes.
      weight_bits, activation_bits: allowed widths of integer quantizers; ``None`` allows all.
      placement: the strategy that this chip uses whatever is asked for; empty where the asked one counts.
    """

    weight: QuantizerConfig
    activation: QuantizerConfig
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    placement: str = ""


CHIPS: Registry[ChipSpec] = Registry("chip")

_WEIGHT = QuantizerConfig(scheme=QScheme(granularity=PerChannel()), observer=minmax(), fake_quantize=learnable())
_NARROW_WEIGHT = QuantizerConfig(
    scheme=QScheme(granularity=PerChannel(), symmetric_range=True), observer=minmax(), fake_quantize=learnable()
)
_FP8_WEIGHT = QuantizerConfig(scheme=QScheme(granularity=PerChannel()), observer=minmax(), fake_quantize=e4m3())
_ACTIVATION = QuantizerConfig(scheme=QScheme(), observer=ema_minmax(), fake_quantize=learnable())

CHIPS.add("BM1688", ChipSpec(weight=_WEIGHT, activation=_ACTIVATION, weight_bits=(4, 8), activation_bits=(4, 8)))
CHIPS.add("BM1684X", ChipSpec(weight=_WEIGHT, activation=_ACTIVATION, activation_bits=(8,)))
CHIPS.add("BM1690", ChipSpec(weight=_WEIGHT, activation=_ACTIVATION, activation_bits=(8,)), "SG2260")
for _name in ("MARS3", "CV183X", "CV182X", "CV181X", "CV180X", "CV186X"):
    CHIPS.add(_name, ChipSpec(weight=_NARROW_WEIGHT, activation=_ACTIVATION))
CHIPS.add("Academic", ChipSpec(weight=_FP8_WEIGHT, activation=_ACTIVATION, placement="Academic"))
