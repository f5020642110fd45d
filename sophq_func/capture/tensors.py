"""What a record says of single tensors and arguments: dtype and layout, memory, and how often they were written into."""

from __future__ import annotations

import torch
from torch import Tensor

from sophq_func.capture.frame import Function
from sophq_func.capture.graph import Option
from sophq_func.capture.transforms import innermost
from sophq_func.core.modes import writes_into
from sophq_func.core.pytree import tensors
from sophq_func.core.types import Args, Kwargs, Tree

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
"""Layouts of tensors without a storage of their own."""


def constants_of(func: Function, args: Args, kwargs: Kwargs) -> dict[str, Option]:
    """The arguments of a call that are no tensors and hold none, by role; and whether it takes its operands in reverse."""
    named = [*((str(i), arg) for i, arg in enumerate(args)), *kwargs.items()]
    constants = {role: arg for role, arg in named if not tensors(arg)}
    if getattr(func, "__name__", "") == "__rmatmul__":  # a.__rmatmul__(b) is b @ a
        constants["reversed"] = True
    return constants


def is_floating(tensor: Tensor) -> bool:
    """Whether a tensor is dense, and its dtype a floating one."""
    return tensor.is_floating_point() and not kind_of(tensor)


def kind_of(tensor: Tensor) -> str:
    """``"complex"`` or ``"sparse"``; empty for other tensors."""
    if tensor.layout in SPARSE:
        return "sparse"
    return "complex" if tensor.is_complex() else ""


def storage_of(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; ``None`` without one.

    Empty storages share one address, and so count as none. Sparse tensors have several, which no view shares.
    """
    tensor = innermost(tensor)
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return storage_of(a) is not None and storage_of(a) == storage_of(b)


def layout_of(tensor: Tensor) -> tuple[torch.dtype, int | torch.SymInt, list[tuple[int, int]]]:
    """Which numbers of its storage a tensor has, in whatever order its axes are."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.dtype, tensor.storage_offset(), sorted((size, stride) for size, stride in axes if size > 1)


def versions_of(tree: Tree) -> dict[int, int]:
    """How often each tensor of a tree was written into, by identity."""
    return {id(tensor): writes_into(innermost(tensor)) for tensor in tensors(tree)}
