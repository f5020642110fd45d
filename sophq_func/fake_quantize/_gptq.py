"""Weights quantized column by column, where later columns compensate for the error of each (GPTQ)."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sophq_func.core.arguments import check_reals, is_count
from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.public import public
from sophq_func.fake_quantize._tables import check_quantile
from sophq_func.numerics import affine
from sophq_func.numerics.affine import constants, fake_quantize, narrowed, ste, working
from sophq_func.numerics.codebooks import codebook_named
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.formats import Codebook, code_bits
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.ranges import EPS
from sophq_func.numerics.scheme import QScheme

FP4_TABLES = ("nf4", "fp4", "fp4_e2m1", "fp4_e2m1_bnb")
"""The tables of sophgo-mq's quantizer of this name."""

WHOLE_ROW = -1
"""The ``group_size`` of one scale for each row; taken anew where a block of columns begins, as in sophgo-mq."""

EACH_COLUMN = -2
"""The ``group_size`` of one scale for each column."""

FROM_QPARAMS = 0
"""The ``group_size`` that takes scale, zero point and bounds from the qparams."""

LEAST_SCALE = EPS**2
"""Scales of a table are at least 2 ** -46: a row or group of zeros divides by this instead of 0.

It is so far below the weights of a model that it changes no other scale.
"""


@FAKE_QUANTIZERS.register("gptq", "GPTQFakeQuantize", actorder="act_order")
def gptq(
    data_type: str = "int4",
    group_size: int = 128,
    block_size: int = 128,
    percdamp: float = 0.01,
    act_order: bool = False,
    quantile: float = 1.0,
) -> FakeQuantize:
    """Quantize a weight so that the layer's output changes least (GPTQ, arXiv:2210.17323).

    ``extras["hessian"]``, ``(in, in)``, is the Hessian of the layer's squared output error, from :func:`hessian_update`;
    ``in`` is the number of elements of one output channel. With ``H`` damped and ``U`` the upper Cholesky factor of its
    inverse, ``H^-1 = U^T U``: for each column ``j``, ``e = (w_j - Q(w_j)) / U_jj``, and ``e U_j`` is subtracted from every
    later column. Columns of later blocks are updated once for each block. Alone and without ``extras["hessian"]`` it is
    :func:`fixed`; in a model that is an error, since no observer makes the Hessian.

    Every call solves anew, in as many steps as there are columns: quantize once, and use the result as the weight.
    Gradient with a Hessian: 1 to ``x``, none to the rest.

    Args:
      data_type: table, as in :func:`fp4`.
      group_size: columns for each scale ``max|W| * quantile / max(table)`` of a row, taken when the group begins, from
        the weight as the block before left it; -1: the whole row, when a block begins; -2: one scale for each column; 0:
        scale, zero point and bounds of the qparams, per tensor or per channel of axis 0.
      block_size: columns of a block, 128 in the paper; it changes the result only through the scales of groups.
      percdamp: damping, as a share of the mean of the diagonal, 0.01 in the paper; the result is NaN where the damped
        Hessian is still singular.
      act_order: columns with the largest diagonal first.
      quantile: share of the maximum that the largest entry stands for.

    Differs from sophgo-mq: the Hessian is an argument, from all batches; runs on any device; nothing is cached.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("GPTQFakeQuantize", group_size=-1), sq.QScheme(bits=4)
      >>> hessian, _ = sq.fake_quantize.hessian_update(torch.zeros(2, 2), 0, torch.tensor([[1.0, 0.9], [1.0, 1.1]]))
      >>> qp = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {"hessian": hessian})
      >>> fq.apply(torch.tensor([[7.0, 2.3], [2.4, 7.0]]), qp, scheme)
      tensor([[7., 2.],
              [2., 7.]])
    """
    return _gptq("gptq", data_type, group_size, block_size, percdamp, act_order, quantile)


@FAKE_QUANTIZERS.register("gptqfp4", "GPTQFP4FakeQuantize", actorder="act_order")
def gptqfp4(data_type: str = "nf4", block_size: int = 128, percdamp: float = 0.01, act_order: bool = False) -> FakeQuantize:
    """:func:`gptq` onto a table, with one scale for each row.

    Args:
      data_type: ``"nf4"``, ``"fp4_e2m1"``, or ``"fp4"`` (also ``"fp4_e2m1_bnb"``).
      block_size: as in :func:`gptq`.
      percdamp: as in :func:`gptq`.
      act_order: as in :func:`gptq`.

    Differs from sophgo-mq: the upper Cholesky factor, without which no error is compensated; solved from the Hessian as
    given, not damped again by every call; E2M1 has 0.5.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantize.gptqfp4()
      gptqfp4(act_order=False, block_size=128, data_type='nf4', percdamp=0.01)
    """
    codebook_named("gptqfp4", data_type, FP4_TABLES)
    return _gptq("gptqfp4", data_type, WHOLE_ROW, block_size, percdamp, act_order, 1.0)


@public
def hessian_update(hessian: Tensor, count: Tensor | int, x: Tensor) -> tuple[Tensor, Tensor | int]:
    """The Hessian of a layer's squared output error, and the number of samples in it, after one more batch of inputs.

    ``H <- H N / (N + t) + 2 / (N + t) X^T X``, ``N <- N + t`` for a batch of ``t`` samples.

    Args:
      hessian: ``(in, in)``, zeros before the first batch.
      count: number of samples so far, an int or a tensor of shape ``()``.
      x: inputs, ``(..., in)``; the first axis counts samples, an input of two axes is one sample. For a convolution its
        patches, ``F.unfold(x, ...).transpose(1, 2)``.

    Returns:
      The new Hessian, a constant, and the new count.

    Raises:
      StateError: a Hessian whose shape does not fit the inputs.

    Example:
      >>> hessian_update(torch.zeros(1, 1), 0, torch.tensor([[1.0], [2.0]]))
      (tensor([[10.]]), 1)
    """
    check_reals("hessian_update", {"hessian": hessian, "x": x}, floating=True)
    if isinstance(count, Tensor):
        check_reals("hessian_update", {"count": count})
    if (isinstance(count, Tensor) and count.ndim) or not isinstance(count, Tensor | int):
        allowed = "an int, or a tensor of shape ()"
        raise StateError(explain("hessian_update", "count is no number of samples", got=count, allowed=allowed, fix="0"))
    if hessian.ndim != 2 or hessian.shape != (x.shape[-1], x.shape[-1]):
        allowed = f"({x.shape[-1]}, {x.shape[-1]}) for inputs of shape {tuple(x.shape)}"
        raise StateError(
            explain("hessian_update", "a Hessian of this shape does not fit", got=tuple(hessian.shape), allowed=allowed)
        )
    if x.numel() == 0:
        return hessian.detach(), count
    rows = x.detach().reshape(-1, x.shape[-1]).to(hessian.dtype)
    total = count + (x.shape[0] if x.ndim > 2 else 1)
    return hessian.detach() * (count / total) + rows.T @ rows * (2 / total), total


def _gptq(
    where: str, data_type: str, group_size: int, block_size: int, percdamp: float, act_order: bool, quantile: float
) -> FakeQuantize:
    table = codebook_named(where, data_type)
    _check_int(where, "group_size", group_size, least=EACH_COLUMN)
    _check_int(where, "block_size", block_size, least=1)
    check_quantile(where, quantile)
    if isinstance(percdamp, bool) or not isinstance(percdamp, int | float) or not 0 <= percdamp < math.inf:
        raise ConfigError(explain(where, "percdamp must not be negative", got=percdamp, allowed="a number >= 0"))
    if not isinstance(act_order, bool):
        raise ConfigError(explain(where, "act_order must be a bool", got=act_order, allowed="True or False"))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        constant = constants(qparams)
        if "hessian" not in qparams.extras:
            return fake_quantize(x, constant, scheme, "kernel")
        if group_size == FROM_QPARAMS:
            _check_rows(where, scheme)
        problem = _problem(working(x).detach(), constant.extras["hessian"], percdamp, act_order)
        integers = group_size == FROM_QPARAMS
        rounding = _Integers(constant, scheme) if integers else _Scaled(table, group_size, quantile)
        return ste(x, narrowed(_solve(problem, rounding, block_size).reshape(x.shape), x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if "hessian" not in qparams.extras:
            return affine.encode(x, qparams, scheme, "kernel")
        return affine.nearest(apply(working(x.detach()), qparams, scheme), qparams, scheme)

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        if "hessian" in qparams.extras and group_size != FROM_QPARAMS:
            return "its scales are computed column by column, and not kept"
        return affine.uncoded(qparams, scheme)

    return FakeQuantize(
        kept,
        apply,
        integer=False,
        resizable=False,
        bits=_bits(table, group_size, block_size),
        scaled=group_size == FROM_QPARAMS,
        encode=encode,
        decode=affine.decode,
        uncoded=uncoded,
        local=False,
        needs=("hessian",),
    )


def _check_rows(where: str, scheme: QScheme) -> None:
    """Raise a :class:`StateError` unless a column of the weight has one grid, or one for each row."""
    granularity = scheme.granularity
    if isinstance(granularity, PerTensor) or (isinstance(granularity, PerChannel) and not granularity.axis):
        return
    sentence = "group_size=0 takes the scales of the scheme, and has none for a column of this granularity"
    allowed, fix = "PerTensor() or PerChannel(0)", "a group_size > 0 of its own"
    raise StateError(explain(where, sentence, got=granularity, allowed=allowed, fix=fix))


def _check_int(where: str, name: str, value: object, *, least: int) -> None:
    if not is_count(value, least):
        raise ConfigError(explain(where, f"{name} must be an int from {least} up", got=value, allowed=f"an int >= {least}"))


def _bits(table: Codebook, group_size: int, block_size: int) -> float | None:
    """Stored bits of a code and its share of a scale of 32 bits; ``None``, those of the scheme, without a table."""
    if group_size == FROM_QPARAMS:
        return None
    if group_size == EACH_COLUMN:
        return float(code_bits(table))  # a column is as long as there are output channels: its scale costs next to nothing
    columns = block_size if group_size == WHOLE_ROW else group_size
    return code_bits(table) + 32 / columns


class _Problem(NamedTuple):
    """The weight ``(out, in)``, the factor ``U`` ``(in, in)``, and what undoes a sorting of the columns, or ``None``."""

    weight: Tensor
    factor: Tensor
    unsort: Tensor | None


def _problem(weight: Tensor, hessian: Tensor, percdamp: float, act_order: bool) -> _Problem:
    """The problem to solve: dead columns cleared, columns sorted for ``act_order``, the Hessian damped and factored."""
    weight = weight.reshape(weight.shape[0], -1)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        allowed = f"({weight.shape[1]}, {weight.shape[1]}), the inputs of one output channel"
        raise StateError(explain("gptq", "a Hessian of this shape does not fit", got=tuple(hessian.shape), allowed=allowed))
    # an input that was always 0 does not reach the output: its column becomes 0, and a 1 makes the Hessian invertible
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    weight = torch.where(dead, 0, weight)
    diagonal = torch.where(dead, 1, diagonal)
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    unsort = None
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        unsort = torch.argsort(order)
        weight = weight.index_select(1, order)
        hessian = hessian.index_select(0, order).index_select(1, order)
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    damped = hessian + percdamp * diagonal.mean() * identity
    inverse = torch.cholesky_inverse(_cholesky(damped))
    return _Problem(weight, _cholesky(inverse, upper=True).to(weight.dtype), unsort)


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    """The Cholesky factor; NaN where the matrix is not positive definite, for an error would need its numbers."""
    result = torch.linalg.cholesky_ex(matrix, upper=upper)
    return torch.where(result.info == 0, result.L, torch.nan)


class _Rounding(Protocol):
    """How one column is rounded."""

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, previous: Tensor) -> Tensor:
        """The scale of column ``j``.

        ``weight`` is as it was when the block began at the column ``start``, ``column`` as it is now; ``previous`` is the
        scale of the column before.
        """

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        """The column on its grid."""


class _Scaled(NamedTuple):
    """The entries of a table, times scales of groups of columns."""

    table: Codebook
    group_size: int
    quantile: float

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, previous: Tensor) -> Tensor:
        if self.group_size == EACH_COLUMN:
            amax = column.abs().amax()
        elif self.group_size == WHOLE_ROW and j == start:
            amax = weight.abs().amax(1)
        elif self.group_size > 0 and j % self.group_size == 0:
            amax = weight[:, j : j + self.group_size].abs().amax(1)
        else:
            return previous
        return (amax * self.quantile / self.table.largest).clamp(min=LEAST_SCALE)

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        return self.table.round(column / scale) * scale


class _Integers(NamedTuple):
    """The grid of the qparams."""

    qparams: QParams
    scheme: QScheme

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, previous: Tensor) -> Tensor:
        return previous

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(column, self.qparams, self.scheme, "kernel")


def _solve(problem: _Problem, rounding: _Rounding, block_size: int) -> Tensor:
    """Round column after column, in all rows at once, and subtract ``(w - q) / U_jj * U_j`` from the columns that follow.

    Inside a block each column is updated after every column before it, since it must be final when its turn comes. Later
    blocks can wait: one matrix product for each block updates them, instead of a pass over the weight for each column.
    """
    weight, factor = problem.weight, problem.factor
    quantized: list[Tensor] = []
    scale = weight.new_ones(())
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        rest = weight[:, start:stop]
        errors = []
        for j in range(start, stop):
            column = rest[:, 0]
            scale = rounding.scale(j, start, weight, column, scale)
            rounded = rounding.round(column, scale)
            error = (column - rounded) / factor[j, j]
            quantized.append(rounded)
            errors.append(error)
            rest = rest[:, 1:] - error[:, None] * factor[j, j + 1 : stop]
        later = weight[:, stop:] - torch.stack(errors, 1) @ factor[start:stop, stop:]
        weight = torch.cat([weight[:, :stop], later], 1)
    solved = torch.stack(quantized, 1)
    return solved if problem.unsort is None else solved.index_select(1, problem.unsort)
