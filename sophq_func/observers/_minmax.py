"""Running minimum and maximum, plain and as an exponential moving average (semantics.md 3.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._options import check_decay, unmergeable


class MinMaxState(NamedTuple):
    """Smallest and largest value seen; float32, scale-shaped; ``(inf, -inf)`` at first."""

    lo: Tensor
    hi: Tensor


class EMAMinMaxState(NamedTuple):
    """Averaged bounds, float32, scale-shaped, and the number of tensors seen, int64 of shape ``()``."""

    lo: Tensor
    hi: Tensor
    seen: Tensor


def init_min_max(x: Tensor, scheme: QScheme) -> MinMaxState:
    """The state of nothing seen."""
    return MinMaxState(*no_range(x, scheme.granularity))


def widen(state: MinMaxState, lo: Tensor, hi: Tensor) -> MinMaxState:
    """The state after a range ``[lo, hi]``; NaN stays."""
    return MinMaxState(torch.minimum(state.lo, lo), torch.maximum(state.hi, hi))


def merge_min_max(a: MinMaxState, b: MinMaxState) -> MinMaxState:
    """The union of two ranges."""
    return widen(a, b.lo, b.hi)


def init_average(x: Tensor, scheme: QScheme) -> EMAMinMaxState:
    """The state of nothing seen."""
    return EMAMinMaxState(*no_range(x, scheme.granularity), torch.zeros((), dtype=torch.int64, device=x.device))


def average(state: EMAMinMaxState, lo: Tensor, hi: Tensor, decay: float) -> EMAMinMaxState:
    """The state after a range ``[lo, hi]``: the first one whole, then ``decay * old + (1 - decay) * new``."""
    first = state.seen == 0
    return EMAMinMaxState(
        torch.where(first, lo, decay * state.lo + (1 - decay) * lo),
        torch.where(first, hi, decay * state.hi + (1 - decay) * hi),
        state.seen + 1,
    )


MOVES = "a moving average depends on the order"
"""Why an average has no merge."""


def range_qparams(state: MinMaxState | EMAMinMaxState, scheme: QScheme) -> QParams:
    """The grid that covers the range."""
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
        return widen(state, *min_max(x, scheme.granularity)) if x.numel() else state

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("ema_minmax", "EMAMinMaxObserver", ema_ratio="decay")
def ema_minmax(decay: float = 0.9) -> Observer:
    """Exponential moving average of each tensor's extremes; the first tensor counts whole.

    ``lo <- decay * lo + (1 - decay) * min x``, likewise ``hi``. Not mergeable: the result depends on the order.

    Args:
      decay: share of the past, in [0, 1); sophgo-mq's ``ema_ratio``.

    Differs from sophgo-mq: a counter tells the first tensor, so an infinite value does not restart the average.

    Example:
      >>> import sophq_func as sq
      >>> sq.observers.ema_minmax(decay=0.5)
      ema_minmax(decay=0.5)
    """
    check_decay("ema_minmax", decay)

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        return average(state, *min_max(x, scheme.granularity), decay) if x.numel() else state

    return Observer(init_average, update, unmergeable("ema_minmax", MOVES), range_qparams)
