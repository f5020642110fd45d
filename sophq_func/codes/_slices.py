"""A weight as its quantizer sees it, slice by slice: no more than one slice is ever held in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.model.weight_quantizer import Params, WeightQuantizer, is_regrouped
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.scheme import PerBlock, PerChannel, PerGroup, PerTensor

SIZE = 2**18
"""Elements of a slice: a megabyte in float32, of which encoding holds about ten at once."""


class Slice(NamedTuple):
    """A part of a weight along one axis, and the qparams of that part."""

    axis: int
    start: int
    seen: Tensor
    qparams: QParams


def slices(weight: WeightQuantizer, params: Params, qparams: QParams, dtype: torch.dtype | None = None) -> Iterator[Slice]:
    """The weight in slices whose codes are those of the whole; in one where that cannot be.

    Args:
      weight: the quantizer.
      params, qparams: the model's params, and the quantizer's own qparams.
      dtype: of the slices; ``None``: that of the weight.
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
    """Along which axis, and in multiples of how many, a weight may be cut; multiples of 0: it may not.

    Elements that share a scale stay together, but for one scale of all, which a slice is given. Along the axis of the
    scales the number of elements to a scale stays what it is, which quantizers that learn their step depend on.
    """
    granularity, fake = weight.scheme.granularity, weight.fake_quantize
    whole = weight.scheme.dynamic or not fake.local or is_regrouped(weight.site) or ndim == 0
    if whole or not isinstance(granularity, PerTensor | PerChannel | PerGroup | PerBlock):
        return 0, 0
    axis = (granularity.axis or 0) % ndim if isinstance(granularity, PerChannel | PerGroup) else 0
    if fake.block_size and axis == ndim - 1:
        return 0, 0
    return axis, granularity.rows if isinstance(granularity, PerBlock) else 1


def _part_of(qparams: QParams, shape: torch.Size, axis: int, place: tuple[int, int], unit: int) -> QParams:
    """The qparams of a slice: cut as the weight what has its shape, along the first axis what has that of the scale."""
    start, length = place

    def cut(value: Tensor) -> Tensor:
        if value.ndim and value.shape == qparams.scale.shape:
            return value.narrow(0, start // unit, length // unit)
        return value.narrow(axis, start, length) if value.shape == shape and value.ndim else value

    extras = {name: cut(value) for name, value in qparams.extras.items()}
    return QParams(cut(qparams.scale), cut(qparams.zero_point), extras)
