"""Test by trial whether an activation's quantizer computes the plain integer grid that a runtime computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes.grid import Grid
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerTensor
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import min_max, positive, range_to_qparams
from sophq_func.numerics.scheme import QScheme

COUNT = 4096
"""Number of trial values for a quantizer with one scale."""

BESIDE_TIES = 0.8
"""Width of the interval around each code, in steps, from which trial values are drawn: ties, where rounding orders differ,
are at a width of 1."""


def reached_bounds(piece: RunQuantizer, grid: Grid, qparams: QParams) -> tuple[Tensor, Tensor] | None:
    """The smallest and largest code that a quantizer makes; ``None`` if its codes are not ``clamp(round(x / s) + z)``.

    The bounds are tested with values far outside the grid, and rounding with values between ties. The bounds are not taken
    from the scheme because a quantizer that clips between two codes may never make the outermost one.

    Args:
      piece: the quantizer.
      grid: the grid that it may have, with the bounds of the scheme.
      qparams: its qparams, with the scale that it uses.
    """
    assert grid.low is not None and grid.high is not None
    trial, granularity = _Trial(piece, qparams, grid.low, grid.high), grid.granularity
    shape = (COUNT,) if isinstance(granularity, PerTensor) else piece.site.shape
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(qparams.scale.device)
    if grid.dynamic:  # the scale comes from the trial values themselves, here any numbers from -3 to 5
        return (grid.low, grid.high) if trial.fits(8 * random - 3, grid.low, grid.high) else None
    parts = positive(qparams.scale), zero_code(qparams, grid.low, grid.high, piece.scheme), grid.low, grid.high
    scale, zero, low, high = (expand(part, random, granularity) for part in parts)
    beyond = (high - low + 2) * 2 * scale + 0 * random  # the same number everywhere, in the shape of random
    lowest, highest = trial.outermost(-beyond, grid.low), trial.outermost(beyond, grid.high)
    # Levels from two below the grid to two above it.
    level = low - zero - 2 + torch.floor(random * (high - low + 5))
    off_ties = (random * 7919 % 1 - 0.5) * BESIDE_TIES  # 7919, a prime: another number for each value
    return (lowest, highest) if trial.fits((level + off_ties) * scale, lowest, highest) else None


def zero_code(qparams: QParams, low: Tensor, high: Tensor, scheme: QScheme) -> Tensor:
    """The zero point as a code, int32: 0 where the scheme is symmetric, else rounded and inside the bounds."""
    if scheme.symmetric:
        return torch.zeros_like(qparams.zero_point, dtype=torch.int32)
    zero = qparams.zero_point.double().round()
    return torch.minimum(torch.maximum(zero, low.double()), high.double()).to(torch.int32)


class _Trial(NamedTuple):
    """A quantizer under test, its qparams, and the bounds of its scheme."""

    piece: RunQuantizer
    qparams: QParams
    low: Tensor
    high: Tensor

    def levels(self, y: Tensor, qparams: QParams) -> Tensor | None:
        """``y / s`` as int32; ``None`` unless all are integers up to rounding and inside the bounds."""
        if not bool(y.isfinite().all()):
            return None
        granularity = self.piece.scheme.granularity
        ratio = y.double() / expand(positive(qparams.scale), y, granularity).double()
        level = ratio.round()
        near = (ratio - level).abs() <= 1e-3 + 2.0**-21 * level.abs()  # float32 rounds to 2 ** -24, and y was rounded twice
        zero = zero_code(qparams, self.low, self.high, self.piece.scheme)
        low, high = (expand(limit - zero, y, granularity) for limit in (self.low, self.high))
        inside = (level >= low) & (level <= high)
        return level.to(torch.int32) if bool((near & inside).all()) else None

    def outermost(self, x: Tensor, bound: Tensor) -> Tensor:
        """The code of values beyond a bound, if all of them have the same; else the bound."""
        level = self.levels(self.piece.fake_quantize.apply(x, self.qparams, self.piece.scheme), self.qparams)
        if level is None:
            return bound
        zero = zero_code(self.qparams, self.low, self.high, self.piece.scheme)
        codes = level + expand(zero, x, self.piece.scheme.granularity)
        code = codes.min()
        return code.to(torch.int32) if bool((codes == code).all()) else bound

    def fits(self, x: Tensor, low: Tensor, high: Tensor) -> bool:
        """Whether the fake quantizer gives ``x`` the values that a runtime gives it with these outermost codes."""
        scheme, qparams = self.piece.scheme, self.qparams
        made = self.piece.fake_quantize.apply(x, qparams, scheme)
        if scheme.dynamic:
            limits = int(self.low.min()), int(self.high.max())
            qparams = range_to_qparams(*min_max(x, scheme.granularity), scheme, limits=limits)
        level = self.levels(made, qparams)
        if level is None:
            return False
        parts = positive(qparams.scale), zero_code(qparams, self.low, self.high, scheme), low, high
        scale, zero, lowest, highest = (expand(part, x, scheme.granularity) for part in parts)
        ratio = x / scale
        code = torch.round(ratio).to(torch.int32) + zero
        expected = torch.minimum(torch.maximum(code, lowest), highest) - zero
        apart = (level - expected).abs()
        on_a_tie = (ratio - ratio.floor() - 0.5).abs() < 1e-3  # where the orders of rounding differ
        return bool(((apart == 0) | (on_a_tie & (apart == 1))).all())
