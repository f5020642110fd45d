"""Uniform integer grids: scale given by an observer, or learned (LSQ, LSQ+)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.modes import beside, may_differentiate
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics import affine
from sophq_func.numerics.affine import Order, constants, fake_quantize, prepared
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams, Uniform, kept
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.ranges import positive
from sophq_func.numerics.scheme import QScheme


@FAKE_QUANTIZERS.register("fixed", "FixedFakeQuantize")
def fixed(*, rounding: str = "nearest") -> FakeQuantize:
    """Scale and zero point are constants: ``y = (clamp(round(x * (1 / s)) + z, n, p) - z) * s``.

    Gradient: 1 to ``x`` where the code is inside ``[n, p]``, else 0; none to scale and zero point.

    Args:
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("fixed"), sq.QScheme(bits=4)
      >>> qp = sq.QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), {})
      >>> fq.apply(torch.tensor([0.7, 9.0]), qp, scheme)
      tensor([0.5000, 3.5000])
    """
    draw = drawing("fixed", rounding)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        constant = constants(qparams)
        return fake_quantize(x, constant, scheme, "kernel", noise=draw(x, qparams, noise))

    def prepare(x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Callable[[], Tensor]:
        constant = constants(qparams)
        return prepared(x, constant, scheme, "kernel", factor=factor, noise=draw(x, qparams))

    def many(qparams: QParams, scheme: QScheme) -> list[Callable[[Tensor], Tensor]]:
        return affine.many(constants(qparams), scheme, "kernel")

    fake = FakeQuantize(
        kept,
        apply,
        prepare=prepare,
        rowwise=True,
        many=many,
        uniform=lambda scheme: Uniform("kernel"),
        encode=partial(affine.encode, order="kernel"),
        decode=affine.decode,
        uncoded=affine.uncoded,
    )
    return with_rounding(fake, rounding)


@FAKE_QUANTIZERS.register("learnable", "LearnableFakeQuantize", "lsq")
def learnable(use_grad_scaling: bool = True, *, rounding: str = "nearest") -> FakeQuantize:
    """Learned step size, and zero point where the scheme is affine (LSQ, arXiv:1902.08153).

    Forward as :func:`fixed` per tensor; per channel and per group in expression order, ``round(x / s + z)``. Gradients
    as :func:`sophq_func.numerics.affine.fake_quantize` states, those of scale and zero point times
    ``g = 1 / sqrt(numel(x) / scales * p)``; per channel and per group this may turn the scale in the forward into a
    neighbouring float, as in sophgo-mq. The scale applied is ``max(|s|, 2 ** -23)``, straight through the floor.

    Args:
      use_grad_scaling: multiply the gradients of scale and zero point by ``g``; else ``g = 1``.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: half inputs come back as half; a symmetric zero point is not a learnable leaf; the state is
    not rewritten by the forward.

    Example:
      >>> import sophq_func as sq
      >>> sq.fake_quantizer("LearnableFakeQuantize", use_grad_scaling=False).learnable
      ('scale', 'zero_point')
    """
    _check_grad_scaling("learnable", use_grad_scaling)
    draw = drawing("learnable", rounding)

    def order_of(scheme: QScheme) -> Literal["kernel", "expression"]:
        return "kernel" if isinstance(scheme.granularity, PerTensor) else "expression"

    def uniform(scheme: QScheme) -> Uniform:
        order = order_of(scheme)
        return Uniform(order, learned=True, grad_scaling=GRAD_SCALING[order] if use_grad_scaling else "none")

    def in_force(x: Tensor, qparams: QParams, scheme: QScheme) -> QParams:
        """Scale and zero point as the forward sees them; of ``x`` only the number of elements matters."""
        scale, zero_point = positive(qparams.scale), qparams.zero_point
        if use_grad_scaling:
            factor, scale_grad = _grad_factor(x, qparams, scheme), SCALE_GRAD[order_of(scheme)]
            scale = scale_grad(scale, factor)
            if zero_point.is_floating_point():
                zero_point = scale_grad(zero_point, factor)
        return QParams(scale, zero_point, qparams.extras)

    def prepare(x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Callable[[], Tensor]:
        current = in_force(x, qparams, scheme)
        return prepared(x, current, scheme, order_of(scheme), factor=factor, noise=draw(x, qparams))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        current = in_force(x, qparams, scheme)
        return fake_quantize(x, current, scheme, order_of(scheme), noise=draw(x, qparams, noise))

    def many(qparams: QParams, scheme: QScheme) -> list[Callable[[Tensor], Tensor]]:
        scales = QParams(positive(qparams.scale), qparams.zero_point, {})
        return affine.many(scales, scheme, "kernel", share=_grad_share if use_grad_scaling else None)

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return affine.encode(x, in_force(x, qparams, scheme), scheme, order_of(scheme))

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return affine.decode(codes, in_force(codes.values, qparams, scheme), scheme, dtype)

    fake = FakeQuantize(
        _with_float_zero_point,
        apply,
        ("scale", "zero_point"),
        prepare=prepare,
        rowwise=True,
        many=many,
        uniform=uniform,
        encode=encode,
        decode=decode,
        uncoded=affine.uncoded,
    )
    return with_rounding(fake, rounding)


@FAKE_QUANTIZERS.register("lsq_plus", "LSQPlusFakeQuantize")
def lsq_plus(use_grad_scaling: bool = True, *, rounding: str = "nearest") -> FakeQuantize:
    """Learned step size and offset (LSQ+, arXiv:2004.09576).

    ``y = s (clamp(round(x / s + z), n, p) - z)``, the paper's formula with ``z = -beta / s`` for its offset ``beta``. Here
    ``z`` is a real number, neither rounded nor clamped, so that 0 need not be on the grid; :func:`learnable` rounds it. A
    symmetric scheme has no offset. Gradients as :func:`sophq_func.numerics.affine.fake_quantize` states, ``z`` itself in
    the place of the rounded one, those of scale and zero point times the factor of :func:`learnable`.

    Args:
      use_grad_scaling: multiply the gradients of scale and zero point by that factor.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("lsq_plus"), sq.QScheme(bits=4, symmetric=False)
      >>> fq.apply(torch.tensor([0.0, 1.2]), sq.QParams(torch.tensor(1.0), torch.tensor(0.25), {}), scheme)
      tensor([-0.2500,  0.7500])
    """
    _check_grad_scaling("lsq_plus", use_grad_scaling)
    draw = drawing("lsq_plus", rounding)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        scale, zero_point = positive(qparams.scale), qparams.zero_point
        if use_grad_scaling:
            factor = _grad_factor(x, qparams, scheme)
            scale = _scale_grad(scale, factor)
            if zero_point.is_floating_point():
                zero_point = _scale_grad(zero_point, factor)
        current = QParams(scale, zero_point, qparams.extras)
        return fake_quantize(x, current, scheme, "expression", whole=False, noise=draw(x, qparams, noise))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return affine.encode(x, qparams._replace(scale=positive(qparams.scale)), scheme, "expression", whole=False)

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return affine.decode(codes, qparams._replace(scale=positive(qparams.scale)), scheme, dtype, whole=False)

    fake = FakeQuantize(
        _with_float_zero_point,
        apply,
        ("scale", "zero_point"),
        uniform=lambda scheme: Uniform("expression", False, True, "term" if use_grad_scaling else "none"),
        encode=encode,
        decode=decode,
        uncoded=partial(affine.uncoded, whole=False),
    )
    return with_rounding(fake, rounding)


def _check_grad_scaling(where: str, use_grad_scaling: object) -> None:
    if not isinstance(use_grad_scaling, bool):
        raise ConfigError(explain(where, "use_grad_scaling must be a bool", got=use_grad_scaling, allowed="True or False"))


def _with_float_zero_point(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
    """The qparams with a zero point that can be learned; a symmetric scheme has none to learn."""
    if scheme.symmetric:
        return qparams
    return qparams._replace(zero_point=qparams.zero_point.to(torch.float32))


def _grad_factor(x: Tensor, qparams: QParams, scheme: QScheme) -> Tensor | float:
    """LSQ's factor of gradients, ``1 / sqrt(elements per scale * qmax)``, a constant.

    A Python number where nothing is differentiated; a tensor in the dtype of the scale where something may be, because
    forward AD widens the dtype of a tangent that is multiplied by a number.
    """
    elements = max(x.numel(), 1) / max(qparams.scale.numel(), 1)
    if "qmax" in qparams.extras:
        return torch.rsqrt(elements * qparams.extras["qmax"].detach().to(qparams.scale.dtype))
    product = elements * scheme.qmax
    # in an export for batches of any size the number of elements is a symbol, which math.sqrt does not take
    root = math.sqrt(product) if isinstance(product, float) else torch.sym_sqrt(product)
    factor = 1 / root
    if isinstance(factor, float) and not may_differentiate():
        return factor
    return torch.full((), factor, dtype=qparams.scale.dtype, device=x.device)


def _grad_share(x: Tensor, scheme: QScheme) -> float:
    """:func:`_grad_factor` of a tensor that has one scale, and no bounds of its own."""
    return 1 / math.sqrt(max(x.numel(), 1) * scheme.qmax)


def _scale_grad(value: Tensor, factor: Tensor | float) -> Tensor:
    """``value``, with its gradient multiplied by ``factor``."""
    if not may_differentiate():
        return value
    constant = beside(value.detach(), value)
    return constant + (value - constant) * _beside(factor, value)


def _scale_grad_by_parts(value: Tensor, factor: Tensor | float) -> Tensor:
    """The same as the sum ``value * factor + (value - value * factor)``, which may round to a neighbour of ``value``.

    sophgo-mq computes it so, and the rounding shows where it decides an exact tie: with ``s = amax / 127.5`` the extreme
    of every channel is one.
    """
    part = value * _beside(factor, value)
    rest = value - part
    return (beside(rest.detach(), part) if may_differentiate() else rest) + part


def _beside(factor: Tensor | float, value: Tensor) -> Tensor | float:
    """The factor, as :func:`~sophq_func.core.modes.beside` gives it where it is a tensor."""
    return beside(factor, value) if isinstance(factor, Tensor) else factor


SCALE_GRAD: Mapping[Order, Callable[[Tensor, Tensor | float], Tensor]] = {
    "kernel": _scale_grad,
    "expression": _scale_grad_by_parts,
}
"""How each rounding order multiplies the gradient of a scale."""

GRAD_SCALING: Mapping[Literal["kernel", "expression"], Literal["term", "parts"]] = {"kernel": "term", "expression": "parts"}
"""The same, as a kernel is told."""
