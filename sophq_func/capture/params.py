"""Whether the params of a run fit the model: tensors of its shapes, each looked at once.

A loop gives the same tensors again and again; they are remembered by weak references, so that the check costs a comparison
of identities.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sophq_func.core.errors import explain, quoted
from sophq_func.core.modes import is_compiling, is_mapped


class Like(NamedTuple):
    """What is expected of one tensor.

    Attributes:
      shape: its shape; ``None`` where it may have any.
      is_floating: it holds floating numbers.
      is_any: it may hold numbers of any kind; else, where they are not floating, real ones.
      is_dense: it is strided.
    """

    shape: tuple[int, ...] | None
    is_floating: bool
    is_any: bool
    is_dense: bool


ANY = Like(None, is_floating=False, is_any=True, is_dense=False)
"""What is expected of a tensor of which nothing is known."""


class ParamsCheck:
    """The check of params by name.

    Args:
      likes: what is expected of each tensor; others need only be tensors.
    """

    def __init__(self, likes: Mapping[str, Like]) -> None:
        self._likes = likes
        self._seen: dict[str, weakref.ref[Tensor]] = {}

    def __reduce__(self) -> tuple[type[ParamsCheck], tuple[Mapping[str, Like]]]:
        return ParamsCheck, (self._likes,)  # what was seen in one process means nothing in another

    def problems(self, params: Mapping[str, Any], where: str, fix: str) -> list[str]:
        """What does not fit, in a line each.

        Args:
          params: by name.
          where: the function that the user called.
          fix: where right params come from.
        """
        if is_compiling() or is_mapped():  # a compiler knows no weak references, and wrappers of a transform do not last
            unfit = [name for name, value in params.items() if not isinstance(value, Tensor)]
            return [line for name in unfit for line in self._misfits(name, params[name], where, fix)]
        seen, likes = self._seen, self._likes
        found: dict[str, weakref.ref[Tensor]] = {}
        unfit = []
        for name, value in params.items():  # one loop without calls: a step of training may have new tensors each time
            if name in seen and value is not None and seen[name]() is value:  # a reference that ended gives None
                continue
            like = likes.get(name, ANY)
            is_fitting = (
                isinstance(value, Tensor)
                and (like.shape is None or value.shape == like.shape)
                and (value.is_floating_point() if like.is_floating else like.is_any or not value.is_complex())
                and (not like.is_dense or value.layout is torch.strided)
            )
            if is_fitting:
                found[name] = weakref.ref(value)
            else:
                unfit.append(name)
        if not found and not unfit:
            return []
        if unfit:
            return [line for name in unfit for line in self._misfits(name, params[name], where, fix)]
        if any(params[name].is_meta for name in found):
            return _mixed(params, where, fix)
        seen.update(found)
        return []

    def _misfits(self, name: str, value: object, where: str, fix: str) -> Iterator[str]:
        """Why a value does not fit, in a line each."""
        place = f"{where}: params[{quoted(name)}]"
        if not isinstance(value, Tensor):
            sentence, got = f"params[{quoted(name)}] must be a tensor", type(value).__name__
            yield explain(where, sentence, got=got, allowed="a Tensor", fix=fix)
            return
        like = self._likes[name]
        if like.is_floating and not value.is_floating_point():
            yield explain(place, "it holds no floating numbers", got=value.dtype, allowed="a floating dtype", fix=fix)
        elif not like.is_any and value.is_complex():
            yield explain(place, "it is complex", got=value.dtype, allowed="real numbers, as in the model", fix=fix)
        if like.is_dense and value.layout is not torch.strided:
            yield explain(place, "it is sparse", got=value.layout, allowed="torch.strided", fix="its to_dense()")
        if like.shape is not None and value.shape != like.shape:
            allowed = f"{like.shape}, as in the model"
            because = "a batch of params goes through torch.vmap" if value.ndim > len(like.shape) else ""
            yield explain(place, "it has another shape", got=tuple(value.shape), allowed=allowed, because=because, fix=fix)


def check_of(model: nn.Module, registered: Mapping[str, Tensor], is_function: bool) -> ParamsCheck:
    """The check of a model's params.

    Args:
      model: the model.
      registered: its parameters and buffers by canonical name.
      is_function: a function of params takes those of any shape. The buffers of a user's own module may grow, too.
    """
    of_layers = (m for m in model.modules() if type(m).__module__.startswith("torch.nn."))
    fixed = {id(buffer) for layer in of_layers for buffer in layer.buffers(recurse=False)}
    fixed |= {id(parameter) for parameter in model.parameters()}
    likes = {}
    for name, tensor in registered.items():
        if is_lazy(tensor):
            continue
        shape = tuple(tensor.shape) if id(tensor) in fixed and not is_function else None
        likes[name] = Like(shape, tensor.is_floating_point(), tensor.is_complex(), tensor.layout == torch.strided)
    return ParamsCheck(likes)


def _mixed(params: Mapping[str, object], where: str, fix: str) -> list[str]:
    """A line where some tensors have numbers and others, on the ``meta`` device, have none."""
    empty = [name for name, value in params.items() if isinstance(value, Tensor) and value.is_meta]
    if len(empty) == len(params):
        return []
    sentence, allowed = "it is on the meta device, where there are no numbers", "all params there, or none"
    return [explain(f"{where}: params[{quoted(empty[0])}]", sentence, allowed=allowed, fix=fix)]
