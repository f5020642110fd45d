"""Tensors under a transform of ``torch.func`` that the model itself starts: ``vmap``, ``grad``, ``jvp`` inside a forward.

Such a transform wraps tensors. What is said about a model without the transform holds for the tensor inside the wrappers,
with the axes over which ``vmap`` maps in front, those of the outermost first: it is the *whole* tensor, of which the model's
function sees one member at a time. Transforms around the run are none of the model's: functions here take ``outer``, how
many of them there are, and leave their wrappers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sophq_func.capture._torch import (
    is_wrapper,
    mapped_axis,
    unwrapped,
    wrapper_level,
)
from sophq_func.core.modes import is_compiling, is_mapped, level, outside_of_transforms
from sophq_func.core.pytree import tree_map
from sophq_func.core.types import Tree


def depth() -> int:
    """How many transforms are active; 0 under a compiler, which makes of a transform a part of its program."""
    return 0 if is_compiling() or not is_mapped() else level()


def innermost(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers: the same object for every wrapper of one tensor."""
    while is_wrapper(tensor):
        tensor = unwrapped(tensor)
    return tensor


def unmapped(tensor: Tensor, outer: int) -> Tensor:
    """The tensor inside the wrappers of the model's own ``vmap``; others, and wrappers inside others, stay."""
    while wrapper_level(tensor) > outer and mapped_axis(tensor) is not None:
        tensor = unwrapped(tensor)
    return tensor


def mapped_like(wrapper: Tensor, tensor: Tensor, outer: int) -> Tensor:
    """A tensor of the shape of :func:`unmapped`, wrapped as ``wrapper`` is."""
    depth = _maps_inside(wrapper, outer)
    return _to_members(tensor.permute(_front_first(wrapper, outer)), wrapper.detach(), depth)


def is_inside(tensor: Tensor, outer: int) -> bool:
    """Whether a tensor is wrapped by a transform that began inside ``outer`` others."""
    return is_mapped() and not is_compiling() and wrapper_level(tensor) > outer


def whole(tensor: Tensor, outer: int) -> Tensor:
    """The whole tensor inside the wrappers of the model's own transforms, without their derivatives."""
    order = _front_first(tensor, outer)
    while wrapper_level(tensor) > outer:
        tensor = unwrapped(tensor)
    if order == sorted(order):
        return tensor
    return outside_of_transforms(lambda: tensor.permute(order), outer)


def _front_first(tensor: Tensor, outer: int) -> list[int]:
    """The axes of the tensor inside the wrappers: first those over which ``vmap`` maps, then the others."""
    mapped = []
    while wrapper_level(tensor) > outer:
        axis = mapped_axis(tensor)
        if axis is not None:
            mapped.append(axis)
        tensor = unwrapped(tensor)
    # each axis is counted among those that the vmaps around it have left over; the innermost vmap was found first
    rest = list(range(tensor.dim()))
    front = [rest.pop(axis) for axis in reversed(mapped)]
    return front + rest


def members(tensor: Tensor, outer: int) -> Iterator[Tensor]:
    """Each member of the :func:`whole` tensor, as the model's function sees them one by one."""
    count = _maps_inside(tensor, outer)
    together = whole(tensor, outer)
    yield from together.flatten(0, count - 1) if count else [together]


def wholes(tree: Tree, outer: int) -> Tree:
    """A tree with the :func:`whole` tensor in the place of each tensor."""
    return tree_map(lambda leaf: whole(leaf, outer) if isinstance(leaf, Tensor) else leaf, tree)


def on_whole(f: Callable[[Tensor], Tensor], tensor: Tensor, outer: int) -> Tensor:
    """``f`` of the whole tensor, as the model's function sees it: of one member, with the derivatives of ``f``.

    Args:
      f: returns a tensor of the same shape.
      tensor: as the model's function sees it.
      outer: how many transforms are active around the run.
    """
    mapped = _maps_inside(tensor, outer)
    if not mapped:  # derivatives alone: there are no members
        return f(tensor)
    # only says at which levels there are members: a derivative in it would be one more wrapper
    like = tensor.detach()
    return _to_members(f(_to_whole(tensor, like, mapped)), like, mapped)


def _maps_inside(tensor: Tensor, outer: int) -> int:
    """By how many ``vmap`` inside ``outer`` transforms a tensor is batched."""
    count = 0
    while wrapper_level(tensor) > outer:
        count += mapped_axis(tensor) is not None
        tensor = unwrapped(tensor)
    return count


def _to_whole(x: Tensor, like: Tensor, depth: int) -> Tensor:
    """Members as the whole tensor; ``like`` is batched by the ``depth`` innermost ``vmap`` that batch it."""
    result: Tensor = _Whole.apply(x, like, depth)  # type: ignore[no-untyped-call]
    return result


def _to_members(x: Tensor, like: Tensor, depth: int) -> Tensor:
    """The whole tensor as members, batched as ``like`` is."""
    result: Tensor = _Member.apply(x, like, depth)  # type: ignore[no-untyped-call]
    return result


class _Adjoint(torch.autograd.Function):
    """Takes members to the whole tensor, or back: two linear functions, each the derivative of the other's.

    Torch calls ``vmap`` for the transforms from the inside out, each time with the mapped axis visible. The first ``depth``
    of them at which ``like`` is batched are the model's own. Where only ``x`` is batched, it is one of many derivatives.
    """

    # torch's own rules of a Function need static methods: subclasses, not arguments, tell the two directions apart

    @staticmethod
    def forward(x: Tensor, like: Tensor, depth: int) -> Tensor:
        return x.clone()  # a view made here could not be written into

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, like, ctx.depth = inputs
        ctx.save_for_backward(like)
        ctx.save_for_forward(like)


class _Whole(_Adjoint):
    """From members to the whole tensor."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (like,) = ctx.saved_tensors
        return _to_members(gradient, like, ctx.depth), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (like,) = ctx.saved_tensors
        return _to_whole(tangent, like, ctx.depth)

    @staticmethod
    def vmap(
        info: Any, axes: tuple[int | None, int | None, None], x: Tensor, like: Tensor, depth: int
    ) -> tuple[Tensor, int | None]:
        axis, like_axis, _ = axes
        if like_axis is None and axis is not None:  # behind the axes that the vmaps further out put in front
            return _to_whole(x.movedim(axis, 0), like, depth), depth
        member = like.select(like_axis, 0) if like_axis is not None else like
        if not depth:
            return _to_whole(x, member, 0), axis
        members = x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
        return _to_whole(members, members.detach(), depth - 1), None


class _Member(_Adjoint):
    """From the whole tensor to members."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (like,) = ctx.saved_tensors
        return _to_whole(gradient, like, ctx.depth), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (like,) = ctx.saved_tensors
        return _to_members(tangent, like, ctx.depth)

    @staticmethod
    def vmap(
        info: Any, axes: tuple[int | None, int | None, None], x: Tensor, like: Tensor, depth: int
    ) -> tuple[Tensor, int | None]:
        axis, like_axis, _ = axes
        if like_axis is None and axis is not None:
            return _to_members(x.movedim(axis, depth), like, depth), 0
        member = like.select(like_axis, 0) if like_axis is not None else like
        if not depth:
            return _to_members(x, member, 0), axis
        return _to_members(x, member, depth - 1), 0
