"""The rounding of each element of a weight as a number that is learned (AdaRound, arXiv:2004.10568)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.model.weight_quantizer import LOOKUPS, Params, WeightQuantizer, arranged
from sophq_func.numerics.affine import working
from sophq_func.numerics.contracts import QParams, as_stored
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import clamp, expanded_bounds, positive
from sophq_func.numerics.rectified import inverse_rectified_sigmoid

DECIDED = 10.0
"""An ``alpha`` of this size rounds all the way, up where it is positive and down where it is negative."""

LEARNABLE = frozenset(("scale", "zero_point", "alpha"))
"""What a fake quantizer may learn whose grid is made of scale and zero point alone."""


def why_not(quantizer: WeightQuantizer) -> str:
    """Why the rounding of a weight cannot be learned; empty where it can."""
    fake = quantizer.fake_quantize
    if quantizer.scheme.dynamic:
        return "its scales are computed anew in each run"
    if not fake.integer or fake.grid is not as_stored or not set(fake.learnable) <= LEARNABLE or fake.noise:
        return f"{quantizer.config.fake_quantize} does not round to integers times the scale of its qparams"
    if quantizer.site.operation in LOOKUPS:
        return "an embedding looks rows up and sums nothing, so that the nearest rounding is the best"
    return ""


class Rounding(NamedTuple):
    """A weight between two neighbours of its grid.

    Attributes:
      quantizer: of the weight.
      fraction: how far each element lies above the lower neighbour, from 0 to 1; as the weight is seen, float32.
      lower: the lower neighbour, as it is stored.
      step: from there to the upper one; 0 where the range of the grid ends.
      dtype: of the weight.
    """

    quantizer: WeightQuantizer
    fraction: Tensor
    lower: Tensor
    step: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(quantizer: WeightQuantizer, params: Params, qparams: QParams) -> Rounding:
        """That of a weight with its grid."""
        scheme, seen = quantizer.scheme, quantizer.seen(params)
        scale = expand(positive(qparams.scale), seen, scheme.granularity)
        zero = 0 if scheme.symmetric else expand(qparams.zero_point.to(scale.dtype), seen, scheme.granularity)
        ratio = working(seen) / scale
        level = ratio.floor()
        low, high = expanded_bounds(qparams, scheme, seen)

        def stored(code: Tensor) -> Tensor:
            return quantizer.unseen((clamp(code, low, high) - zero) * scale, params)

        lower = stored(level + zero)
        step = stored(level + zero + 1) - lower
        return Rounding(quantizer, (ratio - level).float(), lower, step, params[quantizer.site.parameter].dtype)

    def start(self) -> Tensor:
        """The ``alpha`` that leaves the weight where it is."""
        return inverse_rectified_sigmoid(self.fraction)

    def soft(self, share: Tensor) -> Tensor:
        """The weight, as it is stored, a share of each step above the lower neighbour; differentiable."""
        return torch.addcmul(self.lower, self.step, arranged(share, self.quantizer.site)).to(self.dtype)

    def hard(self, alpha: Tensor) -> Tensor:
        """The weight, as it is stored, rounded up where ``alpha`` is not negative."""
        return self.soft((alpha >= 0).to(self.step.dtype))

    def nearest(self) -> Tensor:
        """The ``alpha`` that rounds to the nearest."""
        return torch.where(self.fraction >= 0.5, DECIDED, -DECIDED)

    def decided(self, params: Params, qparams: QParams) -> QParams:
        """Qparams that leave a weight on the grid where it is, for a fake quantizer that stores the rounding of elements.

        Args:
          params: with the weight on its grid.
          qparams: of this weight.
        """
        if "alpha" not in qparams.extras:
            return qparams
        # an element lies within an ulp of its code: a little below it, the lower neighbour is the code before
        alpha = Rounding.of(self.quantizer, params, qparams).nearest()
        return qparams._replace(extras={**qparams.extras, "alpha": alpha})


def undecided(shares: list[Tensor], beta: Tensor | float) -> Tensor:
    """The mean over elements of ``1 - |2 h - 1| ** beta``: 1 for a rounding of one half, 0 for one that is decided.

    A mean, not a sum, so that one factor fits layers of every size.
    """
    decided = torch.stack([(2 * share - 1).abs().pow(beta).sum() for share in shares]).sum()
    return 1 - decided / sum(share.numel() for share in shares)
