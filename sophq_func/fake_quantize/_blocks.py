"""Formats whose blocks of elements share a scale of 8 bits: OCP MX and NVFP4. All gradients pass straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics.affine import narrowed, ste, working
from sophq_func.numerics.blocks import block_amax, from_blocks, to_blocks
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, always_coded, kept
from sophq_func.numerics.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0_BIAS,
    MXINT8,
    Format,
    code_bits,
    indices,
    shared_exponent,
    value_table,
)
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, qparams_to_range
from sophq_func.numerics.scheme import QScheme

LEAST_SCALE = EPS**2
"""The float32 scale of a tensor is at least 2 ** -46: a tensor of zeros divides by this instead of 0.

It is so far below the values of a model that it changes no other scale.
"""


@FAKE_QUANTIZERS.register("mxfp8")
def mxfp8(element: str = "e4m3", block_size: int = 32, *, rounding: str = "nearest") -> FakeQuantize:
    """MXFP8: FP8 elements, 32 of which share a power of two (OCP Microscaling Formats v1.0, 5.2 and 6.3).

    ``y = Q(x / X) * X``, ``X = 2 ** (floor(log2 amax) - e)`` of each block along the last axis, the exponent clamped to
    E8M0's -127..127, ``e`` that of the element's largest value; elements are rounded half to even and saturate. A last
    block may be shorter, as if padded with zeros. In a plan, the blocks of a weight lie along the last axis that its product
    sums over. The scales come from the tensor at hand; observer and scheme are not used. NaN stays NaN, infinities
    saturate, neither counts in ``amax``. Gradient 1 to ``x``.

    Args:
      element: ``"e4m3"`` or ``"e5m2"``.
      block_size: elements for each scale; 32 in the standard.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> sq.fake_quantizer("mxfp8").apply(torch.tensor([0.3, 500.0]), qp, sq.QScheme())
      tensor([3.1250e-01, 4.4800e+02])
    """
    return _microscaled("mxfp8", {"e4m3": E4M3, "e5m2": E5M2}, element, block_size, rounding)


@FAKE_QUANTIZERS.register("mxfp6")
def mxfp6(element: str = "e3m2", block_size: int = 32, *, rounding: str = "nearest") -> FakeQuantize:
    """MXFP6: as :func:`mxfp8` with 6-bit elements.

    Args:
      element: ``"e3m2"`` or ``"e2m3"``.
      block_size: elements for each scale; 32 in the standard.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantize.mxfp6(element="e2m3")
      mxfp6(block_size=32, element='e2m3')
    """
    return _microscaled("mxfp6", {"e3m2": E3M2, "e2m3": E2M3}, element, block_size, rounding)


@FAKE_QUANTIZERS.register("mxfp4")
def mxfp4(block_size: int = 32, *, rounding: str = "nearest") -> FakeQuantize:
    """MXFP4: as :func:`mxfp8` with E2M1 elements.

    Args:
      block_size: elements for each scale; 32 in the standard.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> sq.fake_quantizer("mxfp4").apply(torch.tensor([0.3, -1.2, 7.0]), qp, sq.QScheme())
      tensor([ 0.5000, -1.0000,  6.0000])
    """
    return _microscaled("mxfp4", {"e2m1": E2M1}, "e2m1", block_size, rounding)


@FAKE_QUANTIZERS.register("mxint8")
def mxint8(block_size: int = 32, *, rounding: str = "nearest") -> FakeQuantize:
    """MXINT8: as :func:`mxfp8` with 8-bit integers times ``2 ** -6``; the code of -2 is unused, as the standard allows.

    Args:
      block_size: elements for each scale; 32 in the standard.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> sq.fake_quantizer("mxint8").apply(torch.tensor([0.3, 1.999]), qp, sq.QScheme())
      tensor([0.2969, 1.9844])
    """
    return _microscaled("mxint8", {"int8": MXINT8}, "int8", block_size, rounding)


@FAKE_QUANTIZERS.register("nvfp4")
def nvfp4(block_size: int = 16, *, rounding: str = "nearest") -> FakeQuantize:
    """NVFP4: E2M1 elements, 16 of which share an E4M3 scale, and a float32 scale for all (arXiv:2509.25149).

    ``y = E2M1(x / (b s)) b s`` with ``s = amax / (6 * 448)`` from the observer, one for each scale of the scheme's
    granularity, and ``b = E4M3(amax_block / 6 / s)`` of each block along the last axis; both saturate. A last block may be
    shorter, as if padded with zeros; one whose ``b`` rounds to 0 becomes 0. In a plan, the blocks of a weight lie along the
    last axis that its product sums over. NaN stays NaN, infinities saturate, neither counts in ``amax_block``. Gradient 1
    to ``x``, none to ``s``.

    Args:
      block_size: elements for each E4M3 scale; 16 in NVIDIA's format.
      rounding: of elements: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
      >>> sq.fake_quantizer("nvfp4").apply(torch.tensor([0.3, -1.2, 12.0]), qp, sq.QScheme())
      tensor([ 0.,  -1., 12.])
    """
    _check_size("nvfp4", block_size)
    draw = drawing("nvfp4", rounding)

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        lo, hi = qparams_to_range(qparams, scheme)
        scale = torch.maximum(-lo, hi) / (E2M1.largest * E4M3.largest)
        return QParams(scale, torch.zeros_like(qparams.zero_point, dtype=torch.int32), qparams.extras)

    def expanded_scale(like: Tensor, qparams: QParams, scheme: QScheme) -> Tensor:
        return expand(qparams.scale.detach().abs().clamp(min=LEAST_SCALE), like, scheme.granularity)

    def divided(unit: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks divided by their shared scale, and that scale, ``(..., blocks, 1)``."""
        blocks = to_blocks(unit, block_size)
        shared = E4M3.round(block_amax(blocks) / E2M1.largest)
        divisor = torch.where(shared == 0, 1, shared)  # a block whose scale rounds to 0 becomes 0, not NaN
        return blocks / divisor, shared

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        scale, drawn = expanded_scale(x, qparams, scheme), draw(x, qparams, noise)
        unit = working(x).detach() / scale
        elements, shared = divided(unit)
        quantized = from_blocks(E2M1.round(elements, _in_blocks(drawn, block_size)) * shared, unit) * scale
        return ste(x, narrowed(quantized, x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        elements, shared = divided(working(x).detach() / expanded_scale(x, qparams, scheme))
        block_scale = shared.squeeze(-1).to(torch.float8_e4m3fn)
        return Codes(from_blocks(indices(E2M1, elements), x), {"block_scale": block_scale})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        unit = _by_blocks(E2M1, codes.values, codes.parts["block_scale"].to(wide), block_size)
        return narrowed(unit * expanded_scale(unit, qparams, scheme), dtype)

    fake = FakeQuantize(
        init,
        apply,
        integer=False,
        resizable=False,
        bits=code_bits(E2M1) + 8 / block_size,
        encode=encode,
        decode=decode,
        uncoded=always_coded,
        element=E2M1,
        block_size=block_size,
    )
    return with_rounding(fake, rounding)


def _microscaled(where: str, elements: dict[str, Format], element: str, block_size: int, rounding: str) -> FakeQuantize:
    """A format of OCP MX: blocks of ``elements[element]`` that share a power of two."""
    if not isinstance(element, str) or element not in elements:
        raise ConfigError(
            explain(where, "this element format is not offered", got=element, allowed=" or ".join(map(repr, elements)))
        )
    _check_size(where, block_size)
    draw = drawing(where, rounding)
    form = elements[element]

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        work = working(x).detach()
        blocks = to_blocks(work, block_size)
        scale = torch.exp2(shared_exponent(block_amax(blocks), form).to(work.dtype))
        drawn = _in_blocks(draw(x, qparams, noise), block_size)
        quantized = from_blocks(form.round(blocks / scale, drawn) * scale, work)
        return ste(x, narrowed(quantized, x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        blocks = to_blocks(working(x).detach(), block_size)
        exponent = shared_exponent(block_amax(blocks), form)
        elements = indices(form, blocks / torch.exp2(exponent.to(blocks.dtype)))
        biased = (exponent.squeeze(-1) + E8M0_BIAS).to(torch.uint8)
        return Codes(from_blocks(elements, x), {"exponent": biased})

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = torch.exp2(codes.parts["exponent"].to(wide) - E8M0_BIAS)
        return narrowed(_by_blocks(form, codes.values, scale, block_size), dtype)

    fake = FakeQuantize(
        kept,
        apply,
        integer=False,
        resizable=False,
        bits=code_bits(form) + 8 / block_size,
        scaled=False,
        encode=encode,
        decode=decode,
        uncoded=always_coded,
        element=form,
        block_size=block_size,
    )
    return with_rounding(fake, rounding)


def _in_blocks(noise: Tensor | None, size: int) -> Tensor | None:
    """Noise, cut like the tensor that it belongs to."""
    return None if noise is None else to_blocks(noise, size)


def _by_blocks(form: Format, codes: Tensor, scale: Tensor, size: int) -> Tensor:
    """Values from the codes of a format and the scales ``(..., blocks)`` of their blocks, in the dtype of the scales."""
    unit = value_table(form, codes.device)[codes.long()].to(scale.dtype)
    return from_blocks(to_blocks(unit, size) * scale.unsqueeze(-1), unit)


def _check_size(where: str, size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(explain(where, "block_size must be a positive int", got=size, allowed="an int >= 1"))
