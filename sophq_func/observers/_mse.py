"""The range of least quantization error, searched among shrunken copies of the full one (semantics.md 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.affine import min_max, range_to_qparams, round_to_grid, rows
from sophq_func.base import OBSERVERS, Observer
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
from sophq_func.scheme import PerTensor, QScheme

CANDIDATES_PER_TENSOR = 95
CANDIDATES_PER_CHANNEL = 80
WORST = 1e10
"""A candidate must do better than this; otherwise the full range stays."""

AT_ONCE = 2**22
"""How many elements the candidates that are tried at once may have together."""


def search_range(x: Tensor, scheme: QScheme, p: float) -> tuple[Tensor, Tensor]:
    """The range ``(lo, hi) * (1 - 0.01 i)`` whose grid reproduces ``x`` with the least ``mean(|x_q - x| ** p)``.

    The first of equally good candidates wins, the full range being the first. ``pot_scale`` is left out of the search.

    Args:
      x: a tensor that is not empty.
      scheme: grid and granularity; each scale searches alone.
      p: exponent of the error.

    Returns:
      ``lo, hi``, float32, scale-shaped.
    """
    flat = rows(x.detach(), scheme.granularity).float()
    lo, hi = min_max(x, scheme.granularity)
    count = CANDIDATES_PER_TENSOR if isinstance(scheme.granularity, PerTensor) else CANDIDATES_PER_CHANNEL
    shrink = torch.tensor([1.0 - 0.01 * i for i in range(count)], dtype=torch.float32, device=x.device)
    shrink = shrink.reshape([-1] + [1] * lo.ndim)
    parts = torch.split(shrink, max(1, AT_ONCE // flat.numel()))
    scores = torch.cat([_scores(flat, lo * part, hi * part, scheme, p) for part in parts])
    least, index = scores.min(dim=0)
    best = torch.where(least < WORST, shrink.flatten()[index], 1.0)
    return lo * best, hi * best


def _scores(flat: Tensor, lo: Tensor, hi: Tensor, scheme: QScheme, p: float) -> Tensor:
    """Mean error of each candidate range, ``(candidates, *scale shape)``."""
    qparams = range_to_qparams(lo, hi, scheme, pot_scale=False)
    rounded = round_to_grid(flat, qparams.scale.unsqueeze(-1), qparams.zero_point.unsqueeze(-1), scheme)
    return (rounded - flat).abs().pow(p).mean(-1)


@OBSERVERS.register("mse", "MSEObserver")
def mse(p: float = 2.0) -> Observer:
    """Range of least error ``mean(|x_q - x| ** p)`` for each tensor, and the union of these ranges.

    95 candidates per tensor, 80 per channel or group. Mergeable. For low bit widths, where clipping outliers pays.

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
