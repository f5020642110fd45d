"""Which quantizers are plain grids, so that a stored integer or FP8 code stands for their value; and which are not, and why.

Nothing here asks for the name of a quantizer. A weight is on a grid if its quantized values are multiples of its step; an
activation quantizer is one if, at points all over its range and beyond, it makes what ``(clamp(round(x / s) + z) - z) s``,
or a cast to FP8, makes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, bounds, positive
from sophq_func.numerics.scheme import PerChannel, PerGroup, PerTensor, QScheme

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDEST = 16
OFFSETS = (-0.45, -0.2, 0.1, 0.3, 0.45)
"""Where between two codes a quantizer is asked; ties are left out, rounding orders differ there."""


class Grid(NamedTuple):
    """Codes and what they stand for: ``real = (code - zero_point) * scale``.

    Attributes:
      scale: float32, shape ``()``, ``(C,)`` or ``(C, groups)``.
      zero_point: shaped like it, in the dtype of the codes.
      low, high: smallest and largest code; of FP8 they are the format's.
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

    def unsigned(self) -> Grid:
        """The same values as codes from 0 on, where they are int8."""
        if self.dtype != torch.int8:
            return self
        zero_point = (self.zero_point.to(torch.int16) + 128).to(torch.uint8)
        step, zero = self.number
        return self._replace(zero_point=zero_point, low=self.low + 128, high=self.high + 128, number=(step, zero + 128))


class Stored(NamedTuple):
    """A weight as codes on a grid, in its own layout."""

    codes: Tensor
    grid: Grid


def is_on(qparams: QParams) -> bool | None:
    """Whether ``extras["enabled"]`` switches a quantizer on or off; ``None`` where it mixes."""
    mask = float(qparams.extras.get("enabled", torch.tensor(1.0)))
    return bool(mask) if mask in (0.0, 1.0) else None


def activation_grid(piece: RunQuantizer, qparams: QParams) -> Grid | str:
    """The grid of a quantizer that acts while the model runs; or why there is none."""
    scheme, fake = piece.scheme, piece.fake_quantize
    if scheme.dynamic:
        return "its scale is computed from the tensor at hand"
    if not isinstance(scheme.granularity, PerTensor | PerChannel):
        return f"{type(scheme.granularity).__name__} on an activation"
    if fake.noise:
        return "it needs noise"
    axis = None
    if isinstance(scheme.granularity, PerChannel):
        axis = (scheme.granularity.axis or 0) % max(len(piece.site.shape), 1)
        if len(piece.site.shape) < 2:
            return "PerChannel on a tensor of one axis"
    for grid in _candidates(fake, qparams, scheme, axis):
        if isinstance(grid, str) or _computes(fake, qparams, scheme, grid, len(piece.site.shape)):
            return grid
    return f"{piece.config.fake_quantize.name} computes more than rounding to a grid"


def weight_codes(weight: WeightQuantizer, params: Params, qparams: QParams) -> Stored | str:
    """A quantized weight as codes, BatchNorm folded in; or why that cannot be."""
    scheme, fake = weight.scheme, weight.fake_quantize
    if not isinstance(scheme.granularity, PerTensor | PerChannel | PerGroup):
        return f"{type(scheme.granularity).__name__} on a weight"
    if scheme.dynamic:
        return "its scale is dynamic"
    if weight.site.groups > 1 and weight.site.axis == 1 and not isinstance(scheme.granularity, PerTensor):
        return "the output channels of a grouped deconvolution lie along two axes"
    seen = weight.seen(params)
    axis = None if isinstance(scheme.granularity, PerTensor) else (scheme.granularity.axis or 0) % seen.ndim
    if isinstance(scheme.granularity, PerGroup) and (axis, seen.ndim) != (0, 2):
        return "PerGroup on other than the rows of a matrix"
    value = fake.apply(seen, qparams, scheme).float()
    for grid in _candidates(fake, qparams, scheme, axis):
        if isinstance(grid, str):
            return grid
        codes = to_codes(value, grid, scheme)
        step = expand(grid.scale, value, scheme.granularity)
        if bool(((from_codes(codes, grid, scheme) - value).abs() <= 1e-3 * step + 1e-6 * value.abs()).all()):
            return Stored(arranged(codes, weight.site), grid)
    return f"{weight.config.fake_quantize.name} makes other values than multiples of one step"


def _candidates(fake: FakeQuantize, qparams: QParams, scheme: QScheme, axis: int | None) -> list[Grid | str]:
    """The grids that a quantizer may have: integers with its scale, else the two FP8 formats."""
    size = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0
    if not fake.integer:
        scale = qparams.scale.detach().float().abs().clamp(min=EPS**2)
        return [Grid(scale, torch.zeros_like(scale).to(dtype), 0, 0, axis, size) for dtype in FLOAT8]
    found = fake.grid(qparams, scheme)
    outer = [torch.as_tensor(bound).detach().float() for bound in bounds(qparams, scheme)]
    low, high = float(outer[0].min()), float(outer[1].max())
    if low != round(low) or high != round(high):
        return ["its outermost codes are no whole numbers"]
    dtype = _dtype(int(low), int(high))
    if dtype is None:
        return [f"codes from {low:.0f} to {high:.0f} have no type"]
    zero = torch.zeros_like(found.scale) if scheme.symmetric else found.zero_point.detach().float()
    whole = zero.clamp(low, high).round().to(dtype)
    grid = Grid(positive(found.scale.detach()).float(), whole, int(low), int(high), axis, size)
    if grid.scale.ndim:
        return [grid]
    step, center = float(grid.scale), int(whole)
    ends = None if grid.full else ((low - center) * step, (high - center) * step)
    return [grid._replace(ends=ends, number=(step, center))]


def _dtype(low: int, high: int) -> torch.dtype | None:
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max and (low < 0) == (torch.iinfo(dtype).min < 0):
            return dtype
    return None


def to_codes(x: Tensor, grid: Grid, scheme: QScheme) -> Tensor:
    """The nearest code of each element."""
    ratio = x / expand(grid.scale, x, scheme.granularity)
    if grid.dtype.is_floating_point:
        largest = torch.finfo(grid.dtype).max
        return ratio.clamp(-largest, largest).to(grid.dtype)
    zero = expand(grid.zero_point.float(), x, scheme.granularity)
    return (ratio.round() + zero).clamp(grid.low, grid.high).to(grid.dtype)


def from_codes(codes: Tensor, grid: Grid, scheme: QScheme) -> Tensor:
    """What codes stand for."""
    wide = codes.float()
    return (wide - expand(grid.zero_point.float(), wide, scheme.granularity)) * expand(grid.scale, wide, scheme.granularity)


def _computes(fake: FakeQuantize, qparams: QParams, scheme: QScheme, grid: Grid, ndim: int) -> bool:
    """Whether a quantizer makes of points between all codes, and beyond, what the grid makes of them."""
    if grid.dtype.is_floating_point:
        magnitudes = torch.logspace(-14, 17, 400, base=2.0)
        points = torch.cat([-magnitudes.flip(0), magnitudes])
    else:
        span = grid.high - grid.low
        levels = torch.linspace(-1.25 * span, 1.25 * span, 4 * min(span, 1024) + 1).round()
        points = (levels[:, None] + torch.tensor(OFFSETS)).reshape(-1)
    x = points * grid.scale if grid.axis is None else _along(points, grid.scale, grid.axis, ndim)
    expected = from_codes(to_codes(x, grid, scheme), grid, scheme)
    difference = (fake.apply(x, qparams, scheme).float() - expected).abs()
    return bool((difference <= 1e-3 * expand(grid.scale, x, scheme.granularity) + 1e-5 * expected.abs()).all())


def _along(points: Tensor, scale: Tensor, axis: int, ndim: int) -> Tensor:
    """Points in steps of each channel: a tensor of ``ndim`` axes whose channels lie along ``axis``."""
    other = 0 if axis else 1
    table = scale[:, None] * points if axis < other else points[:, None] * scale
    shape = [1] * ndim
    shape[axis], shape[other] = len(scale), len(points)
    return table.reshape(shape)
