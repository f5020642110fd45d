"""The range of least squared error over a histogram of all tensors, searched from the full range inwards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.arguments import MOST_REPEATS, is_count
from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._options import check, unmergeable

PARTS = 16
"""How many parts a bin is split into before it moves to a histogram of a wider range, as in PyTorch's observer.

Each part goes whole into one bin of the new histogram; more parts misplace less.
"""

HISTOGRAM_UNIT = 2**20
"""What one value counts, so that the parts of a bin are integers: they are exact for five splits, and add up for ever.

Integers, because a float32 stops counting at ``2 ** 24``. An int64 holds the products of :func:`stretch` up to ``2 ** 39``
values in a bin.
"""

STEPS = 100_000
"""One step of the search leaves out one of so many equal parts of all counts: 1e-5, as in PyTorch's observer."""

SCALES_AT_ONCE = 16
"""How many scales are searched at a time on an accelerator: a search holds a dozen tensors of STEPS numbers, 10 MB."""

BINS_AT_ONCE = 2**16
"""How many bins of candidate ranges are scored at a time.

A temporary tensor of them takes 256 KiB in float32, and the half dozen that :func:`squared_error` needs stay in the cache
of a core. Measured on a CPU with 2 MiB: smaller pieces, below 2**14, and larger ones, from 2**20, take two times as long.
"""


class HistogramState(NamedTuple):
    """The extremes and a histogram of all values seen.

    Attributes:
      lo, hi: float32, scale-shaped; ``(inf, -inf)`` before the first tensor.
      counts: int64, ``(*scale shape, bins)``: values in each of the equal bins of ``[lo, hi]``, times ``2 ** 20``, for
        bins are split.
    """

    lo: Tensor
    hi: Tensor
    counts: Tensor


@OBSERVERS.register("histogram", "HistogramObserver", "KLDObserver")
def histogram(bins: int = 2048, levels: int = 256) -> Observer:
    """A range of little squared error over the histogram of all tensors, as PyTorch's ``HistogramObserver`` searches it.

    The search starts at the full range and leaves out 1e-5 of all values at a time, on the side where that removes more
    bins, until the error of ``levels`` equal cells grows. Not mergeable: when the range grows, the bins of the histogram
    are split among those of the new one, and the result depends on the order.

    Args:
      bins: bins between the smallest and the largest value.
      levels: cells for which the error is measured, whatever the bits of the grid.

    Differs from sophgo-mq: there it is called ``KLDObserver``, ``pot_scale`` is ignored and channels are refused. Each
    scale is searched on its own, so many channels take long. Infinite values are refused, not left out.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("histogram"), sq.QScheme()
      >>> x = torch.cat([torch.linspace(-1.0, 1.0, 9999), torch.tensor([100.0])])
      >>> obs.qparams(obs.update(obs.init(x, scheme), x, scheme), scheme).scale
      tensor(0.7839)
    """
    check("histogram", "number of bins", bins, f"an int from 2 to {MOST_REPEATS}", ok=is_count(bins, least=2))
    check("histogram", "number of levels", levels, f"an int from 2 to {MOST_REPEATS}", ok=is_count(levels, least=2))

    def init(x: Tensor, scheme: QScheme) -> HistogramState:
        lo, hi = no_range(x, scheme.granularity)
        return HistogramState(lo, hi, torch.zeros((*lo.shape, bins), dtype=torch.int64, device=lo.device))

    def update(state: HistogramState, x: Tensor, scheme: QScheme) -> HistogramState:
        if x.numel() == 0:
            return state
        least, most = min_max(x, scheme.granularity)
        lo, hi = torch.minimum(state.lo, least), torch.maximum(state.hi, most)
        added = histogram_of(rows(x.detach(), scheme.granularity).float(), lo, hi, bins)
        return HistogramState(lo, hi, added + stretch(state, lo, hi))

    def qparams(state: HistogramState, scheme: QScheme) -> QParams:
        each_scale = state.lo.reshape(-1), state.hi.reshape(-1), state.counts.reshape(-1, bins)
        # on an accelerator a search is some hundred launches, whether of one scale or of several
        search = one_by_one if state.lo.is_cpu else several_at_once
        lo, hi = (side.reshape(state.lo.shape) for side in search(*each_scale, levels))
        finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
        return range_to_qparams(torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan), scheme)

    return Observer(init, update, unmergeable("histogram", "bins are split where the range grows"), qparams)


def histogram_of(flat: Tensor, lo: Tensor, hi: Tensor, bins: int) -> Tensor:
    """How many values of the last axis lie in each of ``bins`` equal bins of ``[lo, hi]``, in units, int64."""
    empty = torch.zeros((*flat.shape[:-1], bins), dtype=torch.int64, device=flat.device)
    index = bin_index(flat, lo, hi, bins)
    return HISTOGRAM_UNIT * empty.scatter_add(-1, index, torch.ones_like(index))


def bin_index(values: Tensor, lo: Tensor, hi: Tensor, bins: int) -> Tensor:
    """The index, int64, of the bin of each value of the last axis, of ``bins`` equal bins of ``[lo, hi]``."""
    # halves, because hi - lo itself may overflow
    start, half_width = (lo / 2).unsqueeze(-1), (hi / 2 - lo / 2).unsqueeze(-1)
    divisor = torch.where(half_width > 0, half_width, 1)
    place = (values / 2 - start) / divisor * bins
    return place.nan_to_num(0).clamp(0, bins - 1).to(torch.int64)


def stretch(state: HistogramState, lo: Tensor, hi: Tensor) -> Tensor:
    """The counts of ``state`` in the bins of a wider range ``[lo, hi]``.

    Each bin is cut into :data:`PARTS` equal parts, and each part goes to the new bin that its middle lies in.
    """
    bins = state.counts.shape[-1]
    # differences of rounded shares, not rounded parts: whatever the rounding, the parts add up to the bin
    shares = torch.arange(PARTS + 1, device=state.counts.device)
    parts = (state.counts.unsqueeze(-1) * shares // PARTS).diff(dim=-1).flatten(-2)
    share = (torch.arange(bins * PARTS, device=parts.device) + 0.5) / (bins * PARTS)
    middle = state.lo.unsqueeze(-1) * (1 - share) + state.hi.unsqueeze(-1) * share
    moved = torch.zeros_like(state.counts).scatter_add(-1, bin_index(middle, lo, hi, bins), parts)
    same_range = (lo == state.lo) & (hi == state.hi)
    return torch.where(same_range.unsqueeze(-1), state.counts, moved)


def one_by_one(lo: Tensor, hi: Tensor, counts: Tensor, levels: int) -> Sequence[Tensor]:
    """:func:`least_error` of each scale."""
    each_scale = zip(lo, hi, counts, strict=True)
    return torch.stack([torch.stack(least_error(*one, levels)) for one in each_scale]).unbind(1)


def several_at_once(lo: Tensor, hi: Tensor, counts: Tensor, levels: int) -> Sequence[Tensor]:
    """The same, by a vmap over :data:`SCALES_AT_ONCE` scales at a time."""
    found: Sequence[Tensor] = torch.vmap(partial(least_error, levels=levels), chunk_size=SCALES_AT_ONCE)(lo, hi, counts)
    return found


def least_error(lo: Tensor, hi: Tensor, counts: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The last range, narrowing ``[lo, hi]`` as :func:`narrowing` says, before the error of ``levels`` cells grows.

    Args:
      lo, hi: the range of the histogram, shape ``()``.
      counts: one histogram, int64, ``(bins,)``.
      levels: number of equal cells.
    """
    bins = counts.shape[-1]
    values = counts.double() / HISTOGRAM_UNIT
    first, last, exists = narrowing(values)
    values = values.float()
    pieces = max(1, BINS_AT_ONCE // bins)
    parts = zip(torch.split(first, pieces), torch.split(last, pieces), strict=True)
    errors = torch.cat([squared_error(values, part_first, part_last, levels) for part_first, part_last in parts])
    not_worse = errors[1:] <= errors[:-1]
    # as in PyTorch's observer, the full range is never the answer where there is a narrower one
    is_first_step = torch.arange(bins - 1, device=errors.device) == 0
    goes_on = exists[1:] & (not_worse | is_first_step)
    stop = goes_on.long().cumprod(0).sum().unsqueeze(0)
    # halves, because hi - lo itself may overflow
    start, width = lo / 2, (hi / 2 - lo / 2) / bins
    return 2 * (start + width * first[stop].squeeze(0)), 2 * (start + width * (last[stop].squeeze(0) + 1))


def narrowing(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every range of bins on the way inwards, the full one first: its first and last bin, and whether there are so many.

    Each step leaves out one more of :data:`STEPS` parts of all counts: on the left if that removes more bins than on the
    right would, else on the right. With ``g`` the numbers of bins that the steps of a side remove, step ``a`` of the left
    comes before step ``b`` of the right exactly when ``min g_left[:a + 1] > min g_right[:b + 1]``: a step that removes few
    bins holds up those behind it until the other side has less to offer. Both minima fall, so the order of all steps is a
    merge of two sorted lists, which needs no loop.

    Args:
      counts: one histogram, float64, ``(bins,)``.

    Returns:
      ``first, last, exists``, each ``(bins,)``: ranges differ from one to the next, so that there are at most ``bins``.
    """
    bins = counts.shape[-1]
    mass = counts.cumsum(0)
    steps = torch.arange(STEPS + 1, device=counts.device)
    share = steps.double() / STEPS
    # shares as float32 has them, as in PyTorch's observer: one of a whole number of values is that number, not beside it
    below, above = ((part * mass[-1]).float().to(mass.dtype) for part in (share, 1 - share))
    # the bin where each side is after 0, 1, ... steps of its own
    left = torch.searchsorted(mass, below).clamp(max=bins - 1)
    right = (torch.searchsorted(mass, above, right=True) - 1).clamp(min=0)
    gain_left = left.diff().abs().cummin(0).values
    gain_right = right.diff().abs().cummin(0).values
    # when step a of the left is taken: after a steps of the left, and the steps of the right whose gain is no smaller
    when = steps[:-1] + torch.searchsorted(-gain_right, -gain_left, right=True)
    marks = torch.zeros(STEPS + 2, dtype=torch.int64, device=counts.device)
    steps_left = marks.scatter_add(0, (when + 1).clamp(max=STEPS + 1), torch.ones_like(when)).cumsum(0)[:-1]
    first, last = left[steps_left], right[steps - steps_left]
    # keep one of each run of equal ranges
    changed = (first.diff() != 0) | (last.diff() != 0)
    slot = torch.nn.functional.pad(changed.cumsum(0), (1, 0)).clamp(max=bins - 1)
    first, last = (torch.zeros_like(slot[:bins]).scatter(0, slot, side) for side in (first, last))
    return first, torch.maximum(first, last), steps[:bins] <= slot[-1]


def squared_error(counts: Tensor, first: Tensor, last: Tensor, levels: int) -> Tensor:
    """The squared error of ``levels`` equal cells over the bins ``first`` to ``last``, for each pair, up to a common factor.

    The counts of a bin are spread evenly over it; every point is rounded to the middle of its cell, or of the outermost
    cell. A bin ``[u, v]`` has the error ``integral (t - middle) ** 2``, the difference of an antiderivative at ``v`` and
    ``u``: ``D ** 3 / 12`` for each whole cell of width ``D``, and ``c ** 3 / 3`` at the distance ``c`` from a middle.
    """
    edges = torch.arange(counts.shape[-1] + 1, device=counts.device, dtype=torch.float32)
    point = edges - first.unsqueeze(-1)
    cell = ((last - first + 1).float() / levels).unsqueeze(-1)
    index = (point / cell).floor().clamp(0, levels - 1)
    distance = point - (index + 0.5) * cell
    integral = index * (cell * cell * cell / 12) + distance * distance * distance / 3
    return (integral.diff(dim=-1) * counts).sum(-1)
