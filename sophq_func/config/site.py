"""Where one quantizer sits. Data only, so that a plan can be written to a file and built from again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal

Role = Literal["weight", "activation"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where one quantizer sits, and what its arithmetic needs to know about the place.

    Attributes:
      quantizer: its name, ``<value>.post_act_fake_quantizer`` or ``<module path>.<parameter>_fake_quant``.
      role: ``"weight"`` or ``"activation"``.
      value: name of the value that an activation quantizer follows.
      path: module path: the module that makes the value or owns the weight, or in which the function is called.
      paths: every path of that module, of further modules in its fused group (activations), and of every other module
        that uses the weight (weights).
      types: qualified names of the module's class and its bases, most special first, and of the modules around it.
      pattern: name of the fused pattern; empty outside fused groups.
      members: names of a fused group's calls; ``value`` alone otherwise.
      function: canonical name; empty for modules and inputs.
      operation: that name, or that of the function which the module's class stands for (``sigmoid`` for ``nn.Sigmoid``).
      anchor: path, function and call count at which it acts; for a group that of the last member.
      output: which tensor of that call's result; -1: an operand (see ``operand``).
      operand: which tensor of that call's operands; -1: a result.
      argument: name of the model's input that it follows; empty elsewhere.
      more: further calls before which it acts: path, function, call count, and which of the call's operands.
      shape: of the tensor in the example.
      also: further inputs of the model that are the same tensor.
      aliases: further names of the quantizer, by other paths of its module and by tied weights.
      parameter: canonical name of the weight; empty where the weight is computed in the forward.
      axis: axis of the weight's output channels.
      groups: of a convolution.
      norm: path of the BatchNorm that is folded into the weight; empty without.
      bias: canonical name of the layer's bias; empty without.
      source: quantizer whose scale, times the weight's, rounds the bias; empty where the bias is not rounded.
      note: a remark for people.
    """

    quantizer: str
    role: Role
    value: str = ""
    path: str = ""
    paths: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    pattern: str = ""
    members: tuple[str, ...] = ()
    function: str = ""
    operation: str = ""
    anchor: tuple[str, str, int] = ("", "", 0)
    output: int = 0
    operand: int = -1
    argument: str = ""
    also: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    more: tuple[tuple[str, str, int, int], ...] = ()
    shape: tuple[int, ...] = ()
    parameter: str = ""
    axis: int = 0
    groups: int = 1
    norm: str = ""
    bias: str = ""
    source: str = ""
    note: str = ""

    def names(self) -> tuple[str, ...]:
        """Every dotted name that a rule may call it: quantizer, value, and each module around it."""
        found = dict.fromkeys((self.quantizer, self.value, *self.also, *self.aliases))
        for path in self.paths:
            parts = path.split(".")
            found.update(dict.fromkeys(".".join(parts[:n]) for n in range(len(parts), 0, -1)))
        return tuple(name for name in found if name)

    def to_data(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    def places(self) -> tuple[tuple[str, str, int, int], ...]:
        """Each call at which it acts, and before which operand; -1: not before one."""
        return ((*self.anchor, self.operand), *self.more)

    @property
    def call(self) -> int:
        """How many calls of the same module, or of the same function in it, come before the one at which it acts."""
        return self.anchor[2]

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Site:
        """The inverse of :meth:`to_data`; a ``TypeError`` names a field that is missing, unknown or of a wrong type."""
        names = {field.name for field in fields(Site)}
        if data.keys() != names:
            raise TypeError(f"a site has the fields {sorted(names)}, got {sorted(data)}")
        return Site(**{key: _checked(key, value) for key, value in data.items()})


ITEMS: Mapping[str, tuple[type, ...]] = {"anchor": (str, str, int), "more": (str, str, int, int)}
"""Types of the items of tuples that have a fixed length; those of ``shape`` are ints, of all others strings."""


def _checked(name: str, value: Any) -> Any:
    default = getattr(Site(quantizer="", role="weight"), name)
    if name == "more" and isinstance(value, list | tuple):
        return tuple(_items(name, item, ITEMS[name]) for item in value)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return _items(name, value, ITEMS.get(name, (int if name == "shape" else str,) * len(value)))
    if type(value) is not type(default):
        raise TypeError(f"{name} of a site cannot be {value!r}")
    return value


def _items(name: str, value: Any, expected: tuple[type, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(expected) or not all(map(isinstance, value, expected)):
        raise TypeError(f"{name} of a site cannot hold {value!r}")
    return tuple(value)


@lru_cache(maxsize=1024)
def class_names(cls: type) -> tuple[str, ...]:
    """Qualified names of a class and of its bases, without ``nn.Module`` and ``object``.

    Example:
      >>> from torch import nn
      >>> class_names(nn.ReLU)
      ('torch.nn.modules.activation.ReLU',)
    """
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__ if base is not object)
    return tuple(name for name in names if name != "torch.nn.modules.module.Module")
