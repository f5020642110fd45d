"""Fake quantization as one ``autograd.Function``, for large tensors in eager: few passes over memory, no kept mask.

It computes what the composition in :mod:`sophq_func.affine` computes, forward and all derivatives. With the mask ``m`` of
codes inside ``[low, high]``, the output ``y`` and its gradient ``g``: ``gx = m g``, ``gs = sum((y - m x) g) / s``,
``gz = -s sum((1 - m) g)``, each sum over the elements that share a scale. Mask and output are found again from ``x``: a
code is inside where the quotient ``v`` lies between ``low - 1/2`` and ``high + 1/2``; a bound itself is rounded to the
even neighbour, and so is inside where its integer is even.
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


def _is_inside(v: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """The mask of quotients whose codes lie inside the bounds."""
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


def _gradient_parts(
    g: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes ``m g`` to ``out`` and returns ``m x`` and ``y``, in fresh tensors."""
    v = _quotient(x, scale, zero, grid)
    if zero is None:
        limits = _outside(grid.low, -1, x.dtype), _outside(grid.high, 1, x.dtype)
        masked = torch.ops.aten.hardtanh_backward  # its first argument where the second lies between, else 0
        masked.grad_input(g, v, *limits, grad_input=out)
        return masked(x, v, *limits), _rounded(v, scale, None, grid)
    inside = _is_inside(v, zero, grid)
    torch.where(inside, g, g.new_zeros(()), out=out)
    return torch.where(inside, x, 0), _rounded(v, scale, zero, grid)


def _levels(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """The mask, and ``dy/ds``, which varies with the zero point alone, and only where the code is outside."""
    x, scale, fixed = x.detach(), scale.detach(), None if zero is None else zero.detach()
    v = _quotient(x, scale, fixed, grid)
    inside = _is_inside(v, fixed, grid)
    level = (_rounded(v, scale, fixed, grid) - torch.where(inside, x, 0)) / scale
    if zero is not None and fixed is not None:
        level = level - torch.where(inside, 0, zero - fixed)
    return inside, level


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
        _save(ctx, *inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero = _saved(ctx)
        gx, gs, gz = _Backward.apply(g, x, scale, zero, ctx.grid)  # type: ignore[no-untyped-call]
        return gx, gs, None if zero is None else gz, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, ts: Tensor | None, tz: Tensor | None, _: None) -> Tensor:  # type: ignore[override]
        x, scale, zero = _saved(ctx)
        inside, level = _levels(x, scale, zero, ctx.grid)
        tangent = torch.zeros_like(x) if tx is None else torch.where(inside, tx, 0)
        if ts is not None:
            tangent = tangent + level * ts
        if tz is not None:
            tangent = tangent - torch.where(inside, 0, scale * tz)
        return tangent


class _Backward(torch.autograd.Function):
    """The gradient, a function of its own, so that it stays fast where torch keeps a graph for the next derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        if _is_wrapped(g, x, scale, zero):
            inside, level = _levels(x, scale, zero, grid)
            gx = torch.where(inside, g, 0)
            gz = torch.zeros_like(scale) if zero is None else _sum_like((gx - g) * scale, zero)
            return gx, _sum_like(level * g, scale), gz
        gx, to_scale, to_zero = torch.empty_like(x), [], []
        for gc, own, xc, s, z in _blocks(g, gx, x, scale, zero):
            kept, y = _gradient_parts(gc, xc, s, z, grid, own)
            to_scale.append(_sum_like(y.sub_(kept).mul_(gc), s))
            to_zero += [] if z is None else [_sum_like((own - gc) * s, z)]
        gz = torch.zeros_like(scale) if zero is None else _joined(to_zero, zero)
        return gx, _joined(to_scale, scale) / scale, gz

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        g, *rest = inputs
        _save(ctx, *rest, g)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor, ggs: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero, g = _saved(ctx)
        inside, level = _levels(x, scale, zero, ctx.grid)
        to_g = torch.where(inside, ggx, 0) + level * ggs
        if zero is None:
            return to_g, None, None, None, None
        outer = torch.where(inside, 0, g)
        to_g = to_g - torch.where(inside, 0, scale * ggz)
        return to_g, None, -_sum_like(outer * ggz, scale), -_sum_like(outer * ggs, zero), None

    @staticmethod
    def jvp(ctx: Any, tg: Any, tx: Any, ts: Any, tz: Any, _: None) -> tuple[Tensor, ...]:  # type: ignore[override]
        x, scale, zero, g = _saved(ctx)
        tg = torch.zeros_like(g) if tg is None else tg
        inside, level = _levels(x, scale, zero, ctx.grid)
        to_scale = _sum_like(level * tg, scale)
        if zero is None:
            return torch.where(inside, tg, 0), to_scale, torch.zeros_like(scale)
        ts, tz = (torch.zeros_like(like) if t is None else t for t, like in ((ts, scale), (tz, zero)))
        outer, moved = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        to_zero = -_sum_like(outer * ts + moved * scale, zero)
        return torch.where(inside, tg, 0), to_scale - _sum_like(outer * tz, scale), to_zero


def _save(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, *more: Tensor) -> None:
    """Keep what a derivative needs; not the output, into which a model may write."""
    ctx.grid, ctx.has_zero = grid, zero is not None
    saved = [t for t in (x, scale, zero, *more) if t is not None]
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What was kept: ``x``, the scale, the zero point or ``None``, and more."""
    x, scale, *rest = ctx.saved_tensors
    return (x, scale, *rest) if ctx.has_zero else (x, scale, None, *rest)
