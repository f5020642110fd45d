"""What each chip takes for granted and what it allows, as data (semantics.md 2). A new chip is one entry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sophq_func.core.registry import Registry
from sophq_func.fake_quantize import e4m3, learnable
from sophq_func.numerics.scheme import PerChannel, QScheme, QuantizerConfig
from sophq_func.observers import ema_minmax, minmax


@dataclass(frozen=True, kw_only=True)
class ChipSpec:
    """Defaults and limits of a chip.

    Attributes:
      weight, activation: config of every quantizer that no rule changes.
      weight_bits, activation_bits: allowed widths of integer quantizers; ``None`` allows all.
      fake_quantizers: names of those that are allowed; ``None`` allows all.
      placement: the strategy that this chip uses whatever is asked for; empty where the asked one counts.
    """

    weight: QuantizerConfig
    activation: QuantizerConfig
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    fake_quantizers: tuple[str, ...] | None = None
    placement: str = ""


CHIPS: Registry[ChipSpec] = Registry("chip")

_WEIGHT = QuantizerConfig(scheme=QScheme(granularity=PerChannel()), observer=minmax(), fake_quantize=learnable())
_NARROW_WEIGHT = QuantizerConfig(
    scheme=QScheme(granularity=PerChannel(), symmetric_range=True), observer=minmax(), fake_quantize=learnable()
)
_FP8_WEIGHT = QuantizerConfig(scheme=QScheme(granularity=PerChannel()), observer=minmax(), fake_quantize=e4m3())
_ACTIVATION = QuantizerConfig(scheme=QScheme(), observer=ema_minmax(), fake_quantize=learnable())

_ALLOWED = tuple("fixed learnable dorefa dsq pact tqt adaround qdrop e4m3 e5m2 fp16 bf16 fp4 gptq gptqfp4 fpxgroup".split())
_tpu = partial(ChipSpec, activation=_ACTIVATION, fake_quantizers=_ALLOWED)

CHIPS.add("BM1688", _tpu(weight=_WEIGHT, weight_bits=(4, 8), activation_bits=(4, 8)))
CHIPS.add("BM1684X", _tpu(weight=_WEIGHT, activation_bits=(8,)))
CHIPS.add("BM1690", _tpu(weight=_WEIGHT, activation_bits=(8,)), "SG2260")
for _name in ("MARS3", "CV183X", "CV182X", "CV181X", "CV180X", "CV186X"):
    CHIPS.add(_name, _tpu(weight=_NARROW_WEIGHT))
CHIPS.add("Academic", ChipSpec(weight=_FP8_WEIGHT, activation=_ACTIVATION, placement="Academic"))
