"""Cutting a tensor into blocks along its last axis, each with a scale of its own, and joining them again."""

from __future__ import annotations

import torch
from torch import Tensor


def to_blocks(x: Tensor, size: int) -> Tensor:
    """``x`` with its last axis cut into blocks: shape ``(..., blocks, size)``.

    The last block is padded with zeros, which do not change the largest magnitude of a block.
    """
    x = x.reshape(x.shape or (1,))
    count = -(-x.shape[-1] // size)  # rounded up
    return torch.constant_pad_nd(x, (0, count * size - x.shape[-1])).reshape(*x.shape[:-1], count, size)


def from_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`to_blocks`, without the padding; ``x``, of which only the shape is read, is what was cut."""
    shape = x.shape or (1,)
    flat = blocks.reshape(*shape[:-1], blocks.shape[-2] * blocks.shape[-1])
    return flat[..., : shape[-1]].reshape(x.shape)


def block_amax(blocks: Tensor) -> Tensor:
    """The largest finite magnitude of each block; shape ``(..., blocks, 1)``.

    With an infinite or NaN element in it, the scale of a block would turn all its elements into NaN.
    """
    return torch.where(blocks.isfinite(), blocks, 0).abs().amax(-1, keepdim=True)
