"""The value of fake quantization on a large tensor: where it is evaluated, and how tensors are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product, repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.modes import is_recorded

BLOCK = 2**17
"""Elements that a CPU processes at once: 512 KiB of float32 stay in a second-level cache from one pass to the next."""

Index: TypeAlias = tuple[int, ...]
"""Which member of a batch: one number for each axis of members."""


class Rounding(NamedTuple):
    """How a quotient becomes a code; all of it constant.

    Attributes:
      low, high: the outermost codes; ``None`` where they are tensors of the :class:`Point`.
      reciprocal: the quotient is ``x * (1 / s)`` instead of ``x / s``.
      shifted: the zero point is added before rounding instead of after.
      axes: how many axes of members every tensor has in front, one for each ``vmap`` that was folded in.
    """

    low: int | None
    high: int | None
    reciprocal: bool
    shifted: bool
    axes: int = 0


class Point(NamedTuple):
    """Where the function and its derivatives are evaluated.

    Behind the axes of members all tensors broadcast against ``x``. Along an axis of members a tensor has length 1 where all
    members share it.

    Attributes:
      x: the tensor.
      step: the step ``r = s / d`` of the grid in ``x``: the scale, divided by the factor where there is one.
      zero: the zero point; ``None`` means 0.
      divisor: the scale ``s``, by which ``x`` is divided; with ``Rounding.reciprocal`` it is ``1 / s``, and ``x`` is
        multiplied with it. A constant.
      factor: the factor ``d``, with 1 where it is 0; a constant.
      dead: the mask where the factor is 0, and the output is ``x``; a constant.
      low, high: the outermost codes of a member, of shape ``()``, where they are data; constants. ``None``: those of the
        :class:`Rounding`.
    """

    x: Tensor
    step: Tensor
    zero: Tensor | None
    divisor: Tensor
    factor: Tensor | None = None
    dead: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None


def value(p: Point, rounding: Rounding) -> Tensor:
    """The output: member by member, and block by block, where that pays."""
    if not rounding.axes:
        y = torch.empty_like(p.x)
        _write_value(y, p, rounding)
        return y
    if not is_cut(p.x):
        return whole_value(aligned(p, rounding.axes), rounding)
    batch = batch_of(rounding.axes, *p)
    y = torch.empty_like(p.x.expand(*batch, *p.x.shape[rounding.axes :]))
    for index in product(*map(range, batch)):
        _write_value(y[index], member(p, index), rounding)
    return y


def _write_value(y: Tensor, p: Point, rounding: Rounding) -> None:
    """Write the output of one member to ``y``."""
    for y_block, *point in blocks(BLOCK, y, *p):
        block = Point(*point)
        _write_output(quotient(block, rounding, out=y_block), block, rounding)
    restore_dead(p.x, y, p.dead)


def quotient(p: Point, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """The number ``v`` that is rounded, in a new tensor or in ``out``; it has the zero point in it where that is shifted."""
    x = p.x if p.factor is None else torch.mul(p.x, p.factor, out=out)
    v = torch.mul(x, p.divisor, out=out) if rounding.reciprocal else torch.div(x, p.divisor, out=out)
    return v if p.zero is None or not rounding.shifted else torch.add(v, p.zero, out=out)


def outermost(p: Point, rounding: Rounding) -> tuple[Any, Any]:
    """The smallest and the largest code: two ints or two tensors, as ``Tensor.clamp`` requires."""
    return (rounding.low, rounding.high) if p.low is None else (p.low, p.high)


def whole_value(p: Point, rounding: Rounding) -> Tensor:
    """The output of all members at once, in new tensors."""
    v = quotient(p, rounding)
    code = v.round() if rounding.shifted or p.zero is None else v.round() + p.zero
    code = code.clamp(*outermost(p, rounding))
    y = (code if p.zero is None else code - p.zero) * p.step
    return y if p.dead is None else torch.where(p.dead, p.x, y)


def _write_output(v: Tensor, p: Point, rounding: Rounding) -> None:
    """The output from the quotient ``v``, written over it."""
    low, high = outermost(p, rounding)
    v.round_()
    if p.zero is None:
        v.clamp_(low, high)
    elif rounding.shifted:
        v.clamp_(low, high).sub_(p.zero)
    else:
        v.add_(p.zero).clamp_(low, high).sub_(p.zero)
    v.mul_(p.step)


def restore_dead(x: Tensor, y: Tensor, dead: Tensor | None) -> None:
    """Write into ``y`` the elements of ``x`` where the factor is 0.

    Mostly the factor is that of a BatchNorm, one a channel, and few or none are 0: only these channels are copied, where
    ``torch.where`` would read and write the whole tensor.
    """
    if dead is None:
        return
    axes = [axis for axis, size in enumerate(dead.shape) if size > 1]
    if len(axes) != 1 or not x.is_cpu or is_recorded():  # a program cannot depend on which channels there are
        torch.where(dead, x, y, out=y)
        return
    channels = dead.reshape(-1).nonzero().reshape(-1)
    if len(channels):
        y.index_copy_(axes[0], channels, x.index_select(axes[0], channels))


def batch_of(axes: int, *tensors: Tensor | None) -> torch.Size:
    """The lengths of the axes of members, of tensors that may have length 1 there."""
    fronts = [t.shape[:axes] for t in tensors if t is not None]
    return torch.Size(torch.broadcast_shapes(*fronts))  # type: ignore[no-untyped-call]


def member(p: Point, index: Index) -> Point:
    """One member of a batch, as views of the same shapes and strides as if it were alone."""
    return Point._make(None if t is None else t[place(t, index)] for t in p)


def place(t: Tensor, index: Index) -> Index:
    """Where a member lies in a tensor, which may have length 1 along an axis of members."""
    return tuple(0 if length == 1 else i for length, i in zip(t.shape, index, strict=False))


def aligned(p: Point, axes: int) -> Point:
    """The same point with tensors that broadcast against ``x`` with all their axes."""
    return p if axes == 0 else Point._make(None if t is None else aligned_to(p.x, t, axes) for t in p)


def aligned_to(x: Tensor, t: Tensor, axes: int) -> Tensor:
    """A tensor with new axes behind those of members, so that it broadcasts against ``x``."""
    return t.reshape(t.shape[:axes] + (1,) * (x.ndim - t.ndim) + t.shape[axes:])


def is_cut(like: Tensor) -> bool:
    """Whether work is cut into members and blocks: a GPU has no use for that, as each would be a kernel of its own."""
    return like.is_cpu


def blocks(size: int, like: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding views, of about ``size`` elements, of ``like`` and of tensors that broadcast against it.

    They are cut along the first axis; tensors of shape ``()`` or of length 1 along it are passed whole to each block.
    """
    count = round(like.numel() / size)
    whole: list[Any] = [like, *tensors]
    if count <= 1 or not is_cut(like):
        return iter((tuple(whole),))
    with_axes = [i for i, t in enumerate(whole) if t is not None and t.ndim]
    # where all are contiguous and alike, the first axis, which may be short, need not be the one to cut
    if all(whole[i].shape == like.shape and whole[i].is_contiguous() for i in with_axes):
        for i in with_axes:
            whole[i] = whole[i].view(-1)
    length = len(whole[0])
    cut = [i for i in with_axes if len(whole[i]) != 1 or length == 1]
    parts = [t.chunk(count) if i in cut else repeat(t) for i, t in enumerate(whole)]
    return zip(*parts, strict=False)  # not strict, since a repeated tensor has no end; ``like`` is cut and has one
