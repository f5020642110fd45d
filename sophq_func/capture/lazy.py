"""Parameters whose values are computed only when the layer that reads them starts.

So the value is still in the CPU's cache when it is read, and its memory serves the next one. A torch function outside
that layer that reads such a parameter gets the same value. A layer to which the model itself binds another tensor
(``functional_call`` in a forward) reads that one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sophq_func.capture._torch import parameters_in
from sophq_func.capture.transforms import depth, is_inside, mapped_like, unmapped
from sophq_func.core.types import Tree


class Deferred:
    """Values of some parameters in one run, computed on demand and kept only while something else refers to them.

    Args:
      compute: for each parameter, a function that returns its value.
      raw: the tensor that holds the place of each parameter otherwise.
    """

    def __init__(
        self,
        compute: Mapping[str, Callable[[], Tensor]],
        raw: Mapping[str, Tensor],
    ) -> None:
        self._compute = compute
        self._outer = depth()  # transforms around the run
        self._names = {id(raw[name]): name for name in compute}
        # weak, so that the memory of a value is free as soon as its layer, and a graph of autograd, let go of it
        self._values: dict[str, weakref.ref[Tensor]] = {}
        self._replaced: list[list[tuple[str, Tensor]]] = []  # of each layer that is running

    def again(self) -> Deferred:
        """The same parameters for another run; this one forgets its values, so that both compute them anew."""
        self._values.clear()
        other = copy.copy(self)
        other._values, other._replaced = {}, []
        return other

    def enter(self, module: nn.Module) -> None:
        """Put the values into a layer that starts, where it holds the raw tensors."""
        held = parameters_in(module)
        values = {attribute: self._filled(tensor) for attribute, tensor in held.items() if tensor is not None}
        replaced = [attribute for attribute, value in values.items() if value is not held[attribute]]
        self._replaced.append([(attribute, held[attribute]) for attribute in replaced])
        for attribute in replaced:
            held[attribute] = values[attribute]

    def leave(self, module: nn.Module) -> None:
        """Put the raw tensors back into a layer that is done."""
        held = parameters_in(module)
        for attribute, tensor in self._replaced.pop():
            held[attribute] = tensor

    def filled(self, tree: Tree) -> Tree:
        """Arguments of a function, with values instead of raw tensors in tuples, lists and dicts."""
        if isinstance(tree, Tensor):
            return self._filled(tree)
        kind = type(tree)
        if kind is tuple or kind is list:
            return kind([self.filled(item) for item in tree])
        if kind is dict and tree:
            return {key: self.filled(item) for key, item in tree.items()}
        return tree

    def _filled(self, tensor: Tensor) -> Tensor:
        """The value in the place of a raw tensor, or of the wrapper in which the model maps over one."""
        name = self._names.get(id(tensor))
        if name is not None:
            return self._value(name)
        if not is_inside(tensor, self._outer):
            return tensor
        name = self._names.get(id(unmapped(tensor, self._outer)))
        return tensor if name is None else mapped_like(tensor, self._value(name), self._outer)

    def _value(self, name: str) -> Tensor:
        """The value of a parameter, computed unless the last one is still alive."""
        reference = self._values.get(name)
        value = None if reference is None else reference()
        if value is None:
            value = self._compute[name]()
            self._values[name] = weakref.ref(value)
        return value
