"""The arithmetic of uniform grids: ``real = (code - zero_point) * scale``. Written once, here.

Rounding orders differ (semantics.md 4.1, 4.9). *Kernel order* is ``clamp(round(x * (1 / s)) + z)``, *expression order*
``clamp(round(x / s + z))``; they put exact ties on different sides when ``z`` is odd, and ``x * (1 / s)`` may differ from
``x / s`` by one unit in the last place. *Quotient order*, ``clamp(round(x / s) + z)``, has the division of the one and the
ties of the other. Rounding is half to even.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sophq_func.core import modes
from sophq_func.numerics import eager, ranges
from sophq_func.numerics.compiled import laid_out, recomputed, settled
from sophq_func.numerics.contracts import Codes, QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import Bound, bounds, clamp, expanded_bounds
from sophq_func.numerics.scheme import QScheme

Order = Literal["kernel", "expression", "quotient"]


def ste(x: Tensor, y: Tensor) -> Tensor:
    """The value of ``y`` with the gradient of ``x`` where that is finite (Bengio et al. 2013, arXiv:1308.3432).

    Example:
      >>> x = torch.tensor(0.7, requires_grad=True)
      >>> y = ste(x, x.round()); y.backward(); y.item(), x.grad.item()
      (1.0, 1.0)
    """
    finite = torch.where(torch.isfinite(x), x, 0)
    return y.detach() + (finite - finite.detach())


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype in which arithmetic is done: float32 for half types, else its own."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: QScheme) -> Tensor:
    """Quantize and dequantize in kernel order, no gradient; all three tensors broadcast."""
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(scheme.qmin, scheme.qmax)
    return (code - zero_point) * scale


def folded(quantize: Callable[[Tensor], Tensor], x: Tensor, factor: Tensor) -> Tensor:
    """``quantize(x * factor) / factor``, and ``x`` where the factor, which broadcasts against ``x``, is 0.

    Example:
      >>> folded(torch.round, torch.tensor([0.3, 0.3]), torch.tensor([10.0, 0.0]))
      tensor([0.3000, 0.3000])
    """
    dead, divisor = ranges.guarded(factor)
    return torch.where(dead, x, quantize(x * divisor) / divisor).to(x.dtype)


def fake_quantize(
    x: Tensor, qparams: QParams, scheme: QScheme, order: Order, *, whole: bool = True, factor: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize with the straight-through surrogate of LSQ (arXiv:1902.08153, semantics.md 4.3).

    Forward ``y = s * (clamp(q, n, p) - z)`` with the code ``q`` in the given order. For gradients of any order the
    function is ``y = s * where(n <= q <= p, x / s + c, clamp(q) - z)`` with the constant ``c = q - z - x / s``, so
    inside ``dy/dx = 1``, ``dy/ds = q - z - x / s``, ``dy/dz = 0``; outside ``dy/dx = 0``, ``dy/ds`` is the bound less
    ``z`` and ``dy/dz = -s``.

    Args:
      x: any floating tensor.
      qparams: scale, zero point; ``extras["qmin"]`` and ``extras["qmax"]`` replace the scheme's bounds.
      scheme: the grid; a symmetric one ignores the zero point.
      order: ``"kernel"``, ``"expression"`` or ``"quotient"``, see the top of this file.
      whole: the zero point is a code, clamped and rounded, straight through both; otherwise any number.
      factor: quantize as :func:`folded` does; broadcasts against ``x``.

    Returns:
      A tensor like ``x``.

    Example:
      >>> qp = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {})
      >>> fake_quantize(torch.tensor([0.26, -1.3]), qp, QScheme(bits=4), "kernel")
      tensor([ 0.3000, -0.8000])
    """
    return prepared(x, qparams, scheme, order, whole=whole, factor=factor)()


def prepared(
    x: Tensor, qparams: QParams, scheme: QScheme, order: Order, *, whole: bool = True, factor: Tensor | None = None
) -> Callable[[], Tensor]:
    """:func:`fake_quantize` when called; what takes no pass over ``x`` is done before."""
    granularity = scheme.granularity
    work = working(x)
    low, high = expanded_bounds(qparams, scheme, x)
    scale = expand(settled(qparams.scale), x, granularity)
    zero = None if scheme.symmetric else expand(settled(_zero_point(qparams, scheme, whole)), x, granularity)
    if whole and eager.fits(work, scale, low, high, factor):
        grid = eager.Grid(low, high, order == "kernel", order == "expression")
        y = eager.prepared(work, scale, zero, grid, factor)
        return y if work is x else lambda: y().to(x.dtype)
    if factor is None:
        y = partial(recomputed, _composed, work, work, scale, scale, zero, low, high, order)
    else:
        y = partial(_composed_folded, work, factor, scale, zero, low, high, order)
    return lambda: laid_out(y().to(x.dtype), granularity)


def encode(x: Tensor, qparams: QParams, scheme: QScheme, order: Order, *, whole: bool = True) -> Codes:
    """The codes, int32, of what :func:`fake_quantize` makes of finite ``x``; :func:`decode` reads them.

    Example:
      >>> qp = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {})
      >>> encode(torch.tensor([0.26, -1.3]), qp, QScheme(bits=4), "kernel").values
      tensor([ 3, -8], dtype=torch.int32)
    """
    work = working(x.detach())
    low, high = expanded_bounds(qparams, scheme, x)
    scale = expand(qparams.scale.detach(), x, scheme.granularity)
    zero = None if scheme.symmetric else expand(_zero_point(qparams, scheme, whole).detach(), x, scheme.granularity)
    ratio = work * scale.reciprocal() if order == "kernel" else work / scale
    code = clamp(_rounded(ratio, zero, order), low, high)
    return Codes(code.to(torch.int32), {})


def decode(
    codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32, *, whole: bool = True
) -> Tensor:
    """``(code - zero_point) * scale``, computed in float32, or in float64 where that is asked for.

    Example:
      >>> qp = QParams(torch.tensor(0.5), torch.tensor(3, dtype=torch.int32), {})
      >>> decode(Codes(torch.tensor([0, 4]), {}), qp, QScheme(bits=4, symmetric=False))
      tensor([-1.5000,  0.5000])
    """
    level = codes.values.to(torch.float64 if dtype == torch.float64 else torch.float32)
    scale = expand(qparams.scale.detach(), level, scheme.granularity)
    if not scheme.symmetric:
        level = level - expand(_zero_point(qparams, scheme, whole).detach(), level, scheme.granularity)
    return (level * scale).to(dtype)


def uncoded(qparams: QParams, scheme: QScheme, *, whole: bool = True) -> str:
    """Why an integer grid has no codes; empty where it has some.

    Bounds lie between two codes where a width is being learned; a zero point that is not ``whole`` may be any number.
    """
    low, high = bounds(qparams, scheme)
    for bound in (low, high):
        if isinstance(bound, Tensor) and not bool((bound == bound.round()).all()):
            return "its outermost codes are no whole numbers"
    zero = qparams.zero_point
    if whole or scheme.symmetric or scheme.dynamic or bool(((zero == zero.round()) & (zero >= low) & (zero <= high)).all()):
        return ""
    return "its zero point is no code: it lies between two, or beyond the outermost"


def nearest(y: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
    """The codes of values that lie on the grid already, up to the rounding of ``code * scale``."""
    scale = expand(qparams.scale.detach(), y, scheme.granularity).double()
    level = (y.detach().double() / scale).round()
    if not scheme.symmetric:
        level = level + expand(_zero_point(qparams, scheme, True).detach().double(), y, scheme.granularity)
    return Codes(clamp(level, *expanded_bounds(qparams, scheme, y)).to(torch.int32), {})


def _composed_folded(
    x: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, low: Bound, high: Bound, order: Order
) -> Tensor:
    """The composition with a factor folded in, and ``x`` where that is 0."""
    dead, safe = ranges.guarded(factor)
    safe = settled(safe)
    y = recomputed(_composed, x, x * safe, scale, settled(scale / safe), zero, low, high, order)
    return torch.where(dead, x, y)


def _composed(
    x: Tensor, seen: Tensor, scale: Tensor, unit: Tensor, zero: Tensor | None, low: Bound, high: Bound, order: Order
) -> Tensor:
    """The same as a composition of functions of torch: for small tensors, transforms and compilers.

    ``seen / scale`` is rounded, and codes are steps of ``unit``: with a factor ``f`` folded in ``x f`` and ``s / f``,
    without one ``x`` and ``s``. The value is ``unit L`` with the constant level ``L = clamp(q) - z``; terms that are 0
    carry the derivatives, so that no compiler computes for the value what only a derivative needs.
    """
    differentiable = modes.may_differentiate()
    step, base, raw, center = unit, scale, seen, zero
    if differentiable:
        step, base, raw, center = unit.detach(), scale.detach(), seen.detach(), None if zero is None else zero.detach()
    ratio = raw * base.reciprocal() if order == "kernel" else raw / base
    code = _rounded(ratio, center, order)
    clamped = clamp(code, low, high)
    level = clamped if center is None else clamped - center
    if not differentiable:
        return step * level
    inside = clamped == code
    if zero is not None and center is not None:  # which moves what is outside
        level = level - torch.where(inside, 0, zero - center)
    within = torch.where(inside, x, 0)
    slope = level - torch.where(inside, ratio, 0)
    return torch.addcmul(torch.addcmul(within - within.detach(), step, level), unit - step, slope)


def switched(x: Tensor, y: Tensor, qparams: QParams) -> Tensor:
    """``y``, what became of ``x``, where ``extras["enabled"]`` of the qparams is on or missing; a floating mask mixes."""
    mask = qparams.extras.get("enabled")
    if mask is None:
        return y
    return torch.where(mask, y, x) if mask.dtype == torch.bool else torch.lerp(x, y, mask.to(x.dtype))


def _rounded(ratio: Tensor, zero: Tensor | None, order: Order) -> Tensor:
    """The code, not clamped, of a quotient."""
    if zero is None:
        return ratio.round()
    return (ratio + zero).round() if order == "expression" else ratio.round() + zero


def _zero_point(qparams: QParams, scheme: QScheme, whole: bool) -> Tensor:
    """The zero point; a whole one clamped to the grid and rounded, straight through both."""
    zero = qparams.zero_point.to(qparams.scale.dtype)
    return ste(zero, clamp(zero, *bounds(qparams, scheme)).round()) if whole else zero
