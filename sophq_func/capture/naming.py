"""Names of calls, which depend on the order of calls alone: the same in a trace and in every later run."""

from __future__ import annotations

from collections.abc import Collection


class CallNames:
    """Gives each call a unique name: ``layer1.0.conv1``, ``layer1.0.add``, then ``layer1.0.add_1``.

    A module's path names the first call of that module and nothing else. A name is only reserved by :meth:`take`, since
    some calls turn out to need none.

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
        self._lowest_free: dict[str, int] = {}

    def module(self, path: str) -> str:
        """Name of the next call of the module at ``path``; for the whole model, the caller gives another word."""
        return path if path not in self._taken else self._numbered(path)

    def function(self, scope: str, function: str) -> str:
        """Name of the next call of a function in the module at ``scope``."""
        return self._numbered(f"{scope}.{function}" if scope else function)

    def input(self, argument: str) -> str:
        """Name of the input that is this argument of the model."""
        return self._numbered(argument)

    def take(self, name: str) -> str:
        """Reserve a name for a call that was made."""
        self._taken.add(name)
        return name

    def _numbered(self, base: str) -> str:
        """``base``, or the first of ``base_1``, ``base_2``, ... that is free."""
        # smaller numbers stay taken, so that the search need not begin at 0: a model may call a function thousands of times
        number = self._lowest_free.get(base, 0)
        name = f"{base}_{number}" if number else base
        while name in self._taken or name in self._modules:
            number += 1
            name = f"{base}_{number}"
        self._lowest_free[base] = number
        return name


def apart(path: str, function: str, after: str, number: int) -> str:
    """Name of a call that is told apart by the module called before it, see :class:`sophq_func.capture.graph.Node`.

    Args:
      path: of the module that is called, or in which the function is called.
      function: canonical name; empty for modules.
      after: what was called before. Calls at the start of their scope have the name that they have without.
      number: how many calls of the same place come after the same module before this one.

    Example:
      >>> apart("", "mul", "experts.2", 0), apart("", "mul", "experts.2", 1), apart("moe", "mul", "", 0)
      ('experts.2.after.mul', 'experts.2.after.mul_1', 'moe.mul')
    """
    at_start = f"{path}.{function}".strip(".")
    base = f"{after}.after.{function or path}" if after else at_start
    return f"{base}_{number}" if number else base
