"""Sums over the tensors that one quantizer sees: range, clipping, noise, and a histogram."""

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
"""A scheme per tensor: one histogram for all values, whatever the scheme of the quantizer."""

COUNTER = OBSERVERS.build(observers.histogram(bins=BINS))
"""Counts the values of a tensor in equal bins."""


class Clipping(NamedTuple):
    """Where a grid ends.

    Attributes:
      low, high: values of its outermost codes, shaped like the scale.
      step: distance of two codes, likewise.
    """

    low: Tensor
    high: Tensor
    step: Tensor

    def outside(self, x: Tensor, scheme: QScheme) -> int:
        """How many values lie more than half a step beyond an outermost code: those nearer are rounded, not clipped."""
        low, high, step = (expand(part, x, scheme.granularity) for part in self)
        below, above = x < low - step / 2, x > high + step / 2
        return int((below | above).sum())


def clipping(config: QuantizerConfig, qparams: QParams) -> Clipping | None:
    """Where a grid ends; ``None`` for formats that are no integer grid, and for ranges taken from each tensor."""
    grid = stored_grid(config, qparams)
    if isinstance(grid, Refusal) or not grid.is_integer or grid.dynamic:
        return None
    low, high = grid.ends()
    return Clipping(low, high, grid.parts["scale"])


def stored_grid(config: QuantizerConfig, qparams: QParams) -> Grid | Refusal:
    """The grid on which a quantizer's values are stored; or why there is none."""
    return grid_of(pieces.build(config.fake_quantize), qparams, config.scheme)


class Sums(NamedTuple):
    """Sums over the tensors ``x`` that one quantizer saw, and over what they became, ``y``.

    Attributes:
      values: how many numbers.
      outside: how many of them lie beyond the grid.
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
        """The cosine of the angle between ``x`` and ``y``; 1 where both are 0, and 0 where one of them is."""
        if self.signal == 0 or self.result == 0:
            return float(self.signal == self.result)
        return self.product / math.sqrt(self.signal) / math.sqrt(self.result)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite where one of them is 0, NaN where one is NaN."""
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 10 * math.log10(signal / noise)


def nothing(x: Tensor) -> Sums:
    """The sums before any tensor, for tensors like ``x``."""
    return Sums(0, 0, 0.0, 0.0, 0.0, 0.0, COUNTER.init(x, WHOLE))


def added(before: Sums, x: Tensor, y: Tensor, clip: Clipping | None, scheme: QScheme) -> Sums:
    """The sums with one more tensor ``x`` that became ``y``."""
    wide_x, wide_y = x.double(), y.double()  # float32 would lose small noise in a long sum
    return Sums(
        values=before.values + x.numel(),
        outside=before.outside + (0 if clip is None else clip.outside(x, scheme)),
        signal=before.signal + float(wide_x.square().sum()),
        noise=before.noise + float((wide_y - wide_x).square().sum()),
        product=before.product + float((wide_x * wide_y).sum()),
        result=before.result + float(wide_y.square().sum()),
        histogram=COUNTER.update(before.histogram, x, WHOLE),
    )
