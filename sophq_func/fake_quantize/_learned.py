"""Integer grids whose range is learned: clipping bounds (PACT), a power-of-two threshold (TQT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.modes import as_constant
from sophq_func.core.pytree import sorted_dict
from sophq_func.fake_quantize._noise import drawing, with_rounding
from sophq_func.numerics import affine
from sophq_func.numerics.affine import constants, fake_quantize, narrowed, ste, working
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, Decode, FakeQuantize, GridInForce, QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import EPS, Bound, bounds, clamp, positive, qparams_to_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme

LOST_BITS = 2.0**-22
"""The share by which an observed range is made smaller, so that a power of two does not round up to the next one.

A range that went through a scale and back has an error of a few roundings, of 2 ** -24 each; this is more than that.
"""


@FAKE_QUANTIZERS.register("pact", "PACTFakeQuantize")
def pact(alpha: float = 6.0, *, rounding: str = "nearest") -> FakeQuantize:
    """Clip at a learned bound, then quantize the clipped range (PACT, arXiv:1805.06085).

    ``y = Q(clip(x, l, alpha))``; ``l`` is ``-alpha`` where the scheme is symmetric, else ``extras["n_alpha"]``, at first
    ``-alpha``, or 0 where the observer saw nothing below 0. ``Q`` is :func:`fixed` with the grid of ``[l, alpha]``, which
    follows ``alpha`` as it is learned. One bound for each scale.

    Gradient, eq. (3) of the paper: rounding passes straight through, the grid is a constant; 1 to ``x`` in ``[l,
    alpha)``, else 0; to ``alpha`` 1 where ``x >= alpha``, and -1 where ``x < -alpha`` and the scheme is symmetric; to
    ``n_alpha`` 1 where ``x < n_alpha``.

    Args:
      alpha: initial bound, > 0.
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: clips always, not only while observing; ``alpha`` has its gradient also where the bound is
    rounded to a code beyond the grid; works per channel and per group.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("PACTFakeQuantize", alpha=3.0), sq.QScheme(bits=2)
      >>> qp = fq.init(sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {}), torch.zeros(2), scheme)
      >>> fq.apply(torch.tensor([-9.0, 1.2, 9.0]), qp, scheme)
      tensor([-4.,  2.,  2.])
    """
    draw = drawing("pact", rounding)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ConfigError(explain("pact", "alpha must be a positive number", got=alpha, allowed="a number above 0"))

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        learned = {"alpha": torch.full_like(qparams.scale, alpha)}
        if not scheme.symmetric:
            lo, _ = qparams_to_range(qparams, scheme)
            learned["n_alpha"] = torch.where(lo < 0, -learned["alpha"], 0.0)
        initial = grid(qparams._replace(extras=sorted_dict(qparams.extras | learned)), scheme)
        # the grid does not depend on the observed scale, but one that is NaN must stay visible
        return initial._replace(scale=torch.where(qparams.scale.isnan(), qparams.scale, initial.scale))

    def grid(qparams: QParams, scheme: QScheme) -> QParams:
        lo, hi = _clip_bounds(qparams, scheme)
        of_range = range_to_qparams(lo.detach(), hi.detach(), scheme, limits=bounds(qparams, scheme))
        return of_range._replace(extras=qparams.extras)

    def clip(x: Tensor, qparams: QParams, scheme: QScheme) -> Tensor:
        work = working(x)
        lo, hi = (expand(bound, x, scheme.granularity) for bound in _clip_bounds(qparams, scheme))
        # >= above and < below: an x that equals the upper bound has no gradient, one that equals the lower bound has
        return torch.where(work >= hi, hi, torch.where(work < lo, lo, work))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        clipped = clip(x, qparams, scheme)
        constant = constants(grid(qparams, scheme))
        quantized = fake_quantize(clipped.detach(), constant, scheme, "kernel", noise=draw(x, qparams, noise))
        return narrowed(ste(clipped, quantized), x.dtype)

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return affine.encode(clip(x.detach(), qparams, scheme), grid(qparams, scheme), scheme, "kernel")

    fake = FakeQuantize(
        init,
        apply,
        ("alpha", "n_alpha"),
        grid=grid,
        encode=encode,
        decode=_decoding(grid),
        uncoded=affine.uncoded,
    )
    return with_rounding(fake, rounding)


def _decoding(grid: GridInForce) -> Decode:
    """A :class:`Decode` that reads codes on the grid that the learned extras give."""

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        return affine.decode(codes, grid(qparams, scheme), scheme, dtype)

    return decode


def _clip_bounds(qparams: QParams, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """The bounds ``(l, hi)`` that are applied: ``hi = max(|alpha|, 2 ** -23)``; ``l`` is ``-hi``, or ``min(n_alpha, 0)``.

    Both have the gradient of what is learned also where they are clamped, so that it can be learned out of there.
    """
    hi = positive(qparams.extras["alpha"])
    if scheme.symmetric:
        return -hi, hi
    lower = qparams.extras["n_alpha"]
    return ste(lower, lower.clamp(max=0)), hi


@FAKE_QUANTIZERS.register("tqt", "TqtFakeQuantize")
def tqt(*, rounding: str = "nearest") -> FakeQuantize:
    """A learned threshold whose step is a power of two (TQT, arXiv:1903.08066).

    ``extras["log2_t"]``, initially the base-2 logarithm of the observed range, is learned. ``s = 2 ** ceil(log2_t) /
    2 ** (b - 1)``, ``2 ** b`` in the divisor where the scheme is affine; then as :func:`fixed`, which rounds half to even
    as the paper does. Affine grids keep the zero point of the initial scale.

    Gradient, eq. (7) and (8) of the paper, ceil straight-through: that of
    :func:`sophq_func.numerics.affine.fake_quantize` to ``x``, and ``s ln(2)`` times that to the scale to
    ``log2_t``: ``s ln(2) (round(x / s) - x / s)`` inside, ``s ln(2) n`` and ``s ln(2) p`` beyond, where ``n`` and ``p`` are
    the smallest and largest code.

    Args:
      rounding: ``"nearest"``, or ``"stochastic"`` by uniform noise, unbiased within the grid, same gradient.

    Differs from sophgo-mq: the threshold is learned; no kind of tensor has to be set first; one rounding for all kinds;
    small scales are not replaced by 1; affine, per channel and per group work.

    Example:
      >>> import sophq_func as sq
      >>> fq, scheme = sq.fake_quantizer("tqt"), sq.QScheme(bits=4)
      >>> qp = fq.init(sq.QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {}), torch.zeros(2), scheme)
      >>> qp.scale, fq.apply(torch.tensor([0.3, 3.0]), qp, scheme)
      (tensor(0.1250), tensor([0.2500, 0.8750]))
    """
    draw = drawing("tqt", rounding)

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        lo, hi = qparams_to_range(qparams, scheme)
        width = torch.maximum(-lo, hi) if scheme.symmetric else hi - lo
        # a width that overflowed is infinite; 2 ** 128 is the power of two above all finite ones
        log2_t = torch.log2(width * (1 - LOST_BITS)).clamp(max=128)
        initial = grid(qparams._replace(extras=sorted_dict({**qparams.extras, "log2_t": log2_t})), scheme)
        if scheme.symmetric:
            return initial
        zero_point = clamp(scheme.qmin - torch.round(lo / initial.scale), scheme.qmin, scheme.qmax)
        # int32 has no NaN; where the zero point is one, the scale is, too, and shows it
        return initial._replace(zero_point=torch.where(zero_point.isnan(), 0, zero_point).to(torch.int32))

    def grid(qparams: QParams, scheme: QScheme) -> QParams:
        log2_t = qparams.extras["log2_t"]
        low, high = bounds(qparams, scheme)
        sign_bits = 1 if scheme.symmetric else 0
        exponent = ste(log2_t, log2_t.ceil()) - (_bits(low, high) - sign_bits)
        # 2 ** 127 is float32's largest power of two
        return qparams._replace(scale=torch.exp2(exponent.clamp(min=math.log2(EPS), max=127)))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        learned = grid(qparams, scheme)
        constant_zero = learned._replace(zero_point=as_constant(learned.zero_point))
        return fake_quantize(x, constant_zero, scheme, "kernel", noise=draw(x, qparams, noise))

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        return affine.encode(x, grid(qparams, scheme), scheme, "kernel")

    fake = FakeQuantize(init, apply, ("log2_t",), grid=grid, encode=encode, decode=_decoding(grid), uncoded=affine.uncoded)
    return with_rounding(fake, rounding)


def _bits(low: Bound, high: Bound) -> Tensor | int:
    """How many bits the codes from ``low`` to ``high`` take; a tensor where a bound is one."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.log2(torch.as_tensor(high - low + 1)).ceil()
    return (high - low).bit_length()
