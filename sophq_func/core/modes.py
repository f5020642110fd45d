"""Who is looking at a computation: a compiler, a transform, or a derivative. The one place that asks torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_compiled_for_use() -> bool:
    """Whether a compiler looks on, and nobody asks for a derivative."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not may_differentiate()


def is_plain(values: Iterable[Tensor]) -> bool:
    """Whether numbers can be read: eager, and no tensor is batched, traced, fake or without storage."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(type(v) in (Tensor, torch.nn.Parameter) and not wrapped(v) and not v.is_meta for v in values)


def may_differentiate() -> bool:
    """Whether somebody may ask for a derivative of what is computed now, or maps it; known to compilers, too."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def has_derivative(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for one of these tensors; if not, autograd need not be told."""
    if forward_ad._current_level >= 0 or is_wrapped(*tensors):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_wrapped(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` looks at one of these tensors."""
    return torch._C._are_functorch_transforms_active() and any(
        t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    )
