"""Granularity and shapes: which elements of a tensor share a scale."""

from __future__ import annotations

import math

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken


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
        raise StateError(explain(where, f"{granularity!s} is not possible", got=granularity.size, allowed=allowed))
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
        raise StateError(explain("qparams", "this shape is not possible", got=tuple(value.shape), allowed=allowed))


def blocks(x: Tensor, granularity: PerBlock) -> tuple[int, int]:
    """How many blocks of ``granularity`` lie along the first axis of ``x``, and along the others flattened."""
    high, wide = (x.shape[0], math.prod(x.shape[1:])) if x.ndim else (1, 1)
    if high % granularity.rows or wide % granularity.columns:
        allowed = f"divisors of {high} and {wide}"
        where, got = f"tensor of shape {tuple(x.shape)}", (granularity.rows, granularity.columns)
        raise StateError(explain(where, f"{granularity!s} is not possible", got=got, allowed=allowed))
    return high // granularity.rows, wide // granularity.columns


def channel_axis(x: Tensor, granularity: PerChannel | PerGroup) -> int:
    """The axis of ``granularity`` in ``x``, counted from the front."""
    axis = granularity.axis or 0
    if not -x.ndim <= axis < x.ndim:
        raise StateError(
            explain(f"tensor of shape {tuple(x.shape)}", "this axis is not possible", got=axis, fix="PerTensor()")
        )
    return axis % x.ndim
