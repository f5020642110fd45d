"""Granularity as shapes: which elements of a tensor share a scale.

A tensor is *scale-shaped* where its shape is that of the scales: ``()`` per tensor, ``(C,)`` per channel, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken


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
    axes = channel_axes(x, granularity)
    channels, rest = _parted(x.shape, axes)
    length = math.prod(rest)
    flat = x.movedim(axes, tuple(range(len(axes)))).reshape(*channels, length)  # not -1, which an empty tensor leaves open
    if isinstance(granularity, PerChannel):
        return flat
    if length % granularity.size:
        raise StateError(indivisible(f"tensor of shape {tuple(x.shape)}", length, granularity, "PerChannel()"))
    return flat.reshape(*channels, length // granularity.size, granularity.size)


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
    axes = channel_axes(x, granularity)
    channels, rest = _parted(x.shape, axes)
    groups = [math.prod(rest) // granularity.size] if isinstance(granularity, PerGroup) else []
    _check_shape(value, [*channels, *groups], x, granularity)
    if isinstance(granularity, PerChannel):
        return value.reshape([size if i in axes else 1 for i, size in enumerate(x.shape)])
    full = value.unsqueeze(-1).expand(*value.shape, granularity.size)
    return full.reshape(*channels, *rest).movedim(tuple(range(len(axes))), axes)


def indivisible(where: str, length: int, granularity: PerGroup, fix: str) -> str:
    """The message that channels of ``length`` elements cannot be cut into the groups of a granularity."""
    sentence = f"its channels of {length} elements cannot be cut into groups by {granularity}"
    return explain(where, sentence, got=granularity.size, allowed=f"a divisor of {length}", fix=fix)


def uneven(where: str, high: int, wide: int, granularity: PerBlock, fix: str) -> str:
    """The message that a matrix of ``high`` by ``wide`` elements cannot be cut into the blocks of a granularity."""
    sentence = f"its {high} by {wide} elements cannot be cut into blocks by {granularity}"
    got = (granularity.rows, granularity.columns)
    return explain(where, sentence, got=got, allowed=f"divisors of {high} and {wide}", fix=fix)


def scale_axes(granularity: Granularity) -> int | None:
    """How many axes scales have; ``None`` where they have as many as the tensor, but one."""
    if isinstance(granularity, PerToken):
        return None
    if isinstance(granularity, PerChannel | PerGroup):
        channels = len(granularity.axis) if isinstance(granularity.axis, tuple) else 1
        return channels + isinstance(granularity, PerGroup)
    return 2 if isinstance(granularity, PerBlock) else 0


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
        raise StateError(uneven(f"tensor of shape {tuple(x.shape)}", high, wide, granularity, "PerChannel()"))
    return high // granularity.rows, wide // granularity.columns


def channel_axes(x: Tensor, granularity: PerChannel | PerGroup) -> tuple[int, ...]:
    """The channel axes in ``x``, counted from the front; axis 0 where the granularity has none."""
    axis = 0 if granularity.axis is None else granularity.axis
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-x.ndim <= one < x.ndim for one in axes):
        where, sentence = f"tensor of shape {tuple(x.shape)}", "it does not have the channel axis"
        allowed = f"{-x.ndim}..{x.ndim - 1}" if x.ndim else "no axis: the tensor is a scalar"
        raise StateError(explain(where, sentence, got=axis, allowed=allowed, fix="PerTensor()"))
    return tuple(one % x.ndim for one in axes)


def _parted(shape: Sequence[int], axes: Sequence[int]) -> tuple[list[int], list[int]]:
    """The sizes along the channel axes, and the sizes along the others."""
    return [shape[i] for i in axes], [size for i, size in enumerate(shape) if i not in axes]
