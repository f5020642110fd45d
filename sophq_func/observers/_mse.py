"""The range of least quantization error, searched among shrunken copies of the full range."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.core.constants import table
from sophq_func.core.modes import is_compiling
from sophq_func.numerics.contracts import OBSERVERS, Observer
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import EPS, min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._minmax import (
    ORDER_MATTERS,
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
"""Candidates are the full range times 1, 0.99, ..., 0.06: sophgo-mq tries as many, and another count gives other ranges."""

CANDIDATES_PER_CHANNEL = 80
"""The same for every other granularity, down to 0.21 of the full range; sophgo-mq's number, too."""

SHRINK_STEP = 0.01
"""Each candidate is narrower than the one before by this share of the full range, as in sophgo-mq."""

WORST = 1e10
"""A candidate must have a smaller error than this, sophgo-mq's initial best score; otherwise the full range stays.

That also decides where every error is infinite or NaN.
"""

FINALISTS = 8
"""How many of the preselected candidates are compared on the tensor itself; :func:`search_range` says why these suffice."""

FINALISTS_OF_ONE_ROW = 4
"""The same where there is one row: its bins are at most 1/32 of a step, so that fewer candidates change places."""

WIDEST_PRESELECTION = 8
"""The most bits for which a histogram puts the candidates in order.

It needs 16 bins for each step of the grid to tell candidates apart. At 8 bits these are 2**11; at 16 bits they would be
2**19, more than most rows have elements.
"""

BINS = 2**11
"""Bins on either side of 0, for each row: 16 for each step of a symmetric grid of 8 bits, and more of fewer bits."""

BINS_PER_STEP_OF_ONE_ROW = 64
"""One row affords finer bins, for it multiplies its counts by the table of errors once; many rows do so once each."""

CPU_ELEMENTS = 2**17
"""How many elements are worked on at a time on a CPU, for each thread, so that they stay in the cache.

The tensor, the temporary one and the sums take about 1 MiB then. Measured on one core with 2 MiB of cache, over rows of
512 and 2304 elements: the same within noise from 2**15 to 2**17, 1.2 to 1.4 times as long at 2**18, twice at 2**21.
"""

ELEMENTS = 2**22
"""The same elsewhere, where each operation costs a launch or a node of a graph, so that pieces are large.

They are not unlimited, to bound memory: a temporary tensor takes 16 MiB in float32.
"""

LARGEST_COUNT = 2**24
"""So many values of a row are counted in one histogram, for a float32 stops counting there; sums of such counts go on."""

TABLE_PIECE = 4
"""A piece of the table of errors may have so many times the elements at a time.

The table is made once, and read for each block of rows. Four times 2**17 holds 95 candidates by 2 * 2**11 + 1 bins in one
piece, so that a block of rows takes one matrix product.
"""


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
        if x.numel() == 0:
            return state
        lo, hi = search_range(x, scheme, p)
        return widen(state, lo, hi)

    return Observer(init_min_max, update, merge_min_max, range_qparams)


@OBSERVERS.register("ema_mse", "EMAMSEObserver", ema_ratio="decay")
def ema_mse(p: float = 2.0, decay: float = 0.9) -> Observer:
    """Exponential moving average of the ranges of least error that ``mse`` finds for each tensor.

    It starts at the range of the first tensor. Not mergeable: the result depends on the order.

    Args:
      p: exponent of the error, > 0.
      decay: weight of the past, in [0, 1); sophgo-mq's ``ema_ratio``.

    Example:
      >>> import sophq_func as sq
      >>> sq.observers.ema_mse(decay=0.5)
      ema_mse(decay=0.5, p=2.0)
    """
    check_positive("ema_mse", "exponent", p)
    check_decay("ema_mse", decay)

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = search_range(x, scheme, p)
        return average(state, lo, hi, decay)

    return Observer(init_average, update, unmergeable("ema_mse", ORDER_MATTERS), range_qparams)


def search_range(x: Tensor, scheme: QScheme, p: float) -> tuple[Tensor, Tensor]:
    """The range ``(lo, hi) * (1 - 0.01 i)`` whose grid reproduces ``x`` with the least ``mean(|x_q - x| ** p)``.

    The first of equally good candidates wins, the full range being the first. ``pot_scale`` is left out of the search.

    On long rows a histogram puts the candidates in order, and only the first :data:`FINALISTS` of that order are compared
    on the tensor itself. That the best of all is among them is an argument about magnitudes, not a theorem. A bin is at
    most 1/16 of the full range's step (of one row, 1/64 for a symmetric grid and 1/32 for an affine one). The bin's center
    misses the squared error of an element by ``step * bin / 6`` in the root mean square: a seventh (a 28th, a 14th) of the
    spread ``step ** 2 / sqrt(180)`` that squared errors have anyway, and both average out alike over more elements. So
    only candidates whose scores differ by less than chance change places, and the best would have to be passed by eight
    (four) others. Values on a lattice average out less: of 16128 rows drawn on lattices, one, of seven bits, took a
    candidate that is worse by 0.25 percent. Candidates at the smallest scale, 2 ** -23, are equal and stay in their order.

    Args:
      x: a tensor that is not empty.
      scheme: grid and granularity; each scale searches alone.
      p: exponent of the error.

    Returns:
      ``lo, hi``, float32, scale-shaped.
    """
    lo, hi = min_max(x, scheme.granularity)
    shape, lo, hi = lo.shape, lo.reshape(-1), hi.reshape(-1)
    flat = rows(x.detach(), scheme.granularity).float().reshape(max(1, lo.numel()), -1)
    per_tensor = isinstance(scheme.granularity, PerTensor)
    count = CANDIDATES_PER_TENSOR if per_tensor else CANDIDATES_PER_CHANNEL
    # in Python's float64, as sophgo-mq computes them
    factors = tuple(1.0 - SHRINK_STEP * i for i in range(count))
    shrink = table(factors, torch.float32, x.device).unsqueeze(-1).expand(-1, len(flat))
    bins = bins_for(flat, scheme)
    if bins:
        shrink = preselect(flat, lo, hi, shrink, scheme, p, bins)
    errors = mean_errors(flat, lo * shrink, hi * shrink, scheme, p)
    least, index = errors.min(dim=0)
    winner = shrink.gather(0, index.unsqueeze(0)).squeeze(0)
    best = torch.where(least < WORST, winner, 1.0)
    return (lo * best).reshape(shape), (hi * best).reshape(shape)


def bins_for(flat: Tensor, scheme: QScheme) -> int:
    """How many bins on either side of 0 preselect, a power of two; 0 where all candidates are compared on the tensor.

    Rows of a symmetric grid share one table of errors, for their candidates are the same shares of their largest
    magnitudes. Rows of an affine grid have zero points of their own, and would need a table each.
    """
    one_row = flat.shape[0] == 1
    if scheme.bits > WIDEST_PRESELECTION or not (scheme.symmetric or one_row):
        return 0
    if one_row:
        # a symmetric grid has 2 ** (bits - 1) steps on either side of 0
        bins = max(BINS, BINS_PER_STEP_OF_ONE_ROW * 2 ** (scheme.bits - 1))
        # The table costs 2 * bins errors for each candidate, the search without it one for each element. Measured on one
        # core the two take the same time from 16 to 32 bins on. The limit stays where it is: moved, it would give another
        # range to the few rows whose best candidate is not a finalist.
        fewest = 4 * bins
    else:
        bins = BINS
        # counting a row and one matrix product with the shared table: measured on one core, as fast from here on
        fewest = bins // 2
    return bins if flat.shape[1] >= fewest else 0


def preselect(flat: Tensor, lo: Tensor, hi: Tensor, shrink: Tensor, scheme: QScheme, p: float, bins: int) -> Tensor:
    """The :data:`FINALISTS` of the candidates ``shrink``, still in their order, that are best on a histogram of each row.

    Args:
      flat: ``(rows, n)``.
      lo, hi: extremes, ``(rows,)``.
      shrink: ``(candidates, rows)``.
      scheme: the grid.
      p: exponent of the error.
      bins: from :func:`bins_for`.

    Returns:
      ``(finalists, rows)``.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    one_row = len(flat) == 1
    unit = torch.maximum(-lo, hi) if scheme.symmetric else hi - lo
    centers = torch.arange(-bins, bins + 1, device=flat.device, dtype=torch.float32) / bins
    if one_row:
        centers = centers * unit
        candidates = grids_of(lo * shrink, hi * shrink, scheme)
    else:
        # in units of each row's largest magnitude, every row has the candidates [-shrink, shrink]
        candidates = grids_of(-shrink[:, :1], shrink[:, :1], scheme)
    table = error_table(centers, candidates, scheme, p, TABLE_PIECE * elements_at_once(flat))
    bins_per_value = bins / torch.where(unit > 0, unit, 1)
    block = max(1, elements_at_once(flat) // bins)
    errors = []
    for part, factor in zip(torch.split(flat, block), torch.split(bins_per_value, block), strict=True):
        counts = histogram(part, factor.unsqueeze(-1), bins)
        errors.append(torch.cat([counts @ piece for piece in table], dim=1))
    ranking = torch.cat(errors).T
    # Candidates at the smallest scale are one grid: all get the score of the first of them, so that rounding in the
    # sums cannot put them in another order. They are the last ones, for the scale falls from candidate to candidate.
    floored = range_to_qparams(lo * shrink, hi * shrink, scheme, pot_scale=False).scale <= EPS
    first_floored = torch.where(floored, 0, 1).cumsum(0).clamp(max=len(shrink) - 1)
    ranking = torch.where(floored, ranking.gather(0, first_floored), ranking)
    finalists = ranking.sort(dim=0, stable=True).indices[: FINALISTS_OF_ONE_ROW if one_row else FINALISTS]
    # back in the order of candidates, in which the first of equals wins
    return shrink.gather(0, finalists.sort(dim=0).values)


class Candidates(NamedTuple):
    """The grids of candidate ranges: scales, their inverses and zero points, float32, ``(candidates, rows, 1)``."""

    scale: Tensor
    inverse: Tensor
    zero_point: Tensor


def grids_of(lo: Tensor, hi: Tensor, scheme: QScheme) -> Candidates:
    """The grids of candidate ranges, ``(candidates, rows)``."""
    scale, zero_point, _ = range_to_qparams(lo, hi, scheme, pot_scale=False)
    return Candidates(scale.unsqueeze(-1), (1 / scale).unsqueeze(-1), zero_point.float().unsqueeze(-1))


def error_table(centers: Tensor, candidates: Candidates, scheme: QScheme, p: float, at_once: int) -> list[Tensor]:
    """``|x_q - x| ** p`` of each bin's center on the grid of each candidate of one row: ``(bins, some candidates)`` each."""
    per_piece = max(1, at_once // centers.numel())
    fields = [torch.split(field.squeeze(1), per_piece) for field in candidates]
    pieces = [Candidates(*piece) for piece in zip(*fields, strict=True)]
    return [deviations(centers, piece, scheme).abs().pow(p).T for piece in pieces]


def histogram(flat: Tensor, factor: Tensor, bins: int) -> Tensor:
    """How many values of each row are nearest to each of ``-bins .. bins`` when multiplied by ``factor``, float32."""
    counts = [count(part, factor, bins) for part in torch.split(flat, LARGEST_COUNT, dim=1)]
    return counts[0] if len(counts) == 1 else torch.stack(counts).sum(0)


def count(flat: Tensor, factor: Tensor, bins: int) -> Tensor:
    """:func:`histogram` of rows of up to :data:`LARGEST_COUNT` values."""
    counts = torch.zeros((len(flat), 2 * bins + 1), device=flat.device)
    one = torch.ones((), device=flat.device)
    for part in torch.split(flat, max(1, elements_at_once(flat) // len(flat)), dim=1):
        # + bins makes places positive, so that the conversion to int64, which cuts, rounds to nearest after + 0.5
        index = (part * factor).add_(bins + 0.5).to(torch.int64).clamp(0, 2 * bins)
        counts = counts.scatter_add(1, index, one.expand(index.shape))
    return counts


def elements_at_once(x: Tensor) -> int:
    """How many elements to work on at a time."""
    in_cache = x.device.type == "cpu" and not is_compiling()
    return CPU_ELEMENTS * torch.get_num_threads() if in_cache else ELEMENTS


def mean_errors(flat: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, p: float) -> Tensor:
    """``mean(|x_q - x| ** p)`` of each row on the grid of each candidate.

    The work is cut into pieces that stay in the cache: of rows, of their elements, and of candidates.

    Args:
      flat: ``(rows, n)``.
      lo, hi: candidate ranges, ``(candidates, rows)``.
      scheme: the grid.
      p: exponent of the error.

    Returns:
      ``(candidates, rows)``.
    """
    candidates, at_once = grids_of(lo, hi, scheme), elements_at_once(flat)
    columns = min(flat.shape[1], at_once)
    rows_per_piece = max(1, at_once // columns)
    candidates_per_piece = max(1, at_once // flat.numel())
    by_rows = []
    for start in range(0, len(flat), rows_per_piece):
        stop = start + rows_per_piece
        fields = [torch.split(field[:, start:stop], candidates_per_piece) for field in candidates]
        pieces = [Candidates(*piece) for piece in zip(*fields, strict=True)]
        sums = []
        for part in torch.split(flat[start:stop], columns, dim=1):
            sums.append(torch.cat([sum_of_powers(deviations(part, piece, scheme), p) for piece in pieces]))
        by_rows.append(torch.stack(sums).sum(0))
    return torch.cat(by_rows, dim=1) / flat.shape[1]


def deviations(x: Tensor, candidates: Candidates, scheme: QScheme) -> Tensor:
    """``x_q - x`` on the grid of each candidate, ``x_q`` by ``round(x * (1 / s))`` as ``fixed`` rounds.

    The operations in place write to a tensor made here; they save a pass over memory each.
    """
    work = (x * candidates.inverse).round_()
    if scheme.symmetric:
        work = work.clamp(scheme.qmin, scheme.qmax)
    else:
        work = work.add_(candidates.zero_point).clamp(scheme.qmin, scheme.qmax).sub_(candidates.zero_point)
    return work.mul_(candidates.scale).sub_(x)


def sum_of_powers(deviation: Tensor, p: float) -> Tensor:
    """``sum |deviation| ** p`` along the last axis."""
    if p == 2:
        # one pass without a temporary tensor of the squares
        norm: Tensor = torch.linalg.vector_norm(deviation, dim=-1)
        return norm.square()
    return deviation.abs().pow(p).sum(-1)
