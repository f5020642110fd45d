"""Histograms that merge without loss, and two ways to cut them: at a percentile, at the least KL divergence.

The bins of a scale lie on both sides of 0, ``bins`` on each, and reach to the smallest power of two above the largest
size seen. When that grows, pairs of bins become one: no count is ever split, so the histogram of all data does not
depend on the order in which it came.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams, Resolve
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._moments import exponent, power
from sophq_func.observers._options import check, is_number

AT_ONCE = 2**21
"""How many groups of bins are looked at together."""

SMALL = 1e-4
"""The count of an empty last bin, so that its divergence from what is clipped to it is finite."""


class CountsState(NamedTuple):
    """Extremes, float32, scale-shaped, and counts, int64, ``(*scale shape, 2 * bins)`` from the most negative bin up."""

    lo: Tensor
    hi: Tensor
    counts: Tensor


def reach(lo: Tensor, hi: Tensor) -> Tensor:
    """The exponent of the largest size of ``[lo, hi]``: bins reach to ``2 ** (reach + 1)``; -126 of nothing."""
    size = torch.maximum(-lo, hi)
    return exponent(torch.where(torch.isfinite(size), size, 0))


def count(x: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, bins: int) -> CountsState:
    """The histogram of one tensor with the extremes ``lo`` and ``hi``."""
    flat = rows(x.detach(), scheme.granularity).float()
    place = (flat / power(reach(lo, hi)).unsqueeze(-1) * (bins // 2)).floor()
    place = torch.where(flat < 0, place.clamp(max=-1), place).nan_to_num(0).clamp(-bins, bins - 1).to(torch.int64) + bins
    empty = torch.zeros((*flat.shape[:-1], 2 * bins), dtype=torch.int64, device=flat.device)
    return CountsState(lo, hi, empty.scatter_add(-1, place, torch.ones_like(place)))


def coarsen(counts: Tensor, steps: Tensor) -> Tensor:
    """The counts of bins that are ``2 ** steps`` times as wide."""
    bins = counts.shape[-1] // 2
    place = torch.arange(-bins, bins, device=counts.device)
    place = torch.bitwise_right_shift(place, steps.clamp(0, 62).to(torch.int64).unsqueeze(-1)) + bins
    return torch.zeros_like(counts).scatter_add(-1, place, counts)


def merge_counts(a: CountsState, b: CountsState) -> CountsState:
    """The histogram of the data of both."""
    lo, hi = torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi)
    counts = [coarsen(state.counts, reach(lo, hi) - reach(state.lo, state.hi)) for state in (a, b)]
    return CountsState(lo, hi, counts[0] + counts[1])


def counting(bins: int, qparams: Resolve) -> Observer:
    """An observer that counts and leaves the cut to ``qparams``."""

    def init(x: Tensor, scheme: QScheme) -> CountsState:
        lo, hi = no_range(x, scheme.granularity)
        return CountsState(lo, hi, torch.zeros((*lo.shape, 2 * bins), dtype=torch.int64, device=lo.device))

    def update(state: CountsState, x: Tensor, scheme: QScheme) -> CountsState:
        if x.numel() == 0:
            return state
        return merge_counts(state, count(x, *min_max(x, scheme.granularity), scheme, bins))

    return Observer(init, update, merge_counts, qparams)


def cut(state: CountsState, below: Tensor, above: Tensor, scheme: QScheme) -> QParams:
    """The grid of the range that is ``below`` and ``above`` so many bins wide, and no wider than what was seen."""
    width = power(reach(state.lo, state.hi)) / (state.counts.shape[-1] // 4)
    lo, hi = torch.maximum(state.lo, -below * width), torch.minimum(state.hi, above * width)
    finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
    return range_to_qparams(torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan), scheme)


def first_with(counts: Tensor, share: float) -> Tensor:
    """How many bins from the first one on hold at least this share of all counts; 99.9 / 100 is a little above 0.999."""
    so_far = counts.cumsum(-1)
    needed = (so_far[..., -1:].double() * (share * (1 - 1e-12))).ceil().clamp(min=1)
    return (so_far < needed).sum(-1) + 1


def check_bins(where: str, bins: object) -> None:
    """Bins pair up when a histogram grows."""
    good = isinstance(bins, int) and bins >= 2 and bins & (bins - 1) == 0
    check(where, "number of bins", bins, "a power of two >= 2", ok=good)


def by_size(counts: Tensor) -> Tensor:
    """Counts of ``|x|``: both sides of 0 together."""
    below, above = counts.tensor_split(2, dim=-1)
    return above + below.flip(-1)


@OBSERVERS.register("percentile")
def percentile(percentile: float = 99.99, bins: int = 2048) -> Observer:
    """The range that holds ``percentile`` percent of all values, to the precision of a histogram.

    Symmetric: the smallest ``a`` such that ``[-a, a]`` holds them; affine: half of the rest is cut at either end. ``a``
    is the outer edge of a bin, and a bin is at most ``max |x| * 2 / bins`` wide. Mergeable without loss.

    Args:
      percentile: percent of the values that are kept, in (0, 100].
      bins: bins on either side of 0, a power of two.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("percentile", percentile=90.0), sq.QScheme(bits=3)
      >>> x = torch.tensor([1.0] * 9 + [100.0])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.3036)
    """
    good = is_number(percentile) and 0 < percentile <= 100
    check("percentile", "percentile", percentile, "a number in (0, 100]", ok=good)
    check_bins("percentile", bins)
    share = percentile / 100

    def qparams(state: CountsState, scheme: QScheme) -> QParams:
        if scheme.symmetric:
            size = first_with(by_size(state.counts), share)
            return cut(state, size, size, scheme)
        above = first_with(state.counts, (1 + share) / 2) - bins
        below = first_with(state.counts.flip(-1), (1 + share) / 2) - bins
        return cut(state, below, above, scheme)

    return counting(bins, qparams)


@OBSERVERS.register("kld", "KLDObserver")
def kld(bins: int = 2048) -> Observer:
    """The threshold on ``|x|`` of least Kullback-Leibler divergence, after Migacz, "8-bit Inference with TensorRT" (2017).

    With counts ``h`` of ``|x|`` and ``L = 2 ** (bits - 1)`` levels, a threshold of ``i >= L`` bins compares ``P``, the
    first ``i`` counts with all that lies beyond added to the last, and ``Q``, the first ``i`` counts joined into ``L``
    groups and spread evenly over those bins of each group that are not empty; both sum to 1. The least
    ``sum P log(P / Q)`` wins, the smallest ``i`` of equals; where the last bin of ``Q`` is empty, it counts as 1e-4.
    Range: the threshold to either side, and no wider than what was seen. Mergeable without loss.

    Args:
      bins: bins on either side of 0, a power of two. With more levels than bins nothing is clipped.

    Differs from sophgo-mq: its observer of this name minimises a squared error and ignores ``bits``; that one is
    ``histogram`` here. Any granularity.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("kld"), sq.QScheme()
      >>> x = torch.cat([torch.linspace(-1.0, 1.0, 9999) ** 3, torch.tensor([100.0])])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.0627)
    """
    check_bins("kld", bins)

    def qparams(state: CountsState, scheme: QScheme) -> QParams:
        levels = 2 ** (scheme.bits - 1)
        if levels >= bins:
            width = torch.full_like(state.lo, 2 * bins)
        else:
            width = least_divergence(by_size(state.counts).double(), levels)
        return cut(state, width, width, scheme)

    return counting(bins, qparams)


def least_divergence(sizes: Tensor, levels: int) -> Tensor:
    """How many of the bins along the last axis to keep, see :func:`kld`.

    Each divergence is read off running sums over bins and groups of bins. With ``n`` counts in all, ``t`` of them below
    the threshold, and ``G`` counts in the ``m`` bins of a group that are not empty, ``n * KL`` is
    ``sum h log h - sum G log(G / m) + t log(t / n)``, up to the last bin's term.
    """
    per_candidate = levels * max(1, math.prod(sizes.shape[:-1]))
    kept = torch.arange(levels, sizes.shape[-1] + 1, device=sizes.device)
    scores = [_divergence(sizes, part, levels) for part in torch.split(kept, max(1, AT_ONCE // per_candidate))]
    return levels + torch.cat(scores, dim=-1).min(dim=-1).indices


def _divergence(sizes: Tensor, kept: Tensor, levels: int) -> Tensor:
    """The divergence times the number of counts, for each number of bins in ``kept``."""
    total = sizes.sum(-1, keepdim=True)
    filled, counts, entropy = (_sums(part) for part in ((sizes > 0).double(), sizes, torch.xlogy(sizes, sizes)))
    edges = (torch.arange(levels + 1, device=kept.device) * kept.unsqueeze(-1) + levels - 1) // levels
    group, members = (part[..., edges].diff(dim=-1) for part in (counts, filled))
    inside, last = counts[..., kept], sizes[..., kept - 1]
    level = torch.where(last > 0, group[..., -1] / members[..., -1].clamp(min=1), SMALL)
    outside = total - inside
    spread = torch.xlogy(group, group / members.clamp(min=1)).sum(-1)
    plain = entropy[..., kept] - spread + torch.xlogy(inside, inside / total)
    whole, log_level = last + outside, torch.log(level * total / inside)
    moved = torch.xlogy(whole, whole) - torch.xlogy(last, last) - outside * log_level
    return torch.where(outside == 0, plain, torch.where(inside > 0, plain + moved, torch.inf))


def _sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))
