"""Grids as QuantizeLinear and DequantizeLinear have them: one scale, one for each channel, or one for each run of a row.

What :mod:`sophq_func.codes` stores, put into the form of these operators; or the reason why they cannot say it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes import FROM_THE_TENSOR, Grid, Stored
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import is_regrouped
from sophq_func.numerics.formats import FLOAT8
from sophq_func.numerics.scheme import PerBlock, PerChannel, PerGroup, PerTensor

TYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16)
"""Of integer codes; the first that holds them is taken."""


class LinearGrid(NamedTuple):
    """Codes and what they stand for: ``real = (code - zero_point) * scale``.

    Attributes:
      scale: float32, shape ``()``, ``(C,)`` or ``(C, groups)``.
      zero_point: shaped like it, in the dtype of the codes.
      low, high: smallest and largest code; of FP8, whose codes are the format's, 0.
      axis: of the channels; ``None`` per tensor.
      size: elements of a group along the axis behind the channels; 0 without groups.
      ends: of one scale, what the outermost codes stand for, where the type has further codes beyond them.
      number: of one scale, scale and zero point as numbers.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None
    size: int = 0
    ends: tuple[float, float] | None = None
    number: tuple[float, int] = (1.0, 0)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which codes are held."""
        return self.zero_point.dtype

    @property
    def bits(self) -> int:
        """How many bits a code needs."""
        span = self.high if self.low == 0 else max(self.high, -self.low - 1)
        return max(1, span).bit_length() + (self.low < 0)

    @property
    def full(self) -> bool:
        """Whether every code of the type is one of the grid's."""
        info = torch.iinfo(self.dtype) if not self.dtype.is_floating_point else None
        return info is None or (info.min, info.max) == (self.low, self.high)

    def unsigned(self) -> LinearGrid:
        """The same values as codes from 0 on, where they are int8."""
        if self.dtype != torch.int8:
            return self
        zero_point = (self.zero_point.to(torch.int16) + 128).to(torch.uint8)
        step, zero = self.number
        return self._replace(zero_point=zero_point, low=self.low + 128, high=self.high + 128, number=(step, zero + 128))


class LinearCodes(NamedTuple):
    """A weight, or a bias, as codes on such a grid, in its own layout."""

    codes: Tensor
    grid: LinearGrid


def value_linear(piece: RunQuantizer, grid: Grid) -> LinearGrid | str:
    """The grid of a quantizer of values; or why the operators have none."""
    if grid.dynamic:
        return FROM_THE_TENSOR
    granularity, ndim = grid.granularity, len(piece.site.shape)
    if not isinstance(granularity, PerTensor | PerChannel):
        return f"no operator has {type(granularity).__name__} on an activation"
    if isinstance(granularity, PerTensor):
        return _linear(grid, None)
    if ndim < 2:
        return "no operator has PerChannel on a tensor of one axis"
    return _linear(grid, (granularity.axis or 0) % ndim)


def weight_linear(stored: Stored) -> LinearCodes | str:
    """A weight with the codes that the operators have; or why there are none."""
    grid, granularity = _as_float8(stored), stored.grid.granularity
    axis, size, rows = None, 0, 1
    if isinstance(granularity, PerChannel | PerGroup) and is_regrouped(stored.site):
        return "the output channels of a grouped deconvolution lie along two axes"
    if isinstance(granularity, PerChannel | PerGroup):
        axis = (granularity.axis or 0) % max(stored.codes.ndim, 1)
    if isinstance(granularity, PerGroup):
        size = granularity.size
    elif isinstance(granularity, PerBlock):
        axis, size, rows = 0, granularity.columns, granularity.rows
    elif not isinstance(granularity, PerTensor | PerChannel):
        return f"no operator has {type(granularity).__name__} on a weight"
    if size and (axis, stored.codes.ndim) != (0, 2):
        return f"no operator has {type(granularity).__name__} on anything but the rows of a matrix"
    linear = _linear(grid.grid, axis)
    if isinstance(linear, str):
        return linear
    scale, zero_point = (part.repeat_interleave(rows, 0) if rows > 1 else part for part in linear[:2])
    linear = linear._replace(scale=scale, zero_point=zero_point, size=size)
    return LinearCodes(grid.codes.to(linear.dtype), linear)


def _as_float8(stored: Stored) -> Stored:
    """Codes of a table whose every entry is an E4M3 number as these numbers; others as they are."""
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
    """The grid with its scale and zero point in the types of the operators."""
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
    for dtype in TYPES:
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max and (low < 0) == (info.min < 0):
            return dtype
    return None
