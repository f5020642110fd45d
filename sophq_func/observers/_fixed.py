"""A range that is known beforehand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.affine import range_to_qparams, rows
from sophq_func.base import OBSERVERS, Observer, QParams
from sophq_func.errors import ConfigError, explain
from sophq_func.scheme import QScheme


class FixedRangeState(NamedTuple):
    """The range, float32, scale-shaped."""

    lo: Tensor
    hi: Tensor


@OBSERVERS.register("fixed_range")
def fixed_range(lo: float = -1.0, hi: float = 1.0) -> Observer:
    """The range ``[lo, hi]``, whatever the data: for outputs of softmax or sigmoid, or images scaled beforehand.

    Mergeable.

    Args:
      lo: smallest value, finite.
      hi: largest value, finite, at least ``lo``.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("fixed_range", lo=0.0, hi=1.0), sq.QScheme(symmetric=False)
      >>> float(obs.qparams(obs.init(torch.ones(3), scheme), scheme).scale) * 255
      1.0
    """
    if not all(isinstance(bound, int | float) and math.isfinite(bound) for bound in (lo, hi)) or lo > hi:
        raise ConfigError(explain("fixed_range", "this range", got=(lo, hi), allowed="two finite numbers, lo <= hi"))

    def init(x: Tensor, scheme: QScheme) -> FixedRangeState:
        shape = rows(x, scheme.granularity).shape[:-1]
        low, high = (torch.full(shape, float(bound), dtype=torch.float32, device=x.device) for bound in (lo, hi))
        return FixedRangeState(low, high)

    def update(state: FixedRangeState, x: Tensor, scheme: QScheme) -> FixedRangeState:
        return state

    def merge(a: FixedRangeState, b: FixedRangeState) -> FixedRangeState:
        return a

    def qparams(state: FixedRangeState, scheme: QScheme) -> QParams:
        return range_to_qparams(state.lo, state.hi, scheme)

    return Observer(init, update, merge, qparams)
