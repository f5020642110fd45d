"""Weights quantized column by column, each error made up for by the columns that follow (GPTQ)."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain
from sophq_func.core.pytree import tree_map
from sophq_func.numerics import affine
from sophq_func.numerics.affine import fake_quantize, ste, working
from sophq_func.numerics.codebooks import codebook_named
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, kept
from sophq_func.numerics.formats import Codebook, code_bits
from sophq_func.numerics.ranges import EPS
from sophq_func.numerics.scheme import QScheme

FP4_TABLES = ("nf4", "fp4", "fp4_e2m1", "fp4_e2m1_bnb")


@FAKE_QUANTIZERS.register("gptq", "GPTQFakeQuantize", actorder="act_order")
def gptq(
    data_type: str = "int4",
    group_size: int = 128,
    block_size: int = 128,
    percdamp: float = 0.01,
    act_order: bool = False,
    quantile: float = 1.0,
) -> FakeQuantize:
    """Quantize a weight so that the layer's output changes least (GPTQ, arXiv:2210.17323; semantics.md 4.14).

    ``extras["hessian"]``, ``(in, in)``, is that of the layer's inputs, from :func:`hessian_update`; ``in`` is what one
    output channel of the weight holds. With ``H`` damped and ``U`` the upper Cholesky factor of its inverse, ``H^-1 = U^T
    U``: for each column ``j``, ``e = (w_j - Q(w_j)) / U_jj``, and every later column loses ``e U_j``. Later blocks of
    columns get their share when a block is done. Without ``extras["hessian"]`` it is :func:`fixed`.

    The solution takes as many steps as there are columns, in every call: quantize once, and use the result as weight.
    Gradient with a Hessian: 1 to ``x``, none to the rest.

    Args:
      data_type: table, as in :func:`fp4`.
      group_size: columns for each scale ``max|W| * quantile / max(table)`` of a row, taken when the group begins, from
        the weight as the block before left it; -1: the whole row, when a block begins; -2: one scale for each column; 0:
        scale, zero point and bounds of the qparams.
      block_size: columns after which later blocks are updated; plays no part in the result but for group scales.
      percdamp: damping, as a share of the mean of the diagonal; a Hessian that is singular even so gives NaN.
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

    Differs from sophgo-mq: the upper Cholesky factor, without which nothing is made up for; solved from the Hessian as
    given, not damped again by every call; E2M1 has 0.5.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantize.gptqfp4()
      gptqfp4(act_order=False, block_size=128, data_type='nf4', percdamp=0.01)
    """
    codebook_named("gptqfp4", data_type, FP4_TABLES)
    return _gptq("gptqfp4", data_type, -1, block_size, percdamp, act_order, 1.0)


def hessian_update(hessian: Tensor, count: Tensor | int, x: Tensor) -> tuple[Tensor, Tensor | int]:
    """The Hessian of a layer's squared output error, and the number of samples in it, after one more batch of inputs.

    ``H <- H N / (N + t) + 2 / (N + t) X^T X``, ``N <- N + t`` for a batch of ``t`` samples (semantics.md 4.14).

    Args:
      hessian: ``(in, in)``, at first zeros.
      count: number of samples so far, an int or a tensor of shape ``()``.
      x: inputs, ``(..., in)``; the first axis counts samples, two axes are one sample. Of a convolution the patches:
        ``F.unfold(x, ...).transpose(1, 2)``.

    Returns:
      New Hessian and count; a constant.

    Example:
      >>> hessian_update(torch.zeros(1, 1), 0, torch.tensor([[1.0], [2.0]]))
      (tensor([[10.]]), 1)
    """
    if hessian.ndim != 2 or hessian.shape != (x.shape[-1], x.shape[-1]):
        allowed = f"({x.shape[-1]}, {x.shape[-1]}) for inputs of shape {tuple(x.shape)}"
        raise StateError(
            explain("hessian_update", "a Hessian of this shape is not possible", got=tuple(hessian.shape), allowed=allowed)
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
    for name, value in (("group_size", group_size), ("block_size", block_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < (-2 if name == "group_size" else 1):
            allowed = "an int >= -2" if name == "group_size" else "an int >= 1"
            raise ConfigError(explain(where, f"{name} is not possible", got=value, allowed=allowed))
    if isinstance(percdamp, bool) or not isinstance(percdamp, int | float) or percdamp < 0:
        raise ConfigError(explain(where, "percdamp is not possible", got=percdamp, allowed="a number >= 0"))
    if not isinstance(act_order, bool):
        raise ConfigError(explain(where, "act_order is not possible", got=act_order, allowed="True or False"))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        constant = tree_map(torch.Tensor.detach, qparams)
        if "hessian" not in qparams.extras:
            return fake_quantize(x, constant, scheme, "kernel")
        problem = _problem(working(x).detach(), constant.extras["hessian"], percdamp, act_order)
        rounding = _Integers(constant, scheme) if group_size == 0 else _Scaled(table, group_size, quantile)
        return ste(x, _solve(problem, rounding, block_size).reshape(x.shape).to(x.dtype))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        if "hessian" not in qparams.extras:
            return affine.encode(x, qparams, scheme, "kernel")
        return affine.nearest(apply(working(x.detach()), qparams, scheme), qparams, scheme)

    def uncoded(qparams: QParams, scheme: QScheme) -> str:
        if "hessian" in qparams.extras and group_size != 0:
            return "its scales are found column by column, and not kept"
        return affine.uncoded(qparams, scheme)

    shared = 32 / {-1: block_size, -2: math.inf}.get(group_size, group_size) if group_size else 0
    bits = code_bits(table) + shared if group_size else None
    return FakeQuantize(
        kept,
        apply,
        integer=False,
        resizable=False,
        bits=bits,
        scaled=group_size == 0,
        encode=encode,
        decode=affine.decode,
        uncoded=uncoded,
        local=False,
    )


class _Problem(NamedTuple):
    """What is solved: the weight as ``(out, in)``, the factor ``U``, and where each column goes and came from."""

    weight: Tensor
    factor: Tensor
    back: Tensor | None


def _problem(weight: Tensor, hessian: Tensor, percdamp: float, act_order: bool) -> _Problem:
    """Dead columns cleared, the Hessian damped, inverted and factored; columns sorted where that is asked for."""
    weight = weight.reshape(weight.shape[0], -1)
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        allowed = f"({weight.shape[1]}, {weight.shape[1]}), the inputs of one output channel"
        raise StateError(
            explain("gptq", "a Hessian of this shape is not possible", got=tuple(hessian.shape), allowed=allowed)
        )
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    weight = torch.where(dead, 0, weight)
    diagonal = torch.where(dead, 1, diagonal)
    hessian = hessian + torch.diag(dead.to(hessian.dtype))
    back = None
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
        weight, back = weight.index_select(1, order), torch.argsort(order)
        hessian = hessian.index_select(0, order).index_select(1, order)
    damped = hessian + percdamp * diagonal.mean() * torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(_cholesky(damped))
    return _Problem(weight, _cholesky(inverse, upper=True).to(weight.dtype), back)


def _cholesky(matrix: Tensor, upper: bool = False) -> Tensor:
    """The Cholesky factor, NaN where there is none."""
    found = torch.linalg.cholesky_ex(matrix, upper=upper)
    return torch.where(found.info == 0, found.L, torch.nan)


class _Rounding(Protocol):
    """How one column is rounded."""

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, before: Tensor) -> Tensor:
        """The scale of column ``j``; ``weight`` as it was when the block began at ``start``, ``before`` the last scale."""

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        """The column on its grid."""


class _Scaled(NamedTuple):
    """A table times scales of groups of columns."""

    table: Codebook
    group_size: int
    quantile: float

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, before: Tensor) -> Tensor:
        if self.group_size == -2:
            amax = column.abs().amax()
        elif self.group_size == -1 and j == start:
            amax = weight.abs().amax(1)
        elif self.group_size > 0 and j % self.group_size == 0:
            amax = weight[:, j : j + self.group_size].abs().amax(1)
        else:
            return before
        return (amax * self.quantile / self.table.largest).clamp(min=EPS**2)

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        return self.table.round(column / scale) * scale


class _Integers(NamedTuple):
    """The grid of the qparams."""

    qparams: QParams
    scheme: QScheme

    def scale(self, j: int, start: int, weight: Tensor, column: Tensor, before: Tensor) -> Tensor:
        return before

    def round(self, column: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(column, self.qparams, self.scheme, "kernel")


def _solve(problem: _Problem, rounding: _Rounding, block_size: int) -> Tensor:
    """Column by column over all rows at once: round, and take ``(w - q) / U_jj * U_j`` off the columns that follow."""
    weight, factor = problem.weight, problem.factor
    found, scale = [], weight.new_ones(())
    for start in range(0, weight.shape[1], block_size):
        stop = min(start + block_size, weight.shape[1])
        rest, errors = weight[:, start:stop], []
        for j in range(start, stop):
            column = rest[:, 0]
            scale = rounding.scale(j, start, weight, column, scale)
            found.append(rounding.round(column, scale))
            errors.append((column - found[-1]) / factor[j, j])
            rest = rest[:, 1:] - errors[-1][:, None] * factor[j, j + 1 : stop]
        later = weight[:, stop:] - torch.stack(errors, 1) @ factor[start:stop, stop:]
        weight = torch.cat([weight[:, :stop], later], 1)
    solved = torch.stack(found, 1)
    return solved if problem.back is None else solved.index_select(1, problem.back)
