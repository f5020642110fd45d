"""Fake quantizers: rounding with a surrogate gradient. Each name returns a :class:`~sophq_func.core.registry.Spec`."""

from sophq_func.fake_quantize._blocks import mxfp4, mxfp6, mxfp8, mxint8, nvfp4
from sophq_func.fake_quantize._float import bf16, e4m3, e5m2, fp16
from sophq_func.fake_quantize._gptq import gptq, gptqfp4, hessian_update
from sophq_func.fake_quantize._integer import fixed, learnable, lsq_plus
from sophq_func.fake_quantize._learned import pact, tqt
from sophq_func.fake_quantize._rounding import adaround, qdrop, rectified_sigmoid
from sophq_func.fake_quantize._soft import dorefa, dsq
from sophq_func.fake_quantize._tables import fp4, fpxgroup, nnie
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize
from sophq_func.numerics.pieces import build

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


def fake_quantizer(name: str, **options: object) -> FakeQuantize:
    """A fake quantizer to use alone, by its short name or its name in sophgo-mq.

    Args:
      name: ``"fixed"``, ``"LearnableFakeQuantize"``, ...
      **options: options of the fake quantizer, by their names here or in sophgo-mq.

    Raises:
      ConfigError: unknown name or option.

    Example:
      >>> fake_quantizer("LearnableFakeQuantize", use_grad_scaling=True).learnable
      ('scale', 'zero_point')
    """
    return build(FAKE_QUANTIZERS.spec(name, **options))
