"""Fake quantizers: rounding with a surrogate gradient. Each name returns a :class:`~sophq_func.core.registry.Spec`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sophq_func.core.public import public
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize._blocks import mxfp4, mxfp6, mxfp8, mxint8, nvfp4
from sophq_func.fake_quantize._float import bf16, e4m3, e5m2, fp16
from sophq_func.fake_quantize._gptq import gptq, gptqfp4, hessian_update
from sophq_func.fake_quantize._integer import fixed, learnable, lsq_plus
from sophq_func.fake_quantize._learned import pact, tqt
from sophq_func.fake_quantize._rounding import adaround, qdrop
from sophq_func.fake_quantize._soft import dorefa, dsq
from sophq_func.fake_quantize._tables import fp4, fpxgroup, nnie
from sophq_func.fake_quantize._tables import scaled as scaled
from sophq_func.numerics.alone import fake_quantizer_alone
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize
from sophq_func.numerics.pieces import build
from sophq_func.numerics.rectified import rectified_sigmoid

# The other names of the same functions: those of papers, and the classes of sophgo-mq.
lsq = learnable
AdaRoundFakeQuantize = adaround
BF16FakeQuantize = bf16
DSQFakeQuantize = dsq
DoReFaFakeQuantize = dorefa
E4M3FakeQuantize = e4m3
E5M2FakeQuantize = e5m2
FP4FakeQuantize = fp4
FPXGROUPFakeQuantize = fpxgroup
FixedFakeQuantize = fixed
Fp16FakeQuantize = fp16
GPTQFP4FakeQuantize = gptqfp4
GPTQFakeQuantize = gptq
LSQPlusFakeQuantize = lsq_plus
LearnableFakeQuantize = learnable
NNIEFakeQuantize = nnie
PACTFakeQuantize = pact
QDropFakeQuantize = qdrop
TqtFakeQuantize = tqt

__all__ = [
    "AdaRoundFakeQuantize",
    "BF16FakeQuantize",
    "DSQFakeQuantize",
    "DoReFaFakeQuantize",
    "E4M3FakeQuantize",
    "E5M2FakeQuantize",
    "FP4FakeQuantize",
    "FPXGROUPFakeQuantize",
    "FixedFakeQuantize",
    "Fp16FakeQuantize",
    "GPTQFP4FakeQuantize",
    "GPTQFakeQuantize",
    "LSQPlusFakeQuantize",
    "LearnableFakeQuantize",
    "NNIEFakeQuantize",
    "PACTFakeQuantize",
    "QDropFakeQuantize",
    "TqtFakeQuantize",
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
    "lsq",
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


def __dir__() -> list[str]:
    return sorted({*__all__, *FAKE_QUANTIZERS.names()})


if not TYPE_CHECKING:  # type checkers see the functions above, and are to refuse other names

    def __getattr__(name: str) -> Callable[..., Spec]:
        """The function of a name that was registered elsewhere, or that is written in another case."""
        return FAKE_QUANTIZERS.function(name, __name__)


@public
def fake_quantizer(name: str, **options: object) -> FakeQuantize:
    """A fake quantizer to use alone, by its short name or its name in sophgo-mq.

    Args:
      name: ``"fixed"``, ``"LearnableFakeQuantize"``, ...
      **options: options of the fake quantizer, by their names here or in sophgo-mq.

    Raises:
      ConfigError: unknown name or option. ``init`` and ``apply`` raise a ``StateError`` for what is no tensor, and for
        qparams that are none; ``apply`` for scales that are not finite, where their numbers can be read.

    Example:
      >>> fake_quantizer("LearnableFakeQuantize", use_grad_scaling=True).learnable
      ('scale', 'zero_point')
    """
    return fake_quantizer_alone(name, build(FAKE_QUANTIZERS.spec(name, **options)))
