"""Whether a fake quantizer of values is the plain integer grid that a chip has, found out by trying it."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.codes.codes import levels_of, whole_bounds, zero_of
from sophq_func.model.value_quantizer import RunQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import min_max, positive, range_to_qparams
from sophq_func.numerics.scheme import PerTensor

COUNT = 4096


def reached_bounds(piece: RunQuantizer, own: QParams) -> tuple[Tensor, Tensor] | None:
    """Smallest and largest code that come out; ``None`` where codes are not ``clamp(round(x / s) + z)``.

    Both are tried on values far beyond the grid, and rounding on values off the ties. A clipping bound between two codes
    may round away the outermost one, which is why the bounds are not read off the scheme.
    """
    limits, zero = whole_bounds(own, piece.scheme), zero_of(own, piece.scheme)
    if limits is None or zero is None or piece.fake_quantize.noise:
        return None
    shape = (COUNT,) if isinstance(piece.scheme.granularity, PerTensor) else piece.site.shape
    random = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(own.scale.device)
    if piece.scheme.dynamic:
        return limits if _fits(piece, own, 8 * random - 3, limits) else None
    scale, middle, low, high = (
        expand(part, random, piece.scheme.granularity) for part in (positive(own.scale), zero, *limits)
    )
    beyond = (high - low + 2) * 2 * scale + 0 * random
    ends = [_outermost(piece, own, end, bound) for end, bound in zip((-beyond, beyond), limits, strict=True)]
    reached = ends[0], ends[1]
    whole = low - middle - 2 + torch.floor(random * (high - low + 5))
    off_ties = (random * 7919 % 1 - 0.5) * 0.8
    return reached if _fits(piece, own, (whole + off_ties) * scale, reached) else None


def _outermost(piece: RunQuantizer, own: QParams, x: Tensor, bound: Tensor) -> Tensor:
    """The code that becomes of values beyond a bound, where it is the same everywhere; else the bound."""
    level, zero = levels_of(piece.fake_quantize.apply(x, own, piece.scheme), own, piece.scheme), zero_of(own, piece.scheme)
    if level is None or zero is None:
        return bound
    codes = level + expand(zero, x, piece.scheme.granularity)
    lowest = codes.min()
    return lowest.to(torch.int32) if bool((codes == lowest).all()) else bound


def _fits(piece: RunQuantizer, own: QParams, x: Tensor, limits: tuple[Tensor, Tensor]) -> bool:
    """Whether the fake quantizer does to ``x`` what a chip does."""
    scheme = piece.scheme
    made = piece.fake_quantize.apply(x, own, scheme)
    if scheme.dynamic:
        own = range_to_qparams(*min_max(x, scheme.granularity), scheme, limits=(int(limits[0].min()), int(limits[1].max())))
    level, zero = levels_of(made, own, scheme), zero_of(own, scheme)
    if level is None or zero is None:
        return False
    scale, middle, low, high = (expand(part, x, scheme.granularity) for part in (positive(own.scale), zero, *limits))
    ratio = x / scale
    code = torch.round(ratio).to(torch.int32) + middle
    apart = (level - (torch.minimum(torch.maximum(code, low), high) - middle)).abs()
    on_a_tie = (ratio - ratio.floor() - 0.5).abs() < 1e-3  # where the orders of rounding differ
    return bool(((apart == 0) | (on_a_tie & (apart == 1))).all())
