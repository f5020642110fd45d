"""Nearest entries of a table, times a scale (FP4, FP6, NF4, AF4, NF8, int4), and a logarithmic grid (NNIE)."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.constants import table
from sophq_func.core.errors import ConfigError, explain
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics.affine import narrowed, ste, working
from sophq_func.numerics.blocks import from_blocks, to_blocks
from sophq_func.numerics.codebooks import codebook_named
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, always_coded, kept, never_coded
from sophq_func.numerics.formats import E4M3, Format, code_bits, indices, value_table
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, qparams_to_range
from sophq_func.numerics.scheme import QScheme

LEAST_SCALE = EPS**2
"""Scales are at least 2 ** -46: a tensor or a group of zeros divides by this instead of 0.

It is so far below the values of a model that it changes no other scale.
"""

OCTAVE = 16
"""Values for each power of two on the logarithmic grid of NNIE."""

POWERS = tuple(2 ** (i / OCTAVE) for i in range(OCTAVE))
"""The values from one power of two up to the next."""

LARGEST_TABLE = 8
"""Bits of the longest code of a table: codes are bytes."""

LARGEST_CODE = 127
"""The largest code of NNIE on either side of 0: seven bits beside the sign."""


@FAKE_QUANTIZERS.register("fp4", "FP4FakeQuantize")
def fp4(data_type: str = "fp4_e2m1", quantile: float = 1.0, *, rounding: str = "nearest") -> FakeQuantize:
    """The nearest entry of a table, times a scale (OCP MX v1.0 and arXiv:2305.14314 for tables).

    ``y = T(x / s) * s`` with ``s = amax * quantile / max(table)``; of two equally near entries the lower. ``amax`` is the
    observer's, for each scale of the scheme's granularity, or with ``QScheme(dynamic=True)`` that of the tensor at hand.
    ``bits`` of the scheme is not used. Gradient 1 to ``x`` everywhere, none to ``s``.

    Args:
      data_type: ``"fp4_e2m1"``, ``"fp4"`` (also ``"fp4_e2m1_bnb"``), ``"fp6_e3m2"``, ``"fp6_e2m3"``, ``"nf4"``, ``"af4"``,
        ``"nf8"`` or ``"int4"``.
      quantile: share of ``amax`` that the largest entry stands for.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: the default is FP4, not FP6; E2M1 has 0.5; the gradient passes; the range is calibrated; any
    granularity.

    Example:
      >>> import sophq_func as sq
      >>> fq = sq.fake_quantizer("FP4FakeQuantize")
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([0.3, 2.5, -9.0]), qp, sq.QScheme())
      tensor([ 0.5000,  2.0000, -6.0000])
    """
    table = codebook_named("fp4", data_type)
    check_quantile("fp4", quantile)
    return scaled("fp4", table, quantile, rounding)


def scaled(where: str, form: Format, quantile: float = 1.0, rounding: str = "nearest") -> FakeQuantize:
    """The nearest value of a number format, times a scale: what :func:`fp4` computes with its tables.

    Args:
      where: name of the fake quantizer, for messages.
      form: the format. Of more than 256 values it has no codes.
      quantile: share of the largest magnitude that the largest value stands for.
      rounding: as in :func:`fp4`.
    """
    draw = drawing(where, rounding)
    bits = code_bits(form)
    has_codes = bits <= LARGEST_TABLE

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        lo, hi = qparams_to_range(qparams, scheme)
        scale = torch.maximum(-lo, hi) * quantile / form.largest
        if scheme.pot_scale:
            scale = torch.exp2(torch.log2(scale).ceil().clamp(max=127))  # 2 ** 128 is infinite
        return QParams(scale, torch.zeros_like(qparams.zero_point, dtype=torch.int32), qparams.extras)

    def expanded_scale(like: Tensor, qparams: QParams, scheme: QScheme) -> Tensor:
        return expand(qparams.scale.detach().abs().clamp(min=LEAST_SCALE), like, scheme.granularity)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        scale = expanded_scale(x, qparams, scheme)
        return ste(x, narrowed(form.round(working(x) / scale, draw(x, qparams, noise)) * scale, x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return Codes(indices(form, working(x.detach()) / expanded_scale(x, qparams, scheme)), {})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        unit = value_table(form, codes.values.device)[codes.values.long()]
        unit = unit.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return narrowed(unit * expanded_scale(unit, qparams, scheme), dtype)

    fake = FakeQuantize(
        init,
        apply,
        integer=False,
        resizable=False,
        bits=bits,
        encode=encode if has_codes else None,
        decode=decode if has_codes else None,
        uncoded=always_coded if has_codes else never_coded,
        element=form if has_codes else None,
    )
    return with_rounding(fake, rounding)


@FAKE_QUANTIZERS.register("fpxgroup", "FPXGROUPFakeQuantize")
def fpxgroup(
    data_type: str = "fp6_e3m2",
    group_size: int = 128,
    double_quant: bool = False,
    quantile: float = 1.0,
    *,
    rounding: str = "nearest",
) -> FakeQuantize:
    """As :func:`fp4`, with a scale for each run of ``group_size`` elements of the flattened tensor.

    ``s = amax * quantile / max(table)`` of the group at hand; the observer and the scheme are not used. NaN and
    infinities do not count. Groups may straddle rows; the last one may be shorter. For scales that are calibrated, use
    :func:`fp4` with ``PerGroup``. Gradient 1 to ``x``.

    Args:
      data_type: as in :func:`fp4`.
      group_size: elements for each scale; 0 or less: the whole tensor.
      double_quant: the scales themselves are rounded to FP8 E4M3, ``E4M3(s m) / m`` with ``m = 448 / max(s)``.
      quantile: share of ``amax`` that the largest entry stands for.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: options instead of environment variables; the shape is kept; the gradient passes; the size
    need not divide the tensor.

    Example:
      >>> import sophq_func as sq
      >>> fq = sq.fake_quantizer("FPXGROUPFakeQuantize", data_type="int4", group_size=2)
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([7.0, 1.2, 70.0, 1.2]), qp, sq.QScheme())
      tensor([ 7.,  1., 70.,  0.])
    """
    table = codebook_named("fpxgroup", data_type)
    check_quantile("fpxgroup", quantile)
    draw = drawing("fpxgroup", rounding)
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise ConfigError(explain("fpxgroup", "group_size must be an int", got=group_size, allowed="an int"))
    if not isinstance(double_quant, bool):
        raise ConfigError(explain("fpxgroup", "double_quant must be a bool", got=double_quant, allowed="True or False"))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if x.numel() == 0:
            return x
        size = group_size if group_size > 0 else x.numel()
        groups, drawn = to_blocks(working(x).detach().reshape(-1), size), draw(x, qparams, noise)
        if drawn is not None:
            drawn = to_blocks(drawn.reshape(-1), size)
        amax = torch.where(groups.isfinite(), groups, 0).abs().amax(-1, keepdim=True)
        scale = amax * quantile / table.largest
        if double_quant:
            multiplier = E4M3.largest / scale.amax().clamp(min=LEAST_SCALE)
            scale = E4M3.round(scale * multiplier) / multiplier
        quantized = table.round(groups / scale.clamp(min=LEAST_SCALE), drawn) * scale
        return ste(x, narrowed(from_blocks(quantized, x.reshape(-1)).reshape(x.shape), x.dtype))

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        return "its groups run over the ends of rows, with scales that are computed anew from each tensor"

    scale_bits = 8 if double_quant else 32  # FP8 E4M3 or float32
    scale_share = scale_bits / group_size if group_size > 0 else 0
    bits = code_bits(table) + scale_share
    fake = FakeQuantize(kept, apply, integer=False, resizable=False, bits=bits, scaled=False, uncoded=uncoded, local=False)
    return with_rounding(fake, rounding)


@FAKE_QUANTIZERS.register("nnie", "NNIEFakeQuantize")
def nnie() -> FakeQuantize:
    """A logarithmic grid of 16 values for each power of two, 128 values up to the largest, and 0.

    With ``M`` the largest magnitude the observer saw, ``k = round(16 log2 M) - 127``: positive values are ``2 ** ((c + k) /
    16)`` with ``c = clamp(round(16 log2 x - k), 0, 127)``, negative ones the same with ``c`` from 1. Values up to half of
    the smallest magnitude become 0, but exactly half of the smallest positive one stays as it is. ``scale`` holds ``M``.
    Gradient 1 to ``x``. ``bits`` of the scheme is not used.

    Differs from sophgo-mq: float32 throughout; per channel works; the state is not rewritten by the forward.

    Example:
      >>> import sophq_func as sq
      >>> fq = sq.fake_quantizer("NNIEFakeQuantize")
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([1.0, 0.97, -0.51, 1e-4]), qp, sq.QScheme())
      tensor([ 1.0000,  0.9576, -0.5000,  0.0000])
    """

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        lo, hi = qparams_to_range(qparams, scheme)
        zero_point = torch.zeros_like(qparams.zero_point, dtype=torch.int32)
        return QParams(torch.maximum(-lo, hi), zero_point, qparams.extras)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        work = working(x).detach()
        largest = expand(qparams.scale.detach().abs().clamp(min=LEAST_SCALE), x, scheme.granularity)
        shift = torch.round(OCTAVE * torch.log2(largest)) - LARGEST_CODE
        least_code = (work < 0).to(work.dtype)  # 1 for negative values: code 0 of that side is taken by the value 0
        code = (OCTAVE * torch.log2(work.abs()) - shift).round().clamp(max=LARGEST_CODE)
        code = torch.maximum(code, least_code)
        magnitude = _sixteenths(code + shift)
        edge = _sixteenths(shift - OCTAVE + least_code)  # half of the smallest magnitude
        below_edge = torch.where(work == edge, work, 0)
        quantized = torch.where(work.abs() > edge, torch.copysign(magnitude, work), below_edge)
        # adding 0 * shift keeps the NaN of a scale that is not finite
        return ste(x, narrowed(torch.where(work.isnan(), work, quantized + 0 * shift), x.dtype))

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        return "its codes stand for logarithms, not for multiples of a scale"

    return FakeQuantize(init, apply, integer=False, resizable=False, bits=8, uncoded=uncoded)


def _sixteenths(exponent: Tensor) -> Tensor:
    """``2 ** (exponent / 16)`` of whole numbers; any number for NaN and infinities.

    A table of 16 powers instead of ``torch.exp2``, which may round differently in a vector of elements and at its end.
    """
    whole = torch.where(exponent.isfinite(), exponent, 0)
    octave = (whole / OCTAVE).floor()
    powers = table(POWERS, exponent.dtype, exponent.device)
    return torch.ldexp(powers[(whole - OCTAVE * octave).long()], octave)


def check_quantile(where: str, quantile: object) -> None:
    """Raise a :class:`ConfigError` unless a share of the largest magnitude is a number in (0, 1]."""
    if isinstance(quantile, bool) or not isinstance(quantile, int | float) or not 0 < quantile <= 1:
        raise ConfigError(explain(where, "quantile must lie in (0, 1]", got=quantile, allowed="a number above 0, at most 1"))
