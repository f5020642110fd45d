"""The arithmetic of uniform grids: ``real = (code - zero_point) * scale``. Written once, here.

Rounding orders differ (semantics.md 4.1, 4.9). *Kernel order* is ``clamp(round(x * (1 / s)) + z)``, *expression order*
``clamp(round(x / s + z))``; they put exact ties on different sides when ``z`` is odd, and ``x * (1 / s)`` may differ from
``x / s`` by one unit in the last place. *Quotient order*, ``clamp(round(x / s) + z)``, has the division of the one and the
ties of the other. Rounding is half to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sophq_func import surrogate
from sophq_func.base import QParams
from sophq_func.errors import StateError, explain
from sophq_func.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QScheme

EPS = torch.finfo(torch.float32).eps
"""Smallest scale of an integer grid, 2 ** -23."""

Order = Literal["kernel", "expression", "quotient"]
Bound = Tensor | int


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


def rows(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` rearranged so that a reduction over the last axis has the shape of the scale; a view where it can be."""
    if isinstance(granularity, PerTensor):
        return x.reshape(-1)
    if isinstance(granularity, PerToken):
        return x if x.ndim else x.reshape(1)
    if isinstance(granularity, PerBlock):
        (high, wide), across = blocks(x, granularity), granularity.columns
        return x.reshape(high, granularity.rows, wide, across).transpose(1, 2).reshape(high, wide, granularity.rows * across)
    axis = channel_axis(x, granularity)
    flat = x.movedim(axis, 0).reshape(x.shape[axis], math.prod(x.shape[:axis] + x.shape[axis + 1 :]))
    if isinstance(granularity, PerChannel):
        return flat
    if flat.shape[1] % granularity.size:
        allowed = f"a divisor of {flat.shape[1]}, the length of a channel"
        where = f"tensor of shape {tuple(x.shape)}"
        raise StateError(explain(where, str(granularity), got=granularity.size, allowed=allowed))
    return flat.reshape(flat.shape[0], flat.shape[1] // granularity.size, granularity.size)


def expand(value: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """A scale-shaped ``value`` in a shape that broadcasts against ``x``."""
    if value.ndim == 0 or isinstance(granularity, PerTensor):
        return value
    if isinstance(granularity, PerToken):
        _check_shape(value, list(x.shape[:-1]), x, granularity)
        return value.unsqueeze(-1)
    if isinstance(granularity, PerBlock):
        high, wide = blocks(x, granularity)
        _check_shape(value, [high, wide], x, granularity)
        full = value.reshape(high, 1, wide, 1).expand(high, granularity.rows, wide, granularity.columns)
        return full.reshape(x.shape)
    axis = channel_axis(x, granularity)
    rest = [*x.shape[:axis], *x.shape[axis + 1 :]]
    groups = [math.prod(rest) // granularity.size] if isinstance(granularity, PerGroup) else []
    _check_shape(value, [x.shape[axis], *groups], x, granularity)
    if isinstance(granularity, PerChannel):
        return value.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    full = value.unsqueeze(-1).expand(*value.shape, granularity.size)
    return full.reshape([x.shape[axis], *rest]).movedim(0, axis)


def _check_shape(value: Tensor, expected: list[int], x: Tensor, granularity: Granularity) -> None:
    if list(value.shape) != expected:
        allowed = f"{tuple(expected)} for {granularity} on a tensor of shape {tuple(x.shape)}"
        raise StateError(explain("qparams", "this shape", got=tuple(value.shape), allowed=allowed))


def blocks(x: Tensor, granularity: PerBlock) -> tuple[int, int]:
    """How many blocks of ``granularity`` lie along the first axis of ``x``, and along the others flattened."""
    high, wide = (x.shape[0], math.prod(x.shape[1:])) if x.ndim else (1, 1)
    if high % granularity.rows or wide % granularity.columns:
        allowed = f"divisors of {high} and {wide}"
        where, got = f"tensor of shape {tuple(x.shape)}", (granularity.rows, granularity.columns)
        raise StateError(explain(where, str(granularity), got=got, allowed=allowed))
    return high // granularity.rows, wide // granularity.columns


def channel_axis(x: Tensor, granularity: PerChannel | PerGroup) -> int:
    """The axis of ``granularity`` in ``x``, counted from the front."""
    axis = granularity.axis or 0
    if not -x.ndim <= axis < x.ndim:
        raise StateError(explain(f"tensor of shape {tuple(x.shape)}", "this axis", got=axis, fix="PerTensor()"))
    return axis % x.ndim


def no_range(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The range of nothing, ``(inf, -inf)``, float32, for each scale that ``x`` has."""
    empty = torch.full(rows(x, granularity).shape[:-1], torch.inf, dtype=torch.float32, device=x.device)
    return empty, -empty


def min_max(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Smallest and largest value for each scale, float32, no gradient; ``(inf, -inf)`` of an empty tensor."""
    if x.numel() == 0:
        return no_range(x, granularity)
    if isinstance(granularity, PerTensor):
        lo, hi = torch.aminmax(x.detach())
        return lo.float(), hi.float()
    flat = rows(x.detach(), granularity)
    return flat.amin(-1).float(), flat.amax(-1).float()


def range_to_qparams(
    lo: Tensor, hi: Tensor, scheme: QScheme, *, pot_scale: bool | None = None, limits: tuple[Bound, Bound] | None = None
) -> QParams:
    """Scale and zero point whose grid covers ``[lo, hi]`` and 0 (semantics.md 3.1).

    With ``m- = min(lo, 0)``, ``m+ = max(hi, 0)``: symmetric ``s = max(-m-, m+) / ((qmax - qmin) / 2)``; affine
    ``s = (m+ - m-) / (qmax - qmin)``, ``z = clamp(qmin - round(m- / s), qmin, qmax)``; ``s`` is at least 2 ** -23.

    Args:
      lo: lower bounds, float32, scale-shaped.
      hi: upper bounds, same shape.
      scheme: the grid.
      pot_scale: instead of the scheme's.
      limits: smallest and largest code, instead of the scheme's.

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
        scale = torch.where(torch.isinf(width), hi / steps - lo / steps, width / steps)
    scale = scale.clamp(min=EPS)
    if scheme.pot_scale if pot_scale is None else pot_scale:
        scale = torch.exp2(torch.log2(scale).round().clamp(max=127))
    if scheme.symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero = clamp(low - torch.round(lo / scale), low, high)
        zero_point = torch.where(finite, zero, 0).to(torch.int32)
    return QParams(torch.where(finite, scale, torch.nan), zero_point, {})


def qparams_to_range(qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """The range that was handed to :func:`range_to_qparams`, as far as scale and zero point remember it."""
    low, high = bounds(qparams, scheme)
    if scheme.symmetric:
        half = qparams.scale * ((high - low) / 2)
        return -half, half
    zero = qparams.zero_point.to(qparams.scale.dtype)
    return (low - zero) * qparams.scale, (high - zero) * qparams.scale


def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: QScheme) -> Tensor:
    """Quantize and dequantize in kernel order, no gradient; all three tensors broadcast."""
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(scheme.qmin, scheme.qmax)
    return (code - zero_point) * scale


def positive(scale: Tensor) -> Tensor:
    """The scale in force, ``max(|s|, 2 ** -23)``; its gradient is the sign of ``s``, straight through the floor."""
    if not surrogate.may_differentiate():
        return scale.abs().clamp(min=EPS)
    size = torch.where(scale < 0, -scale, scale)
    constant = size.detach()
    return size + (constant.clamp(min=EPS) - constant)


def bounds(qparams: QParams, scheme: QScheme) -> tuple[Bound, Bound]:
    """Smallest and largest code: tensors of ``extras`` where they are data, else the scheme's numbers."""
    return qparams.extras.get("qmin", scheme.qmin), qparams.extras.get("qmax", scheme.qmax)


def expanded_bounds(qparams: QParams, scheme: QScheme, x: Tensor) -> tuple[Bound, Bound]:
    """The same; tensors in a shape that broadcasts against ``x``."""
    low, high = bounds(qparams, scheme)
    if isinstance(low, Tensor):
        low = expand(low, x, scheme.granularity)
    if isinstance(high, Tensor):
        high = expand(high, x, scheme.granularity)
    return low, high


def is_compiled_for_use() -> bool:
    """Whether a compiler looks on, and nobody asks for a derivative."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not surrogate.may_differentiate()


def settled(value: Tensor) -> Tensor:
    """``value``, which a compiler shall compute once.

    Inductor computes what is broadcast anew for each element that it is broadcast to, and takes only the results of
    reductions from memory: this is one, of equal numbers.
    """
    return value.unsqueeze(-1).expand(*value.shape, 16).amax(-1) if is_compiled_for_use() else value


def laid_out(y: Tensor, granularity: Granularity) -> Tensor:
    """``y``, which a compiler shall write in its own order, before a convolution wants it in another.

    Inductor would compute a weight in the order in which the convolution reads it, one channel beside the other, and read
    it with as many cache misses. What is viewed by strides is stored first.
    """
    if is_compiled_for_use() and isinstance(granularity, PerChannel) and y.ndim > 2:
        return y.as_strided(y.shape, y.stride())
    return y


def recomputed(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """``f(*args)``, of which a compiler shall keep nothing for the backward pass but the arguments.

    Of all intermediate results inductor would keep the smallest, which are masks of booleans, and a CPU takes longer to
    write one than to compute it twice. Inside transforms of ``torch.func`` there is no pass of its own that could do so.
    """
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not compiled or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return f(*args)
    result: Tensor = checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def folded(quantize: Callable[[Tensor], Tensor], x: Tensor, factor: Tensor) -> Tensor:
    """``quantize(x * factor) / factor``, and ``x`` where the factor, which broadcasts against ``x``, is 0.

    Example:
      >>> folded(torch.round, torch.tensor([0.3, 0.3]), torch.tensor([10.0, 0.0]))
      tensor([0.3000, 0.3000])
    """
    dead, divisor = surrogate.guarded(factor)
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
    if whole and surrogate.fits(work, scale, low, high, factor):
        grid = surrogate.Grid(low, high, order == "kernel", order == "expression")
        y = surrogate.prepared(work, scale, zero, grid, factor)
        return y if work is x else lambda: y().to(x.dtype)
    if factor is None:
        y = partial(recomputed, _composed, work, work, scale, scale, zero, low, high, order)
    else:
        y = partial(_composed_folded, work, factor, scale, zero, low, high, order)
    return lambda: laid_out(y().to(x.dtype), granularity)


def _composed_folded(
    x: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, low: Bound, high: Bound, order: Order
) -> Tensor:
    """The composition with a factor folded in, and ``x`` where that is 0."""
    dead, safe = surrogate.guarded(factor)
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
    differentiable = surrogate.may_differentiate()
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


def clamp(code: Tensor, low: Bound, high: Bound) -> Tensor:
    """A constant between bounds that may be tensors; a code on a bound does not move with it."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        low, high = (torch.as_tensor(b, dtype=code.dtype, device=code.device) for b in (low, high))
        return torch.where(code > high, high, torch.where(code < low, low, code))
    return code.clamp(low, high)


def _zero_point(qparams: QParams, scheme: QScheme, whole: bool) -> Tensor:
    """The zero point; a whole one clamped to the grid and rounded, straight through both."""
    zero = qparams.zero_point.to(qparams.scale.dtype)
    return ste(zero, clamp(zero, *bounds(qparams, scheme)).round()) if whole else zero
