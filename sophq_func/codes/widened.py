"""Parameters in float32, where folding and rounding to codes would lose bits of 16-bit floats."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sophq_func.model.weight_quantizer import Params, WeightQuantizer


def widened_beside(weights: Iterable[WeightQuantizer], params: Params) -> dict[str, Tensor]:
    """Detached params, of which the biases and BatchNorms that are folded with a weight are widened."""
    small = {name for weight in weights for name in beside(weight)}
    return {name: widened(p) if name in small else p.detach() for name, p in params.items()}


def beside(weight: WeightQuantizer) -> list[str]:
    """Names of the parameters that are folded with a weight: the bias of its layer, and the BatchNorm behind it."""
    norm = weight.norm
    folded = [] if norm is None else [norm.weight, norm.bias, norm.mean, norm.var]
    return [weight.site.bias, *folded]


def widened(p: Tensor) -> Tensor:
    """The tensor without its gradient; 16-bit and 8-bit floats as float32."""
    return p.detach().float() if p.is_floating_point() and p.element_size() < 4 else p.detach()
