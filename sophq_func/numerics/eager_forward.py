"""The value of fake quantization on a large tensor: where it is evaluated, and how a tensor is cut into blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.modes import is_wrapped

BLOCK = 2**17
"""Elements that a CPU processes at once: 512 KiB of float32 stay in a second-level cache from one pass to the next."""

_Bound: TypeAlias = Any
"""A bound of the codes: an int or a tensor of shape ``()``. Both bounds are of one kind, as ``Tensor.clamp`` requires."""


class Rounding(NamedTuple):
    """How a quotient becomes a code; nothing of it is differentiated.

    Attributes:
      low: the smallest code, an int or, where it is data, a tensor of shape ``()``.
      high: the largest code, of the same kind.
      reciprocal: the quotient is ``x * (1 / s)`` instead of ``x / s``.
      shifted: the zero point is added before rounding instead of after.
    """

    low: _Bound
    high: _Bound
    reciprocal: bool
    shifted: bool


class Point(NamedTuple):
    """Where the function and its derivatives are evaluated; all tensors broadcast against ``x``.

    Attributes:
      x: the tensor.
      step: the step ``r = s / d`` of the grid in ``x``: the scale, divided by the factor where there is one.
      zero: the zero point; ``None`` means 0.
      divisor: the scale ``s``, by which ``x`` is divided; with ``Rounding.reciprocal`` it is ``1 / s``, and ``x`` is
        multiplied with it. A constant.
      factor: the factor ``d``, with 1 where it is 0; a constant.
      dead: the mask where the factor is 0, and the output is ``x``; a constant.
    """

    x: Tensor
    step: Tensor
    zero: Tensor | None
    divisor: Tensor
    factor: Tensor | None = None
    dead: Tensor | None = None


def value(p: Point, rounding: Rounding) -> Tensor:
    """The output, computed block by block where that pays."""
    if is_wrapped(*p):
        return with_dead(p.x, _output(quotient(p, rounding), p, rounding), p.dead)
    y = torch.empty_like(p.x)
    for y_block, *point in blocks(BLOCK, y, *p):
        block = Point(*point)
        _write_output(quotient(block, rounding, out=y_block), block, rounding)
    return with_dead(p.x, y, p.dead)


def quotient(p: Point, rounding: Rounding, out: Tensor | None = None) -> Tensor:
    """The number ``v`` that is rounded, in a new tensor or in ``out``; it has the zero point in it where that is shifted."""
    x = p.x if p.factor is None else torch.mul(p.x, p.factor, out=out)
    v = torch.mul(x, p.divisor, out=out) if rounding.reciprocal else torch.div(x, p.divisor, out=out)
    return v if p.zero is None or not rounding.shifted else torch.add(v, p.zero, out=out)


def _output(v: Tensor, p: Point, rounding: Rounding) -> Tensor:
    """The output from the quotient ``v``, in new tensors, as transforms need it."""
    code = v.round() if rounding.shifted or p.zero is None else v.round() + p.zero
    code = code.clamp(rounding.low, rounding.high)
    return (code if p.zero is None else code - p.zero) * p.step


def _write_output(v: Tensor, p: Point, rounding: Rounding) -> None:
    """:func:`_output`, written over the quotient."""
    v.round_()
    if p.zero is None:
        v.clamp_(rounding.low, rounding.high)
    elif rounding.shifted:
        v.clamp_(rounding.low, rounding.high).sub_(p.zero)
    else:
        v.add_(p.zero).clamp_(rounding.low, rounding.high).sub_(p.zero)
    v.mul_(p.step)


def with_dead(x: Tensor, y: Tensor, dead: Tensor | None) -> Tensor:
    """``y``, with the elements of ``x`` where the factor is 0; may write into ``y``.

    Mostly the factor is that of a BatchNorm, one a channel, and few or none are 0: only these channels are copied, where
    ``torch.where`` would read and write the whole tensor.
    """
    if dead is None:
        return y
    axes = [axis for axis, size in enumerate(dead.shape) if size > 1]
    if len(axes) != 1 or not x.is_cpu or is_wrapped(x, y, dead):
        return torch.where(dead, x, y)
    channels = dead.reshape(-1).nonzero().reshape(-1)
    if len(channels) == 0:
        return y
    return y.index_copy_(axes[0], channels, x.index_select(axes[0], channels))


def blocks(size: int, like: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Corresponding views, of about ``size`` elements, of ``like`` and of tensors that broadcast against it.

    They are cut along the first axis; tensors of shape ``()`` or of length 1 along it are passed whole to each block.
    """
    count = round(like.numel() / size)
    whole: list[Any] = [like, *tensors]
    # a GPU has no use for blocks: each would be a kernel of its own
    if count <= 1 or not like.is_cpu:
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
