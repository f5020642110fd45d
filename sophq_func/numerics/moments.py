"""Moments of what a weight multiplies: one mergeable statistic for solvers, clipping, smoothing and corrections."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.public import public

ROWS_AT_ONCE = 2**14
"""How many rows are converted to float32 and multiplied at once: their copy stays small beside the second moments."""


class Moments(NamedTuple):
    """Statistics of the rows ``x`` that a weight multiplies: ``y = W x`` with ``W`` of shape ``(out, n)``.

    ``n`` counts what one output channel reads: the inputs of a linear layer; of a convolution the inputs of its group, times
    the elements of the kernel, in the order of the weight's memory. Where parts of the weight read rows of their own (groups
    of a convolution, the matrices of a batched product), each field has a first axis for these, ``G`` below, and the output
    channels belong to them in equal shares, in order. Without such parts there is no such axis.

    The error that a change ``D`` of the weight makes at the output is ``mean |D x|**2 = sum_r D_r second D_r``, a sum over
    its rows.

    Attributes:
      count: number of rows; float32, shape ``()`` or ``(G,)``.
      mean: of ``x``; shape ``(n,)`` or ``(G, n)``.
      mean_abs: mean of ``|x|``; the same shape.
      amax: largest ``|x|``; the same shape; 0 without rows.
      second: mean of ``x x^T``; shape ``(n, n)`` or ``(G, n, n)``.
    """

    count: Tensor  # type: ignore[assignment]  # of rows, not of equal items, which a tuple has under this name
    mean: Tensor
    mean_abs: Tensor
    amax: Tensor
    second: Tensor

    @property
    def parts(self) -> int:
        """How many parts of the weight read rows of their own."""
        return self.second.shape[0] if self.second.ndim == 3 else 1


@public
def moments_of(x: Tensor) -> Moments:
    """The moments of some rows, in float32; no gradient.

    Args:
      x: rows ``(T, n)``, or ``(G, T, n)`` for ``G`` parts of a weight.

    Raises:
      StateError: another number of axes.

    Example:
      >>> moments_of(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).second
      tensor([[ 5., -1.],
              [-1.,  2.]])
    """
    if x.ndim not in (2, 3):
        allowed = "(rows, n), or (parts, rows, n)"
        raise StateError(explain("moments_of", "these are no rows", got=tuple(x.shape), allowed=allowed))
    pieces = (_of_rows(rows.float()) for rows in torch.split(x.detach(), ROWS_AT_ONCE, dim=-2))
    return reduce(merged, pieces)


def no_moments(x: Tensor) -> Moments:
    """The moments of no rows, which are neutral in :func:`merged`; ``x`` gives shape and device alone."""
    parts, n = x.shape[:-2], x.shape[-1]
    zeros = torch.zeros(*parts, n, device=x.device)
    count = torch.zeros(parts, device=x.device)
    return Moments(count, zeros, zeros.clone(), zeros.clone(), torch.zeros(*parts, n, n, device=x.device))


def _of_rows(rows: Tensor) -> Moments:
    """The moments of rows in float32."""
    if not rows.shape[-2]:
        return no_moments(rows)
    count = torch.full(rows.shape[:-2], float(rows.shape[-2]), device=rows.device)
    size = rows.abs()
    second = rows.mT @ rows / rows.shape[-2]
    return Moments(count, rows.mean(-2), size.mean(-2), size.amax(-2), second)


@public
def merged(a: Moments, b: Moments) -> Moments:
    """The moments of the rows of both: associative and commutative up to the rounding of sums.

    Raises:
      StateError: moments of other shapes.

    Example:
      >>> x = torch.randn(8, 3)
      >>> whole, halves = moments_of(x), merged(moments_of(x[:5]), moments_of(x[5:]))
      >>> all(torch.allclose(one, other, atol=1e-6) for one, other in zip(whole, halves))
      True
    """
    if a.second.shape != b.second.shape:
        got, allowed = tuple(b.second.shape), tuple(a.second.shape)
        raise StateError(explain("merged", "moments of different weights cannot be merged", got=got, allowed=allowed))
    count = a.count + b.count
    share = b.count / count.clamp(min=1)  # of two without rows, both are 0
    along, square = share[..., None], share[..., None, None]
    return Moments(
        count,
        torch.lerp(a.mean, b.mean, along),
        torch.lerp(a.mean_abs, b.mean_abs, along),
        torch.maximum(a.amax, b.amax),
        torch.lerp(a.second, b.second, square),
    )


def in_part(moments: Moments, part: int, parts: int) -> Moments:
    """The moments of the rows of one part of a weight, as moments of all parts, of which the others have no rows.

    Example:
      >>> in_part(moments_of(torch.ones(2, 3)), 1, 2).count
      tensor([0., 2.])
    """

    def placed(field: Tensor) -> Tensor:
        whole = field.new_zeros(parts, *field.shape)
        whole[part] = field
        return whole

    return Moments(*map(placed, moments))


@public
def output_error(change: Tensor, second: Tensor) -> Tensor:
    """The mean square that a change of a weight adds to each of its outputs, ``D_r second D_r`` for each row ``D_r``.

    Args:
      change: ``(out, n)``.
      second: from :class:`Moments`: ``(n, n)``, or ``(G, n, n)``, whose parts share the rows of ``change`` in order.

    Returns:
      Shape ``(out,)``, not below 0.

    Example:
      >>> output_error(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2))
      tensor([1., 4.])
    """
    parts = change.reshape(*second.shape[:-2], -1, change.shape[-1])
    # sums of float32 may come out slightly below 0
    return ((parts @ second) * parts).sum(-1).clamp(min=0).reshape(-1)
