"""Names of the calls of a run, in the order in which they are made: the same in a trace and in every later run."""

from __future__ import annotations

from collections.abc import Collection


class CallNames:
    """Gives each call a name that no other has: ``layer1.0.conv1``, ``layer1.0.add``, then ``layer1.0.add_1``.

    A module's path belongs to the module: its first call has it, and nothing else does.

    Args:
      modules: paths of all modules.

    Example:
      >>> names = CallNames(["conv"])
      >>> names.module("conv", "conv"), names.module("conv", "conv"), names.function("", "relu"), names.function("", "relu")
      ('conv', 'conv_1', 'relu', 'relu_1')
    """

    def __init__(self, modules: Collection[str]) -> None:
        self._modules = frozenset(path for path in modules if path)
        self._taken: set[str] = set()
        self._called: set[str] = set()
        self._next: dict[str, int] = {}

    def module(self, path: str, base: str) -> str:
        """Name of the next call of the module at ``path``; ``base`` is the path, or what stands for an empty one."""
        first = path not in self._called
        self._called.add(path)
        if first and base not in self._taken:
            return self._take(base, base)
        return self._numbered(base)

    def function(self, scope: str, function: str) -> str:
        """Name of the next call of a function in the module at ``scope``."""
        return self._numbered(f"{scope}.{function}" if scope else function)

    def input(self, argument: str) -> str:
        """Name of an input of the model."""
        return self._numbered(argument)

    def _numbered(self, base: str) -> str:
        """``base``, or the first of ``base_1``, ``base_2``, ... that is free."""
        number = self._next.get(base, 0)  # all smaller ones are taken, and stay so
        name = f"{base}_{number}" if number else base
        while name in self._taken or name in self._modules:
            number += 1
            name = f"{base}_{number}"
        self._next[base] = number + 1
        return self._take(name, base)

    def _take(self, name: str, base: str) -> str:
        self._taken.add(name)
        self._next[base] = max(self._next.get(base, 0), 1)
        return name
