"""Where one quantizer sits. Data only, so that a plan can be written to a file and built from again.

There are three kinds of sites: that of a weight (:class:`WeightSite`), of a weight that is computed in the forward
(:class:`ComputedSite`), and of a value (:class:`ValueSite`). A predicate in a rule may ask a site of any kind for an
attribute of any other: what a kind does not have is neutral there (:class:`Neutral`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

from sophq_func.config.names import underscored

Role = Literal["weight", "activation"]


class CallSite(NamedTuple):
    """One call of a module, or of a function in a module.

    Attributes:
      path: of the module that is called, or in which the function is called.
      function: canonical name; empty for modules.
      call: how many calls of the same module, or of the same function in it, come before.
    """

    path: str = ""
    function: str = ""
    call: int = 0


NOWHERE = CallSite()


class OperandSite(NamedTuple):
    """A :class:`CallSite`, and which tensor of the call's operands; -1: none of them."""

    path: str
    function: str
    call: int
    operand: int

    @property
    def made(self) -> CallSite:
        """The call alone."""
        return CallSite(self.path, self.function, self.call)


class LayerInput(NamedTuple):
    """What the layer of a weight reads.

    Attributes:
      value: name of the value; empty where it is none, as a constant or another parameter.
      quantizer: whose grid the value is on when it is read, views and dropout looked through; empty where it is float.
    """

    value: str = ""
    quantizer: str = ""


NOTHING = LayerInput()


class Neutral:
    """What an attribute is on the kinds of sites that do not have it."""

    # Of values.
    value: str = ""
    argument: str = ""
    also: tuple[str, ...] = ()
    output: int = -1
    operand: int = -1
    more: tuple[OperandSite, ...] = ()
    # Of weights.
    parameter: str = ""
    axis: int = 0
    norm: str = ""
    bias: str = ""
    source: str = ""
    inputs: tuple[LayerInput, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Site(Neutral):
    """Where one quantizer sits, and what its arithmetic needs to know about the place.

    Attributes:
      quantizer: its name, ``<value>.post_act_fake_quantizer`` or ``<module path>.<parameter>_fake_quant``.
      role: ``"weight"`` or ``"activation"``.
      path: module path: the module that makes the value or owns the weight, or in which the function is called.
      paths: every path of that module, of further modules in its fused group (activations), and of every other module
        that uses the weight (weights).
      types: qualified names of the module's class and its bases, most special first, and of the modules around it.
      pattern: name of the fused pattern; empty outside fused groups.
      members: names of a fused group's calls; empty otherwise.
      function: canonical name; empty for modules and inputs.
      operation: that name, or that of the function which the module's class stands for (``sigmoid`` for ``nn.Sigmoid``).
      anchor: the call at which it acts; for the value of a group that of the last member.
      shape: of the tensor in the example.
      groups: of a convolution.
      aliases: further names of the quantizer, by other paths of its module and by tied weights.
      note: a remark for people.
    """

    role: ClassVar[Role]
    kind: ClassVar[str]

    quantizer: str
    path: str = ""
    paths: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    pattern: str = ""
    members: tuple[str, ...] = ()
    function: str = ""
    operation: str = ""
    anchor: CallSite = NOWHERE
    shape: tuple[int, ...] = ()
    groups: int = 1
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def call(self) -> int:
        """How many calls of the same module, or of the same function in it, come before the one at which it acts."""
        return self.anchor.call

    @property
    def input(self) -> LayerInput:
        """What the layer of a weight reads at its first call; of other quantizers, nothing."""
        return self.inputs[0] if self.inputs else NOTHING

    def places(self) -> tuple[OperandSite, ...]:
        """Each call at which it acts, and before which operand; -1: not before one."""
        return OperandSite(*self.anchor, self.operand), *self.more

    def names(self) -> tuple[str, ...]:
        """Every dotted name that a rule may call it: quantizer, value, and each module around it."""
        found = dict.fromkeys((self.quantizer, self.value, *self.also, *self.aliases))
        for path in self.paths:
            parts = path.split(".")
            found.update(dict.fromkeys(".".join(parts[:n]) for n in range(len(parts), 0, -1)))
        return tuple(name for name in found if name)

    @cached_property
    def spellings(self) -> frozenset[str]:
        """The same names with dots and with underscores. Every rule looks here, so they are put together once."""
        names = self.names()
        return frozenset((*names, *map(underscored, names)))

    def to_data(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {"kind": self.kind, **asdict(self)}

    def identity(self) -> dict[str, Any]:
        """The part of it that decides about numbers: what compares."""
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Site:
        """The inverse of :meth:`to_data`; a ``TypeError`` names a field that is missing, unknown or of a wrong type."""
        kinds = {cls.kind: cls for cls in (WeightSite, ComputedSite, ValueSite)}
        if data["kind"] not in kinds:
            raise TypeError(f"a site is one of {', '.join(kinds)}, got {data['kind']!r}")
        cls = kinds[data["kind"]]
        own = {name: value for name, value in data.items() if name != "kind"}
        names = {field.name for field in fields(cls)}
        if own.keys() != names:
            raise TypeError(f"the site of a {cls.kind} has the fields {sorted(names)}, got {sorted(own)}")
        return cls(**{name: _checked(cls, name, value) for name, value in own.items()})


@dataclass(frozen=True, kw_only=True)
class WeightSite(Site):
    """The quantizer of a parameter.

    Attributes:
      parameter: canonical name of the weight.
      axis: axis of the weight's output channels.
      norm: path of the BatchNorm that is folded into the weight; empty without.
      bias: canonical name of the layer's bias; empty without.
      source: quantizer whose scale, times the weight's, rounds the bias; empty where the bias is not rounded.
      shape: of the weight. It plays no part in comparisons, as the model has it; empty in plans read from version 2.
      inputs: what its layers read, each pair once, in execution order. Known when everything else is decided, so rules
        see none. It plays no part in comparisons, as it follows from other sites.
    """

    role: ClassVar[Role] = "weight"
    kind: ClassVar[str] = "weight"

    parameter: str = ""
    axis: int = 0
    norm: str = ""
    bias: str = ""
    source: str = ""
    shape: tuple[int, ...] = field(default=(), compare=False)
    inputs: tuple[LayerInput, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class ComputedSite(Site):
    """The quantizer of a weight that is computed in the forward; it acts at the call that multiplies with it.

    Attributes:
      axis: axis of the weight's output channels.
      operand: which tensor of a function's call the weight is; -1: it is computed inside a leaf module.
      inputs: as of a weight.
    """

    role: ClassVar[Role] = "weight"
    kind: ClassVar[str] = "computed weight"

    axis: int = 0
    operand: int = -1
    inputs: tuple[LayerInput, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True)
class ValueSite(Site):
    """The quantizer of a value, behind the call that makes it or before some that take it.

    Attributes:
      value: name of the value.
      argument: name of the model's input that it follows; empty elsewhere.
      also: further inputs of the model that are the same tensor.
      output: which tensor of the call's result; -1: an operand (see ``operand``).
      operand: which tensor of the call's operands; -1: a result.
      more: further calls before which it acts.
    """

    role: ClassVar[Role] = "activation"
    kind: ClassVar[str] = "value"

    value: str = ""
    argument: str = ""
    also: tuple[str, ...] = ()
    output: int = 0
    operand: int = -1
    more: tuple[OperandSite, ...] = ()


_RECORDS: Mapping[str, type[OperandSite] | type[LayerInput]] = {"more": OperandSite, "inputs": LayerInput}
"""Of which tuples a field has any number."""

_ITEMS: Mapping[type, tuple[type, ...]] = {
    CallSite: (str, str, int),
    OperandSite: (str, str, int, int),
    LayerInput: (str, str),
}


def _checked(cls: type[Site], name: str, value: Any) -> Any:
    """A field of a site as its type wants it, from JSON, where tuples are lists."""
    default = getattr(cls(quantizer=""), name)
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        if name == "anchor":
            return CallSite(*_items(name, value, _ITEMS[CallSite]))
        if name in _RECORDS:
            record = _RECORDS[name]
            return tuple(record(*_items(name, item, _ITEMS[record])) for item in value)
        return _items(name, value, (int if name == "shape" else str,) * len(value))
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
