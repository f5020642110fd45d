"""The error of all layers of a model, each on the inputs that it has in the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sophq_func.algorithms._matrix import output_axis
from sophq_func.algorithms.contract import begin, fits
from sophq_func.core.types import Given, Tree
from sophq_func.model.quantized import Quantized
from sophq_func.model.statistics import statistics
from sophq_func.model.weight_quantizer import Params, WeightQuantizer
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerChannel
from sophq_func.numerics.layout import rows
from sophq_func.numerics.moments import Moments, output_error


def layer_errors(
    q: Quantized, float_params: Given, params: Given, qparams: Mapping[str, QParams], batches: Sequence[Tree]
) -> Tensor:
    """The sum over weights of ``mean |D x|**2 / mean |W x|**2``: how far each layer is from its output in the float model.

    ``W`` is the weight in ``float_params``, ``D`` what becomes of it, ``x`` what it multiplies in the float model.

    Args:
      q: a quantized model in eval mode.
      float_params: of the float model.
      params, qparams: of the quantized model.
      batches: a list.

    Returns:
      Shape ``()``.
    """
    start = begin("layer_errors", q, params, qparams)
    original = begin("layer_errors", q, float_params, qparams).params
    moments = statistics(q, float_params, batches, progress=False)
    total = torch.zeros(())
    for name, weight in start.weights.items():
        if name in moments and fits(moments[name], weight.seen(original), weight):
            total = total + relative_error(weight, original, start.params, start.grid(name), moments[name])
    return total


def relative_error(weight: WeightQuantizer, original: Params, params: Params, grid: QParams, moments: Moments) -> Tensor:
    """How far a quantized weight is from what its layer computes: ``mean |D x|**2 / mean |W x|**2``; shape ``()``.

    Args:
      weight: the quantizer.
      original: with the weight ``W``.
      params: with the weight that is quantized; ``D`` is what becomes of it, less ``W``.
      grid: its qparams.
      moments: of ``x``.
    """
    parameter = weight.site.parameter
    seen = weight.seen(original)
    rounded = weight.seen({**original, parameter: weight.quantize(params, grid)})
    along = PerChannel(output_axis(weight.scheme, weight.output_axis))
    power, error = (_power(rows(x, along), moments.second) for x in (seen, rounded - seen))
    return error / power.clamp(min=torch.finfo(power.dtype).tiny)


def _power(x: Tensor, second: Tensor) -> Tensor:
    return output_error(x.reshape(-1, x.shape[-1]), second).sum()
