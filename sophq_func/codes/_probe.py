"""Whether a quantizer of values is the plain integer grid that a runtime has, found out by trying it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes.grid import Grid
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import min_max, positive, range_to_qparams
from sophq_func.numerics.scheme import PerTensor, QScheme

COUNT = 4096
"""How many values are tried where one scale is for all."""

BESIDE_TIES = 0.8
"""Values are tried up to so far, together below and above a code: rounding orders differ at ties, half a step away."""


def reached_bounds(piece: RunQuantizer, grid: Grid, own: QParams) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest code that come out; ``None`` where codes are not ``clamp(round(x / s) + z)``.

    Both are tried on values far beyond the grid, and rounding on values off the ties. A clipping bound between two codes
    may round away the outermost one, which is why the bounds are not read off the scheme.

    Args:
      piece: the quantizer.
      grid: what it would be, with the bounds of the scheme.
      own: its qparams, with the scale in force.
    """
    assert grid.low is not None and grid.high is not None
    trial, granularity = _Trial(piece, own, grid.low, grid.high), grid.granularity
    shape = (COUNT,) if isinstance(granularity, PerTensor) else piece.site.shape
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(own.scale.device)
    if grid.dynamic:
        return (grid.low, grid.high) if trial.fits(8 * random - 3, grid.low, grid.high) else None
    parts = positive(own.scale), zero_code(own, grid.low, grid.high, piece.scheme), grid.low, grid.high
    scale, middle, low, high = (expand(part, random, granularity) for part in parts)
    beyond = (high - low + 2) * 2 * scale + 0 * random
    lowest, highest = trial.outermost(-beyond, grid.low), trial.outermost(beyond, grid.high)
    whole = low - middle - 2 + torch.floor(random * (high - low + 5))
    off_ties = (random * 7919 % 1 - 0.5) * BESIDE_TIES  # 7919, a prime: another number for each value
    return (lowest, highest) if trial.fits((whole + off_ties) * scale, lowest, highest) else None


def zero_code(own: QParams, low: Tensor, high: Tensor, scheme: QScheme) -> Tensor:
    """The zero point as a code, int32: 0 where the scheme is symmetric, else rounded and inside the bounds."""
    if scheme.symmetric:
        return torch.zeros_like(own.zero_point, dtype=torch.int32)
    zero = own.zero_point.double().round()
    return torch.minimum(torch.maximum(zero, low.double()), high.double()).to(torch.int32)


class _Trial(NamedTuple):
    """A quantizer that is tried, its qparams, and the bounds of its scheme."""

    piece: RunQuantizer
    own: QParams
    low: Tensor
    high: Tensor

    def levels(self, y: Tensor, own: QParams) -> Tensor | None:
        """``y / s`` as integers, int32, where each is one to within rounding and inside the bounds; else ``None``."""
        if not bool(y.isfinite().all()):
            return None
        granularity = self.piece.scheme.granularity
        ratio = y.double() / expand(positive(own.scale), y, granularity).double()
        level = ratio.round()
        near = (ratio - level).abs() <= 1e-3 + 2.0**-21 * level.abs()  # float32 rounds to 2 ** -24, and y was rounded twice
        zero = zero_code(own, self.low, self.high, self.piece.scheme)
        low, high = (expand(limit - zero, y, granularity) for limit in (self.low, self.high))
        return level.to(torch.int32) if bool((near & (level >= low) & (level <= high)).all()) else None

    def outermost(self, x: Tensor, bound: Tensor) -> Tensor:
        """The code that becomes of values beyond a bound, where it is the same everywhere; else the bound."""
        level = self.levels(self.piece.fake_quantize.apply(x, self.own, self.piece.scheme), self.own)
        if level is None:
            return bound
        zero = zero_code(self.own, self.low, self.high, self.piece.scheme)
        codes = level + expand(zero, x, self.piece.scheme.granularity)
        lowest = codes.min()
        return lowest.to(torch.int32) if bool((codes == lowest).all()) else bound

    def fits(self, x: Tensor, low: Tensor, high: Tensor) -> bool:
        """Whether the fake quantizer does to ``x`` what a runtime does with these outermost codes."""
        scheme, own = self.piece.scheme, self.own
        made = self.piece.fake_quantize.apply(x, own, scheme)
        if scheme.dynamic:
            limits = int(self.low.min()), int(self.high.max())
            own = range_to_qparams(*min_max(x, scheme.granularity), scheme, limits=limits)
        level = self.levels(made, own)
        if level is None:
            return False
        parts = positive(own.scale), zero_code(own, self.low, self.high, scheme), low, high
        scale, middle, lowest, highest = (expand(part, x, scheme.granularity) for part in parts)
        ratio = x / scale
        code = torch.round(ratio).to(torch.int32) + middle
        apart = (level - (torch.minimum(torch.maximum(code, lowest), highest) - middle)).abs()
        on_a_tie = (ratio - ratio.floor() - 0.5).abs() < 1e-3  # where the orders of rounding differ
        return bool(((apart == 0) | (on_a_tie & (apart == 1))).all())
