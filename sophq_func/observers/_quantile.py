"""A moving average of the range that all but a small share of the sizes fit in (semantics.md 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sophq_func.numerics.contracts import OBSERVERS, Observer
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._minmax import MOVES, EMAMinMaxState, average, init_average, range_qparams
from sophq_func.observers._options import check, check_decay, is_number, unmergeable

NARROWEST = 4
"""Blocks of fewer elements save nothing."""

LARGE = 1e30
"""Up to here the place of a size among the bins is computed as ``torch.histc`` does, product first."""


def clipped_range(x: Tensor, scheme: QScheme, threshold: float, bins: int) -> tuple[Tensor, Tensor]:
    """The extremes of ``x``, cut where ``threshold`` of all sizes ``|x|`` lie below.

    sophgo-mq cuts ``[0, R]``, ``R = max |x|``, into ``bins`` equal bins and takes the middle of the first bin with
    ``sum_{j <= i} count_j >= threshold * n``. The count reaches that in the bin of the ``ceil(threshold * n)``-th
    smallest size, whatever the other counts are; so one order statistic gives the same bin without a histogram.

    Args:
      x: a tensor that is not empty.
      scheme: whose granularity says what is cut on its own.
      threshold: share of the sizes, in (0, 1].
      bins: how fine the cut is.

    Returns:
      ``lo, hi``, float32, scale-shaped.
    """
    lo, hi = min_max(x, scheme.granularity)
    flat = rows(x.detach(), scheme.granularity)
    rank = flat.shape[-1] - max(1, math.ceil(threshold * flat.shape[-1])) + 1
    reach = torch.maximum(-lo, hi)
    found, whole = nth_largest_size(flat, rank).float(), torch.where(reach > 0, reach, 1)
    place = torch.where(whole < LARGE, found * bins / whole, found / whole * bins)
    middle = (place.floor().clamp(max=bins - 1) + 0.5) / bins * reach
    return torch.maximum(lo, -middle), torch.minimum(hi, middle)


def nth_largest_size(flat: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest ``|x|`` along the last axis.

    Cut into blocks, the ``rank`` largest sizes lie in the ``rank`` blocks with the largest peaks: a block left out has a
    peak no larger than each of theirs. So only few elements are sorted.

    Example:
      >>> nth_largest_size(torch.tensor([1.0, -3.0, 2.0]), 2)
      tensor(2.)
    """
    count = flat.shape[-1]
    width = math.isqrt(count // rank)
    if width < NARROWEST:
        return flat.abs().sort(dim=-1).values[..., -rank]
    whole = count // width * width
    blocks = flat[..., :whole].reshape(*flat.shape[:-1], -1, width)
    peaks = torch.maximum(-blocks.amin(-1), blocks.amax(-1))
    found = peaks.topk(rank).indices.unsqueeze(-1)
    inside = blocks.gather(-2, found.expand(*found.shape[:-1], width)).flatten(-2)
    return torch.cat([inside, flat[..., whole:]], dim=-1).abs().topk(rank).values[..., -1]


@OBSERVERS.register("ema_quantile", "EMAQuantileObserver", ema_ratio="decay")
def ema_quantile(decay: float = 0.9, threshold: float = 0.99999, bins: int = 2048) -> Observer:
    """Exponential moving average of each tensor's extremes, cut at a quantile of ``|x|``; see :func:`clipped_range`.

    Not mergeable: the result depends on the order. For activations with rare outliers.

    Args:
      decay: share of the past, in [0, 1); sophgo-mq's ``ema_ratio``.
      threshold: share of the sizes that is kept, in (0, 1].
      bins: the cut is the middle of one of so many bins.

    Differs from sophgo-mq: any granularity, each scale with a quantile of its own; a tensor of one value is no error.

    Example:
      >>> import sophq_func as sq
      >>> obs, scheme = sq.observer("ema_quantile", threshold=0.9), sq.QScheme()
      >>> x = torch.cat([torch.linspace(-1.0, 1.0, 98), torch.tensor([50.0, 100.0])])
      >>> obs.update(obs.init(x, scheme), x, scheme).hi
      tensor(0.9033)
    """
    check_decay("ema_quantile", decay)
    check("ema_quantile", "threshold", threshold, "a number in (0, 1]", ok=is_number(threshold) and 0 < threshold <= 1)
    check("ema_quantile", "number of bins", bins, "an int >= 1", ok=isinstance(bins, int) and bins >= 1)

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        return average(state, *clipped_range(x, scheme, threshold, bins), decay) if x.numel() else state

    return Observer(init_average, update, unmergeable("ema_quantile", MOVES), range_qparams)
