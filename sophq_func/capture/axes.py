"""Which axes of a parameter run along each axis of a tensor that was only moved from it, be it by views or by copies.

A call that moves numbers moves the indices of these numbers alike. So the call is made a second time, for each axis of the
parameter, with a tensor in the place of the numbers that holds, at each place, the index along that axis. Where this tensor
varies along an axis of the result, there the parameter's axis runs along it. No call needs a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sophq_func.capture._torch import is_empty_shell
from sophq_func.core.operations import DROPOUTS, MOVES
from sophq_func.core.pytree import flatten, tensors
from sophq_func.core.types import Args, Kwargs, Output

Axes: TypeAlias = tuple[tuple[int, ...], ...]
"""For each axis of a tensor, the axes of the parameter that run along it: ``((1,), (0,))`` for the transpose of a matrix."""

CONVERSIONS = frozenset(("clone", "contiguous", "detach", "float", "to", "type_as")) | DROPOUTS
"""Operations that keep each number in its place: on indices, a conversion to another dtype would round."""

CHOICES = frozenset("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d max_pool2d max_pool3d".split())
"""Operations that choose numbers by their size: they would choose other indices than numbers."""

STRIDED = frozenset(("view", "view_as"))
"""Operations that need an operand whose strides fit."""

FOLLOWED = (MOVES | DROPOUTS) - CHOICES
"""Operations that are followed."""

EXACT = 2**24
"""Whole numbers up to this one are exact in float32."""

NOWHERE = 0
"""In the place of an index: no number of the parameter, as padding with zeros makes it."""


def indices(tensor: Tensor) -> list[Tensor]:
    """For each axis of a tensor, the index along it at each place, from 1; each takes the memory of one axis alone."""
    made = []
    for axis, size in enumerate(tensor.shape):
        dtype = torch.float32 if size < EXACT else torch.float64
        index = torch.arange(1, size + 1, dtype=dtype, device=_device(tensor))
        shape = [1] * tensor.ndim
        shape[axis] = size
        made.append(index.reshape(shape).expand(tensor.shape))
    return made


def _device(tensor: Tensor) -> torch.device:
    """Where indices of a tensor lie: beside it, unless it has no numbers at all."""
    return torch.device("cpu") if is_empty_shell(tensor) else tensor.device


def _numbers(tensor: Tensor) -> Tensor:
    """A tensor that a call takes beside its first operand; in the place of one without numbers some that vary everywhere."""
    if not is_empty_shell(tensor):
        return tensor
    places = torch.zeros(tensor.shape, dtype=torch.int64, device="cpu")
    for axis, size in enumerate(tensor.shape):
        shape = [1] * tensor.ndim
        shape[axis] = size
        places = places + torch.arange(size, device="cpu").reshape(shape)
    # Whatever is looked up with them has two entries at least, or this moves nothing.
    return (places % 2).to(tensor.dtype)


def same_axes(ndim: int) -> Axes:
    """The axes of the parameter itself."""
    return tuple((axis,) for axis in range(ndim))


def axes_of(indices: list[Tensor], ndim: int) -> Axes:
    """Which axes run along each axis of a tensor of ``ndim`` axes, from its indices as :func:`moved` returns them."""
    return tuple(tuple(axis for axis, index in enumerate(indices) if _varies(index, d)) for d in range(ndim))


def moved(
    name: str, func: Callable[..., Output], args: Args, kwargs: Kwargs, indices: list[Tensor], made: list[Tensor]
) -> list[list[Tensor] | None]:
    """The indices of each tensor that a call made of its first operand; ``None`` where they cannot be told.

    Args:
      name: of the function, one of :data:`FOLLOWED`.
      func, args, kwargs: the call.
      indices: of the first operand.
      made: what the call made.
    """
    items, rebuild = flatten((args, kwargs))
    source = next(item for item in items if isinstance(item, Tensor))
    if any(tensor.dtype != source.dtype for tensor in made) and name not in CONVERSIONS:
        return [None] * len(made)  # a view of the same bits as other numbers
    if name in CONVERSIONS:
        return [[index.to(_device(tensor)) for index in indices] for tensor in made]
    others = [item for item in items if isinstance(item, Tensor) and item is not source]
    if any(map(is_empty_shell, others)):
        if min(source.shape, default=0) < 2:
            return [None] * len(made)
        items = [_numbers(item) if isinstance(item, Tensor) and item is not source else item for item in items]
    of_made: list[list[Tensor]] = [[] for _ in made]
    for index in indices:
        # Any view of a contiguous tensor exists. Elsewhere a view, since an operation may change its operand in place.
        operand = index.contiguous() if name in STRIDED else index.view_as(index)
        new_args, new_kwargs = rebuild([operand if item is source else item for item in items])
        for of_one, result in zip(of_made, tensors(func(*new_args, **new_kwargs)), strict=False):
            of_one.append(_small(result))
    return [of_one if len(of_one) == len(indices) else None for of_one in of_made]


def _small(index: Tensor) -> Tensor:
    """The same numbers, in the memory of the axes along which they vary."""
    for d in range(index.ndim):
        if index.shape[d] > 1 and index.stride(d) and not _varies(index, d):
            index = index.amax(d, keepdim=True).expand(index.shape)
    return index


def _varies(index: Tensor, d: int) -> bool:
    """Whether numbers, apart from :data:`NOWHERE`, vary along an axis."""
    if index.shape[d] == 1 or not index.stride(d) or not index.numel():
        return False
    # Along axes of stride 0 all numbers are equal, and one is enough.
    for other in range(index.ndim):
        if not index.stride(other):
            index = index.narrow(other, 0, 1)
    lowest = torch.where(index == NOWHERE, torch.inf, index).amin(d)
    return bool((lowest < index.amax(d)).any())
