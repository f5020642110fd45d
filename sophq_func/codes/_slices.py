"""A weight as its quantizer sees it, in slices, so that only one slice at a time is in memory in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.model.weight_quantizer import Params, WeightQuantizer, is_regrouped
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor

SIZE = 2**18
"""Elements of a slice: 1 MiB in float32; encoding holds about ten tensors of this size at once."""


class Slice(NamedTuple):
    """A part of a weight, and the qparams of that part.

    Attributes:
      axis: along which the weight is cut.
      start: index of the first element along it.
      seen: the part as the quantizer sees it.
      qparams: of the part.
    """

    axis: int
    start: int
    seen: Tensor
    qparams: QParams


def slices(weight: WeightQuantizer, params: Params, qparams: QParams, dtype: torch.dtype | None = None) -> Iterator[Slice]:
    """The weight in slices that have the same codes as the whole weight; in one slice if it cannot be cut.

    Args:
      weight: the quantizer.
      params: of the model.
      qparams: of the quantizer.
      dtype: of the slices; ``None`` for that of the weight.
    """
    shape = params[weight.site.parameter].shape
    axis, unit = _cut(weight, len(shape))
    if not unit or not shape.numel():
        yield Slice(0, 0, weight.seen_part(params, dtype=dtype), qparams)
        return
    across = max(shape.numel() // max(shape[axis], 1), 1)
    step = max(SIZE // (across * unit), 1) * unit
    for start in range(0, shape[axis], step):
        length = min(step, shape[axis] - start)
        seen = weight.seen_part(params, axis, start, length, dtype)
        yield Slice(axis, start, seen, _part_of(qparams, shape, axis, (start, length), unit))


def _cut(weight: WeightQuantizer, ndim: int) -> tuple[int, int]:
    """The axis along which a weight may be cut, and the unit of a slice's length; a unit of 0 if it may not be cut.

    Elements that share a scale stay in one slice, except for a single scale, which every slice gets. The cut is along the
    axis of the scales, so that the number of elements to a scale, on which learned steps depend, stays the same.
    """
    granularity, fake = weight.scheme.granularity, weight.fake_quantize
    needs_whole = weight.scheme.dynamic or not fake.local or is_regrouped(weight.site) or ndim == 0
    if needs_whole or not isinstance(granularity, PerTensor | PerChannel | PerGroup | PerBlock):
        return 0, 0
    if isinstance(granularity, PerBlock):
        return (0, 0) if _has_blocks_along(0, fake, ndim) else (0, granularity.rows)
    if isinstance(granularity, PerTensor):
        axes = tuple(range(ndim))
    else:
        channel = granularity.axis
        # Of several axes the first, which is that of the scale, too.
        axes = channel[:1] if isinstance(channel, tuple) else ((channel or 0) % ndim,)
    free = [axis for axis in axes if not _has_blocks_along(axis, fake, ndim)]
    return (free[0], 1) if free else (0, 0)


def _has_blocks_along(axis: int, fake: FakeQuantize, ndim: int) -> bool:
    """Whether the blocks of a format lie along an axis, so that a cut would go through them."""
    return bool(fake.block_size) and axis - ndim == fake.block_axis


def _part_of(qparams: QParams, shape: torch.Size, axis: int, place: tuple[int, int], unit: int) -> QParams:
    """The qparams of a slice: tensors shaped like the weight are cut like it, those shaped like the scale along axis 0."""
    start, length = place

    def cut(value: Tensor) -> Tensor:
        if value.ndim and value.shape == qparams.scale.shape:
            return value.narrow(0, start // unit, length // unit)
        return value.narrow(axis, start, length) if value.shape == shape and value.ndim else value

    extras = {name: cut(value) for name, value in qparams.extras.items()}
    return QParams(cut(qparams.scale), cut(qparams.zero_point), extras)
