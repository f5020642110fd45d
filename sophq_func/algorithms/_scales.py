"""The error at a layer's output, scale by scale: what a change of the weight's elements that share a scale costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from sophq_func.algorithms._matrix import output_axis
from sophq_func.numerics.granularity import Axis, PerBlock, PerChannel, PerGroup, PerTensor
from sophq_func.numerics.layout import blocks, rows
from sophq_func.numerics.scheme import QScheme

Form: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``sum a_r H b_r`` over the elements of each scale: from two changes of a weight to a scale-shaped tensor."""


def form_of(weight: Tensor, second: Tensor, scheme: QScheme, axis: Axis = 0) -> Form:
    """The bilinear form of a layer's squared output error, for each scale of its weight by itself.

    ``form(d, d)`` is the error that a change ``d`` makes, without the products of elements that have different scales: then
    each scale can be chosen without the others.

    Args:
      weight: gives the shape.
      second: moments of the rows that it multiplies, see :class:`~sophq_func.numerics.moments.Moments`.
      scheme: of the weight.
      axis: of the output channels, where the scheme has one scale for the tensor.

    Example:
      >>> scheme = QScheme(granularity=PerGroup(2, axis=0))
      >>> form_of(torch.zeros(1, 4), torch.eye(4), scheme)(torch.ones(1, 4), torch.ones(1, 4))
      tensor([[2., 2.]])
    """
    granularity, n = scheme.granularity, second.shape[-1]
    along = PerChannel(output_axis(scheme, axis))
    channels = rows(weight, along).shape[:-1]
    size = _columns_of_a_scale(scheme, n)
    parts = second.reshape(-1, n, n)
    # products within each run of columns that share their scales
    inner = torch.stack([parts[:, i : i + size, i : i + size] for i in range(0, n, size)], 1)

    def cut(change: Tensor) -> Tensor:
        return rows(change, along).reshape(parts.shape[0], -1, n // size, size)

    def form(a: Tensor, b: Tensor) -> Tensor:
        projected = torch.einsum("prgi,pgij->prgj", cut(a), inner)
        by_row = (projected * cut(b)).sum(-1).reshape(-1, n // size)
        if isinstance(granularity, PerTensor):
            return by_row.sum()
        if isinstance(granularity, PerBlock):
            high, _ = blocks(weight, granularity)
            return by_row.reshape(high, granularity.rows, -1).sum(1)
        if isinstance(granularity, PerGroup):
            return by_row.reshape(*channels, n // size)
        return by_row.reshape(channels)

    return form


def _columns_of_a_scale(scheme: QScheme, n: int) -> int:
    """How many of the ``n`` numbers that an output channel reads have one scale."""
    granularity = scheme.granularity
    if isinstance(granularity, PerGroup):
        return granularity.size
    return granularity.columns if isinstance(granularity, PerBlock) else n
