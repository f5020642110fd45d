"""Fake quantizers made from their specs."""

from __future__ import annotations

from torch import Tensor

from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize, QParams
from sophq_func.numerics.ranges import bounds, min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme


def build(spec: Spec) -> FakeQuantize:
    """The fake quantizer that ``spec`` describes; with a dynamic scheme it takes the range from the tensor at hand."""
    made = FAKE_QUANTIZERS.build(spec)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        return made.apply(x, in_force(made, x, qparams, scheme), scheme, noise)

    return made._replace(apply=apply)


def in_force(made: FakeQuantize, x: Tensor, qparams: QParams, scheme: QScheme) -> QParams:
    """The qparams themselves, or with a dynamic scheme those of the range of ``x``."""
    if not scheme.dynamic:
        return qparams
    found = range_to_qparams(*min_max(x, scheme.granularity), scheme, limits=bounds(qparams, scheme))
    return made.init(QParams(found.scale, found.zero_point, qparams.extras), x, scheme)
