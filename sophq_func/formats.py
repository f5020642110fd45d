"""Rounding to floating-point formats, through the number types that torch has.

Source: OCP 8-bit Floating Point Specification (OFP8), revision 1.0; IEEE 754 binary16; bfloat16. Half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_float8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of a float8 type, saturating at its largest finite value; NaN stays NaN. No gradient.

    float64 is rounded to float32 on the way.

    Differs from sophgo-mq: subnormals lie on the grid of the standard and are not flushed, NaN is kept.

    Example:
      >>> round_to_float8(torch.tensor([0.0049, 1.1, 1000.0]), torch.float8_e4m3fn)
      tensor([5.8594e-03, 1.1250e+00, 4.4800e+02])
    """
    largest = torch.finfo(dtype).max
    return x.detach().clamp(-largest, largest).to(dtype).to(x.dtype)


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest value of ``dtype``; what is beyond its largest value becomes infinite.

    The gradient is 1, rounded to ``dtype`` on its way, as torch's own casts do.

    Example:
      >>> round_to_dtype(torch.tensor([1.001, 70000.0]), torch.float16)
      tensor([1.0010,    inf])
    """
    return x.to(dtype).to(x.dtype)
