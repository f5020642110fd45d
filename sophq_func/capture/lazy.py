"""Parameters whose values are computed only when the layer that reads them starts.

So the value is still in the CPU's cache when it is read, and its memory serves the next one. A torch function outside
that layer that reads such a parameter gets the same value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sophq_func.capture._torch import store_of
from sophq_func.core.types import Tree


class Deferred:
    """Values of some parameters in one run, computed on demand and kept only while something else refers to them.

    Args:
      compute: for each parameter, a function that returns its value.
      readers: for the path of each layer, its parameters by attribute.
      raw: the tensor that holds the place of each parameter otherwise.
    """

    def __init__(
        self,
        compute: Mapping[str, Callable[[], Tensor]],
        readers: Mapping[str, Mapping[str, str]],
        raw: Mapping[str, Tensor],
    ) -> None:
        self._compute, self._raw = compute, raw
        self.readers = {
            path: {attribute: name for attribute, name in parameters.items() if name in compute}
            for path, parameters in readers.items()
            if not compute.keys().isdisjoint(parameters.values())
        }
        self._names = {id(raw[name]): name for name in compute}
        # weak, so that the memory of a value is free as soon as its layer, and a graph of autograd, let go of it
        self._values: dict[str, weakref.ref[Tensor]] = {}

    def enter(self, path: str, module: nn.Module) -> None:
        """Put the values into a layer that starts."""
        for attribute, name in self.readers[path].items():
            store_of(module, attribute)[attribute] = self._value(name)

    def leave(self, path: str, module: nn.Module) -> None:
        """Put the raw tensors back into a layer that is done."""
        for attribute, name in self.readers[path].items():
            store_of(module, attribute)[attribute] = self._raw[name]

    def filled(self, tree: Tree) -> Tree:
        """Arguments of a function, with values instead of raw tensors in tuples, lists and dicts."""
        if isinstance(tree, Tensor):
            name = self._names.get(id(tree))
            return tree if name is None else self._value(name)
        kind = type(tree)
        if kind is tuple or kind is list:
            return kind([self.filled(item) for item in tree])
        if kind is dict and tree:
            return {key: self.filled(item) for key, item in tree.items()}
        return tree

    def _value(self, name: str) -> Tensor:
        """The value of a parameter, computed unless the last one is still alive."""
        reference = self._values.get(name)
        value = None if reference is None else reference()
        if value is None:
            value = self._compute[name]()
            self._values[name] = weakref.ref(value)
        return value
