"""Whether observer states are those of the plan: tensors of the shapes that each observer begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.arguments import not_real
from sophq_func.core.errors import StateError, explain, raise_all
from sophq_func.core.modes import is_compiling
from sophq_func.model.bind import Quantizers
from sophq_func.model.shapes import UNMAKEABLE
from sophq_func.model.weight_quantizer import WeightQuantizer
from sophq_func.numerics.contracts import State


class Like(NamedTuple):
    """Shape and dtype of a field; its sizes alone matter, as no update changes them."""

    shape: tuple[int, ...]
    is_floating: bool


Fields: TypeAlias = dict[str, Like]

FIX = "the states that q.init or q.observe returned"


class StateCheck:
    """The check of all observer states of a plan.

    Args:
      quantizers: by name.
      registered: the model's parameters and buffers on the ``meta`` device, by name.
    """

    def __init__(self, quantizers: Quantizers, registered: Mapping[str, Tensor]) -> None:
        self._quantizers = quantizers
        self._registered = registered
        self._likes: dict[str, Fields] = {}

    def __call__(self, states: Mapping[str, State]) -> None:
        """Raise a :class:`StateError` that names every field that does not fit."""
        if is_compiling():
            return
        if not self._likes:  # when the first states come, which many models never see
            self._likes = {name: self._fields(name) for name in self._quantizers}
        raise_all([line for name in self._likes for line in self._misfits(name, states[name])], StateError)

    def _fields(self, name: str) -> Fields:
        """What the state of a quantizer is before any tensor; nothing of an observer that wants numbers then."""
        quantizer = self._quantizers[name]
        empty = torch.empty((), device="meta")
        try:
            is_weight = isinstance(quantizer, WeightQuantizer)
            x = quantizer.seen(self._registered) if is_weight else empty.expand(quantizer.site.shape)
            neutral = quantizer.observer.init(x, quantizer.scheme)
        except UNMAKEABLE:
            return {}
        fields = neutral._asdict().items()
        return {field: Like(tuple(tensor.shape), tensor.is_floating_point()) for field, tensor in fields}

    def _misfits(self, name: str, state: State) -> Iterator[str]:
        for field, like in self._likes[name].items():
            tensor, where = getattr(state, field), f"ostate of {name}"
            unfit = not_real(where, field, tensor)
            if unfit:
                yield unfit
            elif tensor.shape != like.shape or tensor.is_floating_point() != like.is_floating:
                kind = "floating" if like.is_floating else "integer"
                got, allowed = f"{tensor.dtype} {tuple(tensor.shape)}", f"{kind} {like.shape}"
                yield explain(where, f"{field} has another shape or dtype", got=got, allowed=allowed, fix=FIX)
            elif isinstance(state[0], Tensor) and tensor.device != state[0].device:
                allowed = f"{state[0].device}, that of {state._fields[0]}"
                yield explain(where, f"{field} is on another device", got=tensor.device, allowed=allowed, fix=FIX)
