"""The gradient of fake quantization on a large tensor.

Let ``m`` be the mask of codes inside ``[low, high]``, ``y`` the output and ``g`` its gradient. Then, with each sum over the
elements that share a scale::

    gx = m g
    gs = sum((y - m x) g) / s
    gz = -s sum((1 - m) g)

Mask and codes are recomputed from the quotient ``v`` of ``x`` and the scale. A code is inside iff ``v`` lies between
``low - 1/2`` and ``high + 1/2``; these bounds are ties, which round to even, so that a bound is inside iff its integer is
even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from sophq_func.numerics.eager_forward import (
    Index,
    Point,
    Rounding,
    aligned,
    batch_of,
    blocks,
    is_cut,
    member,
    outermost,
    place,
    quotient,
    restore_dead,
)

BACKWARD_BLOCK = 2**16
"""Elements that a CPU processes at once. Five tensors are in use at once: with 2 ** 17 it took a third longer."""


def gradient(g: Tensor, p: Point, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """``(gx, gr, gz)``, shaped like ``x``, step and zero point, for the gradient ``g`` of the output.

    Computed member by member, and block by block, where that pays; what members share has the sum of their gradients.
    Without a zero point ``gz`` is zeros, since a function must return tensors.
    """
    axes = rounding.axes
    if axes and not is_cut(g):
        return _whole_gradient(g, p, rounding)
    gx = torch.empty_like(p.x)
    if not axes:
        return gx, *_gradient_of_one(g, p, rounding, gx)
    gr = torch.empty_like(p.step)
    gz = torch.zeros_like(p.step) if p.zero is None else torch.empty_like(p.zero)
    scratch: Tensor | None = None
    for index in product(*map(range, batch_of(axes, g, *p))):
        at_x = place(gx, index)
        is_new = _is_first(gx, index)
        if not is_new and scratch is None:
            scratch = torch.empty_like(gx[at_x])
        out = gx[at_x] if is_new or scratch is None else scratch
        step_part, zero_part = _gradient_of_one(g[place(g, index)], member(p, index), rounding, out)
        if not is_new:
            gx[at_x].add_(out)
        _put(gr, index, step_part)
        if p.zero is not None:
            _put(gz, index, zero_part)
    return gx, gr, gz


def _is_first(total: Tensor, index: Index) -> bool:
    """Whether a member is the first of those that share a place in ``total``."""
    return all(i == 0 or length > 1 for i, length in zip(index, total.shape, strict=False))


def _put(total: Tensor, index: Index, part: Tensor) -> None:
    """Write the part of one member to its place in ``total``, or add it where members share the place."""
    slot = total[place(total, index)]
    if _is_first(total, index):
        slot.copy_(part)
    else:
        slot.add_(part)


def _whole_gradient(g: Tensor, p: Point, rounding: Rounding) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gradient` of all members at once, in new tensors."""
    full = aligned(p, rounding.axes)
    inside, slope = mask_and_slope(full, rounding)
    gx = torch.where(inside, g, 0)
    gr = sum_like(slope * g, full.step).reshape(p.step.shape)
    if p.zero is None or full.zero is None:
        return sum_like(gx, p.x), gr, torch.zeros_like(p.step)
    gz = sum_like((gx - g) * full.step, full.zero).reshape(p.zero.shape)
    return sum_like(gx, p.x), gr, gz


def _gradient_of_one(g: Tensor, p: Point, rounding: Rounding, gx: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient to ``x`` of one member to ``gx``, and return those to its step and zero point."""
    step_sums: list[Tensor] = []
    zero_sums: list[Tensor] = []
    scratch: list[Tensor] = []
    for g_block, gx_block, *point in blocks(BACKWARD_BLOCK, g, gx, *p):
        block = Point(*point)
        if not scratch or scratch[0].shape != gx_block.shape:  # for the first block, and again for a shorter last one
            scratch = [torch.empty_like(gx_block), torch.empty_like(gx_block)]
        terms = _gradient_parts(g_block, block, rounding, gx_block, scratch)
        # cloned where there is nothing to add up: the next block overwrites the scratch tensors
        step_sums.append(terms.clone() if terms.shape == block.step.shape else sum_like(terms, block.step))
        if block.zero is not None:
            minus_outside = gx_block - g_block  # -(1 - m) g
            if block.dead is not None:
                minus_outside.masked_fill_(block.dead, 0)
            zero_sums.append(sum_like(minus_outside * block.step, block.zero))
    gr = _joined(step_sums, p.step)
    gz = torch.zeros_like(p.step) if p.zero is None else _joined(zero_sums, p.zero)
    if p.dead is not None:
        gr = gr.masked_fill(p.dead, 0)
    restore_dead(g, gx, p.dead)
    return gr, gz


def _gradient_parts(g: Tensor, p: Point, rounding: Rounding, out: Tensor, scratch: Sequence[Tensor]) -> Tensor:
    """Write ``m g`` to ``out``, and return ``g dy/dr`` in the second of two ``scratch`` tensors."""
    v, code = scratch
    quotient(p, rounding, out=v)
    torch.round(v, out=code)
    if p.zero is not None and not rounding.shifted:
        code.add_(p.zero)
    low, high = outermost(p, rounding)
    code.clamp_(low, high)
    if p.zero is None and isinstance(low, int):
        # one pass instead of the four of two comparisons, their conjunction and a selection: this kernel returns its first
        # argument where the second lies strictly between the limits, and 0 elsewhere
        limits = _first_outside_int(low, -1, v.dtype), _first_outside_int(high, 1, v.dtype)
        masked = torch.ops.aten.hardtanh_backward.grad_input
        masked(g, v, *limits, grad_input=out)
        slope = code.sub_(masked(v, v, *limits, grad_input=v))  # less v inside, less 0 outside
    else:
        inside = _is_inside(v, p, rounding)
        torch.where(inside, g, g.new_zeros(()), out=out)
        slope = code.sub_(_subtrahend(v, inside, p, rounding))
    return slope.mul_(g)


def _subtrahend(v: Tensor, inside: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The number to subtract from the code for ``dy/dr``: ``x / r + z`` inside the bounds, and ``z`` outside."""
    if p.zero is None or rounding.shifted:  # here ``v`` is ``x / r + z``
        return torch.where(inside, v, 0 if p.zero is None else p.zero)
    return torch.where(inside, v, 0) + p.zero


def mask_and_slope(p: Point, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """The mask ``dy/dx``, and the slope ``dy/dr``.

    They are constants, but for the slope of codes outside, which has a derivative with respect to the zero point. All
    tensors broadcast against ``x``, as :func:`aligned` makes them.
    """
    fixed = Point._make(None if t is None else t.detach() for t in p)
    v = quotient(fixed, rounding)
    inside = _is_inside(v, fixed, rounding)
    code = v.round() if rounding.shifted or fixed.zero is None else v.round() + fixed.zero
    slope = code.clamp(*outermost(fixed, rounding)) - _subtrahend(v, inside, fixed, rounding)
    if p.dead is not None:  # there y = x
        inside, slope = inside | p.dead, torch.where(p.dead, 0, slope)
    if p.zero is not None and fixed.zero is not None:
        # a term that is 0: for second derivatives, the slope outside is the bound less the zero point
        slope = slope - torch.where(inside, 0, p.zero - fixed.zero)
    return inside, slope


def _is_inside(v: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The mask of quotients whose codes lie inside the bounds."""
    low, high = outermost(p, rounding)
    if p.zero is None or rounding.shifted:
        return (v >= _last_inside(low, -1, v.dtype)) & (v <= _last_inside(high, 1, v.dtype))
    # the code is round(v) + z, so that the bounds of round(v) are those of the code less z
    lowest, highest = _last_inside_of(low - p.zero, -1), _last_inside_of(high - p.zero, 1)
    return (v >= lowest) & (v <= highest)


def _last_inside(code: int | Tensor, side: int, dtype: torch.dtype) -> float | Tensor:
    """The outermost quotient that is rounded to an outermost code; ``side`` is 1 for the largest, -1 for the smallest.

    It is the tie beyond the code, or the number before that where the tie is rounded away from the code.
    """
    return _last_inside_of(code.to(dtype), side) if isinstance(code, Tensor) else _last_inside_int(code, side, dtype)


@cache
def _last_inside_int(code: int, side: int, dtype: torch.dtype) -> float:
    tie = torch.tensor(code + side / 2, dtype=dtype)
    if code % 2 == 0:
        return float(tie)
    inwards = torch.tensor(-side * math.inf, dtype=dtype)
    return float(torch.nextafter(tie, inwards))


def _last_inside_of(codes: Tensor, side: int) -> Tensor:
    """:func:`_last_inside` for codes in a tensor. Of one between two integers, the integer further inside counts."""
    whole = codes.floor() if side > 0 else codes.ceil()
    tie = whole + side / 2
    inwards = torch.full_like(tie, -side * math.inf)
    return torch.where(whole.remainder(2) == 0, tie, torch.nextafter(tie, inwards))


@cache
def _first_outside_int(code: int, side: int, dtype: torch.dtype) -> float:
    """The innermost quotient beyond the outermost code: the neighbour of :func:`_last_inside`."""
    inside = torch.tensor(_last_inside_int(code, side, dtype), dtype=dtype)
    outwards = torch.tensor(side * math.inf, dtype=dtype)
    return float(torch.nextafter(inside, outwards))


def sum_like(value: Tensor, like: Tensor) -> Tensor:
    """The sum over all axes along which ``like`` is broadcast."""
    return value.sum_to_size(like.shape) if like.ndim else value.sum()


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sums of all blocks as the sum that ``like`` has: side by side where ``like`` was cut, too, else added up."""
    if len(parts) == 1:
        return parts[0].reshape(like.shape)
    was_cut = sum(part.numel() for part in parts) == like.numel()
    joined = torch.cat(parts) if was_cut else torch.stack(parts).sum(0)
    return joined.reshape(like.shape)
