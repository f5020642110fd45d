"""Building a fake quantizer from its spec, with dynamic schemes added to it."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams
from sophq_func.numerics.ranges import bounds, min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme


def build(spec: Spec) -> FakeQuantize:
    """The fake quantizer that ``spec`` describes, for static and dynamic schemes.

    The registered functions quantize by the qparams that they are given. With a dynamic scheme, the functions returned
    here compute scale and zero point from the tensor first.
    """
    static = FAKE_QUANTIZERS.build(spec)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        if not static.noise and (noise is not None or "noise" in qparams.extras):
            raise StateError(_unused_noise(spec))
        return static.apply(x, in_force(static, x, qparams, scheme), scheme, noise)

    if static.encode is None or static.decode is None:
        return static._replace(apply=apply)
    static_encode, static_decode = static.encode, static.decode

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        current = in_force(static, x, qparams, scheme)
        codes = static_encode(x, current, scheme)
        if not scheme.dynamic:
            return codes
        # what was computed from ``x`` is stored with the codes: decoding does not see ``x``
        computed = {name: extra for name, extra in current.extras.items() if extra is not qparams.extras.get(name)}
        computed |= {"scale": current.scale, "zero_point": current.zero_point}
        return codes._replace(parts=sorted_dict({**codes.parts, **computed}))

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        if scheme.dynamic:
            extras = dict(codes.parts)
            scale, zero_point = extras.pop("scale"), extras.pop("zero_point")
            qparams = QParams(scale, zero_point, sorted_dict({**qparams.extras, **extras}))
        return static_decode(codes, qparams, scheme, dtype)

    return static._replace(apply=apply, encode=encode, decode=decode)


def _unused_noise(spec: Spec) -> str:
    because = "with these options it does not quantize at random"
    fix = "leave the noise out, or name a quantizer that takes it, such as fixed(rounding='stochastic')"
    return explain(repr(spec), "it is given noise and has no use for it", because=because, fix=fix)


def in_force(fake: FakeQuantize, x: Tensor, qparams: QParams, scheme: QScheme) -> QParams:
    """The qparams that quantize ``x``: those given, or with a dynamic scheme those of the range of ``x``."""
    if not scheme.dynamic:
        return qparams
    lo, hi = min_max(x, scheme.granularity)
    scale, zero_point, _ = range_to_qparams(lo, hi, scheme, limits=bounds(qparams, scheme))
    return fake.init(QParams(scale, zero_point, qparams.extras), x, scheme)
