"""A weight and its grid as matrices of columns, in which solvers work on all output channels at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.numerics.affine import working
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import Axis, PerBlock, PerChannel, PerGroup, PerToken
from sophq_func.numerics.layout import expand, rows
from sophq_func.numerics.ranges import Bound, expanded_bounds
from sophq_func.numerics.scheme import QScheme

Field = Tensor | int
"""One number for all elements, or a number for each."""


class Grid(NamedTuple):
    """Scale, zero point and outermost codes of the elements of a matrix; each one number, or shaped like the matrix."""

    scale: Tensor
    zero: Field
    low: Bound
    high: Bound

    def round(self, x: Tensor) -> Tensor:
        """The nearest values on the grid."""
        code = (torch.round(x / self.scale) + self.zero).clamp(self.low, self.high)  # type: ignore[arg-type]
        return (code - self.zero) * self.scale

    def map(self, f: Callable[[Tensor], Tensor]) -> Grid:
        """The grid with a function of each field that has a number for each element."""
        scale, *others = (f(field) if isinstance(field, Tensor) and field.ndim else field for field in self)
        assert isinstance(scale, Tensor)
        return Grid(scale, *others)


class Columns(NamedTuple):
    """A weight ``(out, n)`` as ``(n, out)``, or of ``G`` parts that read rows of their own as ``(G, n, out / G)``.

    A column of the weight is one row here, so that its elements lie side by side in memory.

    Attributes:
      weight: in the dtype that codes are computed in.
      grid: of its elements.
      back: from a matrix of the same shape to the shape and dtype of the weight.
    """

    weight: Tensor
    grid: Grid
    back: Callable[[Tensor], Tensor]


def output_axis(scheme: QScheme, axis: Axis) -> Axis:
    """The axes of a weight's output channels: those of its scales, or ``axis`` where a scale has none.

    Args:
      scheme: of the weight.
      axis: for schemes with one scale for the tensor.
    """
    granularity = scheme.granularity
    if isinstance(granularity, PerChannel | PerGroup) and granularity.axis is not None:
        return granularity.axis
    # blocks are those of the matrix with the first axis as rows
    return 0 if isinstance(granularity, PerChannel | PerGroup | PerBlock) else axis


def columns_of(where: str, weight: Tensor, parts: int, qparams: QParams, scheme: QScheme, axis: Axis) -> Columns:
    """A weight and its grid, arranged for a solver.

    Args:
      where: the function that an error names.
      weight: of any shape.
      parts: how many parts of it read rows of their own: 1, or those of :class:`~sophq_func.numerics.moments.Moments`.
      qparams, scheme: its grid.
      axis: of the output channels, where the scheme does not say it.

    Raises:
      StateError: a scheme whose grid is found in each tensor anew, or output channels that the parts cannot share.
    """
    if scheme.dynamic or isinstance(scheme.granularity, PerToken):
        because, fix = "its grid is computed from the weight at each call", "dynamic=False"
        raise StateError(explain(where, "a dynamic scheme has no grid to round to", because=because, fix=fix))
    along = PerChannel(output_axis(scheme, axis))
    work = working(weight)
    flat = rows(work, along)
    channels, n = flat.shape[:-1], flat.shape[-1]
    if math.prod(channels) % parts:
        got, allowed = parts, f"a divisor of {math.prod(channels)} output channels"
        raise StateError(explain(where, "the weight has not so many parts", got=got, allowed=allowed))
    lead = (parts,) if parts > 1 else ()

    def arranged(x: Tensor) -> Tensor:
        return rows(x, along).reshape(*lead, -1, n).mT.contiguous()

    def full(field: Field) -> Field:
        if not isinstance(field, Tensor) or not field.ndim:
            return field
        return arranged(field.expand(weight.shape))

    def back(matrix: Tensor) -> Tensor:
        axes = _from_the_front(along, weight.ndim)
        sizes = [weight.shape[i] for i in axes] + [size for i, size in enumerate(weight.shape) if i not in axes]
        return matrix.mT.reshape(sizes).movedim(tuple(range(len(axes))), axes).to(weight.dtype)

    low, high = expanded_bounds(qparams, scheme, work)
    scale = expand(qparams.scale, work, scheme.granularity)
    zero = 0 if scheme.symmetric else expand(qparams.zero_point, work, scheme.granularity).to(work.dtype)
    filled = [full(field) for field in (zero, low, high)]
    return Columns(arranged(work), Grid(_tensor(full(scale)), *filled), back)


def _tensor(field: Field) -> Tensor:
    assert isinstance(field, Tensor), "a scale is a tensor"
    return field


def _from_the_front(along: PerChannel, ndim: int) -> tuple[int, ...]:
    """The axes of a granularity, counted from the front."""
    axis = 0 if along.axis is None else along.axis
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(one % ndim for one in axes)
