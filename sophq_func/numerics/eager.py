"""Fake quantization as one ``autograd.Function``, for large tensors in eager: few passes over memory, no kept mask.

It computes what the composition in :mod:`sophq_func.numerics.affine` computes, forward and all derivatives. With the
mask ``m`` of codes inside ``[low, high]``, the output ``y`` and its gradient ``g``: ``gx = m g``,
``gs = sum((y - m x) g) / s``,
``gz = -s sum((1 - m) g)``, each sum over the elements that share a scale. Mask and codes are found again from ``x``: a
code is inside where the quotient ``v`` lies between ``low - 1/2`` and ``high + 1/2``; a bound itself is rounded to the
even neighbour, and so is inside where its integer is even.

With a factor ``d`` folded in it is ``Q(x d) / d``, rounded in that order, and ``x`` where ``d`` is 0: a grid of step
``r = s / d``, which takes the place of ``s`` in every derivative. Autograd knows that quotient; ``s`` and ``d``
themselves enter as constants.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.core.modes import has_derivative, is_compiling, is_recording, is_wrapped
from sophq_func.numerics.ranges import guarded

LARGE = 2**14
"""From how many elements on it is used; below, the composition costs less than the call."""

BLOCK = 2**17
"""How many elements a CPU works on at once: what passes over them after the first finds them in the cache."""

BACKWARD_BLOCK = 2**16
"""The same where five tensors are in use at once."""


class Grid(NamedTuple):
    """What is not differentiated: bounds of the codes, and whether the quotient is ``x * (1 / s)``, and holds ``z``.

    Both bounds are ints or, where they are data, tensors of shape ``()``.
    """

    low: Any
    high: Any
    reciprocal: bool
    shifted: bool


class Point(NamedTuple):
    """Where the function and its derivatives are evaluated; all tensors broadcast against ``x``.

    Attributes:
      x: the tensor.
      ratio: the step ``r`` of the grid in ``x``: the scale, divided by the factor.
      zero: the zero point.
      unit: the scale ``s``, or ``1 / s`` where the quotient is a product; a constant.
      factor: what is folded in, 1 where it is 0; a constant.
      dead: where it is 0; a constant.
    """

    x: Tensor
    ratio: Tensor
    zero: Tensor | None
    unit: Tensor
    factor: Tensor | None = None
    dead: Tensor | None = None


def fits(x: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int, factor: Tensor | None = None) -> bool:
    """Whether the function serves these tensors: eager, large, of torch's own type and one floating type."""
    floats = (x, scale) if factor is None else (x, scale, factor)
    return (
        not is_compiling()
        and x.numel() >= LARGE
        and all(t.dtype == x.dtype and type(t) in (Tensor, torch.nn.Parameter) for t in floats)
        and type(low) is type(high)
        and _is_constant(low)
        and _is_constant(high)
    )


def _is_constant(bound: Tensor | int) -> bool:
    """Whether a bound is the same everywhere, and nothing is differentiated or mapped along it."""
    return isinstance(bound, int) or not (bound.ndim or bound.requires_grad or is_wrapped(bound))


def prepared(
    x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, factor: Tensor | None = None
) -> Callable[[], Tensor]:
    """``s (clamp(q, low, high) - z)`` when called; scale, zero point and factor broadcast against ``x``."""
    constant = scale.detach()
    unit = constant.reciprocal() if grid.reciprocal else constant
    point = Point(x, scale, zero, unit)
    if factor is not None:
        dead, safe = guarded(factor)
        point = Point(x, scale / safe, zero, unit, safe.detach(), dead)
    return partial(_FakeQuantize.apply if has_derivative(*point) else _FakeQuantize.forward, *point, grid)


def _quotient(p: Point, grid: Grid, out: Tensor | None = None) -> Tensor:
    """What is rounded, in a fresh tensor or in ``out``."""
    x = p.x if p.factor is None else torch.mul(p.x, p.factor, out=out)
    v = torch.mul(x, p.unit, out=out) if grid.reciprocal else torch.div(x, p.unit, out=out)
    return v if p.zero is None or not grid.shifted else torch.add(v, p.zero, out=out)


def _is_inside(v: Tensor, p: Point, grid: Grid) -> Tensor:
    """The mask of quotients whose codes lie inside the bounds."""
    if p.zero is None or grid.shifted:
        return (v >= _bound(grid.low, -1, v.dtype)) & (v <= _bound(grid.high, 1, v.dtype))
    return (v >= _bounds(grid.low - p.zero, -1)) & (v <= _bounds(grid.high - p.zero, 1))


def _bound(code: int | Tensor, side: int, dtype: torch.dtype) -> float | Tensor:
    """The outermost quotient that is rounded to a code; ``side`` is 1 above it and -1 below."""
    return _bounds(code.to(dtype), side) if isinstance(code, Tensor) else _inner_limit(code, side, dtype)


@cache
def _inner_limit(code: int, side: int, dtype: torch.dtype) -> float:
    tie = torch.tensor(code + side / 2, dtype=dtype)
    return float(tie if code % 2 == 0 else torch.nextafter(tie, tie * 0 - side * math.inf))


def _bounds(codes: Tensor, side: int) -> Tensor:
    """The same for codes in a tensor; one that is not whole is no tie."""
    whole = codes.floor() if side > 0 else codes.ceil()
    tie = whole + side / 2
    return torch.where(whole.remainder(2) == 0, tie, torch.nextafter(tie, torch.full_like(tie, -side * math.inf)))


def _sum_like(value: Tensor, like: Tensor) -> Tensor:
    """The sum over all axes along which ``like`` is broadcast."""
    return value.sum_to_size(like.shape) if like.ndim else value.sum()


def _blocks(size: int, like: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding parts, of about ``size`` elements, of tensors that broadcast against the first; views.

    They are cut along the first axis.
    """
    count = round(like.numel() / size)
    whole: list[Any] = [like, *tensors]
    if count <= 1 or not like.is_cpu:
        return iter((tuple(whole),))
    wide = [i for i, t in enumerate(whole) if t is not None and t.ndim]
    if all(whole[i].shape == like.shape and whole[i].is_contiguous() for i in wide):
        for i in wide:
            whole[i] = whole[i].view(-1)
    length = len(whole[0])
    cut = [i for i in wide if len(whole[i]) != 1 or length == 1]
    return zip(*[t.chunk(count) if i in cut else repeat(t) for i, t in enumerate(whole)], strict=False)  # the first is cut


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """Sums of blocks as one: side by side where the scales were cut, too."""
    if len(parts) == 1:
        return parts[0].reshape(like.shape)
    split = sum(part.numel() for part in parts) == like.numel()
    return (torch.cat(parts) if split else torch.stack(parts).sum(0)).reshape(like.shape)


@cache
def _outside(code: int, side: int, dtype: torch.dtype) -> float:
    """The innermost quotient beyond a bound: the neighbour of :func:`_bound`."""
    bound = torch.tensor(_inner_limit(code, side, dtype), dtype=dtype)
    return float(torch.nextafter(bound, torch.tensor(side * math.inf, dtype=dtype)))


def _gradient_parts(g: Tensor, p: Point, grid: Grid, out: Tensor, room: Sequence[Tensor]) -> Tensor:
    """Writes ``m g`` to ``out`` and returns ``g dy/dr`` in the second tensor of ``room``; both are overwritten."""
    v, level = room
    _quotient(p, grid, out=v)
    torch.round(v, out=level)
    if p.zero is not None and not grid.shifted:
        level.add_(p.zero)
    level.clamp_(grid.low, grid.high)
    if p.zero is None and isinstance(grid.low, int) and isinstance(grid.high, int):
        limits = _outside(grid.low, -1, v.dtype), _outside(grid.high, 1, v.dtype)
        masked = torch.ops.aten.hardtanh_backward.grad_input  # its first argument where the second lies between, else 0
        masked(g, v, *limits, grad_input=out)
        level.sub_(masked(v, v, *limits, grad_input=v))
    else:
        inside = _is_inside(v, p, grid)
        torch.where(inside, g, g.new_zeros(()), out=out)
        level.sub_(_center(v, inside, p, grid))
    return level.mul_(g)


def _center(v: Tensor, inside: Tensor, p: Point, grid: Grid) -> Tensor:
    """What is subtracted from a code to have ``dy/dr``."""
    if p.zero is None or grid.shifted:
        return torch.where(inside, v, 0 if p.zero is None else p.zero)
    return torch.where(inside, v, 0) + p.zero


def _levels(p: Point, grid: Grid) -> tuple[Tensor, Tensor]:
    """The mask, and ``dy/dr``, which varies with the zero point alone, and only where the code is outside."""
    fixed = Point._make(None if t is None else t.detach() for t in p)
    v = _quotient(fixed, grid)
    inside = _is_inside(v, fixed, grid)
    code = v.round() if grid.shifted or fixed.zero is None else v.round() + fixed.zero
    level = code.clamp(grid.low, grid.high) - _center(v, inside, fixed, grid)
    if p.dead is not None:
        inside, level = inside | p.dead, torch.where(p.dead, 0, level)
    if p.zero is not None and fixed.zero is not None:
        level = level - torch.where(inside, 0, p.zero - fixed.zero)
    return inside, level


def _rounded(v: Tensor, p: Point, grid: Grid) -> Tensor:
    """The output from the quotient."""
    code = v.round() if grid.shifted or p.zero is None else v.round() + p.zero
    code = code.clamp(grid.low, grid.high)
    return (code if p.zero is None else code - p.zero) * p.ratio


def _round(v: Tensor, p: Point, grid: Grid) -> None:
    """The same, written over the quotient."""
    v.round_()
    if p.zero is None:
        v.clamp_(grid.low, grid.high)
    elif grid.shifted:
        v.clamp_(grid.low, grid.high).sub_(p.zero)
    else:
        v.add_(p.zero).clamp_(grid.low, grid.high).sub_(p.zero)
    v.mul_(p.ratio)


def _left_alone(x: Tensor, y: Tensor, dead: Tensor | None) -> Tensor:
    """``y``, into which those elements of ``x`` are written that a factor of 0 leaves alone; mostly there are none."""
    if dead is None:
        return y
    axes = [axis for axis, size in enumerate(dead.shape) if size > 1]
    if len(axes) != 1 or not x.is_cpu or is_wrapped(x, y, dead):
        return torch.where(dead, x, y)
    rows = dead.reshape(-1).nonzero().reshape(-1)
    return y.index_copy_(axes[0], rows, x.index_select(axes[0], rows)) if len(rows) else y


def _positional(forward: Any) -> Any:
    """A ``forward`` that is only called with all its arguments in order.

    To fill in defaults ``Function.apply`` binds the arguments to its signature, and finds that out, too, at every call; in
    this one there is nothing to bind.
    """
    forward.__signature__ = inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    return forward


class _FakeQuantize(torch.autograd.Function):
    """The output; see the top of this file for the gradient."""

    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(
        x: Tensor,
        ratio: Tensor,
        zero: Tensor | None,
        unit: Tensor,
        factor: Tensor | None,
        dead: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        p = Point(x, ratio, zero, unit, factor, dead)
        if is_wrapped(*p):
            return _left_alone(x, _rounded(_quotient(p, grid), p, grid), dead)
        y = torch.empty_like(x)
        for own, *rest in _blocks(BLOCK, y, *p):
            cut = Point(*rest)
            _round(_quotient(cut, grid, out=own), cut, grid)
        return _left_alone(x, y, dead)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        p = Point(*ctx.saved_tensors)
        again = is_recording(g, *p)
        gx, gr, gz = (_Backward.apply if again else _Backward.forward)(g, *p, ctx.grid)  # type: ignore[no-untyped-call]
        return gx, gr, None if p.zero is None else gz, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tx: Tensor | None, tr: Tensor | None, tz: Tensor | None, *_: None) -> Tensor:  # type: ignore[override]
        p = Point(*ctx.saved_tensors)
        inside, level = _levels(p, ctx.grid)
        tangent = torch.zeros_like(p.x) if tx is None else torch.where(inside, tx, 0)
        if tr is not None:
            tangent = tangent + level * tr
        if tz is not None:
            tangent = tangent - torch.where(inside, 0, p.ratio * tz)
        return tangent


class _Backward(torch.autograd.Function):
    """The gradient, a function of its own, so that it stays fast where torch keeps a graph for the next derivative."""

    generate_vmap_rule = True

    @staticmethod
    @_positional
    def forward(
        g: Tensor,
        x: Tensor,
        ratio: Tensor,
        zero: Tensor | None,
        unit: Tensor,
        factor: Tensor | None,
        dead: Tensor | None,
        grid: Grid,
    ) -> tuple[Tensor, Tensor, Tensor]:
        p = Point(x, ratio, zero, unit, factor, dead)
        if is_wrapped(g, *p):
            inside, level = _levels(p, grid)
            gx = torch.where(inside, g, 0)
            gz = torch.zeros_like(ratio) if zero is None else _sum_like((gx - g) * ratio, zero)
            return gx, _sum_like(level * g, ratio), gz
        gx, to_ratio, to_zero = torch.empty_like(x), [], []
        room: list[Tensor] = []
        for gc, own, *rest in _blocks(BACKWARD_BLOCK, g, gx, *p):
            cut = Point(*rest)
            if not room or room[0].shape != own.shape:
                room = [torch.empty_like(own), torch.empty_like(own)]
            terms = _gradient_parts(gc, cut, grid, own, room)
            to_ratio.append(terms.clone() if terms.shape == cut.ratio.shape else _sum_like(terms, cut.ratio))
            if cut.zero is not None:
                outer = own - gc if cut.dead is None else (own - gc).masked_fill_(cut.dead, 0)
                to_zero.append(_sum_like(outer * cut.ratio, cut.zero))
        gr = _joined(to_ratio, ratio)
        gz = torch.zeros_like(ratio) if zero is None else _joined(to_zero, zero)
        return _left_alone(g, gx, dead), gr if dead is None else gr.masked_fill(dead, 0), gz

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, ggx: Tensor, ggr: Tensor, ggz: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, *rest = ctx.saved_tensors
        p = Point(*rest)
        inside, level = _levels(p, ctx.grid)
        to_g = torch.where(inside, ggx, 0) + level * ggr
        if p.zero is None:
            return to_g, *(None,) * 7
        outer = torch.where(inside, 0, g)
        to_g = to_g - torch.where(inside, 0, p.ratio * ggz)
        to_ratio, to_zero = -_sum_like(outer * ggz, p.ratio), -_sum_like(outer * ggr, p.zero)
        return to_g, None, to_ratio, to_zero, *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, tg: Any, tx: Any, tr: Any, tz: Any, *_: None) -> tuple[Tensor, ...]:  # type: ignore[override]
        g, *rest = ctx.saved_tensors
        p = Point(*rest)
        tg = torch.zeros_like(g) if tg is None else tg
        inside, level = _levels(p, ctx.grid)
        to_ratio = _sum_like(level * tg, p.ratio)
        if p.zero is None:
            return torch.where(inside, tg, 0), to_ratio, torch.zeros_like(p.ratio)
        tr, tz = (torch.zeros_like(like) if t is None else t for t, like in ((tr, p.ratio), (tz, p.zero)))
        outer, moved = torch.where(inside, 0, g), torch.where(inside, 0, tg)
        to_zero = -_sum_like(outer * tr + moved * p.ratio, p.zero)
        return torch.where(inside, tg, 0), to_ratio - _sum_like(outer * tz, p.ratio), to_zero


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Keep what a derivative needs; not the output, into which a model may write."""
    *tensors, ctx.grid = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
