"""Ranges of tensors, and the scales and zero points that cover them."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core import modes
from sophq_func.core.constants import number
from sophq_func.core.errors import StateError, explain
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import Granularity, PerTensor
from sophq_func.numerics.layout import expand, rows
from sophq_func.numerics.scheme import QScheme

EPS = torch.finfo(torch.float32).eps
"""Smallest scale of an integer grid, 2 ** -23: that of torch's observers and of sophgo-mq. It bounds ``x / scale``."""

Bound = Tensor | int
"""An outermost code: an int, or a tensor where it is data, as while a bit width is learned."""


def no_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The empty range ``(inf, -inf)``, float32, scale-shaped: neutral for the minimum and the maximum."""
    empty = torch.full(rows(x, granularity).shape[:-1], torch.inf, dtype=torch.float32, device=x.device)
    return empty, -empty


def min_max(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value for each scale, float32; ``(inf, -inf)`` for an empty tensor. No gradient."""
    if x.numel() == 0:
        return no_range(x, granularity)
    if isinstance(granularity, PerTensor):
        lo, hi = torch.aminmax(x.detach())  # one pass over memory; along an axis it is slower than two
        return lo.float(), hi.float()
    flat = rows(x.detach(), granularity)
    return flat.amin(-1).float(), flat.amax(-1).float()


def range_to_qparams(
    lo: Tensor, hi: Tensor, scheme: QScheme, *, pot_scale: bool | None = None, limits: tuple[Bound, Bound] | None = None
) -> QParams:
    """Scale and zero point whose grid covers ``[lo, hi]`` and 0.

    With ``m- = min(lo, 0)``, ``m+ = max(hi, 0)``: symmetric ``s = max(-m-, m+) / ((qmax - qmin) / 2)``; affine
    ``s = (m+ - m-) / (qmax - qmin)``, ``z = clamp(qmin - round(m- / s), qmin, qmax)``; ``s`` is at least 2 ** -23.

    Args:
      lo: lower bounds, float32, scale-shaped.
      hi: upper bounds, same shape.
      scheme: the grid.
      pot_scale: replaces that of the scheme.
      limits: smallest and largest code, replacing those of the scheme.

    Returns:
      :class:`QParams` shaped like ``lo``; the scale is NaN where a bound is not finite.

    Differs from sophgo-mq: with ``pot_scale`` the affine zero point belongs to the rounded scale.

    Example:
      >>> range_to_qparams(torch.tensor(-1.0), torch.tensor(2.55), QScheme(symmetric=False)).zero_point
      tensor(72, dtype=torch.int32)
    """
    finite = torch.isfinite(lo) & torch.isfinite(hi)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    low, high = limits or (scheme.qmin, scheme.qmax)
    steps = high - low
    if scheme.symmetric:
        scale = torch.maximum(-lo, hi) / (steps / 2)
    else:
        width = hi - lo
        # the width of a finite range may overflow float32: then divide first
        scale = torch.where(torch.isinf(width), hi / steps - lo / steps, width / steps)
    scale = scale.clamp(min=EPS)
    if pot_scale is None:
        pot_scale = scheme.pot_scale
    if pot_scale:
        # 2 ** 127 is float32's largest power of two
        scale = torch.exp2(torch.log2(scale).round().clamp(max=127))
    if scheme.symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero = clamp(low - torch.round(lo / scale), low, high)
        zero_point = torch.where(finite, zero, 0).to(torch.int32)
    return QParams(torch.where(finite, scale, torch.nan), zero_point, {})


def qparams_to_range(qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """The range that the grid covers: the inverse of :func:`range_to_qparams`, up to rounding and the least scale."""
    low, high = bounds(qparams, scheme)
    if scheme.symmetric:
        half = qparams.scale * ((high - low) / 2)
        return -half, half
    zero = qparams.zero_point.to(qparams.scale.dtype)
    return (low - zero) * qparams.scale, (high - zero) * qparams.scale


def positive(scale: Tensor) -> Tensor:
    """The scale to round by, ``max(|s|, 2 ** -23)``, of a learned scale ``s``.

    The gradient is the sign of ``s``, also where the maximum is ``2 ** -23``, so that a scale can leave the floor.
    """
    if not modes.may_differentiate():
        return scale.abs().clamp(min=EPS)
    # not ``abs``, whose gradient at 0 is 0: the scale could not leave it
    size = torch.where(scale < 0, -scale, scale)
    constant = size.detach()
    return size + modes.beside(constant.clamp(min=EPS) - constant, size)


def bounds(qparams: QParams, scheme: QScheme) -> tuple[Bound, Bound]:
    """Smallest and largest code: ``"qmin"`` and ``"qmax"`` of ``extras`` where these exist, else the scheme's.

    Raises:
      StateError: one without the other, which would be a grid that nobody asked for.
    """
    low, high = qparams.extras.get("qmin"), qparams.extras.get("qmax")
    if low is None and high is None:
        return scheme.qmin, scheme.qmax
    if low is None or high is None:
        sentence, got = "the bounds of a grid come in pairs", "qmin alone" if high is None else "qmax alone"
        fix = "sq.with_bits(qparams, plan, bits)"
        raise StateError(explain("extras", sentence, got=got, allowed="qmin and qmax, or neither", fix=fix))
    return low, high


def expanded_bounds(qparams: QParams, scheme: QScheme, x: Tensor) -> tuple[Bound, Bound]:
    """:func:`bounds`, tensors among them in a shape that broadcasts against ``x``."""
    low, high = bounds(qparams, scheme)
    if isinstance(low, Tensor):
        low = expand(low, x, scheme.granularity)
    if isinstance(high, Tensor):
        high = expand(high, x, scheme.granularity)
    return low, high


def clamp(code: Tensor, low: Bound, high: Bound) -> Tensor:
    """A code, which has no gradient, clamped to bounds that may be tensors.

    A bound that is a tensor has the gradient of the codes beyond it, and none of codes that equal it.
    """
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (number(b, code.device, code.dtype) for b in (low, high))
        return torch.where(code > high, high, torch.where(code < low, low, code))
    return code.clamp(low, high)


def guarded(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The mask where a factor is 0, and the factor with 1 in these places, to divide by."""
    dead = factor == 0
    return dead, factor.masked_fill(dead, 1)
