"""Fake quantizers whose work one compiled kernel does: in eager, for plain autograd, where it is there.

Under transforms of ``torch.func``, compilers, forward mode and for second derivatives, for other dtypes and devices, and
for what else the kernel does not serve, the composition of :mod:`~sophq_func.numerics.affine` computes. Values and
gradients of tensors are the same bits. A gradient of a scale is a sum, and the kernel adds up in another order: the two
differ by less than 1e-5 of the sum of the absolute terms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from sophq_func.core import modes
from sophq_func.core.errors import ConfigError, explain
from sophq_func.numerics import eager, library
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize, Prepare, QParams, Uniform
from sophq_func.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sophq_func.numerics.library import Kernel, Library
from sophq_func.numerics.scheme import QScheme, QuantizerConfig, config_from_data, to_data

Kernels = Literal["auto", "off", "compiled"]
"""``"auto"``: the kernel if it has been compiled; ``"off"``: never; ``"compiled"``: compiled now if it is not there."""

GRAD_SCALINGS = ("none", "term", "parts")
"""In the order of the enum of ``kernel.cpp``."""

GRANULARITIES = (PerTensor, PerToken, PerChannel, PerGroup)
"""Those that the kernel serves, in the order of the enum of ``kernel.cpp``."""

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Tensor, scale, zero point and factor."""


def find(kernels: Kernels) -> Library | None:
    """The library that quantizers use; ``None``: they are composed.

    Raises:
      ConfigError: an option that there is not; or there is no compiler where one is needed.
    """
    if kernels not in get_args(Kernels):
        allowed = ", ".join(map(repr, get_args(Kernels)))
        raise ConfigError(explain("build", "kernels= takes other values", got=kernels, allowed=allowed))
    if kernels == "off":
        return None
    return library.compiled() if kernels == "compiled" else library.find()


def served(fake: FakeQuantize, config: QuantizerConfig, kernels: Library | None) -> FakeQuantize:
    """The same fake quantizer, which asks the kernel first.

    Args:
      fake: as it is registered.
      config: what it was made of, and the scheme that it will be called with; with any other it composes.
      kernels: the library; without one ``fake`` comes back.
    """
    planned = config.scheme
    if kernels is None or fake.uniform is None or not _is_served(planned):
        return fake
    kernel = _kernel(kernels, fake.uniform(planned), config)

    def value(x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Tensor | None:
        if not _is_eager(qparams, scheme, planned):
            return None
        zero = None if planned.symmetric else qparams.zero_point
        return kernel(x, qparams.scale, zero, factor)

    def apply(x: Tensor, qparams: QParams, scheme: QScheme, noise: Tensor | None = None) -> Tensor:
        y = value(x, None, qparams, scheme)
        return fake.apply(x, qparams, scheme, noise) if y is None else y

    return fake._replace(
        apply=apply,
        prepare=None if fake.prepare is None else _served_prepare(fake.prepare, value, planned),
        kernel=True,
    )


Value = Callable[[Tensor, Tensor | None, QParams, QScheme], Tensor | None]
"""A tensor, quantized with a factor by the kernel; ``None`` where it has to be composed."""


def _served_prepare(prepare: Prepare, value: Value, planned: QScheme) -> Prepare:
    def served(x: Tensor, factor: Tensor | None, qparams: QParams, scheme: QScheme) -> Callable[[], Tensor]:
        # of what else the kernel asks for, most is seldom missing: then the preparation is late
        is_kind = x.is_cpu and x.dtype == torch.float32
        if not is_kind or not _is_eager(qparams, scheme, planned):
            return prepare(x, factor, qparams, scheme)

        def rounded() -> Tensor:
            y = value(x, factor, qparams, scheme)
            return prepare(x, factor, qparams, scheme)() if y is None else y

        return rounded

    return served


def _is_served(scheme: QScheme) -> bool:
    """Whether the kernel knows the granularity: all but blocks, and channels along several axes."""
    granularity = scheme.granularity
    has_axes = isinstance(getattr(granularity, "axis", None), tuple)
    return isinstance(granularity, GRANULARITIES) and not has_axes


def _is_eager(qparams: QParams, scheme: QScheme, planned: QScheme) -> bool:
    """Whether the kernel may be asked: nothing but autograd looks on, and the grid is the planned one."""
    is_watched = modes.is_compiling() or modes.is_mapped() or modes.is_recorded()
    has_bounds = "qmin" in qparams.extras or "qmax" in qparams.extras
    return not is_watched and not has_bounds and (scheme is planned or scheme == planned)


def _kernel(kernels: Library, uniform: Uniform, config: QuantizerConfig) -> Kernel:
    """The kernel of one quantizer."""
    scheme, granularity = config.scheme, config.scheme.granularity
    return kernels.Quantizer(
        scheme.qmin,
        scheme.qmax,
        uniform.order == "kernel",
        uniform.whole,
        uniform.learned,
        GRAD_SCALINGS.index(uniform.grad_scaling),
        [isinstance(granularity, kind) for kind in GRANULARITIES].index(True),
        getattr(granularity, "axis", None) or 0,
        granularity.size if isinstance(granularity, PerGroup) else 0,
        eager.LARGE if uniform.whole else sys.maxsize,  # see affine.prepared
        json.dumps(to_data(config)),
    )


def gradients(config: str, g: Tensor, at: Parts, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the composition, which autograd and transforms can follow.

    The kernel asks for them where its backward pass is recorded for another derivative, or mapped.

    Args:
      config: of the quantizer, as JSON.
      g: the gradient of the output.
      at: tensor, scale, zero point and factor.
      needed: which of their gradients are wanted; the others are ``None``.
    """
    fake, scheme = _made(config)
    x, scale, zero, factor = at
    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero, {})
        if factor is None or fake.prepare is None:
            y = fake.apply(x, qparams, scheme)
        else:
            y = fake.prepare(x, factor, qparams, scheme)()
    inputs = [t for t, is_needed in zip(at, needed, strict=True) if is_needed and t is not None]
    found = iter(torch.autograd.grad(y, inputs, g, create_graph=recording, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]


@cache  # of a graph's quantizers, which are few, while its backward pass runs
def _made(config: str) -> tuple[FakeQuantize, QScheme]:
    """The composition that a config names, and its scheme."""
    of = config_from_data(json.loads(config))
    return FAKE_QUANTIZERS.build(of.fake_quantize), of.scheme
