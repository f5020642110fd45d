"""Symmetric ranges from the largest magnitude or the root mean square, and a range that is given."""

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
    """The root mean square so far, float32, and the number of its elements, int64; both scale-shaped."""

    root: Tensor
    seen: Tensor


@OBSERVERS.register("absmax")
def absmax(factor: float = 1.0) -> Observer:
    """The range ``[-a, a]``, ``a = factor * max |x|`` over all tensors; symmetric about 0 for affine grids too.

    Mergeable. A factor below 1 clips. Keeps as much of either sign: of an affine grid, values of one sign use half.

    Args:
      factor: multiple of the largest magnitude, > 0.

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
        largest = torch.maximum(-lo, hi)
        bound = torch.where(torch.isfinite(largest), (factor * largest).clamp(max=LARGEST), torch.nan)
        return widen(state, -bound, bound)

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("rms")
def rms(factor: float = 4.0) -> Observer:
    """The range ``[-a, a]``, ``a = factor * sqrt(mean x ** 2)`` over the elements of all tensors.

    Mergeable, up to the rounding of a sum. For tensors whose outliers do not matter. Keeps what is no larger than that,
    and leaves codes unused where nothing is as large.

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
        lo, _ = no_range(x, scheme.granularity)
        root = torch.zeros_like(lo)
        return RootState(root, root.to(torch.int64))

    def update(state: RootState, x: Tensor, scheme: QScheme) -> RootState:
        if x.numel() == 0:
            return state
        flat, unit = in_units(x, scheme)
        root = flat.square().mean(-1).sqrt() * unit
        finite_root = torch.where(torch.isfinite(root), root, torch.nan)
        return merge_roots(state, RootState(finite_root, torch.full_like(state.seen, flat.shape[-1])))

    def qparams(state: RootState, scheme: QScheme) -> QParams:
        bound = torch.where(state.seen > 0, (factor * state.root).clamp(max=LARGEST), torch.nan)
        return range_to_qparams(-bound, bound, scheme)

    return Observer(init, update, merge_roots, qparams, sums=True, clips=True)


def merge_roots(a: RootState, b: RootState) -> RootState:
    """The root mean square of the elements of both."""
    seen = a.seen + b.seen
    weight_a, weight_b = ((state.seen / seen.clamp(min=1)).float().sqrt() for state in (a, b))
    # hypot, because a square may overflow or underflow
    return RootState(torch.hypot(a.root * weight_a, b.root * weight_b), seen)


@OBSERVERS.register("fixed_range")
def fixed_range(lo: float = -1.0, hi: float = 1.0) -> Observer:
    """The range ``[lo, hi]``, whatever the tensors hold: for softmax, sigmoid, tanh, and for ranges a chip prescribes.

    Mergeable. Keeps what lies in the range. As with every observer, there is none before the first tensor, nor after
    values that are not finite.

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
    good = is_number(lo) and is_number(hi) and -LARGEST <= lo < hi <= LARGEST
    check("fixed_range", "range", (lo, hi), "finite numbers lo < hi", ok=good)

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        if x.numel() == 0:
            return state
        least, most = min_max(x, scheme.granularity)
        finite = torch.isfinite(least) & torch.isfinite(most)
        bound_lo, bound_hi = torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan)
        return widen(state, bound_lo, bound_hi)

    return Observer(init_min_max, update, merge_min_max, range_qparams, clips=True)
