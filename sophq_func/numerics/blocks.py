"""Blocks along the last axis, each of which has a scale of its own."""

from __future__ import annotations

import torch
from torch import Tensor


def to_blocks(x: Tensor, size: int) -> Tensor:
    """``x`` with its last axis cut into blocks, the last one filled up with zeros: ``(..., blocks, size)``."""
    x = x.reshape(x.shape or (1,))
    count = -(-x.shape[-1] // size)
    return torch.constant_pad_nd(x, (0, count * size - x.shape[-1])).reshape(*x.shape[:-1], count, size)


def from_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`to_blocks`: blocks in the shape of ``x``."""
    shape = x.shape or (1,)
    flat = blocks.reshape(*shape[:-1], blocks.shape[-2] * blocks.shape[-1])
    return flat[..., : shape[-1]].reshape(x.shape)


def block_amax(blocks: Tensor) -> Tensor:
    """The largest finite magnitude of each block."""
    return torch.where(blocks.isfinite(), blocks, 0).abs().amax(-1, keepdim=True)
