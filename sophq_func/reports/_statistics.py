"""What is summed up at one quantizer, tensor by tensor: range, clipping, noise, and a histogram."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from sophq_func import observers
from sophq_func.codes import Grid, Refusal, grid_of
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import OBSERVERS, QParams, State
from sophq_func.numerics.layout import expand
from sophq_func.numerics.scheme import QScheme, QuantizerConfig

BINS = 64
"""Bars of a histogram."""

WHOLE = QScheme()
"""One range for all values."""

COUNTER = OBSERVERS.build(observers.histogram(bins=BINS))


class Clipping(NamedTuple):
    """Where the grid ends: the values of its outermost codes, scale-shaped; ``step`` between two codes."""

    low: Tensor
    high: Tensor
    step: Tensor

    def outside(self, x: Tensor, scheme: QScheme) -> int:
        """How many values are moved to an outermost code from more than half a step beyond it."""
        low, high, step = (expand(part, x, scheme.granularity) for part in self)
        return int(((x < low - step / 2) | (x > high + step / 2)).sum())


def clipping(config: QuantizerConfig, qparams: QParams) -> Clipping | None:
    """Where a grid ends; ``None`` for formats that are no integer grid, and for ranges taken from each tensor."""
    grid = stored_grid(config, qparams)
    if isinstance(grid, Refusal) or not grid.is_integer or grid.dynamic:
        return None
    low, high = grid.ends()
    return Clipping(low, high, grid.parts["scale"])


def stored_grid(config: QuantizerConfig, qparams: QParams) -> Grid | Refusal:
    """The grid that a quantizer's values are stored on; or why there is none."""
    return grid_of(pieces.build(config.fake_quantize), qparams, config.scheme)


class Sums(NamedTuple):
    """What was seen at one quantizer.

    Attributes:
      values: how many.
      outside: those beyond the grid.
      signal, noise: sums of ``x ** 2`` and ``(y - x) ** 2``.
      product, result: sums of ``x y`` and ``y ** 2``.
      histogram: smallest and largest value, and how many lie in each of :data:`BINS` equal bins between.
    """

    values: int
    outside: int
    signal: float
    noise: float
    product: float
    result: float
    histogram: State

    def sqnr_db(self) -> float:
        """``10 log10(signal / noise)``; infinite without noise."""
        return decibel(self.signal, self.noise)

    def cosine(self) -> float:
        """Of the angle between what comes in and what goes out; 1 where both are nothing."""
        if self.signal == 0 or self.result == 0:
            return float(self.signal == self.result)
        return self.product / math.sqrt(self.signal) / math.sqrt(self.result)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, infinite where one of them is 0, NaN where one is no number."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def seen(x: Tensor, y: Tensor, clip: Clipping | None, scheme: QScheme, before: Sums | None) -> Sums:
    """What was seen so far, and one more tensor ``x`` that became ``y``."""
    state = COUNTER.init(x, WHOLE) if before is None else before.histogram
    wide, result = x.double(), y.double()
    new = Sums(
        x.numel(),
        clip.outside(x, scheme) if clip is not None else 0,
        float(wide.square().sum()),
        float((result - wide).square().sum()),
        float((wide * result).sum()),
        float(result.square().sum()),
        COUNTER.update(state, x, WHOLE),
    )
    if before is None:
        return new
    return Sums(
        before.values + new.values,
        before.outside + new.outside,
        before.signal + new.signal,
        before.noise + new.noise,
        before.product + new.product,
        before.result + new.result,
        new.histogram,
    )
