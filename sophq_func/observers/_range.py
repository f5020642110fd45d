"""Symmetric ranges from the largest or the typical size, and a range that is known beforehand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._minmax import MinMaxState, init_min_max, merge_min_max, range_qparams, widen
from sophq_func.observers._moments import LARGEST, in_units
from sophq_func.observers._options import check, check_positive, is_number


class RootState(NamedTuple):
    """Root of the mean square, float32, and the number of elements it is the mean of, int64; both scale-shaped."""

    root: Tensor
    seen: Tensor


def merge_roots(a: RootState, b: RootState) -> RootState:
    """The root mean square of both together; ``hypot`` neither overflows nor underflows."""
    seen = a.seen + b.seen
    weights = [(state.seen / seen.clamp(min=1)).float().sqrt() for state in (a, b)]
    return RootState(torch.hypot(a.root * weights[0], b.root * weights[1]), seen)


@OBSERVERS.register("absmax")
def absmax(factor: float = 1.0) -> Observer:
    """The range ``[-a, a]``, ``a = factor * max |x|`` over all tensors; symmetric about 0 for affine grids too.

    Mergeable. A factor below 1 clips.

    Args:
      factor: share of the largest size, > 0.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("absmax"), sq.QScheme(symmetric=False)
      >>> x = torch.tensor([-1.0, 2.0])
      >>> obs.update(obs.init(x, scheme), x, scheme)
      MinMaxState(lo=tensor(-2.), hi=tensor(2.))
    """
    check_positive("absmax", "factor", factor)

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        size = torch.maximum(-lo, hi)
        bound = torch.where(torch.isfinite(size), (factor * size).clamp(max=LARGEST), torch.nan)
        return widen(state, -bound, bound)

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("rms")
def rms(factor: float = 4.0) -> Observer:
    """The range ``[-a, a]``, ``a = factor * sqrt(mean x ** 2)`` over the elements of all tensors.

    Mergeable, up to the rounding of a sum. For tensors whose outliers do not matter.

    Args:
      factor: how many root mean squares are kept, > 0.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("rms", factor=2.0), sq.QScheme()
      >>> x = torch.tensor([-1.0, 1.0])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.0157)
    """
    check_positive("rms", "factor", factor)

    def init(x: Tensor, scheme: QScheme) -> RootState:
        nothing = torch.zeros_like(no_range(x, scheme.granularity)[0])
        return RootState(nothing, nothing.to(torch.int64))

    def update(state: RootState, x: Tensor, scheme: QScheme) -> RootState:
        if x.numel() == 0:
            return state
        flat, unit = in_units(x, scheme)
        root = flat.square().mean(-1).sqrt() * unit
        seen = torch.full_like(state.seen, flat.shape[-1])
        return merge_roots(state, RootState(torch.where(torch.isfinite(root), root, torch.nan), seen))

    def qparams(state: RootState, scheme: QScheme) -> QParams:
        bound = torch.where(state.seen > 0, (factor * state.root).clamp(max=LARGEST), torch.nan)
        return range_to_qparams(-bound, bound, scheme)

    return Observer(init, update, merge_roots, qparams)


@OBSERVERS.register("fixed_range")
def fixed_range(lo: float = -1.0, hi: float = 1.0) -> Observer:
    """The range ``[lo, hi]``, whatever the tensors hold: for softmax, sigmoid, tanh, and for what a chip prescribes.

    Mergeable. As with every observer a range is there once something was observed, and values that are not finite
    leave none.

    Args:
      lo: lower bound. A grid holds 0 in any case: above 0, it begins at 0.
      hi: upper bound, > ``lo``.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("fixed_range", lo=0.0, hi=1.0), sq.QScheme(symmetric=False)
      >>> x = torch.tensor([0.2, 0.3])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.0039)
    """
    known = is_number(lo) and is_number(hi) and -LARGEST <= lo < hi <= LARGEST
    check("fixed_range", "range", (lo, hi), "finite numbers lo < hi", ok=known)

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        if x.numel() == 0:
            return state
        least, most = min_max(x, scheme.granularity)
        finite = torch.isfinite(least) & torch.isfinite(most)
        return widen(state, torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan))

    return Observer(init_min_max, update, merge_min_max, range_qparams)
