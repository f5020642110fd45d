"""A moving average of each tensor's range, without the few largest magnitudes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sophq_func.core.arguments import MOST_REPEATS, is_count
from sophq_func.numerics.contracts import OBSERVERS, Observer
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers._minmax import ORDER_MATTERS, EMAMinMaxState, average, init_average, range_qparams
from sophq_func.observers._options import check, check_decay, is_number, unmergeable

NARROWEST_BLOCK = 4
"""Fewest elements of a block for which the search by blocks pays; else the row is sorted.

Blocks of ``width`` elements leave ``2 / width`` of the row to select from: one peak for each block, and the elements of the
blocks that are kept. At 4 that is half of the row. It also sends rows of fewer than 16 elements to the sort, which is
faster for them: measured on a CPU, a row of 9 takes half as long by a sort, a row of 16 as long, a row of 64 five times
as long.
"""

LARGEST_PRODUCT = 1e30
"""Up to this magnitude, ``size * bins`` is computed before the division by the range, as ``torch.histc`` does.

That order gives the bin that ``torch.histc``, and so sophgo-mq, gives. Beyond it the product could overflow float32, whose
largest number is 3.4e38, so the division comes first; this leaves room for 3e8 bins.
"""


@OBSERVERS.register("ema_quantile", "EMAQuantileObserver", ema_ratio="decay")
def ema_quantile(decay: float = 0.9, threshold: float = 0.99999, bins: int = 2048) -> Observer:
    """Exponential moving average of each tensor's extremes, cut at a quantile of ``|x|``; see :func:`clipped_range`.

    Not mergeable: the result depends on the order. For activations with rare outliers.

    Args:
      decay: weight of the past, in [0, 1); sophgo-mq's ``ema_ratio``.
      threshold: share of the magnitudes ``|x|`` that is kept, in (0, 1].
      bins: number of equal bins of ``[0, max |x|]``; the cut is the middle of one of them.

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
    check("ema_quantile", "number of bins", bins, f"an int from 1 to {MOST_REPEATS}", ok=is_count(bins))

    def update(state: EMAMinMaxState, x: Tensor, scheme: QScheme) -> EMAMinMaxState:
        if x.numel() == 0:
            return state
        lo, hi = clipped_range(x, scheme, threshold, bins)
        return average(state, lo, hi, decay)

    return Observer(init_average, update, unmergeable("ema_quantile", ORDER_MATTERS), range_qparams)


def clipped_range(x: Tensor, scheme: QScheme, threshold: float, bins: int) -> tuple[Tensor, Tensor]:
    """The extremes of ``x``, clipped to a magnitude that at least the share ``threshold`` of all ``|x|`` does not exceed.

    sophgo-mq counts ``|x|`` in ``bins`` equal bins of ``[0, R]``, ``R = max |x|``, and clips at the middle of the first bin
    ``i`` with ``sum_{j <= i} count_j >= threshold * n``. That is the bin of the ``ceil(threshold * n)``-th smallest
    magnitude, whatever the other counts are; so one order statistic gives the same bin without a histogram.

    Args:
      x: a tensor that is not empty.
      scheme: its granularity says which elements share a range.
      threshold: share of the magnitudes that is kept, in (0, 1].
      bins: number of equal bins.

    Returns:
      ``lo, hi``, float32, scale-shaped.
    """
    lo, hi = min_max(x, scheme.granularity)
    flat = rows(x.detach(), scheme.granularity)
    count = flat.shape[-1]
    kept = max(1, math.ceil(threshold * count))
    quantile = nth_largest_magnitude(flat, count - kept + 1).float()
    largest = torch.maximum(-lo, hi)
    divisor = torch.where(largest > 0, largest, 1)
    place = torch.where(divisor < LARGEST_PRODUCT, quantile * bins / divisor, quantile / divisor * bins)
    index = place.floor().clamp(max=bins - 1)  # the largest magnitude belongs to the last bin
    middle = (index + 0.5) / bins * largest
    return torch.maximum(lo, -middle), torch.minimum(hi, middle)


def nth_largest_magnitude(flat: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest ``|x|`` along the last axis.

    The row is cut into blocks. The ``rank`` largest magnitudes lie in the ``rank`` blocks with the largest peaks, for a
    block left out has a peak no larger than each of theirs. So only few elements are sorted.

    Example:
      >>> nth_largest_magnitude(torch.tensor([1.0, -3.0, 2.0]), 2)
      tensor(2.)
    """
    count = flat.shape[-1]
    # count / width peaks and rank * width elements are selected from: the sum is least at this width
    width = math.isqrt(count // rank)
    if width < NARROWEST_BLOCK:
        return flat.abs().sort(dim=-1).values[..., -rank]
    in_blocks = count // width * width
    blocks = flat[..., :in_blocks].reshape(*flat.shape[:-1], -1, width)
    remainder = flat[..., in_blocks:]
    peaks = torch.maximum(-blocks.amin(-1), blocks.amax(-1))
    chosen = peaks.topk(rank).indices.unsqueeze(-1)
    elements = blocks.gather(-2, chosen.expand(*chosen.shape[:-1], width)).flatten(-2)
    return torch.cat([elements, remainder], dim=-1).abs().topk(rank).values[..., -1]
