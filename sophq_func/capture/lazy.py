"""Parameters that get their values only when the layer that reads them starts.

The value is in the cache when it is read, and its memory is free for the next one soon after. A torch function that
reads such a parameter from elsewhere gets the same value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sophq_func.capture._torch import store_of


class Deferred:
    """Values of some parameters in one run, computed at need and remembered only as long as somebody else holds them.

    Args:
      compute: by parameter.
      readers: by the path of a layer, the parameters that its attributes hold.
      raw: what stands for each parameter until then.
    """

    def __init__(
        self,
        compute: Mapping[str, Callable[[], Tensor]],
        readers: Mapping[str, Mapping[str, str]],
        raw: Mapping[str, Tensor],
    ) -> None:
        self._compute, self._raw = compute, raw
        self.readers = {
            path: {attribute: name for attribute, name in own.items() if name in compute}
            for path, own in readers.items()
            if not compute.keys().isdisjoint(own.values())
        }
        self._names = {id(raw[name]): name for name in compute}
        self._known: dict[str, weakref.ref[Tensor]] = {}

    def enter(self, path: str, module: nn.Module) -> None:
        """The layer starts."""
        for attribute, name in self.readers[path].items():
            store_of(module, attribute)[attribute] = self._value(name)

    def leave(self, path: str, module: nn.Module) -> None:
        """The layer is done."""
        for attribute, name in self.readers[path].items():
            store_of(module, attribute)[attribute] = self._raw[name]

    def filled(self, tree: Any) -> Any:
        """Arguments of a function outside layers, with values for parameters in tuples, lists and dicts."""
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
        known = self._known.get(name)
        value = None if known is None else known()
        if value is None:
            value = self._compute[name]()
            self._known[name] = weakref.ref(value)
        return value
