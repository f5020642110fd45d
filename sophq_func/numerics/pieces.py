"""Building a fake quantizer from its spec, with dynamic schemes added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sophq_func.core.errors import StateError, explain
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.registry import Spec
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, Codes, FakeQuantize, QParams
from sophq_func.numerics.granularity import PerChannel, PerGroup
from sophq_func.numerics.ranges import bounds, min_max, range_to_qparams
from sophq_func.numerics.scheme import QScheme


def build(spec: Spec, serve: Callable[[FakeQuantize], FakeQuantize] | None = None) -> FakeQuantize:
    """The fake quantizer that ``spec`` describes, for static and dynamic schemes.

    Args:
      spec: its name and options.
      serve: what is done with the registered functions first, see :func:`sophq_func.numerics.kernels.served`.

    The registered functions quantize by the qparams that they are given. With a dynamic scheme, the functions returned
    here compute scale and zero point from the tensor first.
    """
    static = FAKE_QUANTIZERS.build(spec)
    if serve is not None:
        static = serve(static)

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


def along(fake: FakeQuantize, axis: int) -> FakeQuantize:
    """A fake quantizer with blocks along the last axis, changed to one with blocks along another axis.

    Args:
      fake: as :func:`build` returns it; one without blocks comes back unchanged.
      axis: counted from the end.
    """
    if not fake.block_size or axis == -1:
        return fake

    def there(x: Tensor) -> Tensor:
        return x.movedim(axis, -1)

    def back(x: Tensor) -> Tensor:
        return x.movedim(-1, axis)

    def init(qparams: QParams, x: Tensor, scheme: QScheme) -> QParams:
        return fake.init(qparams, there(x), _there(scheme, axis, x.ndim))

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        noise = None if noise is None else there(noise)
        return back(fake.apply(there(x), qparams, _there(scheme, axis, x.ndim), noise))

    changed = fake._replace(init=init, apply=apply, block_axis=axis)
    if fake.encode is None or fake.decode is None:
        return changed
    fake_encode, fake_decode = fake.encode, fake.decode

    def encode(x: Tensor, qparams: QParams, scheme: QScheme) -> Codes:
        codes = fake_encode(there(x), qparams, _there(scheme, axis, x.ndim))
        # Of the parts, those with one entry for each block have the axes of the tensor.
        parts = {name: back(part) if part.ndim == x.ndim else part for name, part in codes.parts.items()}
        return Codes(back(codes.values), parts)

    def decode(codes: Codes, qparams: QParams, scheme: QScheme, dtype: torch.dtype = torch.float32) -> Tensor:
        ndim = codes.values.ndim
        parts = {name: there(part) if part.ndim == ndim else part for name, part in codes.parts.items()}
        return back(fake_decode(Codes(there(codes.values), parts), qparams, _there(scheme, axis, ndim), dtype))

    return changed._replace(encode=encode, decode=decode)


def _there(scheme: QScheme, axis: int, ndim: int) -> QScheme:
    """A scheme for tensors of ``ndim`` axes, of which one is moved to the end."""
    granularity = scheme.granularity
    if not isinstance(granularity, PerChannel | PerGroup):
        return scheme
    order = [i for i in range(ndim) if i != axis + ndim] + [axis + ndim]
    channels = granularity.axis if isinstance(granularity.axis, tuple) else (granularity.axis or 0,)
    moved = tuple(order.index(channel % ndim) for channel in channels)
    return replace(scheme, granularity=replace(granularity, axis=moved))
