"""The range of least squared error over a histogram of all tensors, found by walking in from both ends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer, QParams
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, no_range, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._options import check, unmergeable

FINER = 16
"""Into how many parts a bin is split before it moves to another histogram."""

STEPS = 100_000
"""Each step of the walk leaves out so small a part of the mass."""

AT_ONCE = 2**16
"""How many bins of all ranges of the walk are looked at together."""


class HistogramState(NamedTuple):
    """Extremes, float32, scale-shaped, and what lies in each of the equal bins between, float32, ``(*shape, bins)``."""

    lo: Tensor
    hi: Tensor
    counts: Tensor


def places(values: Tensor, lo: Tensor, hi: Tensor, bins: int) -> Tensor:
    """The number of the bin that each value of the last axis lies in, of ``bins`` equal ones; halves do not overflow."""
    start, width = (lo / 2).unsqueeze(-1), (hi / 2 - lo / 2).unsqueeze(-1)
    place = (values / 2 - start) / torch.where(width > 0, width, 1) * bins
    return place.nan_to_num(0).clamp(0, bins - 1).to(torch.int64)


def histogram_of(flat: Tensor, lo: Tensor, hi: Tensor, bins: int) -> Tensor:
    """How many values of the last axis lie in each of ``bins`` equal bins of ``[lo, hi]``, float32."""
    empty = torch.zeros((*flat.shape[:-1], bins), dtype=torch.float32, device=flat.device)
    return empty.scatter_add(-1, places(flat, lo, hi, bins), torch.ones_like(flat))


def stretch(state: HistogramState, lo: Tensor, hi: Tensor) -> Tensor:
    """The counts of ``state`` in the bins of a wider range, each bin cut into :data:`FINER` parts at its places."""
    bins = state.counts.shape[-1]
    parts = (state.counts / FINER).repeat_interleave(FINER, dim=-1)
    share = (torch.arange(bins * FINER, device=parts.device) + 0.5) / (bins * FINER)
    middle = state.lo.unsqueeze(-1) * (1 - share) + state.hi.unsqueeze(-1) * share
    moved = torch.zeros_like(state.counts).scatter_add(-1, places(middle, lo, hi, bins), parts)
    return torch.where(((lo == state.lo) & (hi == state.hi)).unsqueeze(-1), state.counts, moved)


def walk(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last bin of every range on the way in, and whether the way is that long; ``(bins,)`` each.

    A step leaves out one more part of the mass: on the left if that takes away more bins than on the right would, else
    on the right. With the gains ``g`` (bins that a step takes away) of either side, step ``a`` of the left comes before
    step ``b`` of the right just when ``min g_left[:a + 1] > min g_right[:b + 1]``, for the step with the smaller gain
    waits until the other side has less to offer. Both minima fall, so the walk merges two sorted lists, without a loop.
    """
    bins, mass, steps = counts.shape[-1], counts.cumsum(0), torch.arange(STEPS + 1, device=counts.device)
    share = steps.double() / STEPS
    left = torch.searchsorted(mass, (share * mass[-1]).float()).clamp(max=bins - 1)
    right = (torch.searchsorted(mass, ((1 - share) * mass[-1]).float(), right=True) - 1).clamp(min=0)
    gain_left, gain_right = (side.diff().abs().cummin(0).values for side in (left, right))
    when = steps[:-1] + torch.searchsorted(-gain_right, -gain_left, right=True)
    marks = torch.zeros(STEPS + 2, dtype=torch.int64, device=counts.device)
    taken = marks.scatter_add(0, (when + 1).clamp(max=STEPS + 1), torch.ones_like(when)).cumsum(0)[:-1]
    first, last = left[taken], right[steps - taken]
    moved = (first.diff() != 0) | (last.diff() != 0)
    slot = torch.nn.functional.pad(moved.cumsum(0), (1, 0)).clamp(max=bins - 1)
    first, last = (torch.zeros_like(slot[:bins]).scatter(0, slot, side) for side in (first, last))
    return first, torch.maximum(first, last), steps[:bins] <= slot[-1]


def squared_error(counts: Tensor, first: Tensor, last: Tensor, levels: int) -> Tensor:
    """What ``levels`` equal cells over the bins ``first`` to ``last`` lose, for each such pair, up to a common factor.

    The mass of a bin is spread evenly; every point is drawn to the middle of its cell, or of the outermost cell. With
    cells of width ``D``, a bin ``[u, v]`` loses ``integral (t - middle) ** 2``: whole cells give ``D ** 3 / 12``, and
    ``c ** 3 / 3`` is what lies between a middle and a point at the distance ``c``.
    """
    edges = torch.arange(counts.shape[-1] + 1, device=counts.device, dtype=torch.float32)
    point = edges - first.unsqueeze(-1)
    cell = ((last - first + 1).float() / levels).unsqueeze(-1)
    index = (point / cell).floor().clamp(0, levels - 1)
    distance = point - (index + 0.5) * cell
    lost = index * (cell * cell * cell / 12) + distance * distance * distance / 3
    return (lost.diff(dim=-1) * counts).sum(-1)


def least_error(lo: Tensor, hi: Tensor, counts: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The range where the walk in from ``[lo, hi]`` first meets a larger error."""
    first, last, there = walk(counts)
    pieces = max(1, AT_ONCE // counts.shape[-1])
    parts = zip(torch.split(first, pieces), torch.split(last, pieces), strict=True)
    errors = torch.cat([squared_error(counts, begin, end, levels) for begin, end in parts])
    better = there[1:] & ((errors[1:] <= errors[:-1]) | (torch.arange(len(errors) - 1, device=errors.device) == 0))
    stop = better.long().cumprod(0).sum().unsqueeze(0)
    start, width = lo / 2, (hi / 2 - lo / 2) / counts.shape[-1]
    return 2 * (start + width * first[stop].squeeze(0)), 2 * (start + width * (last[stop].squeeze(0) + 1))


@OBSERVERS.register("histogram", "HistogramObserver")
def histogram(bins: int = 2048, levels: int = 256) -> Observer:
    """A range of little squared error over the histogram of all tensors, as PyTorch's ``HistogramObserver`` searches it.

    From the full range it walks in, leaving out 1e-5 of the mass at a time on the side where that takes away more bins,
    until the error of ``levels`` equal cells grows. Not mergeable: a histogram of another range is stretched, by
    splitting its bins, and the result depends on the order.

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
    check("histogram", "number of bins", bins, "an int >= 2", ok=isinstance(bins, int) and bins >= 2)
    check("histogram", "number of levels", levels, "an int >= 2", ok=isinstance(levels, int) and levels >= 2)

    def init(x: Tensor, scheme: QScheme) -> HistogramState:
        lo, hi = no_range(x, scheme.granularity)
        return HistogramState(lo, hi, torch.zeros((*lo.shape, bins), dtype=torch.float32, device=lo.device))

    def update(state: HistogramState, x: Tensor, scheme: QScheme) -> HistogramState:
        if x.numel() == 0:
            return state
        least, most = min_max(x, scheme.granularity)
        lo, hi = torch.minimum(state.lo, least), torch.maximum(state.hi, most)
        fresh = histogram_of(rows(x.detach(), scheme.granularity).float(), lo, hi, bins)
        return HistogramState(lo, hi, fresh + stretch(state, lo, hi))

    def qparams(state: HistogramState, scheme: QScheme) -> QParams:
        each = zip(state.lo.reshape(-1), state.hi.reshape(-1), state.counts.reshape(-1, bins), strict=True)
        found = torch.stack([torch.stack(least_error(lo, hi, counts, levels)) for lo, hi, counts in each])
        lo, hi = found.T.reshape(2, *state.lo.shape)
        finite = torch.isfinite(state.lo) & torch.isfinite(state.hi)
        return range_to_qparams(torch.where(finite, lo, torch.nan), torch.where(finite, hi, torch.nan), scheme)

    return Observer(init, update, unmergeable("histogram", "bins are split where the range grows"), qparams)
