"""Granularity as shapes: which elements of a tensor share a scale.

A tensor is *scale-shaped* where its shape is that of the scales: ``()`` per tensor, ``(C,)`` per channel, and so on.
"""

from __future__ import annotations

import math

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.numerics.scheme import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken


def rows(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` rearranged so that a reduction over the last axis is scale-shaped; a view where possible."""
    if isinstance(granularity, PerTensor):
        return x.reshape(-1)
    if isinstance(granularity, PerToken):
        return x if x.ndim else x.reshape(1)
    if isinstance(granularity, PerBlock):
        high, wide = blocks(x, granularity)
        tiles = x.reshape(high, granularity.rows, wide, granularity.columns).transpose(1, 2)
        return tiles.reshape(high, wide, granularity.rows * granularity.columns)
    axis = channel_axis(x, granularity)
    channels, length = x.shape[axis], math.prod(x.shape[:axis] + x.shape[axis + 1 :])
    flat = x.movedim(axis, 0).reshape(channels, length)  # not -1, which an empty tensor leaves open
    if isinstance(granularity, PerChannel):
        return flat
    if length % granularity.size:
        where = f"tensor of shape {tuple(x.shape)}"
        sentence = f"its channels of {length} elements cannot be cut into groups by {granularity}"
        raise StateError(
            explain(where, sentence, got=granularity.size, allowed=f"a divisor of {length}", fix="PerChannel()")
        )
    return flat.reshape(channels, length // granularity.size, granularity.size)


def expand(value: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """A scale-shaped ``value`` reshaped, and repeated where need be, so that it broadcasts against ``x``."""
    if value.ndim == 0:
        return value
    if isinstance(granularity, PerTensor):
        _check_shape(value, [], x, granularity)
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


def scale_axes(granularity: Granularity) -> int | None:
    """How many axes scales have; ``None`` where they have as many as the tensor, but one."""
    if isinstance(granularity, PerToken):
        return None
    if isinstance(granularity, PerTensor):
        return 0
    return 2 if isinstance(granularity, PerGroup | PerBlock) else 1


def _check_shape(value: Tensor, expected: list[int], x: Tensor, granularity: Granularity) -> None:
    if list(value.shape) != expected:
        allowed = f"{tuple(expected)} for {granularity} on a tensor of shape {tuple(x.shape)}"
        fix = "use the qparams of this model and plan"
        raise StateError(
            explain("qparams", "their shape does not fit the tensor", got=tuple(value.shape), allowed=allowed, fix=fix)
        )


def blocks(x: Tensor, granularity: PerBlock) -> tuple[int, int]:
    """How many blocks lie along the first axis of ``x``, and how many along its other axes, flattened."""
    high, wide = (x.shape[0], math.prod(x.shape[1:])) if x.ndim else (1, 1)
    if high % granularity.rows or wide % granularity.columns:
        where = f"tensor of shape {tuple(x.shape)}"
        sentence = f"its {high} by {wide} elements cannot be cut into blocks by {granularity}"
        got = (granularity.rows, granularity.columns)
        raise StateError(explain(where, sentence, got=got, allowed=f"divisors of {high} and {wide}", fix="PerChannel()"))
    return high // granularity.rows, wide // granularity.columns


def channel_axis(x: Tensor, granularity: PerChannel | PerGroup) -> int:
    """The channel axis in ``x``, counted from the front; 0 where the granularity has none."""
    axis = 0 if granularity.axis is None else granularity.axis
    if not -x.ndim <= axis < x.ndim:
        where, sentence = f"tensor of shape {tuple(x.shape)}", "it does not have the channel axis"
        allowed = f"{-x.ndim}..{x.ndim - 1}" if x.ndim else "no axis: the tensor is a scalar"
        raise StateError(explain(where, sentence, got=axis, allowed=allowed, fix="PerTensor()"))
    return axis % x.ndim
