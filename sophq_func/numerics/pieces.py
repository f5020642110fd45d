"""Fake quantizers made from their specs."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.pytree import sorted_dict
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams
from sophq_func.numerics.ranges import bounds, min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme


def build(spec: Spec) -> FakeQuantize:
    """The fake quantizer that ``spec`` describes; with a dynamic scheme it takes the range from the tensor at hand."""
    made = FAKE_QUANTIZERS.build(spec)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        return made.apply(x, in_force(made, x, qparams, scheme), scheme, noise)

    if made.encode is None or made.decode is None:
        return made._replace(apply=apply)
    own_encode, own_decode = made.encode, made.decode

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        own = in_force(made, x, qparams, scheme)
        codes = own_encode(x, own, scheme)
        if not scheme.dynamic:
            return codes
        made_here = {name: extra for name, extra in own.extras.items() if extra is not qparams.extras.get(name)}
        found = {"scale": own.scale, "zero_point": own.zero_point, **made_here}
        return codes._replace(parts=sorted_dict({**codes.parts, **found}))

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if scheme.dynamic:
            extras = dict(codes.parts)
            qparams = QParams(extras.pop("scale"), extras.pop("zero_point"), sorted_dict({**qparams.extras, **extras}))
        return own_decode(codes, qparams, scheme, dtype)

    return made._replace(apply=apply, encode=encode, decode=decode)


def in_force(made: FakeQuantize, x: Tensor, qparams: QParams, scheme: QScheme) -> QParams:
    """The qparams themselves, or with a dynamic scheme those of the range of ``x``."""
    if not scheme.dynamic:
        return qparams
    found = range_to_qparams(*min_max(x, scheme.granularity), scheme, limits=bounds(qparams, scheme))
    return made.init(QParams(found.scale, found.zero_point, qparams.extras), x, scheme)
