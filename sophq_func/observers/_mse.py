"""The range of least quantization error, searched among shrunken copies of the full one (semantics.md 3.5)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.modes import is_compiling
from sophq_func.numerics.contracts import OBSERVERS, Observer
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import EPS, min_max, range_to_qparams
from sophq_func.numerics.scheme import PerTensor, QScheme
from sophq_func.observers._minmax import (
    MOVES,
    EMAMinMaxState,
    MinMaxState,
    average,
    init_average,
    init_min_max,
    merge_min_max,
    range_qparams,
    widen,
)
from sophq_func.observers._options import check_decay, check_positive, unmergeable

CANDIDATES_PER_TENSOR = 95
CANDIDATES_PER_CHANNEL = 80
WORST = 1e10
"""A candidate must do better than this; otherwise the full range stays."""

EXACT = 8
"""So many candidates of the preselection are compared on the tensor itself."""

EXACT_ALONE = 4
"""The same where there is one row, whose bins are finer by far."""

WIDEST_PRESELECTION = 8
"""Wider codes leave less error than a histogram of practical size can tell apart."""

IN_CACHE = 2**17
"""How many elements are worked on at a time on a CPU, for each thread."""

AT_ONCE = 2**22
"""The same elsewhere, where each operation costs a launch or a node of a graph."""


def search_range(x: Tensor, scheme: QScheme, p: float) -> tuple[Tensor, Tensor]:
    """The range ``(lo, hi) * (1 - 0.01 i)`` whose grid reproduces ``x`` with the least ``mean(|x_q - x| ** p)``.

    The first of equally good candidates wins, the full range being the first. ``pot_scale`` is left out of the search.

    On long rows a histogram puts the candidates in order, and only the first :data:`EXACT` of that order are compared on
    the tensor itself. That the best of all is among them is an argument of size, not a theorem. A bin is at most 1/16 of
    the full range's step (1/64 for one row), so it gets an element's squared error wrong by ``step * bin / 6`` in the
    root mean square, a seventh (a 28th) of the spread ``step ** 2 / sqrt(180)`` that these errors have anyway; and
    both average out alike with more elements. So the order is disturbed only among candidates whose scores differ by less
    than chance alone makes them differ by, and the best would have to be passed by eight (four) others. Values on a
    lattice average out less: of 16128 rows drawn on lattices, one in seven bits took a candidate that is worse by 0.25
    percent. Candidates whose scale is the smallest there is are equal, and stay in their order.

    Args:
      x: a tensor that is not empty.
      scheme: grid and granularity; each scale searches alone.
      p: exponent of the error.

    Returns:
      ``lo, hi``, float32, scale-shaped.
    """
    lo, hi = min_max(x, scheme.granularity)
    flat = rows(x.detach(), scheme.granularity).float().reshape(max(1, lo.numel()), -1)
    per_tensor = isinstance(scheme.granularity, PerTensor)
    count = CANDIDATES_PER_TENSOR if per_tensor else CANDIDATES_PER_CHANNEL
    shrink = torch.tensor([1.0 - 0.01 * i for i in range(count)], dtype=torch.float32, device=x.device)
    shrink = shrink.unsqueeze(-1).expand(-1, flat.shape[0])
    bins = bins_for(flat, scheme)
    if bins:
        shrink = preselect(flat, lo.reshape(-1), hi.reshape(-1), shrink, scheme, p, bins)
    least, index = scores(flat, lo.reshape(-1) * shrink, hi.reshape(-1) * shrink, scheme, p).min(dim=0)
    best = torch.where(least < WORST, shrink.gather(0, index.unsqueeze(0)).squeeze(0), 1.0).reshape(lo.shape)
    return lo * best, hi * best


def bins_for(flat: Tensor, scheme: QScheme) -> int:
    """How many bins on either side of 0 preselect, a power of two; 0 where they would save nothing.

    Rows of a symmetric grid share a table of errors, for their candidates have the same ratio to the largest size; rows of
    an affine grid have zero points of their own.
    """
    alone = flat.shape[0] == 1
    if scheme.bits > WIDEST_PRESELECTION or not (scheme.symmetric or alone):
        return 0
    bins = max(2**11, 2 ** (scheme.bits + 5)) if alone else 2**11
    return bins if flat.shape[1] >= (4 * bins if alone else bins // 2) else 0


def preselect(flat: Tensor, lo: Tensor, hi: Tensor, shrink: Tensor, scheme: QScheme, p: float, bins: int) -> Tensor:
    """The :data:`EXACT` best of the candidates ``shrink``, in their order, as a histogram of each row sees them."""
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    unit = torch.maximum(-lo, hi) if scheme.symmetric else hi - lo
    centers = torch.arange(-bins, bins + 1, device=flat.device, dtype=torch.float32) / bins
    if flat.shape[0] == 1:
        centers, ends = centers * unit, (lo * shrink, hi * shrink)
    else:
        ends = (-shrink[:, :1], shrink[:, :1])
    deep = max(1, 4 * at_once(flat) // centers.numel())
    grids = zip(*(torch.split(t.squeeze(1), deep) for t in grid_of(*ends, scheme)), strict=True)
    table = [deviations(centers, Grid(*grid), scheme).abs().pow(p).T for grid in grids]
    factor, high = bins / torch.where(unit > 0, unit, 1), max(1, at_once(flat) // bins)
    coarse = []
    for part, to_bins in zip(torch.split(flat, high), torch.split(factor, high), strict=True):
        counts = histogram(part, to_bins.unsqueeze(-1), bins)
        coarse.append(torch.cat([counts @ piece for piece in table], dim=1))
    ranking = torch.cat(coarse).T
    floored = range_to_qparams(lo * shrink, hi * shrink, scheme, pot_scale=False).scale <= EPS
    first_floored = torch.where(floored, 0, 1).cumsum(0).clamp(max=len(shrink) - 1)
    ranking = torch.where(floored, ranking.gather(0, first_floored), ranking)
    kept = ranking.sort(dim=0, stable=True).indices[: EXACT_ALONE if len(flat) == 1 else EXACT].sort(dim=0).values
    return shrink.gather(0, kept)


def histogram(flat: Tensor, factor: Tensor, bins: int) -> Tensor:
    """How many values of each row are nearest to each of ``-bins .. bins`` when multiplied with ``factor``."""
    counts = torch.zeros((len(flat), 2 * bins + 1), device=flat.device)
    one = torch.ones((), device=flat.device)
    for part in torch.split(flat, max(1, at_once(flat) // len(flat)), dim=1):
        place = (part * factor).add_(bins + 0.5).to(torch.int64).clamp(0, 2 * bins)
        counts = counts.scatter_add(1, place, one.expand(place.shape))
    return counts


def at_once(x: Tensor) -> int:
    """How many elements to work on at a time."""
    small = x.device.type == "cpu" and not is_compiling()
    return IN_CACHE * torch.get_num_threads() if small else AT_ONCE


def scores(flat: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, p: float) -> Tensor:
    """Mean error of each candidate range on each row: ``(rows, n)`` and ``(candidates, rows)`` to ``(candidates, rows)``.

    The work is cut into pieces that stay in the cache: of rows, of their elements, and of candidates.
    """
    grids, size = grid_of(lo, hi, scheme), at_once(flat)
    columns = min(flat.shape[1], size)
    high, deep = max(1, size // columns), max(1, size // flat.numel())
    by_rows = []
    for r in range(0, len(flat), high):
        parts = torch.split(flat[r : r + high], columns, dim=1)
        pieces = [Grid(*piece) for piece in zip(*(torch.split(t[:, r : r + high], deep) for t in grids), strict=True)]
        sums = [torch.cat([total(deviations(part, piece, scheme), p) for piece in pieces]) for part in parts]
        by_rows.append(torch.stack(sums).sum(0))
    return torch.cat(by_rows, dim=1) / flat.shape[1]


class Grid(NamedTuple):
    """Scales, their inverses and zero points of candidates, float32, with an axis for the elements."""

    scale: Tensor
    inverse: Tensor
    zero: Tensor


def grid_of(lo: Tensor, hi: Tensor, scheme: QScheme) -> Grid:
    """The grids of candidate ranges."""
    scale, zero_point, _ = range_to_qparams(lo, hi, scheme, pot_scale=False)
    return Grid(scale.unsqueeze(-1), (1 / scale).unsqueeze(-1), zero_point.float().unsqueeze(-1))


def deviations(x: Tensor, grid: Grid, scheme: QScheme) -> Tensor:
    """``x_q - x`` in kernel order. What is written to is an intermediate tensor of this function."""
    work = (x * grid.inverse).round_()
    if scheme.symmetric:
        work = work.clamp(scheme.qmin, scheme.qmax)
    else:
        work = work.add_(grid.zero).clamp(scheme.qmin, scheme.qmax).sub_(grid.zero)
    return work.mul_(grid.scale).sub_(x)


def total(deviation: Tensor, p: float) -> Tensor:
    """``sum |deviation| ** p`` along the last axis."""
    if p == 2:
        norm: Tensor = torch.linalg.vector_norm(deviation, dim=-1)
        return norm.square()
    return deviation.abs().pow(p).sum(-1)


@OBSERVERS.register("mse", "MSEObserver")
def mse(p: float = 2.0) -> Observer:
    """Range of least error ``mean(|x_q - x| ** p)`` for each tensor, and the union of these ranges.

    95 candidates per tensor, 80 per channel or group: ``(lo, hi) (1 - i / 100)``. Mergeable. For low bit widths,
    where clipping outliers pays.

    Args:
      p: exponent of the error, > 0.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("MSEObserver"), sq.QScheme(bits=4)
      >>> x = torch.cat([torch.linspace(-1, 1, 99), torch.tensor([2.0])])
      >>> bool(obs.update(obs.init(x, scheme), x, scheme).hi < 2.0)
      True
    """
    check_positive("mse", "exponent", p)

    def update(state: MinMaxState, x: Tensor, scheme: QScheme) -> MinMaxState:
        return widen(state, *search_range(x, scheme, p)) if x.numel() else state

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("ema_mse", "EMAMSEObserver", ema_ratio="decay")
def ema_mse(p: float = 2.0, decay: float = 0.9) -> Observer:
    """Exponential moving average of the ranges of least error that ``mse`` finds for each tensor.

    The first tensor counts whole. Not mergeable: the result depends on the order.

    Args:
      p: exponent of the error, > 0.
      decay: share of the past, in [0, 1); sophgo-mq's ``ema_ratio``.

    Example:
      >>> import sophq_func as sq
      >>> sq.observers.ema_mse(decay=0.5)
      ema_mse(decay=0.5, p=2.0)
    """
    check_positive("ema_mse", "exponent", p)
    check_decay("ema_mse", decay)

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        return average(state, *search_range(x, scheme, p), decay) if x.numel() else state

    return Observer(init_average, update, unmergeable("ema_mse", MOVES), range_qparams)
