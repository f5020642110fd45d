"""A bias in int32, as a chip adds it to its sums: whole multiples of the weight's scale times the input's scale.

Every form that stores such a bias asks here, so that all of them store the same numbers or refuse for the same reason.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sophq_func.codes.stored import Refusal, Stored
from sophq_func.model.weight_quantizer import arranged, is_regrouped
from sophq_func.numerics.granularity import PerChannel
from sophq_func.numerics.layout import rows

LIMIT = 2.0**31 - 2**7
"""The largest bias, in steps: the largest float32 that fits in int32."""

IDLE_BIAS = 2**30
"""Steps that a bias takes in a channel of zero weights, whose scale is free: any number well below LIMIT would do."""


class BiasCodes(NamedTuple):
    """A bias as codes, ``real = codes * step``.

    Attributes:
      codes: int32, one for each output channel.
      step: float32, ``()`` or shaped like the codes: ``scale`` times the scale of the layer's input.
      scale: of the weight; enlarged in channels of zero weights whose bias would not fit otherwise.
    """

    codes: Tensor
    step: Tensor
    scale: Tensor


def bias_step(stored: Stored, input_scale: Tensor) -> Tensor | None:
    """The step of a layer's sums, ``()`` or one for each output channel; ``None`` where a sum has no single step.

    Args:
      stored: the layer's weight.
      input_scale: of the grid of its input.
    """
    scale, granularity = stored.grid.parts.get("scale"), stored.grid.granularity
    if not stored.grid.is_integer or scale is None or input_scale.ndim:
        return None
    # the scales of a grouped deconvolution are those of the arranged weight, whose axis 0 has all output channels
    ndim = max(stored.codes.ndim, 1)
    own = 0 if is_regrouped(stored.site) else stored.site.axis
    of_scales = granularity.axis or 0 if isinstance(granularity, PerChannel) else ()
    # scales along several axes give a sum several steps
    is_per_channel = isinstance(own, int) and isinstance(of_scales, int) and own % ndim == of_scales % ndim
    return scale * input_scale if scale.ndim == 0 or is_per_channel else None


def bias_codes(stored: Stored, step: Tensor, real: Tensor) -> BiasCodes | Refusal:
    """The codes of a bias; or why it has none.

    Args:
      stored: the layer's weight.
      step: from :func:`bias_step`.
      real: the bias, BatchNorm folded in; ``()`` or one number for each output channel.
    """
    if not bool(real.isfinite().all()):
        return Refusal("its bias holds NaN or infinity")
    step, scale = _enlarged(stored, step, real)
    code = (real / step).round()
    largest = float(code.abs().max()) if code.numel() else 0.0
    if largest > LIMIT:
        return Refusal(f"its bias takes {largest:.3g} steps of weight scale times input scale, int32 holds {LIMIT:.0f}")
    return BiasCodes(code.to(torch.int32), step, scale)


def _enlarged(stored: Stored, step: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The step, and the scale of the weight, enlarged where all weights are zero and the bias would overflow.

    Zero weights are zero at any scale, so that the scale of the weight is enlarged with the step.
    """
    scale, overflows, largest = stored.grid.parts["scale"], (real / step).abs() > LIMIT, real.abs()
    if not bool(overflows.any()):
        return step, scale
    if step.ndim == 0:
        overflows, largest = overflows.any(), largest.max()
    seen = arranged(stored.read(), stored.site)
    is_idle = overflows & rows(seen, stored.grid.granularity).eq(0).all(-1)
    enlarged = torch.where(is_idle, largest / IDLE_BIAS, step)
    return enlarged, torch.where(is_idle, scale * (enlarged / step), scale)
