"""Fake quantizers: arithmetic with a surrogate gradient. Each name here returns a :class:`~sophq_func.registry.Spec`."""

from typing import Any

from torch import Tensor

from sophq_func.affine import bounds, min_max, range_to_qparams
from sophq_func.base import FAKE_QUANTIZERS, FakeQuantize, QParams
from sophq_func.fake_quantize._blocks import mxfp4, mxfp6, mxfp8, mxint8, nvfp4
from sophq_func.fake_quantize._float import bf16, e4m3, e5m2, fp16
from sophq_func.fake_quantize._gptq import gptq, gptqfp4, hessian_update
from sophq_func.fake_quantize._integer import fixed, learnable, lsq_plus
from sophq_func.fake_quantize._learned import pact, tqt
from sophq_func.fake_quantize._rounding import adaround, qdrop, rectified_sigmoid
from sophq_func.fake_quantize._soft import dorefa, dsq
from sophq_func.fake_quantize._tables import fp4, fpxgroup, nnie
from sophq_func.registry import Spec
from sophq_func.scheme import QScheme

__all__ = [
    "adaround",
    "bf16",
    "dorefa",
    "dsq",
    "e4m3",
    "e5m2",
    "fake_quantizer",
    "fixed",
    "fp4",
    "fp16",
    "fpxgroup",
    "gptq",
    "gptqfp4",
    "hessian_update",
    "learnable",
    "lsq_plus",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "mxint8",
    "nnie",
    "nvfp4",
    "pact",
    "qdrop",
    "rectified_sigmoid",
    "tqt",
]


def fake_quantizer(name: str, **options: Any) -> FakeQuantize:
    """A fake quantizer to use alone, by short or reference name.

    Args:
      name: ``"fixed"``, ``"LearnableFakeQuantize"``, ...
      **options: the factory's options by own or reference name.

    Raises:
      ConfigError: unknown name or option.

    Example:
      >>> fake_quantizer("LearnableFakeQuantize", use_grad_scaling=True).learnable
      ('scale', 'zero_point')
    """
    return build(FAKE_QUANTIZERS.spec(name, **options))


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
