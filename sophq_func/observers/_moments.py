"""Ranges and scales from the mean and the standard deviation of the last tensor, and exact powers of two."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.modes import is_mapped
from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import EPS, min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._minmax import MinMaxState, init_min_max, range_qparams
from sophq_func.observers._mse import search_range
from sophq_func.observers._options import check, check_positive, unmergeable

LAST_ONLY = "only the last tensor counts"
"""Why the statistic of one tensor has no merge."""

LARGEST = torch.finfo(torch.float32).max
"""Bounds and scales saturate here instead of becoming infinite, so that infinity always means a value that was."""

WIDEST_ZERO_POINT = 2.0**30
"""Zero points saturate at this magnitude, which int32 still holds after a bound of the grid is added."""

SPREAD = 3
"""The standard deviations on either side of the mean that LSQ+ covers (arXiv:2004.09576, section 3.3)."""

MANTISSA_BITS, EXPONENT_BIAS = 23, 127
"""Of a float32: the exponent stands above 23 bits of mantissa, with 127 added."""

LEAST_EXPONENT = -126
"""That of the smallest normal float32; smaller numbers have no exponent of their own to read off the bits."""


class StepState(NamedTuple):
    """The magnitude that a scale is made of, and the range, of the last tensor.

    All float32, scale-shaped; infinite before the first tensor.
    """

    size: Tensor
    lo: Tensor
    hi: Tensor


def exponent(size: Tensor) -> Tensor:
    """``floor(log2(size))`` as int32, exactly; at least -126, and meaningless where ``size`` is not finite.

    Example:
      >>> exponent(torch.tensor([0.0, 0.75, 4.0])).tolist()
      [-126, -1, 2]
    """
    magnitude = size.float().abs()
    if is_mapped():  # before torch 2.13 ``vmap`` cannot read bits; ``frexp`` takes the mantissa from [1/2, 1)
        return torch.where(magnitude < 2.0**LEAST_EXPONENT, LEAST_EXPONENT, magnitude.frexp().exponent - 1)
    bits = magnitude.view(torch.int32)
    return (bits.bitwise_right_shift(MANTISSA_BITS) - EXPONENT_BIAS).clamp(min=LEAST_EXPONENT)


def power(exponent: Tensor) -> Tensor:
    """``2 ** exponent``, float32, exactly, for exponents in -126..127."""
    clamped = exponent.clamp(LEAST_EXPONENT, 127).to(torch.int32)
    if is_mapped():  # as above; in four parts, since int64 holds no power above 62
        quarter = clamped.bitwise_right_shift(2)
        part = _small_power(quarter)
        return part * part * part * _small_power(clamped - 3 * quarter)
    return (clamped + EXPONENT_BIAS).bitwise_left_shift(MANTISSA_BITS).view(torch.float32)


def _small_power(exponent: Tensor) -> Tensor:
    """``2 ** exponent``, float32, exactly, for exponents in -62..62."""
    one = torch.ones((), dtype=torch.int64, device=exponent.device)
    up, down = exponent.clamp(min=0), (-exponent).clamp(min=0)
    return one.bitwise_left_shift(up).float() / one.bitwise_left_shift(down).float()


def in_units(x: Tensor, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """The rows of ``x`` divided by a unit, and the unit: a power of two near the largest magnitude of the row.

    No sum of the quotients or of their squares overflows, and dividing by a power of two does not round.
    """
    lo, hi = min_max(x, scheme.granularity)
    unit = power(exponent(torch.maximum(-lo, hi)))
    return rows(x.detach(), scheme.granularity).float() / unit.unsqueeze(-1), unit


def mean_and_std(x: Tensor, scheme: QScheme) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased; 0 of a single element) for each scale, float32."""
    flat, unit = in_units(x, scheme)
    mean = flat.mean(-1)
    std = flat.std(-1) if flat.shape[-1] > 1 else torch.zeros_like(mean)
    return mean * unit, std * unit


def latest(before: Tensor, now: Tensor) -> Tensor:
    """The statistic ``now``; NaN if it is not finite, or if one before was not."""
    return torch.where(before.isnan() | ~torch.isfinite(now), torch.nan, now)


def init_step(x: Tensor, scheme: QScheme) -> StepState:
    """The state before the first tensor."""
    lo, hi = no_range(x, scheme.granularity)
    return StepState(lo, lo.clone(), hi)  # clone: no two tensors of a state share memory


def scale_qparams(scale: Tensor, lo: Tensor, scheme: QScheme) -> QParams:
    """A given scale, clamped to [2 ** -23, the largest float32], and ``z = qmin - round(lo / s)``.

    ``pot_scale`` rounds the scale to a power of two. It is NaN where ``lo`` is not finite.
    """
    scale = torch.where(torch.isfinite(lo), scale.clamp(EPS, LARGEST), torch.nan)
    if scheme.pot_scale:
        scale = torch.exp2(torch.log2(scale).round().clamp(max=127))  # 2 ** 128 is infinite
    if scheme.symmetric:
        return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), {})
    steps_to_lo = torch.round(torch.where(torch.isfinite(lo), lo / scale, 0))
    zero_point = scheme.qmin - steps_to_lo.clamp(-WIDEST_ZERO_POINT, WIDEST_ZERO_POINT)
    return QParams(scale, zero_point.to(torch.int32), {})


@OBSERVERS.register("clip_std", "ClipStdObserver")
def clip_std(std_scale: float = 2.6) -> Observer:
    """The range ``mean +- k * std`` of the last tensor, within its extremes; ``k = std_scale``, ``std`` unbiased.

    ``lo = max(mean - k std, min x)``, ``hi = min(mean + k std, max x)``. Not mergeable: only the last tensor counts. Keeps
    what is that near to the mean: rare values far from it become one.

    Args:
      std_scale: how many standard deviations are kept on either side of the mean, > 0.

    Differs from sophgo-mq: it clips, as its name says; there the wider bound is taken on either side.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("ClipStdObserver", std_scale=1.0), sq.QScheme()
      >>> x = torch.tensor([-1.0, 0.0, 0.0, 1.0])
      >>> obs.update(obs.init(x, scheme), x, scheme)
      MinMaxState(lo=tensor(-0.8165), hi=tensor(0.8165))
    """
    check_positive("clip_std", "width", std_scale)

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        mean, std = mean_and_std(x, scheme)
        clipped_lo = torch.maximum(mean - std_scale * std, lo)
        clipped_hi = torch.minimum(mean + std_scale * std, hi)
        return MinMaxState(latest(state.lo, clipped_lo), latest(state.hi, clipped_hi))

    return Observer(init_min_max, update, unmergeable("clip_std", LAST_ONLY), range_qparams, clips=True)


@OBSERVERS.register("lsq", "LSQObserver")
def lsq() -> Observer:
    """The initial scale of LSQ (arXiv:1902.08153): ``s = 2 mean |x| / sqrt(qmax)`` of the last tensor.

    Affine: ``z = qmin - round(min x / s)``, which may lie beyond the grid (a fake quantizer clamps it). Not mergeable:
    only the last tensor counts. Keeps a start for training, not a range: values that vary little about one far from 0 share
    a few codes, and the largest of many small ones are clipped.

    Differs from sophgo-mq: the scale is at least 2 ** -23; there a tensor of zeros has the scale 0.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("lsq"), sq.QScheme(bits=3)
      >>> x = torch.tensor([-3.0, 3.0])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(3.4641)
    """

    def update(state: StepState, x: Tensor, scheme: QScheme) -> StepState:
        if x.numel() == 0:
            return state
        flat, unit = in_units(x, scheme)
        lo, hi = min_max(x, scheme.granularity)
        size = flat.abs().mean(-1) * unit
        return StepState(latest(state.size, size), latest(state.lo, lo), latest(state.hi, hi))

    def qparams(state: StepState, scheme: QScheme) -> QParams:
        scale = state.size * (2 / math.sqrt(scheme.qmax))
        return scale_qparams(torch.where(torch.isfinite(state.size), scale, torch.nan), state.lo, scheme)

    return Observer(init_step, update, unmergeable("lsq", LAST_ONLY), qparams, clips=True)


@OBSERVERS.register("lsq_plus", "LSQPlusObserver")
def lsq_plus(rule: str = "paper") -> Observer:
    """The initial scale and offset of LSQ+ (arXiv:2004.09576, section 3.3), from the last tensor.

    Symmetric: ``s = max(|mean - 3 std|, |mean + 3 std|) / 2 ** (bits - 1)``. Affine: the range of least squared error
    (among the candidates of ``mse``), and its ``s`` and ``z``. Not mergeable: only the last tensor counts. Keeps, if
    symmetric, what is within three standard deviations: rare values far from the mean become one.

    Args:
      rule: ``"paper"``, or ``"reference"``: ``s = max(|mean - 3 std|, |mean + 3 std|) / (qmax - qmin + 1)`` and
        ``z = qmin - round(min / s)`` where ``min >= 0``, else ``qmin``, with ``min`` over the whole tensor.

    Differs from sophgo-mq: the rule of the paper; sophgo-mq halves the scale, drops the zero point where it is needed,
    and cannot select this observer by name. ``rule="reference"`` gives its numbers.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("lsq_plus"), sq.QScheme(bits=3)
      >>> x = torch.tensor([-1.0, 0.0, 1.0])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.7500)
    """
    check("lsq_plus", "rule", rule, "'paper' or 'reference'", ok=rule in ("paper", "reference"))

    def update(state: StepState, x: Tensor, scheme: QScheme) -> StepState:
        if x.numel() == 0:
            return state
        mean, std = mean_and_std(x, scheme)
        size = torch.maximum((mean - SPREAD * std).abs(), (mean + SPREAD * std).abs()).clamp(max=LARGEST)
        size = torch.where(torch.isfinite(mean), size, torch.nan)
        if rule == "reference":
            lo, hi = (bound.expand(mean.shape) for bound in min_max(x, PerTensor()))
        elif scheme.symmetric:
            lo, hi = min_max(x, scheme.granularity)
        else:
            lo, hi = search_range(x, scheme, 2.0)
        return StepState(latest(state.size, size), latest(state.lo, lo), latest(state.hi, hi))

    def qparams(state: StepState, scheme: QScheme) -> QParams:
        if rule == "paper" and not scheme.symmetric:
            return range_to_qparams(state.lo, state.hi, scheme)
        if rule == "paper":
            return scale_qparams(state.size / 2 ** (scheme.bits - 1), state.lo, scheme)
        codes = scheme.qmax - scheme.qmin + 1
        # a range that begins at 0 has the zero point qmin, which sophgo-mq takes wherever min < 0
        return scale_qparams(state.size / codes, state.lo.clamp(min=0), scheme)

    return Observer(init_step, update, unmergeable("lsq_plus", LAST_ONLY), qparams, clips=True)
