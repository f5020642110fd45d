"""Configs by the names that practitioners give them. Each function returns a :class:`QuantConfig`, which is data.

``W`` and ``A`` are the bits of weights and of activations. All are for models without a chip. ``rules`` come last, so that
they override what the preset says: ``presets.w8a8(rules=[sq.Rule(name="head", weight=None, activation=None)])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from sophq_func import observers
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.core.absent import refuse_name
from sophq_func.core.errors import check_flags
from sophq_func.core.public import constructor
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize import e4m3 as e4m3_numbers
from sophq_func.fake_quantize import fixed, learnable
from sophq_func.fake_quantize import mxfp4 as mxfp4_blocks
from sophq_func.fake_quantize import nvfp4 as nvfp4_blocks
from sophq_func.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sophq_func.numerics.scheme import QScheme, QuantizerConfig

__all__ = ["fp8", "mxfp4", "nvfp4", "w4a4_lsq", "w4a8", "w4a16", "w8a8", "w8a8_per_token"]

CHANNELS = QScheme(bits=8, granularity=PerChannel())
"""8 bits, symmetric, a scale for each output of a weight."""

TOKENS = QScheme(bits=8, granularity=PerToken(), dynamic=True)
"""8 bits, symmetric, a scale for each token, computed in the run."""


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # a type checker would take every name for one of this module

    def __getattr__(name: str) -> NoReturn:
        refuse_name("presets", name, __all__)


@constructor
def w8a8(*, rules: Sequence[Rule] = ()) -> QuantConfig:
    """8-bit integers after training, calibrated: the default of vision models and of runtimes for CPUs.

    Weights symmetric with a scale for each output channel, activations affine with a scale for each tensor, both from
    the smallest and largest value (arXiv:1806.08342, sections 3.1 and 6; arXiv:2106.08295, section 3). The operands of
    every contraction are quantized (strategy ``Dataflow``), those of attention included; biases are rounded to int32.

    Args:
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.w8a8().activation.scheme
      QScheme(bits=8, symmetric=False)
    """
    activation = _calibrated(QScheme(bits=8, symmetric=False))
    return QuantConfig(weight=_calibrated(CHANNELS), activation=activation, rules=rules)


@constructor
def w4a4_lsq(*, rules: Sequence[Rule] = ()) -> QuantConfig:
    """4-bit integers with learned steps, LSQ, for training with quantization (arXiv:1902.08153).

    Weights symmetric with one step for each layer, which starts at ``2 mean |w| / sqrt(qmax)``. Inputs of layers affine:
    behind a ReLU that is the paper's unsigned grid; elsewhere the zero point is learned, too, as in LSQ+ (arXiv:2004.09576),
    whose start of least squared error is used. Products of attention, additions and biases stay float (strategy
    ``Layers``). The paper keeps the first and the last layer at 8 bits: name them in ``rules``.

    Args:
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> eight = sq.override(bits=8)
      >>> config = sq.presets.w4a4_lsq(rules=[sq.Rule(name="fc", weight=eight, activation=eight)])
      >>> config.weight
      QuantizerConfig(scheme=QScheme(bits=4), observer=lsq(), fake_quantize=learnable(use_grad_scaling=True), ...)
    """
    weight = QuantizerConfig(scheme=QScheme(bits=4), observer=observers.lsq(), fake_quantize=learnable())
    affine = QScheme(bits=4, symmetric=False)
    activation = QuantizerConfig(scheme=affine, observer=observers.lsq_plus(), fake_quantize=learnable())
    return QuantConfig(strategy="Layers", weight=weight, activation=activation, rules=rules)


@constructor
def w4a16(group: int = 128, *, symmetric: bool = True, rules: Sequence[Rule] = ()) -> QuantConfig:
    """4-bit weights in groups, activations as they are: the common format of large language models.

    Each ``group`` consecutive inputs of an output share a scale; symmetric is what compressed-tensors calls ``W4A16``,
    affine (``symmetric=False``) what AWQ stores (arXiv:2306.00978). Scales come from the smallest and largest value.

    Args:
      group: weights that share a scale; it must divide the inputs of every layer that no rule leaves out.
      symmetric: without a zero point.
      rules: exceptions, later ones over earlier ones; large language models mostly leave the head out.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.w4a16(group=64).weight.scheme
      QScheme(bits=4, granularity=PerGroup(axis=None, size=64))
    """
    check_flags("w4a16", {"symmetric": symmetric})
    weight = _calibrated(QScheme(bits=4, symmetric=symmetric, granularity=PerGroup(size=group)))
    return QuantConfig(strategy="Layers", weight=weight, activation=None, rules=rules)


@constructor
def w4a8(group: int = 128, *, rules: Sequence[Rule] = ()) -> QuantConfig:
    """4-bit weights in groups, and 8-bit integers with a scale for each token, computed in the run, for inputs of layers.

    The weights of :func:`w4a16` with the activations of :func:`w8a8_per_token`: what compressed-tensors calls ``W4A8``.
    Strategy ``Layers``.

    Args:
      group: weights that share a scale; it must divide the inputs of every layer that no rule leaves out.
      rules: exceptions, later ones over earlier ones; large language models mostly leave the head out.

    Example:
      >>> import sophq_func as sq
      >>> config = sq.presets.w4a8(group=64)
      >>> config.weight.scheme, config.activation.scheme.bits
      (QScheme(bits=4, granularity=PerGroup(axis=None, size=64)), 8)
    """
    weight = _calibrated(QScheme(bits=4, granularity=PerGroup(size=group)))
    return QuantConfig(strategy="Layers", weight=weight, activation=_calibrated(TOKENS), rules=rules)


@constructor
def w8a8_per_token(*, rules: Sequence[Rule] = ()) -> QuantConfig:
    """8-bit integers with a scale for each token, computed in the run: large language models without calibration of values.

    Weights symmetric with a scale for each output channel, inputs of layers symmetric with a scale for each token
    (arXiv:2206.01861, section 4). It is what compressed-tensors calls ``INT8``. Strategy ``Layers``.

    Args:
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.w8a8_per_token().activation.scheme
      QScheme(bits=8, granularity=PerToken(), dynamic=True)
    """
    return QuantConfig(strategy="Layers", weight=_calibrated(CHANNELS), activation=_calibrated(TOKENS), rules=rules)


@constructor
def fp8(*, dynamic: bool = False, rules: Sequence[Rule] = ()) -> QuantConfig:
    """FP8 E4M3 weights and inputs of layers, scaled so that the largest is 448 (arXiv:2209.05433).

    One calibrated scale for each tensor; or with ``dynamic`` one for each output of a weight and one for each token,
    computed in the run, which compressed-tensors calls ``FP8_DYNAMIC``. Strategy ``Layers``.

    Args:
      dynamic: whether scales of inputs are computed in the run.
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.fp8().weight.fake_quantize
      e4m3(scaling='max')
    """
    check_flags("fp8", {"dynamic": dynamic})
    per_tensor = QScheme(bits=8, granularity=PerTensor())
    schemes = (CHANNELS, TOKENS) if dynamic else (per_tensor, per_tensor)
    weight, activation = (_calibrated(scheme, e4m3_numbers()) for scheme in schemes)
    return QuantConfig(strategy="Layers", weight=weight, activation=activation, rules=rules)


@constructor
def mxfp4(*, weight_only: bool = False, rules: Sequence[Rule] = ()) -> QuantConfig:
    """MXFP4: E2M1 numbers, 32 of which share a power of two (OCP Microscaling Formats v1.0), for weights and inputs.

    The scales are computed from the tensor at hand. Strategy ``Layers``.

    Args:
      weight_only: inputs stay as they are, as in gpt-oss.
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.mxfp4(weight_only=True).activation is None
      True
    """
    return _in_blocks("mxfp4", mxfp4_blocks(), weight_only, rules)


@constructor
def nvfp4(*, weight_only: bool = False, rules: Sequence[Rule] = ()) -> QuantConfig:
    """NVFP4: E2M1 numbers, 16 of which share an E4M3 scale, and a float32 scale for all (arXiv:2509.25149).

    The float32 scale is calibrated, those of blocks are computed from the tensor at hand. Strategy ``Layers``.

    Args:
      weight_only: inputs stay as they are.
      rules: exceptions, later ones over earlier ones.

    Example:
      >>> import sophq_func as sq
      >>> sq.presets.nvfp4().weight.fake_quantize
      nvfp4(block_size=16)
    """
    return _in_blocks("nvfp4", nvfp4_blocks(), weight_only, rules)


def _calibrated(scheme: QScheme, fake_quantize: Spec | None = None) -> QuantizerConfig:
    """Scales from the smallest and largest value; without a fake quantizer, integers without learned parts."""
    return QuantizerConfig(scheme=scheme, observer=observers.minmax(), fake_quantize=fake_quantize or fixed())


def _in_blocks(where: str, fake_quantize: Spec, weight_only: bool, rules: Sequence[Rule]) -> QuantConfig:
    """A format that scales blocks by itself, whose scheme is not used but for the scale of the whole tensor."""
    check_flags(where, {"weight_only": weight_only})
    both = _calibrated(QScheme(), fake_quantize)
    return QuantConfig(strategy="Layers", weight=both, activation=None if weight_only else both, rules=rules)
