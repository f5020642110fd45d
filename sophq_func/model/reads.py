"""The rows that a call multiplies a weight with, from the call's arguments: one function for each kind of product.

Rows lie as :class:`~sophq_func.numerics.moments.Moments` has them: the elements that one output channel sums over, in the
order of the weight's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor

from sophq_func.core.types import Args, Kwargs
from sophq_func.model.equations import named, product_of, rows_of

Rows: TypeAlias = Tensor | list[Tensor]
"""``(T, n)``, or ``(G, T, n)`` for ``G`` parts of a weight; or a list of ``(T, n)``, where each part has another number."""

Read: TypeAlias = Callable[[Args, Kwargs, int], Rows | None]
"""From the arguments of a call and the slot of the weight among its tensors to rows; ``None`` where they do not tell."""


def _linear(args: Args, kwargs: Kwargs, slot: int) -> Tensor:
    """Of ``linear(input, weight)``."""
    x: Tensor = named(args, kwargs, ("input",))["input"]
    return x.reshape(-1, x.shape[-1])


def _product(names: tuple[str, str], first: int = 0) -> Read:
    """Of a product of matrices, one of which is the weight.

    Args:
      names: of the two operands.
      first: how many arguments come before them.
    """

    def read(args: Args, kwargs: Kwargs, slot: int) -> Tensor:
        given = named(args[first:], kwargs, names)
        is_right = slot == first + 1
        weight: Tensor = given[names[is_right]]
        x: Tensor = given[names[not is_right]]
        if x.ndim == 1:
            x = x[None] if is_right else x[:, None]
        rows = x if is_right else x.mT
        return _by_matrix(rows, weight.shape[:-2])

    return read


def _by_matrix(rows: Tensor, batch: Sequence[int]) -> Tensor:
    """Rows ``(..., T, n)`` as ``(T, n)``; for a batch of matrices, each of which has rows of its own, as ``(G, T, n)``."""
    times, n = rows.shape[-2:]
    if not batch:
        return rows.reshape(-1, n)
    if rows.ndim < len(batch) + 2:
        rows = rows.expand(*batch, times, n)
    return rows.reshape(-1, math.prod(batch), times, n).transpose(0, 1).flatten(1, 2)


CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
DECONVOLUTION = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
"""Arguments of torch's convolutions, in order."""


def _convolution(axes: int) -> Read:
    """Of a convolution over a number of axes: each place of the output reads a patch of the input."""

    def read(args: Args, kwargs: Kwargs, slot: int) -> Tensor:
        given = named(args, kwargs, CONVOLUTION)
        kernel = given["weight"].shape[2:]
        dilation = _each(given.get("dilation", 1), axes)
        around = _padding(given.get("padding", 0), kernel, dilation)
        x = F.pad(_batched(given["input"], axes), around)
        found = patches(x, kernel, _each(given.get("stride", 1), axes), dilation)
        return _by_group(found, int(given.get("groups", 1)))

    return read


def _deconvolution(axes: int) -> Read:
    """Of a transposed convolution: a convolution of the input with zeros between its places, and the kernel turned round."""

    def read(args: Args, kwargs: Kwargs, slot: int) -> Tensor:
        given = named(args, kwargs, DECONVOLUTION)
        kernel = given["weight"].shape[2:]
        dilation = _each(given.get("dilation", 1), axes)
        x = _spread(_batched(given["input"], axes), _each(given.get("stride", 1), axes))
        padding, more = _each(given.get("padding", 0), axes), _each(given.get("output_padding", 0), axes)
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        pairs = [(far - less, far - less + add) for far, less, add in zip(reach, padding, more, strict=True)]
        x = F.pad(x, list(chain.from_iterable(reversed(pairs))))
        found = patches(x, kernel, (1,) * axes, dilation)
        return _by_group(found.flip(tuple(range(-axes, 0))), int(given.get("groups", 1)))

    return read


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The patches that a convolution reads: ``(N, C, *places)`` to ``(T, C, *kernel)``, ``T`` the places of all outputs.

    Example:
      >>> import torch
      >>> patches(torch.arange(4.0).reshape(1, 1, 4), (2,), (1,), (1,)).flatten(1)
      tensor([[0., 1.],
              [1., 2.],
              [2., 3.]])
    """
    axes = len(kernel)
    for axis in range(axes):
        extent = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, extent, stride[axis])[..., :: dilation[axis]]
    # (N, C, *places, *kernel): the channel goes behind the places
    return x.movedim(1, 1 + axes).flatten(0, axes)


def _by_group(found: Tensor, groups: int) -> Tensor:
    """Patches ``(T, C, *kernel)`` as rows ``(T, n)``, or ``(groups, T, n)``."""
    if groups == 1:
        return found.flatten(1)
    places, channels, *kernel = found.shape
    return found.reshape(places, groups, channels // groups, *kernel).movedim(1, 0).flatten(2)


def _batched(x: Tensor, axes: int) -> Tensor:
    """An input with a batch axis."""
    return x if x.ndim == axes + 2 else x[None]


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """An input with ``stride - 1`` zeros between neighbouring places."""
    sizes = [step * (size - 1) + 1 for step, size in zip(stride, x.shape[2:], strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    places_of_x = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    wide[places_of_x] = x
    return wide


def _padding(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The zeros before and behind each axis, as ``F.pad`` takes them: the last axis first."""
    if padding == "same":
        whole = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in whole]
    else:
        sizes = (0,) * len(kernel) if padding == "valid" else _each(padding, len(kernel))
        pairs = [(size, size) for size in sizes]
    return list(chain.from_iterable(reversed(pairs)))


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """A setting of a convolution for each axis."""
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * axes if len(value) == 1 else tuple(value)


def _grouped(args: Args, kwargs: Kwargs, slot: int) -> Rows | None:
    """Of ``grouped_mm``: each matrix of the weight multiplies rows of its own, of which ``offs`` has the ends."""
    given = named(args, kwargs, ("mat_a", "mat_b"))
    is_right, ends = slot == 1, given.get("offs")
    x = given["mat_a"] if is_right else given["mat_b"].mT
    if ends is None:
        return GROUPED(args, kwargs, slot)
    if x.ndim != 2 or (given["mat_b"] if is_right else given["mat_a"]).ndim != 3:
        return None  # the ends cut the sums
    return [x[start:end] for start, end in pairwise([0, *ends.tolist()])]


GROUPED = _product(("mat_a", "mat_b"))
"""Without ends it is a product of matrices."""

READS: Mapping[str, Read] = {
    "addmm": _product(("mat1", "mat2"), first=1),
    "baddbmm": _product(("batch1", "batch2"), first=1),
    "bmm": _product(("input", "mat2")),
    "conv1d": _convolution(1),
    "conv2d": _convolution(2),
    "conv3d": _convolution(3),
    "conv_transpose1d": _deconvolution(1),
    "conv_transpose2d": _deconvolution(2),
    "conv_transpose3d": _deconvolution(3),
    "grouped_mm": _grouped,
    "linear": _linear,
    "matmul": _product(("input", "other")),
    "mm": _product(("input", "mat2")),
}
"""By canonical name of a function, how the rows are read."""


def rows_read(function: str, args: Args, kwargs: Kwargs, slot: int) -> Rows | None:
    """The rows that a call multiplies its weight with; ``None`` for a function of which that is not known.

    Args:
      function: canonical name.
      args, kwargs: of the call.
      slot: index of the weight among the tensors of the call.

    Example:
      >>> import torch
      >>> rows_read("linear", (torch.ones(2, 3, 4), torch.ones(5, 4)), {}, 1).shape
      torch.Size([6, 4])
    """
    if function in READS:
        return READS[function](args, kwargs, slot)
    product = product_of(function, args, kwargs)
    return None if product is None else rows_of(product, slot)
