"""Hints to inductor that change where numbers are stored and when they are computed, but no number."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sophq_func.core.modes import is_compiled_for_training, is_compiled_for_use
from sophq_func.numerics.granularity import Granularity, PerChannel

COPIES = 16
"""Length of the axis that :func:`materialized` reduces; inductor unrolls a reduction of fewer than 8 elements."""


def materialized(value: Tensor) -> Tensor:
    """Force inductor to materialize ``value``, by wrapping it in a reduction over equal copies.

    Inductor fuses pointwise work into its user, and so would compute a scale per channel anew for each element that it
    is broadcast to; results of reductions it stores. The maximum of equal numbers is exact.
    """
    if not is_compiled_for_use():
        return value
    return value.unsqueeze(-1).expand(*value.shape, COPIES).amax(-1)


def keeping_layout(y: Tensor, granularity: Granularity) -> Tensor:
    """Store before a strided view, so that inductor keeps the weight's memory layout.

    A convolution on a CPU reads its weight channels-last. Inductor would compute the weight in that order, too, and
    miss the cache at each element that it reads; a tensor that is viewed by strides it stores in its own order first.
    """
    is_convolution_weight = isinstance(granularity, PerChannel) and y.ndim > 2
    if is_convolution_weight and is_compiled_for_use():
        return y.as_strided(y.shape, y.stride())
    return y


def recomputed(f: Callable[..., Tensor], *args: object) -> Tensor:
    """``f(*args)``, of which a compiled backward pass keeps nothing but the arguments.

    Of all intermediate results inductor would keep the smallest, which are boolean masks, and a CPU takes longer to write
    a mask than to compute it twice. Inside transforms of ``torch.func`` there is no separate backward pass.
    """
    if not is_compiled_for_training():
        return f(*args)
    # nothing in ``f`` is random, so that the state of the generator need not be saved
    result: Tensor = checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
    return result
