"""Hints to a compiler, which leave every number as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sophq_func.core.modes import is_compiled_for_training, is_compiled_for_use
from sophq_func.numerics.scheme import Granularity, PerChannel


def settled(value: Tensor) -> Tensor:
    """``value``, which a compiler shall compute once.

    Inductor computes what is broadcast anew for each element that it is broadcast to, and takes only the results of
    reductions from memory: this is one, of equal numbers.
    """
    return value.unsqueeze(-1).expand(*value.shape, 16).amax(-1) if is_compiled_for_use() else value


def laid_out(y: Tensor, granularity: Granularity) -> Tensor:
    """``y``, which a compiler shall write in its own order, before a convolution wants it in another.

    Inductor would compute a weight in the order in which the convolution reads it, one channel beside the other, and read
    it with as many cache misses. What is viewed by strides is stored first.
    """
    if is_compiled_for_use() and isinstance(granularity, PerChannel) and y.ndim > 2:
        return y.as_strided(y.shape, y.stride())
    return y


def recomputed(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """``f(*args)``, of which a compiler shall keep nothing for the backward pass but the arguments.

    Of all intermediate results inductor would keep the smallest, which are masks of booleans, and a CPU takes longer to
    write one than to compute it twice. Inside transforms of ``torch.func`` there is no pass of its own that could do so.
    """
    if not is_compiled_for_training():
        return f(*args)
    result: Tensor = checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)
    return result
