"""Floating-point formats: FP8 with a scale, half precision without one. All gradients pass straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics.affine import narrowed, ste, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, always_coded, kept
from sophq_func.numerics.formats import E4M3, E5M2, float_, round_to_dtype, round_to_float8
from sophq_func.numerics.layout import expand, rows
from sophq_func.numerics.ranges import EPS, qparams_to_range
from sophq_func.numerics.scheme import QScheme

SCALINGS = ("max", "mean", "none")

FORMATS = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.float16: float_(5, 10, saturate=False),
    torch.bfloat16: float_(8, 7, saturate=False),
}
"""The formats of torch's types, which can round stochastically where a cast cannot."""

SMALLEST_MEAN = 1e-5
"""With ``scaling="mean"`` the scale of a tensor whose mean magnitude is no larger is 1, as in sophgo-mq."""

LEAST_SCALE = EPS**2
"""Scales are at least 2 ** -46: a tensor of zeros divides by this instead of 0.

It is so far below the values of a model that it changes no other scale.
"""


@FAKE_QUANTIZERS.register("e4m3", "E4M3FakeQuantize", scaling_method="scaling")
def e4m3(scaling: str = "max", *, rounding: str = "nearest") -> FakeQuantize:
    """OCP FP8 E4M3: 3 mantissa bits, largest value 448, saturating (OFP8 rev. 1.0).

    ``y = E4M3(x / s) * s``; gradient 1 to ``x`` everywhere, none to ``s``. The scale comes from the observer, or with
    ``QScheme(dynamic=True)`` from the tensor at hand. ``bits`` of the scheme is not used.

    Args:
      scaling: ``"max"``: ``s = amax / 448``; ``"none"``: ``s = 1``; ``"mean"``: ``s = mean |x| / 2 ** -9``, the smallest
        subnormal, or 1 where the mean is at most 1e-5, of the tensor that ``init`` takes: a weight, or with a dynamic
        scheme the tensor at hand.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: the scale multiplies (there it is the reciprocal), has no jump at small ranges, and is
    calibrated; values below the smallest normal are rounded on the grid of the standard; per channel works.

    Example:
      >>> import sophq_func as sq
      >>> fq = sq.fake_quantizer("E4M3FakeQuantize", scaling="none")
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([1.1, 19.0, 1000.0]), qp, sq.QScheme())
      tensor([  1.1250,  20.0000, 448.0000])
    """
    return _float8(torch.float8_e4m3fn, scaling, rounding)


@FAKE_QUANTIZERS.register("e5m2", "E5M2FakeQuantize", scaling_method="scaling")
def e5m2(scaling: str = "none", *, rounding: str = "nearest") -> FakeQuantize:
    """OCP FP8 E5M2: 2 mantissa bits, largest value 57344, saturating; otherwise as :func:`e4m3`.

    Args:
      scaling: ``"max"``: ``s = amax / 57344``; ``"none"``: ``s = 1``, as in sophgo-mq; ``"mean"``: with ``2 ** -16``.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: saturates where that overflows to infinity; per channel works.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantize.e5m2()
      e5m2(scaling='none')
    """
    return _float8(torch.float8_e5m2, scaling, rounding)


@FAKE_QUANTIZERS.register("fp16", "Fp16FakeQuantize")
def fp16(*, rounding: str = "nearest") -> FakeQuantize:
    """IEEE half precision: cast and back.

    Beyond 65504 the value is infinite; the gradient is 1, itself cast. The observed scale rounds biases only.

    Args:
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: differentiable per channel too.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantizer("fp16").learnable
      ()
    """
    return _cast(torch.float16, rounding)._replace(scales_bias=True)


@FAKE_QUANTIZERS.register("bf16", "BF16FakeQuantize")
def bf16(*, rounding: str = "nearest") -> FakeQuantize:
    """bfloat16: cast and back; the gradient is 1, itself cast.

    Args:
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantizer("bf16").integer
      False
    """
    return _cast(torch.bfloat16, rounding)


def _float8(element: torch.dtype, scaling: str, rounding: str) -> FakeQuantize:
    """FP8 numbers of the type ``element``, times a scale."""
    if scaling not in SCALINGS:
        allowed = " or ".join(map(repr, SCALINGS))
        raise ConfigError(explain("FP8", "this scaling is not known", got=scaling, allowed=allowed))
    draw = drawing("FP8", rounding)
    smallest = torch.finfo(element).smallest_normal * torch.finfo(element).eps

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        lo, hi = qparams_to_range(qparams, scheme)
        scale = torch.maximum(-lo, hi) / torch.finfo(element).max
        if scaling == "none":
            scale = torch.where(scale.isnan(), scale, 1.0)
        elif scaling == "mean" and x.numel():
            mean = rows(x.detach(), scheme.granularity).float().abs().mean(-1)
            # adding 0 * scale keeps the NaN of an observer that saw nothing, or values that are not finite
            of_mean = mean / smallest + 0 * scale
            scale = torch.where(scale.isnan() | (mean > SMALLEST_MEAN), of_mean, 1.0)
        elif scheme.pot_scale:
            scale = torch.exp2(torch.log2(scale).ceil())
        return QParams(scale, torch.zeros_like(qparams.zero_point, dtype=torch.int32), qparams.extras)

    def expanded_scale(like: Tensor, qparams: QParams, scheme: QScheme) -> Tensor:
        return expand(qparams.scale.detach().abs().clamp(min=LEAST_SCALE), like, scheme.granularity)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        work, scale = working(x), expanded_scale(x, qparams, scheme)
        unit, drawn = work / scale, draw(x, qparams, noise)
        quantized = round_to_float8(unit, element) if drawn is None else FORMATS[element].round(unit, drawn)
        return ste(x, narrowed(quantized * scale, x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        unit = working(x.detach()) / expanded_scale(x, qparams, scheme)
        return Codes(round_to_float8(unit, element).to(element), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        unit = codes.values.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return narrowed(unit * expanded_scale(unit, qparams, scheme), dtype)

    fake = FakeQuantize(
        init,
        apply,
        integer=False,
        resizable=False,
        bits=torch.finfo(element).bits,
        encode=encode,
        decode=decode,
        uncoded=always_coded,
        element=element,
    )
    return with_rounding(fake, rounding)


def _finite_stays(y: Tensor, dtype: torch.dtype) -> Tensor:
    """``y`` in a narrower dtype; infinite where it is infinite now, and nowhere else."""
    return torch.where(y.isinf(), y.to(dtype), narrowed(y, dtype))


def _cast(element: torch.dtype, rounding: str) -> FakeQuantize:
    """Rounding to the floating type ``element``, without a scale."""
    draw = drawing(str(element).removeprefix("torch."), rounding)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        drawn = draw(x, qparams, noise)
        if element == torch.bfloat16 and x.dtype == torch.float16:  # it rounds what is near the largest float16 to more
            return _finite_stays(apply(x.float(), qparams, scheme, drawn), x.dtype)
        if drawn is None:
            return round_to_dtype(x, element)
        finite = torch.where(x.isfinite(), x, 0)
        gradient = round_to_dtype(finite - finite.detach(), element)  # a zero, with the gradient of the cast
        return FORMATS[element].round(x, drawn) + gradient

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return Codes(x.detach().to(element), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return _finite_stays(codes.values.float(), dtype) if dtype == torch.float16 else codes.values.to(dtype)

    fake = FakeQuantize(
        kept,
        apply,
        integer=False,
        resizable=False,
        bits=torch.finfo(element).bits,
        scaled=False,
        encode=encode,
        decode=decode,
        uncoded=always_coded,
        element=element,
    )
    return with_rounding(fake, rounding)
