"""Who is looking at a computation: a compiler, an exporter, a transform, a derivative. The one place that asks torch.

A run asks :func:`now` once. Arithmetic that is used alone, and hooks inside a model that compiles a part of itself, ask
the single questions, since there the answer may differ from that of the run around them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


class Mode(NamedTuple):
    """Who is looking.

    Attributes:
      compiling: Dynamo or torch.export traces the Python code.
      exporting: it is torch.export.
      mapped: a transform of ``torch.func`` is active.
      differentiating: somebody may ask for a derivative of what is computed now, or maps it.
    """

    compiling: bool
    exporting: bool
    mapped: bool
    differentiating: bool


def now() -> Mode:
    """Who is looking at what is computed now; compilers can follow the question."""
    return Mode(is_compiling(), torch.compiler.is_exporting(), is_mapped(), may_differentiate())


def is_compiling() -> bool:
    """Whether Dynamo or torch.export traces the Python code."""
    return torch.compiler.is_compiling()


def is_compiled_for_use() -> bool:
    """Whether a compiler makes a program for inference."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not may_differentiate()


def is_compiled_for_training() -> bool:
    """Whether a compiler makes a program with a backward pass of its own; transforms of ``torch.func`` have none."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and torch.is_grad_enabled() and not is_mapped()


def is_mapped() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._are_functorch_transforms_active()


def may_differentiate() -> bool:
    """Whether somebody may ask for a derivative of what is computed now, or maps it; known to compilers, too."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or is_mapped()


def has_derivative(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a derivative of one of these tensors; if not, autograd need not be told."""
    if forward_ad._current_level >= 0 or is_wrapped(*tensors):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_recording(*tensors: Tensor | None) -> bool:
    """Whether a backward pass is differentiated itself: torch records it, or a transform looks at these tensors."""
    return torch.is_grad_enabled() or has_derivative(*tensors)


def is_wrapped(*tensors: Tensor | None) -> bool:
    """Whether a transform of ``torch.func`` looks at one of these tensors."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return is_mapped() and any(tensor is not None and wrapped(tensor) for tensor in tensors)


def is_plain(values: Iterable[Tensor]) -> bool:
    """Whether numbers can be read: eager, and no tensor is batched, traced, fake or without storage."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(type(v) in (Tensor, torch.nn.Parameter) and not wrapped(v) and not v.is_meta for v in values)


def writes_into(tensor: Tensor) -> int:
    """How often a tensor, or what shares its memory, was written into; -1 where torch does not count (inference mode)."""
    return -1 if tensor.is_inference() else tensor._version
