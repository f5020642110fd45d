"""A moving average of the range that all but a small share of the sizes fit in (semantics.md 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sophq_func.affine import min_max, rows
from sophq_func.base import OBSERVERS, Observer
from sophq_func.observers._minmax import MOVES, EMAMinMaxState, average, init_average, range_qparams
from sophq_func.observers._options import check, check_decay, is_number, unmergeable
from sophq_func.scheme import QScheme


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
    sizes = rows(x.detach(), scheme.granularity).abs()
    count = sizes.shape[-1]
    beyond = count - max(1, math.ceil(threshold * count))
    found = torch.topk(sizes, beyond + 1).values[..., -1] if beyond < count // 2 else sizes.sort().values[..., -1 - beyond]
    reach = torch.maximum(-lo, hi)
    share = found.float() / torch.where(reach > 0, reach, 1)
    middle = ((share * bins).floor().clamp(max=bins - 1) + 0.5) / bins * reach
    return torch.maximum(lo, -middle), torch.minimum(hi, middle)


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
