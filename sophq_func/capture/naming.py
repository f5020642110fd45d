"""Names of the calls of a run, in the order in which they are made: the same in a trace and in every later run."""

from __future__ import annotations

from collections.abc import Collection


class CallNames:
    """Gives each call a name that no other has: ``layer1.0.conv1``, ``layer1.0.add``, then ``layer1.0.add_1``.

    A module's path belongs to the module: its first call has it, and nothing else does. A name that was told stays free
    until it is taken, since some calls turn out to need none.

    Args:
      modules: paths of all modules.

    Example:
      >>> names = CallNames(["conv"])
      >>> [names.take(names.module("conv")), names.take(names.module("conv")), names.function("", "relu")]
      ['conv', 'conv_1', 'relu']
    """

    def __init__(self, modules: Collection[str]) -> None:
        self._modules = frozenset(path for path in modules if path)
        self._taken: set[str] = set()
        self._lowest: dict[str, int] = {}

    def module(self, path: str) -> str:
        """Name of the next call of the module at ``path``, or of what stands for an empty path."""
        return path if path not in self._taken else self._numbered(path)

    def function(self, scope: str, function: str) -> str:
        """Name of the next call of a function in the module at ``scope``."""
        return self._numbered(f"{scope}.{function}" if scope else function)

    def input(self, argument: str) -> str:
        """Name of an input of the model."""
        return self._numbered(argument)

    def take(self, name: str) -> str:
        """The call was made: its name is no longer free."""
        self._taken.add(name)
        return name

    def _numbered(self, base: str) -> str:
        """``base``, or the first of ``base_1``, ``base_2``, ... that is free."""
        number = self._lowest.get(base, 0)  # smaller ones are taken, and stay so
        name = f"{base}_{number}" if number else base
        while name in self._taken or name in self._modules:
            number += 1
            name = f"{base}_{number}"
        self._lowest[base] = number
        return name
