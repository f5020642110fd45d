"""Histograms that merge without loss, and two observers on them: a percentile, and the least Kullback-Leibler divergence.

Each scale has ``bins`` bins on either side of 0. They reach to the smallest power of two above the largest magnitude
seen. When a larger magnitude doubles that reach, each pair of neighbouring bins is added into one: no count is ever split,
so the histogram of all tensors does not depend on their order.
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

GROUPS_AT_ONCE = 2**21
"""How many groups of bins are scored at a time, over all thresholds and scales, to bound memory.

A temporary tensor of them takes 16 MiB in float64. The default, 1921 thresholds of 128 groups, is one pass for up to eight
scales; on a CPU the time is the same within noise from 2**16 to 2**24.
"""

EMPTY_BIN = 1e-4
"""The count that ``Q`` has in an empty last bin.

All values beyond the threshold are counted there in ``P``; a ``Q`` of 0 would make the divergence infinite for every
threshold that ends at an empty bin. It is far below the least real count, 1, so that such a threshold still costs much.
MXNet and TVM replace zeros by the same number in their calibrations.
"""

ROUND_OFF = 1e-12
"""Relative slack of a share: ``99.9 / 100`` is a little above 0.999, and must not ask for one more count.

It is far above the round-off of a division in float64, 1e-16, and moves no threshold below 1e12 counts.
"""


class CountsState(NamedTuple):
    """The extremes and a histogram of all values seen.

    Attributes:
      lo, hi: float32, scale-shaped; ``(inf, -inf)`` before the first tensor.
      counts: int64, ``(*scale shape, 2 * bins)``, from the most negative bin up.
    """

    lo: Tensor
    hi: Tensor
    counts: Tensor


@OBSERVERS.register("percentile")
def percentile(percentile: float = 99.99, bins: int = 2048) -> Observer:
    """The range that holds ``percentile`` percent of all values, to the precision of a histogram.

    Symmetric: the smallest ``a`` such that ``[-a, a]`` holds them; affine: half of the rest is cut at either end. ``a``
    is the outer edge of a bin, and a bin is at most ``max |x| * 2 / bins`` wide. Mergeable without loss. Keeps that share
    of the values, whatever the size of the others.

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
            kept = bins_that_hold(counts_of_magnitudes(state.counts), share)
            return clipped_qparams(state, kept, kept, scheme)
        # each end may cut half of the values that are not kept: bins from the other end hold all but that half
        above = bins_that_hold(state.counts, (1 + share) / 2) - bins
        below = bins_that_hold(state.counts.flip(-1), (1 + share) / 2) - bins
        return clipped_qparams(state, below, above, scheme)

    return counting(bins, qparams)


@OBSERVERS.register("kld")
def kld(bins: int = 2048) -> Observer:
    """The threshold on ``|x|`` of least Kullback-Leibler divergence, after Migacz, "8-bit Inference with TensorRT" (2017).

    With counts ``h`` of ``|x|`` and ``L`` levels, a threshold of ``i >= L`` bins compares ``P``, the first ``i`` counts
    with all that lies beyond added to the last, and ``Q``, the first ``i`` counts joined into ``L`` groups and spread
    evenly over those bins of each group that are not empty. The least ``sum P log(P / Q)`` wins, the largest ``i`` of
    equals; where the last bin of ``Q`` is empty, it counts as 1e-4. ``L`` is ``2 ** (bits - 1)``; on an affine grid
    ``2 ** bits`` where no two values differ in sign. Range: the threshold to either side, and no wider than the extremes
    seen. Mergeable without loss.

    Three rules keep it from cutting what matters. The first count is replaced by the second, as in NVIDIA's
    ``pytorch-quantization``: zeros, of which a ReLU makes many, are exact on every grid. ``Q`` keeps the scale of the
    counts, so that it lacks what is clipped: normalized, one bin with all values clipped to it would be a perfect match.
    And a threshold clips at most the share ``1 / L ** 2`` of the values: 0.006 % at 8 bits, 1.6 % at 4. That is near the
    share that the least squared error clips of Laplace's density (arXiv:1810.05723). Keeps all but that share, whatever
    the size of the others, and all of fewer than ``L ** 2`` values.

    Args:
      bins: bins on either side of 0, a power of two. With more levels than bins nothing is clipped.

    Differs from sophgo-mq: its ``KLDObserver`` minimises a squared error and ignores ``bits``; here that name means
    ``histogram``. Any granularity.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("kld"), sq.QScheme()
      >>> x = torch.cat([torch.linspace(-1.0, 1.0, 99999) ** 3, torch.tensor([100.0])])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.0667)
    """
    check_bins("kld", bins)

    def qparams(state: CountsState, scheme: QScheme) -> QParams:
        magnitudes = without_zeros(counts_of_magnitudes(state.counts)).double()
        levels = 2 ** (scheme.bits - 1)
        kept = least_divergence(magnitudes, levels)
        if not scheme.symmetric:
            # all codes of the grid lie on the side that has values
            one_sided = (state.lo >= 0) | (state.hi <= 0)
            kept = torch.where(one_sided, least_divergence(magnitudes, 2 * levels), kept)
        return clipped_qparams(state, kept, kept, scheme)

    return counting(bins, qparams)


def check_bins(where: str, bins: object) -> None:
    """Raise a :class:`ConfigError` unless ``bins`` is a power of two >= 2: bins are added in pairs when the reach grows."""
    good = isinstance(bins, int) and bins >= 2 and bins & (bins - 1) == 0
    check(where, "number of bins", bins, "a power of two >= 2", ok=good)


def counting(bins: int, qparams: Resolve) -> Observer:
    """An observer whose state is a histogram; ``qparams`` reads the range off it."""

    def init(x: Tensor, scheme: QScheme) -> CountsState:
        lo, hi = no_range(x, scheme.granularity)
        return CountsState(lo, hi, torch.zeros((*lo.shape, 2 * bins), dtype=torch.int64, device=lo.device))

    def update(state: CountsState, x: Tensor, scheme: QScheme) -> CountsState:
        if x.numel() == 0:
            return state
        lo, hi = min_max(x, scheme.granularity)
        return merge_counts(state, count(x, lo, hi, scheme, bins))

    return Observer(init, update, merge_counts, qparams)


def count(x: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, bins: int) -> CountsState:
    """The histogram of one tensor with the extremes ``lo`` and ``hi``."""
    flat = rows(x.detach(), scheme.granularity).float()
    unit = power(reach_exponent(lo, hi)).unsqueeze(-1)
    # bins reach to 2 * unit; the division by a power of two is exact, and comes first so that nothing overflows
    place = (flat / unit * (bins // 2)).floor()
    # a negative value so small that its place rounds to -0.0 belongs to the first bin below 0
    place = torch.where(flat < 0, place.clamp(max=-1), place)
    # values that are not finite need some bin; the extremes tell that they were there
    index = place.nan_to_num(0).clamp(-bins, bins - 1).to(torch.int64) + bins
    empty = torch.zeros((*flat.shape[:-1], 2 * bins), dtype=torch.int64, device=flat.device)
    return CountsState(lo, hi, empty.scatter_add(-1, index, torch.ones_like(index)))


def merge_counts(a: CountsState, b: CountsState) -> CountsState:
    """The histogram of the data of both."""
    lo, hi = torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi)
    reach = reach_exponent(lo, hi)
    counts_a = coarsen(a.counts, reach - reach_exponent(a.lo, a.hi))
    counts_b = coarsen(b.counts, reach - reach_exponent(b.lo, b.hi))
    return CountsState(lo, hi, counts_a + counts_b)


def coarsen(counts: Tensor, doublings: Tensor) -> Tensor:
    """The counts of bins that are ``2 ** doublings`` times as wide."""
    bins = counts.shape[-1] // 2
    place = torch.arange(-bins, bins, device=counts.device)
    # an arithmetic shift rounds down, so places below 0 keep their side; int64 cannot be shifted by 64 or more, and
    # every place has become 0 or -1 long before 62
    shift = doublings.clamp(0, 62).to(torch.int64).unsqueeze(-1)
    index = torch.bitwise_right_shift(place, shift) + bins
    return torch.zeros_like(counts).scatter_add(-1, index, counts)


def reach_exponent(lo: Tensor, hi: Tensor) -> Tensor:
    """``e`` such that bins reach to ``2 ** (e + 1)``: that of the largest magnitude of ``[lo, hi]``; -126 before any."""
    magnitude = torch.maximum(-lo, hi)
    return exponent(torch.where(torch.isfinite(magnitude), magnitude, 0))


def clipped_qparams(state: CountsState, below: Tensor, above: Tensor, scheme: QScheme) -> QParams:
    """The grid of ``below`` bins under 0 and ``above`` bins over 0, and no wider than the extremes seen."""
    bins = state.counts.shape[-1] // 2
    width = power(reach_exponent(state.lo, state.hi)) / (bins // 2)
    lo, hi = torch.maximum(state.lo, -below * width), torch.minimum(state.hi, above * width)
    finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
    return range_to_qparams(torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan), scheme)


def bins_that_hold(counts: Tensor, share: float) -> Tensor:
    """The smallest number of bins, from the first one on, that hold at least this share of all counts."""
    so_far = counts.cumsum(-1)
    needed = (so_far[..., -1:].double() * (share * (1 - ROUND_OFF))).ceil().clamp(min=1)
    return (so_far < needed).sum(-1) + 1


def counts_of_magnitudes(counts: Tensor) -> Tensor:
    """Counts of ``|x|``: those of both sides of 0 added."""
    below, above = counts.tensor_split(2, dim=-1)
    return above + below.flip(-1)


def without_zeros(magnitudes: Tensor) -> Tensor:
    """The counts of ``|x|`` with that of the first bin, which holds the zeros, replaced by that of the second."""
    return torch.cat([magnitudes[..., 1:2], magnitudes[..., 1:]], dim=-1)


def least_divergence(magnitudes: Tensor, levels: int) -> Tensor:
    """The number of bins to keep, of the counts of ``|x|`` along the last axis, float64; see :func:`kld`."""
    bins = magnitudes.shape[-1]
    if levels >= bins:
        # every bin has a level of its own; twice the bins reach beyond the extremes, which then bound the range
        return torch.full(magnitudes.shape[:-1], 2 * bins, device=magnitudes.device)
    scales = max(1, math.prod(magnitudes.shape[:-1]))
    # from the widest down, because the first of equals is taken
    thresholds = torch.arange(bins, levels - 1, -1, device=magnitudes.device)
    pieces = torch.split(thresholds, max(1, GROUPS_AT_ONCE // (levels * scales)))
    divergences = torch.cat([_divergence(magnitudes, piece, levels) for piece in pieces], dim=-1)
    return bins - divergences.min(dim=-1).indices


def _divergence(magnitudes: Tensor, thresholds: Tensor, levels: int) -> Tensor:
    """``n * sum P log(P / Q)`` for each threshold, with ``n`` counts in all; infinite where too many are clipped.

    Each is read off running sums over bins and groups of bins. With ``G`` counts in the ``m`` bins of a group that are not
    empty, it is ``sum h log h - sum G log(G / m)`` for ``P`` as counted. Moving the counts from beyond the threshold into
    its last bin then changes that bin's term alone.
    """
    total = magnitudes.sum(-1, keepdim=True)
    filled_sums = _running_sums((magnitudes > 0).double())
    count_sums = _running_sums(magnitudes)
    entropy_sums = _running_sums(torch.xlogy(magnitudes, magnitudes))
    # bin j of i belongs to the group j * levels // i, so group g begins at the bin ceil(g * i / levels)
    edges = (torch.arange(levels + 1, device=thresholds.device) * thresholds.unsqueeze(-1) + levels - 1) // levels
    group = count_sums[..., edges].diff(dim=-1)
    filled = filled_sums[..., edges].diff(dim=-1)
    outside = total - count_sums[..., thresholds]
    spread = torch.xlogy(group, group / filled.clamp(min=1)).sum(-1)
    unclipped = entropy_sums[..., thresholds] - spread
    last = magnitudes[..., thresholds - 1]
    last_of_q = torch.where(last > 0, group[..., -1] / filled[..., -1].clamp(min=1), EMPTY_BIN)
    last_of_p = last + outside
    moved = torch.xlogy(last_of_p, last_of_p) - torch.xlogy(last, last) - outside * torch.log(last_of_q)
    divergence = torch.where(outside == 0, unclipped, unclipped + moved)
    return torch.where(outside * levels**2 <= total, divergence, torch.inf)


def _running_sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values."""
    return torch.nn.functional.pad(values.cumsum(-1), (1, 0))
