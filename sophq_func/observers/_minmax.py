"""Running minimum and maximum, plain and as an exponential moving average; and what other observers of ranges share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._options import check_decay, unmergeable

ORDER_MATTERS = "a moving average depends on the order of the tensors"
"""Why a moving average has no merge."""


class MinMaxState(NamedTuple):
    """Smallest and largest value seen so far; float32, scale-shaped; ``(inf, -inf)`` before the first tensor."""

    lo: Tensor
    hi: Tensor


class EMAMinMaxState(NamedTuple):
    """Averaged bounds, float32, scale-shaped, and the number of tensors averaged, int64 of shape ``()``."""

    lo: Tensor
    hi: Tensor
    seen: Tensor


def init_min_max(x: Tensor, scheme: QScheme) -> MinMaxState:
    """The state before the first tensor."""
    return MinMaxState(*no_range(x, scheme.granularity))


def widen(state: MinMaxState, lo: Tensor, hi: Tensor) -> MinMaxState:
    """The union of the state's range and ``[lo, hi]``; a bound that is NaN stays NaN."""
    return MinMaxState(torch.minimum(state.lo, lo), torch.maximum(state.hi, hi))


def merge_min_max(a: MinMaxState, b: MinMaxState) -> MinMaxState:
    """The union of the ranges of two states."""
    return widen(a, b.lo, b.hi)


def init_average(x: Tensor, scheme: QScheme) -> EMAMinMaxState:
    """The state before the first tensor."""
    return EMAMinMaxState(*no_range(x, scheme.granularity), torch.zeros((), dtype=torch.int64, device=x.device))


def average(state: EMAMinMaxState, lo: Tensor, hi: Tensor, decay: float) -> EMAMinMaxState:
    """The moving average after one more range: ``decay * old + (1 - decay) * new``; the first range is taken whole."""
    # a counter, not infinite bounds, marks the first range: an infinite value must not restart the average
    is_first = state.seen == 0
    averaged_lo = decay * state.lo + (1 - decay) * lo
    averaged_hi = decay * state.hi + (1 - decay) * hi
    return EMAMinMaxState(torch.where(is_first, lo, averaged_lo), torch.where(is_first, hi, averaged_hi), state.seen + 1)


def range_qparams(state: MinMaxState | EMAMinMaxState, scheme: QScheme) -> QParams:
    """Scale and zero point of the grid that covers the state's range."""
    return range_to_qparams(state.lo, state.hi, scheme)


@OBSERVERS.register("minmax", "MinMaxObserver")
def minmax() -> Observer:
    """Smallest and largest value over all tensors: ``lo <- min(lo, min x)``, ``hi <- max(hi, max x)``.

    Mergeable. For weights, and for activations whose extremes matter.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("minmax"), sq.QScheme()
      >>> x = torch.tensor([-1.0, 2.0])
      >>> obs.update(obs.init(x, scheme), x, scheme)
      MinMaxState(lo=tensor(-1.), hi=tensor(2.))
    """

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        return widen(state, lo, hi)

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("ema_minmax", "EMAMinMaxObserver", ema_ratio="decay")
def ema_minmax(decay: float = 0.9) -> Observer:
    """Exponential moving average of each tensor's extremes, which starts at those of the first tensor.

    ``lo <- decay * lo + (1 - decay) * min x``, likewise ``hi``. Not mergeable: the result depends on the order.

    Args:
      decay: weight of the past, in [0, 1); sophgo-mq's ``ema_ratio``.

    Differs from sophgo-mq: a counter marks the first tensor, so an infinite value does not restart the average.

    Example:
      >>> import sophq_func as sq
      >>> sq.observers.ema_minmax(decay=0.5)
      ema_minmax(decay=0.5)
    """
    check_decay("ema_minmax", decay)

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        return average(state, lo, hi, decay)

    return Observer(init_average, update, unmergeable("ema_minmax", ORDER_MATTERS), range_qparams)
