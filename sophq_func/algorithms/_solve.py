"""Rounding one weight so that its layer's output changes least: GPTQ, then descent along single codes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sophq_func.algorithms._matrix import Columns, Grid, columns_of
from sophq_func.core.arguments import check_counts, check_reals
from sophq_func.core.errors import ConfigError, StateError, explain, unknown
from sophq_func.core.modes import is_plain
from sophq_func.core.public import public
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import Axis
from sophq_func.numerics.kinds import check_alone
from sophq_func.numerics.scheme import QScheme

Order = Literal["activation", "storage"]
"""In which order columns are rounded: those with the largest input first, or as they lie in memory."""

ORDERS = get_args(Order)

AT_ONCE = 32
"""How many columns are rounded one by one before those behind them are told. More make each update inside longer, fewer make
more products with the columns behind; for 576 to 1536 columns on a CPU this is fastest."""

HARDER = 10.0
"""By what the damping grows while a matrix has no Cholesky factor."""

TRIES = 6
"""How often it may grow: from 1 % of the mean of the diagonal to 10,000 times that mean, with which rounding errors are far
too small to hide that the matrix is one of squares."""


@public
def gptq_solve(
    weight: Tensor,
    second: Tensor,
    scheme: QScheme,
    qparams: QParams,
    *,
    order: Order = "activation",
    damping: float | Tensor = 0.01,
    sweeps: int = 0,
    axis: Axis = 0,
) -> tuple[Tensor, QParams]:
    """Round a weight column by column, each later column making up for the error of those before (GPTQ, arXiv:2210.17323).

    Minimises ``sum_r D_r H D_r`` over weights on the grid, ``D = W - Q`` and ``H`` the second moments of the rows that the
    weight multiplies. With ``H`` damped and ``U`` upper triangular, ``H^-1 = U^T U``: for each column ``j``, ``e = (w_j -
    Q(w_j)) / U_jj``, and ``e U_j`` is subtracted from the columns that follow. Columns wait for the others in blocks of 32,
    which changes nothing but the time. Where rounding each number alone is better for an output channel, that is taken: no
    channel is worse than rounded.

    Args:
      weight: of any shape, floating.
      second: ``(n, n)`` or ``(G, n, n)``, see :class:`~sophq_func.numerics.moments.Moments`; ``n`` is how many numbers an
        output channel reads.
      scheme: the grid: integers, per tensor, channel, group or block.
      qparams: scale and zero point, and bounds in ``extras`` if these are others than the scheme's.
      order: ``"activation"``: columns with the largest second moment first; ``"storage"``: as they lie in memory.
      damping: what is added to the diagonal, as a share of its mean. May be mapped over. On plain tensors it grows tenfold
        while the matrix has no Cholesky factor; inside a transform a weight without one is rounded.
      sweeps: passes of descent afterwards: each code in turn takes its best value while all others stay (QuantEase,
        arXiv:2309.01885), on the damped matrix.
      axis: of the output channels, where the scheme has one scale for the tensor.

    Returns:
      The weight on its grid, in its own shape and dtype, and the qparams, as they were given. No gradient.

    Raises:
      ConfigError: an unknown order, a negative damping or number of sweeps.
      StateError: second moments that do not fit the weight, are not finite, or a dynamic scheme.

    Example:
      >>> scheme, qp = QScheme(bits=4), QParams(torch.tensor(1.0), torch.tensor(0), {})
      >>> x = torch.tensor([[1.0, 0.9], [1.0, 1.1]])
      >>> rounded, _ = gptq_solve(torch.tensor([[3.4, 2.3], [2.4, 3.0]]), x.T @ x / 2, scheme, qp)
      >>> rounded  # the second column makes up for the first one
      tensor([[4., 2.],
              [2., 3.]])
    """
    check_reals("gptq_solve", {"weight": weight, "second": second}, floating=True)
    check_alone("gptq_solve: qparams", qparams, scheme)
    check_options("gptq_solve", order, damping, sweeps)
    parts = second.shape[0] if second.ndim == 3 else 1
    columns = columns_of("gptq_solve", weight.detach(), parts, qparams, scheme, axis)
    check_second("gptq_solve", columns.weight.shape[-2], second)
    moments = second.detach().to(columns.weight.dtype).reshape(*columns.weight.shape[:-2], *second.shape[-2:])
    return columns.back(_solved(columns, moments, order, damping, sweeps)), qparams


def check_options(where: str, order: object, damping: object, sweeps: object) -> None:
    """Raise a :class:`ConfigError` for options that mean nothing."""
    if order not in ORDERS:
        raise ConfigError(unknown(where, "order", order, ORDERS))
    is_number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if isinstance(damping, Tensor) and damping.ndim:
        got, allowed = tuple(damping.shape), "a number, or a tensor of shape ()"
        raise ConfigError(explain(where, "damping has axes", got=got, allowed=allowed, fix="damping=0.01"))
    if not isinstance(damping, Tensor) and not (is_number and 0 <= damping < math.inf):  # type: ignore[operator]
        sentence = "damping must not be negative"
        raise ConfigError(explain(where, sentence, got=damping, allowed="a number >= 0", fix="damping=0.01"))
    check_counts(where, {"sweeps": sweeps}, least=0)


def check_second(where: str, n: int, second: Tensor) -> None:
    """Raise a :class:`StateError` unless second moments are those of ``n`` numbers, and finite."""
    if second.ndim not in (2, 3) or second.shape[-2:] != (n, n):
        allowed = f"({n}, {n}), or (G, {n}, {n}): an output channel reads {n} numbers"
        raise StateError(explain(where, "second moments of this shape do not fit", got=tuple(second.shape), allowed=allowed))
    if is_plain([second]) and not bool(second.isfinite().all()):
        fix = "look for the batch with sq.statistics(q, params, [batch])"
        raise StateError(explain(where, "the second moments are not finite", fix=fix))


def _solved(columns: Columns, second: Tensor, order: Order, damping: float | Tensor, sweeps: int) -> Tensor:
    """The weight on its grid, as :class:`Columns` has it."""
    nearest = columns.grid.round(columns.weight)
    found = _compensated(columns.weight, _factored(second, damping, order), columns.grid)
    found = _better(columns.weight, found, nearest, second)
    if not sweeps:
        return found
    matrix = _damped(second, damping)
    for _ in range(sweeps):
        swept = _swept(columns.weight, found, matrix, columns.grid)
        found = _better(columns.weight, swept, found, second)
    return found


def _better(weight: Tensor, new: Tensor, old: Tensor, second: Tensor) -> Tensor:
    """For each output channel, the new values if they have a smaller error, else the old ones; NaN is never smaller."""
    return torch.where((_error(new - weight, second) < _error(old - weight, second))[..., None, :], new, old)


def _error(change: Tensor, second: Tensor) -> Tensor:
    """``D_r H D_r`` for each output channel of a change ``(..., n, out)``."""
    return ((second @ change) * change).sum(-2)


def _damped(second: Tensor, damping: float | Tensor) -> Tensor:
    """Second moments with a share of their mean diagonal on the diagonal; 1 for inputs that were always 0.

    On plain tensors the share grows until there is a Cholesky factor.
    """
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    mean = diagonal.mean(-1, keepdim=True)
    share = torch.as_tensor(damping, dtype=second.dtype, device=second.device)
    matrix = second + torch.diag_embed(share * mean + dead)
    if not is_plain([matrix]):
        return matrix
    for _ in range(TRIES):
        if not bool(torch.linalg.cholesky_ex(matrix).info.any()):
            break
        share = (share * HARDER).clamp(min=1e-6)
        matrix = second + torch.diag_embed(share * mean + dead)
    return matrix


class _Factor(NamedTuple):
    """``U``, upper triangular, with ``H^-1 = U^T U`` for a damped matrix ``H``; NaN where there is none.

    Attributes:
      order: in which its rows and columns are, as indices of those of ``H``; ``None`` for their own.
      upper: the factor.
    """

    order: Tensor | None
    upper: Tensor


def _factored(second: Tensor, damping: float | Tensor, order: Order) -> _Factor:
    """The factor of damped second moments. Each step is a call, so that its matrices are freed behind it."""
    by_size, upper = _in_upper(_damped(second, damping), order)
    return _Factor(by_size, _inverse(upper))


def _in_upper(matrix: Tensor, order: Order) -> tuple[Tensor | None, Tensor]:
    """The order of rows and columns, and upper triangular ``R`` with ``matrix = R R^T`` in that order.

    With rows and columns in reverse order, ``matrix`` has the lower factor ``L``; in the first order again, that is ``R``.
    Then ``U = R^-1``: no inverse of the matrix itself is needed.
    """
    if order == "storage":
        return None, _cholesky(matrix.flip((-2, -1))).flip((-2, -1))
    by_size = torch.argsort(matrix.diagonal(dim1=-2, dim2=-1), dim=-1, descending=True, stable=True)
    return by_size, _cholesky(_sorted(matrix, by_size).flip((-2, -1))).flip((-2, -1))


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor; NaN where there is none."""
    result = torch.linalg.cholesky_ex(matrix)
    return torch.where(result.info[..., None, None] == 0, result.L, torch.nan)


def _inverse(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix."""
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def _compensated(weight: Tensor, factor: _Factor, grid: Grid) -> Tensor:
    """GPTQ: columns are rounded in order, each after the error of those before is made up for."""
    order = factor.order
    if order is None:
        return _in_order(weight, factor.upper, grid)
    found = _in_order(_taken(weight, order), factor.upper, grid.map(lambda field: _taken(field, order)))
    return _taken(found, torch.argsort(order, dim=-1))


def _sorted(matrix: Tensor, index: Tensor) -> Tensor:
    """A symmetric matrix with rows and columns in another order."""
    return _taken(_taken(matrix, index).mT, index)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``(..., n, m)`` in another order."""
    if index.ndim == 1:
        return x[index]
    return torch.take_along_dim(x, index[..., None], dim=-2)  # makes an index for each element


def _in_order(weight: Tensor, factor: Tensor, grid: Grid) -> Tensor:
    """Round columns first to last, and subtract ``(w - q) / U_jj * U_j`` from those that follow.

    Within a block each column is updated after every one before it, since it must be final when its turn comes. Those behind
    the block wait for one product of matrices.
    """
    n = weight.shape[-2]
    found: list[Tensor] = []
    for start in range(0, n, AT_ONCE):
        stop = min(start + AT_ONCE, n)
        rest = weight[..., : stop - start, :]  # the columns from ``start`` on are left
        errors = []
        for j in range(start, stop):
            column = rest[..., 0, :]
            rounded = _column(grid, j).round(column)
            error = (column - rounded) / factor[..., j, j, None]
            found.append(rounded)
            errors.append(error)
            rest = rest[..., 1:, :] - factor[..., j, j + 1 : stop, None] * error[..., None, :]
        behind = factor[..., start:stop, stop:].mT @ torch.stack(errors, -2)
        weight = weight[..., stop - start :, :] - behind
    return torch.stack(found, -2)


def _column(grid: Grid, j: int) -> Grid:
    """The grid of one column."""
    return grid.map(lambda field: field[..., j, :])


def _swept(weight: Tensor, start: Tensor, matrix: Tensor, grid: Grid) -> Tensor:
    """One pass of descent: each column in turn takes the values on its grid that are best while all others stay.

    With ``D = W - Q`` and ``G = H D``, that is the grid value nearest to ``q_j + G_j / H_jj``; a change ``d`` of ``q_j``
    subtracts ``H_j d`` from ``G``. The error cannot rise.
    """
    n = weight.shape[-2]
    gradient = matrix @ (weight - start)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    found: list[Tensor] = []
    for first in range(0, n, AT_ONCE):
        last = min(first + AT_ONCE, n)
        rest = gradient[..., first:last, :]
        changes = []
        for j in range(first, last):
            before = start[..., j, :]
            after = _column(grid, j).round(before + rest[..., 0, :] / diagonal[..., j, None])
            change = after - before
            found.append(after)
            changes.append(change)
            rest = rest[..., 1:, :] - matrix[..., j + 1 : last, j, None] * change[..., None, :]
        gradient = gradient - matrix[..., :, first:last] @ torch.stack(changes, -2)
    return torch.stack(found, -2)
