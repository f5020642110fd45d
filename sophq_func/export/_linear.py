"""Grids in the form of QuantizeLinear and DequantizeLinear: one scale, or one for each channel or group of a row.

The grids and codes of :mod:`sophq_func.codes` are converted to this form; or a clause says why these operators cannot
express them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes import FROM_THE_TENSOR, Grid, Stored
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import is_regrouped
from sophq_func.numerics.formats import FLOAT8
from sophq_func.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor

TYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16)
"""Dtypes for integer codes: the first that holds them is used, so that narrow ones come first."""


class LinearGrid(NamedTuple):
    """A grid as the operators have it: ``real = (code - zero_point) * scale``.

    Attributes:
      scale: float32, shape ``()``, ``(C,)`` or ``(C, groups)``.
      zero_point: shape of ``scale``, in the dtype of the codes.
      low, high: smallest and largest code; both 0 for FP8, where every code of the format is used.
      axis: of the channels; ``None`` for one scale.
      size: elements of a group, along the axis after ``axis``; 0 without groups.
      ends: for one scale, the real numbers of the outermost codes, if the dtype has codes beyond them; values are clipped
        to them before QuantizeLinear, which clips to the dtype only.
      number: for one scale, scale and zero point as Python numbers.
      axes, shape: of a weight with channels along several axes, these axes, and its shape with them in front; its codes are
        a matrix with a row for each channel. Empty otherwise.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None
    size: int = 0
    ends: tuple[float, float] | None = None
    number: tuple[float, int] = (1.0, 0)
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return self.zero_point.dtype

    @property
    def bits(self) -> int:
        """How many bits a code needs."""
        span = self.high if self.low == 0 else max(self.high, -self.low - 1)
        return max(1, span).bit_length() + (self.low < 0)

    @property
    def full(self) -> bool:
        """Whether the grid has every code of its dtype."""
        info = torch.iinfo(self.dtype) if not self.dtype.is_floating_point else None
        return info is None or (info.min, info.max) == (self.low, self.high)

    def as_matrix(self, x: Tensor) -> Tensor:
        """A weight, or its codes, in the layout of the codes, from the layout of the parameter."""
        if not self.shape:
            return x
        in_front = x.movedim(self.axes, tuple(range(len(self.axes))))
        return in_front.reshape(prod(self.shape[: len(self.axes)]), prod(self.shape[len(self.axes) :]))

    def in_own_layout(self, real: Tensor) -> Tensor:
        """The numbers of a weight in the layout of the parameter, from those in the layout of its codes."""
        if not self.shape:
            return real
        return real.reshape(self.shape).movedim(tuple(range(len(self.axes))), self.axes)

    def unsigned(self) -> LinearGrid:
        """The same grid with int8 codes shifted by 128 to uint8; other dtypes unchanged."""
        if self.dtype != torch.int8:
            return self
        zero_point = (self.zero_point.to(torch.int16) + 128).to(torch.uint8)
        step, zero = self.number
        return self._replace(zero_point=zero_point, low=self.low + 128, high=self.high + 128, number=(step, zero + 128))


class LinearCodes(NamedTuple):
    """A weight or a bias as codes on a linear grid, in the layout of the parameter or as :class:`LinearGrid` says."""

    codes: Tensor
    grid: LinearGrid


def value_linear(piece: RunQuantizer, grid: Grid) -> LinearGrid | str:
    """The linear grid of the quantizer of a value; or why it has none, as a clause."""
    if grid.dynamic:
        return FROM_THE_TENSOR
    granularity, ndim = grid.granularity, len(piece.site.shape)
    if not isinstance(granularity, PerTensor | PerChannel):
        return f"no operator has {type(granularity).__name__} on an activation"
    if isinstance(granularity, PerTensor):
        return _linear(grid, None)
    if isinstance(granularity.axis, tuple):
        if piece.site.role == "weight":
            return _by_rows(grid, piece.site.shape, granularity)
        return "no operator has channels along several axes of an activation"
    if ndim < 2:
        return "no operator has PerChannel on a tensor of one axis"
    return _linear(grid, (granularity.axis or 0) % ndim)


def weight_linear(stored: Stored) -> LinearCodes | str:
    """A weight as codes on a linear grid; or why it has none, as a clause."""
    as_float8, granularity = _as_float8(stored), stored.grid.granularity
    axis, size, rows = None, 0, 1
    if isinstance(granularity, PerChannel | PerGroup) and is_regrouped(stored.site):
        return "the output channels of a grouped deconvolution lie along two axes"
    if isinstance(granularity, PerChannel | PerGroup):
        if isinstance(granularity.axis, tuple):
            by_rows = _by_rows(as_float8.grid, as_float8.codes.shape, granularity)
            if isinstance(by_rows, str):
                return by_rows
            return LinearCodes(by_rows.as_matrix(as_float8.codes).to(by_rows.dtype), by_rows)
        axis = (granularity.axis or 0) % max(stored.codes.ndim, 1)
    if isinstance(granularity, PerGroup):
        size = granularity.size
    elif isinstance(granularity, PerBlock):
        axis, size, rows = 0, granularity.columns, granularity.rows
    elif not isinstance(granularity, PerTensor | PerChannel):
        return f"no operator has {type(granularity).__name__} on a weight"
    if size and (axis, stored.codes.ndim) != (0, 2):
        return f"no operator has {type(granularity).__name__} on anything but the rows of a matrix"
    linear = _linear(as_float8.grid, axis)
    if isinstance(linear, str):
        return linear
    linear = linear._replace(size=size)
    if rows > 1:  # the operators have blocks of one row only: each row gets the scales of its block
        scale, zero_point = linear.scale.repeat_interleave(rows, 0), linear.zero_point.repeat_interleave(rows, 0)
        linear = linear._replace(scale=scale, zero_point=zero_point)
    return LinearCodes(as_float8.codes.to(linear.dtype), linear)


def _by_rows(grid: Grid, shape: Sequence[int], granularity: PerChannel | PerGroup) -> LinearGrid | str:
    """The grid of a weight with channels along several axes, or with groups of all its elements, as that of a matrix.

    Args:
      grid: of the weight.
      shape: of the weight.
      granularity: with a tuple of axes.
    """
    linear = _linear(grid, 0)
    if isinstance(linear, str):
        return linear
    assert isinstance(granularity.axis, tuple)
    axes = granularity.axis
    channels, rest = [shape[i] for i in axes], [size for i, size in enumerate(shape) if i not in axes]
    size = granularity.size if isinstance(granularity, PerGroup) else 0
    scales = (prod(channels), prod(rest) // size) if size else (prod(channels),)
    return linear._replace(
        scale=linear.scale.reshape(scales),
        zero_point=linear.zero_point.reshape(scales),
        size=size,
        axes=axes,
        shape=(*channels, *rest),
    )


def _as_float8(stored: Stored) -> Stored:
    """Codes of a table as E4M3 numbers, if every entry of the table is one; else unchanged."""
    table = stored.grid.parts.get("table")
    if table is None or stored.grid.block_size:
        return stored
    numbers = table.to(torch.float8_e4m3fn)
    if not torch.equal(numbers.float(), table):
        return stored
    scale = {"scale": stored.grid.parts["scale"]}
    grid = Grid(format="float8_e4m3fn", bits=8, granularity=stored.grid.granularity, parts=scale)
    return Stored(numbers.view(torch.uint8)[stored.codes.long()].view(torch.float8_e4m3fn), grid, stored.site)


def _linear(grid: Grid, axis: int | None) -> LinearGrid | str:
    """The grid with scale and zero point in the dtypes of the operators; or why it has none, as a clause."""
    if not grid.is_integer:
        if grid.dtype not in FLOAT8:
            return "no operator has " + ("codes of a table" if grid.format == "table" else f"codes of {grid.format}")
        scale = grid.parts["scale"]
        return LinearGrid(scale, torch.zeros_like(scale).to(grid.dtype), 0, 0, axis)
    assert grid.low is not None and grid.high is not None
    low, high = int(grid.low.min()), int(grid.high.max())
    if not bool((grid.low == low).all() & (grid.high == high).all()):
        return "its channels have different outermost codes"
    dtype = _type(low, high)
    if dtype is None:
        return f"no type holds codes from {low} to {high}"
    scale, zero_point = grid.parts["scale"].float(), grid.parts["zero_point"].to(dtype)
    linear = LinearGrid(scale, zero_point, low, high, axis)
    if scale.ndim:
        return linear
    step, center = float(scale), int(zero_point)
    ends = None if linear.full else ((low - center) * step, (high - center) * step)
    return linear._replace(ends=ends, number=(step, center))


def _type(low: int, high: int) -> torch.dtype | None:
    """The narrowest dtype that holds these codes and is signed exactly if they are."""
    for dtype in TYPES:
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max and (low < 0) == (info.min < 0):
            return dtype
    return None
