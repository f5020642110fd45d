"""Fake quantization as one ``autograd.Function``, for large tensors in eager: few passes over memory, no kept mask.

It computes what the composition in :mod:`sophq_func.affine` computes, forward and all derivatives. With the mask ``m`` of
codes inside ``[low, high]``, the output ``y`` and its gradient ``g``: ``gx = m g``, ``gs = sum((y - m x) g) / s``,
``gz = -s sum((1 - m) g)``, each sum over the elements that share a scale. The mask is found again from ``x``: a code is
inside where the quotient ``v`` lies between ``low - 1/2`` and ``high + 1/2``; a bound itself is rounded to the even
neighbour, and so is inside where its integer is even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGE = 2**14
"""From how many elements on it is used; below, the composition costs less than the call."""

BLOCK = 2**18
"""How many elements are worked on at once: what passes over them after the first finds them in the cache."""


class Grid(NamedTuple):
    """What is not differentiated: bounds of the codes, and whether the quotient is ``x * (1 / s)``, and holds ``z``."""

    low: int
    high: int
    reciprocal: bool
    shifted: bool


def fits(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> bool:
    """Whether the function serves these tensors: eager, large, of torch's own type and one floating type."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(low, int)
        and isinstance(high, int)
        and x.numel() >= LARGE
        and x.dtype == scale.dtype
        and type(x) in (Tensor, torch.nn.Parameter)
        and type(scale) in (Tensor, torch.nn.Parameter)
    )


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """``s (clamp(q, low, high) - z)``; scale and zero point broadcast against ``x``."""
    result: Tensor = _FakeQuantize.apply(x, scale, zero, grid)  # type: ignore[no-untyped-call]
    return result


def _quotient(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, out: Tensor | None = None) -> Tensor:
    """What is rounded, in a fresh tensor or in ``out``."""
    v = torch.mul(x, 1 / scale, out=out) if grid.reciprocal else torch.div(x, scale, out=out)
    return v if zero is None or not grid.shifted else torch.add(v, zero, out=out)


def _inside(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The mask of codes inside the bounds."""
    v = _quotient(x, scale, zero, grid)
    if zero is None or grid.shifted:
        return (v >= _bound(grid.low, -1, v.dtype)) & (v <= _bound(grid.high, 1, v.dtype))
    return (v >= _bounds(grid.low - zero, -1)) & (v <= _bounds(grid.high - zero, 1))


def _bound(code: int, side: int, dtype: torch.dtype) -> float:
    """The outermost quotient that is rounded to a code; ``side`` is 1 above it and -1 below."""
    tie = torch.tensor(code + side / 2, dtype=dtype)
    return float(tie if code % 2 == 0 else torch.nextafter(tie, tie * 0 - side * math.inf))


def _bounds(codes: Tensor, side: int) -> Tensor:
    """The same for codes that are whole numbers in a tensor."""
    tie = codes + side / 2
    return torch.where(codes.remainder(2) == 0, tie, torch.nextafter(tie, torch.full_like(tie, -side * math.inf)))


def _is_wrapped(*tensors: Tensor | None) -> bool:
    return any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def _sum_like(value: Tensor, like: Tensor) -> Tensor:
    """The sum over all axes along which ``like`` is broadcast."""
    return value.sum_to_size(like.shape) if like.ndim else value.sum()


def _blocks(like: Tensor, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """Corresponding parts of tensors that broadcast against the first, cut along the first axis; views."""
    shapes = {t.shape for t in (like, *tensors) if t is not None and t.ndim}
    flat = len(shapes) == 1 and all(t is None or t.is_contiguous() for t in (like, *tensors))
    whole = [t.view(-1) if flat and t is not None and t.ndim else t for t in (like, *tensors)]
    length = whole[0].shape[0] if like.ndim and like.numel() else 1  # type: ignore[union-attr]
    step = max(1, BLOCK * length // max(1, like.numel()))
    for start in range(0, length, step):
        cut = (t if t is None or not t.ndim or t.shape[0] == 1 != length else t[start : start + step] for t in whole)
        yield list(cut)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """Sums of blocks as one: side by side where the scales were cut, too."""
    if len(parts) == 1:
        return parts[0].reshape(like.shape)
    split = like.ndim and like.shape[0] > 1
    return (torch.cat(parts) if split else torch.stack(parts).sum(0)).reshape(like.shape)


def _outside(code: int, side: int, dtype: torch.dtype) -> float:
    """The innermost quotient beyond a bound: the neighbour of :func:`_bound`."""
    bound = torch.tensor(_bound(code, side, dtype), dtype=dtype)
    return float(torch.nextafter(bound, torch.tensor(side * math.inf, dtype=dtype)))


def _split(g: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, out: Tensor) -> Tensor:
    """Writes ``m g`` to ``out`` and returns ``m x``, in a fresh tensor."""
    if zero is not None:
        inside = _inside(x, scale, zero, grid)
        torch.where(inside, g, g.new_zeros(()), out=out)
        return torch.where(inside, x, 0)
    v = _quotient(x, scale, None, grid)
    limits = _outside(grid.low, -1, x.dtype), _outside(grid.high, 1, x.dtype)
    masked = torch.ops.aten.hardtanh_backward.grad_input  # its first argument where the second lies between, else 0
    masked(g, v, *limits, grad_input=out)
    kept: Tensor = masked(x, v, *limits, grad_input=v)
    return kept


def _rounded(v: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The output from the quotient, whose memory it takes where it may."""
    v = v.round_() if grid.shifted or zero is None else v.round_().add_(zero)
    v = v.clamp(grid.low, grid.high) if _is_wrapped(v) else v.clamp_(grid.low, grid.high)
    return v.mul_(scale) if zero is None else v.sub_(zero).mul_(scale)


class _FakeQuantize(torch.autograd.Function):
    """The output; see the top of this file for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
        if _is_wrapped(x, scale, zero):
            return _rounded(_quotient(x, scale, zero, grid), scale, zero, grid)
        y = torch.empty_like(x)
        for part, own, s, z in _blocks(x, y, scale, zero):
            _rounded(_quotient(part, s, z, grid, out=own), s, z, grid)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero, ctx.grid = inputs
        saved = (x, scale, output) if zero is None else (x, scale, output, zero)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, y, *zero = ctx.saved_tensors
        z = zero[0] if zero else None
        gx, gs, gz = _Backward.apply(g, x, scale, y, z, ctx.grid)  # type: ignore[no-untyped-call]
        return gx, gs, gz if zero else None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, ts: Tensor | None, tz: Tensor | None, _: None) -> Tensor:  # type: ignore[override]
        x, scale, y, *zero = ctx.saved_tensors
        inside = _inside(x.detach(), scale.detach(), zero[0].detach() if zero else None, ctx.grid)
        tangent = torch.zeros_like(y) if tx is None else torch.where(inside, tx, 0)
        if ts is not None:
            tangent = tangent + (y - torch.where(inside, x, 0)) * (ts / scale)
        if tz is not None:
            tangent = tangent - torch.where(inside, 0, scale * tz)
        return tangent


class _Backward(torch.autograd.Function):
    """The gradient, a function of its own, so that it stays fast where torch keeps a graph for the next derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, scale: Tensor, y: Tensor, zero: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _is_wrapped(g, x, scale, y, zero):
            inside = _inside(x, scale, zero, grid)
            gx = torch.where(inside, g, 0)
            gs = _sum_like((y - torch.where(inside, x, 0)) * g, scale) / scale
            return gx, gs, torch.zeros_like(scale) if zero is None else _sum_like((gx - g) * scale, zero)
        gx, to_scale, to_zero = torch.empty_like(x), [], []
        for gc, own, xc, yc, s, z in _blocks(g, gx, x, y, scale, zero):
            kept = _split(gc, xc, s, z, grid, own)
            to_scale.append(_sum_like(torch.sub(yc, kept, out=kept).mul_(gc), s))
            to_zero += [] if z is None else [_sum_like((own - gc) * s, z)]
        gz = torch.zeros_like(scale) if zero is None else _joined(to_zero, zero)
        return gx, _joined(to_scale, scale) / scale, gz

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, x, scale, y, zero, ctx.grid = inputs
        saved = (g, x, scale, y, output[1]) if zero is None else (g, x, scale, y, output[1], zero)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor, ggs: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, x, scale, y, gs, *zero = ctx.saved_tensors
        inside = _inside(x.detach(), scale.detach(), zero[0].detach() if zero else None, ctx.grid)
        step = ggs / scale
        to_g = torch.where(inside, ggx, 0) + (y - torch.where(inside, x, 0)) * step
        to_scale = -gs * step
        if zero:
            outer = torch.where(inside, 0, g)
            to_g = to_g - torch.where(inside, 0, scale * ggz)
            to_scale = to_scale - _sum_like(outer * ggz, scale)
        return to_g, torch.where(inside, -g * step, 0), to_scale, g * step, None, None

    @staticmethod
    def jvp(ctx: Any, tg: Any, tx: Any, ts: Any, ty: Any, tz: Any, _: None) -> tuple[Tensor, ...]:  # type: ignore[override]
        g, x, scale, y, gs, *zero = ctx.saved_tensors
        tg, tx, ty = (torch.zeros_like(x) if t is None else t for t in (tg, tx, ty))
        ts = torch.zeros_like(scale) if ts is None else ts
        inside = _inside(x.detach(), scale.detach(), zero[0].detach() if zero else None, ctx.grid)
        rest, change = y - torch.where(inside, x, 0), ty - torch.where(inside, tx, 0)
        to_scale = (_sum_like(rest * tg + change * g, scale) - gs * ts) / scale
        if not zero:
            return torch.where(inside, tg, 0), to_scale, torch.zeros_like(scale)
        outer, moved = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        return torch.where(inside, tg, 0), to_scale, -_sum_like(outer * ts + moved * scale, zero[0])
