"""Where one quantizer sits in a model. Sites are data, so that a plan can be stored in a file and read back.

There are three kinds: the site of a parameter (:class:`WeightSite`), of a weight that is computed in the forward
(:class:`ComputedSite`), and of a value (:class:`ValueSite`). The ``where`` of a rule may read any attribute of any kind: one
that a kind does not have is empty there (:class:`Neutral`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from sophq_func.config.names import underscored
from sophq_func.numerics.granularity import Axis

Role = Literal["weight", "activation"]

Data: TypeAlias = dict[str, Any]
"""An object of JSON."""


class CallSite(NamedTuple):
    """One call of a module, or of a function in a module.

    Attributes:
      path: of the module that is called, or in which the function is called.
      function: canonical name; empty for modules. Behind it stands, after an ``@``, the module that was called before where
        calls are told apart by that, see :class:`sophq_func.capture.graph.Node`.
      call: how many calls of the same module, or of the same function in it, come before; ``EVERY_CALL`` for all of them.
    """

    path: str = ""
    function: str = ""
    call: int = 0


NOWHERE = CallSite()

EVERY_CALL = -1
"""The number of a call that stands for every call of its place."""


class OperandSite(NamedTuple):
    """A :class:`CallSite`, and the slot of a tensor among the call's operands; -1 for the call as a whole."""

    path: str
    function: str
    call: int
    operand: int

    @property
    def made(self) -> CallSite:
        """The call alone."""
        return CallSite(self.path, self.function, self.call)

    @property
    def pair(self) -> tuple[str, str]:
        """Path and function: calls that have both in common are counted together."""
        return self.path, self.function


class LayerInput(NamedTuple):
    """What the layer of a weight reads.

    Attributes:
      value: name of the value; empty for a constant or another parameter.
      quantizer: name of the quantizer whose grid the value is on when it is read, be it before views or dropout; empty where
        the value is float.
    """

    value: str = ""
    quantizer: str = ""


NOTHING = LayerInput()


class Requant(NamedTuple):
    """How a chip brings integers onto the grid of a quantizer: by a small integer multiplier and a shift.

    A quantizer has one for each grid that the integers come from, its own first.

    Attributes:
      rule: ``"term"``: the quantizer acts on one term of a sum, or on one part of what is concatenated, and brings it onto
        the grid of the result; ``"unrounded term"``: the same, but the sum of all terms is shifted; ``"sum"``: the result
        of such terms; ``"product"``: the result of products or of a sum over many elements; ``"layer"``: that of a layer,
        whose multipliers have 31 bits; ``"layer in two shifts"``: the same, rounded after the first of two shifts, too;
        ``"quotient"``: the exact quotient, ties away from 0, as in the table of an activation's results for all codes.
      source: quantizer of the integers that come in.
      result: quantizer of the result; empty where that is the quantizer itself.
      number: how many integers are summed and divided by their number, as in average pooling.
      truncates: whether multipliers are rounded toward 0; else to the nearest.
      axis: of a layer's result, the axis of its channels, counted from the end.
    """

    rule: str
    source: str
    result: str = ""
    number: int = 1
    truncates: bool = False
    axis: int = -1


RULES_OF_LAYERS = frozenset(("layer", "layer in two shifts"))
"""Rules of a :class:`Requant` for the results of layers, whose weights may have a step for each channel."""

RULES_OF_TERMS = frozenset(("term", "unrounded term"))
"""Rules of a :class:`Requant` for terms of a sum, which name its result."""

RULES_OF_MULTIPLIERS = RULES_OF_LAYERS | RULES_OF_TERMS | {"sum", "product", "quotient"}
"""All rules of a :class:`Requant`."""


def shown(instance: Any) -> str:
    """A dataclass with the fields alone that differ from their defaults."""
    given = {f.name: getattr(instance, f.name) for f in fields(instance)}
    defaults = {f.name: f.default for f in fields(instance)}
    parts = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
    return f"{type(instance).__name__}({', '.join(parts)})"


class Neutral:
    """The values of attributes on the kinds of sites that do not have them."""

    # Attributes of values.
    value: str = ""
    argument: str = ""
    also: tuple[str, ...] = ()
    output: int = -1
    operand: int = -1
    more: tuple[OperandSite, ...] = ()
    requant: tuple[Requant, ...] = ()
    unsigned: bool = False
    # Attributes of weights.
    parameter: str = ""
    axis: Axis = 0
    norm: str = ""
    bias: str = ""
    source: str = ""
    inputs: tuple[LayerInput, ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Site(Neutral):
    """Where one quantizer sits in a model: what rules match, and what a built model needs to apply the quantizer.

    Attributes:
      quantizer: name of the quantizer: ``<module path>.<parameter>_fake_quant`` of a weight,
        ``<value>.post_act_fake_quantizer`` or ``<first call>.input_act_fake_quantizer`` of a value.
      role: ``"weight"`` or ``"activation"``.
      path: of the module that makes the value or owns the weight, or in which the function is called.
      paths: every path of that module, of further modules in its fused group (activations), and of every other module
        that uses the weight (weights).
      types: qualified names of the module's class and its bases, the class first, and of the modules around it.
      pattern: name of the fused pattern; empty outside fused groups.
      members: names of a fused group's calls; empty otherwise.
      function: canonical name of the function that is called; empty for modules and inputs.
      operation: canonical name of that function, or of the function that the module does (``sigmoid`` for ``nn.Sigmoid``).
      anchor: the call at which the quantizer acts; for the value of a group that of the last member.
      shape: of the tensor in the example.
      groups: of a convolution; else 1.
      aliases: further names of the quantizer, by other paths of its module and by tied weights.
      note: a remark for the table of a plan.
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

    def __repr__(self) -> str:
        return shown(self)

    @property
    def call(self) -> int:
        """How many calls of the same module, or of the same function in it, come before the anchor."""
        return self.anchor.call

    @property
    def input(self) -> LayerInput:
        """What the layer of a weight reads at its first call; ``NOTHING`` for values."""
        return self.inputs[0] if self.inputs else NOTHING

    @property
    def is_term(self) -> bool:
        """Whether the quantizer stands for a term of a sum inside a call, which is on the grid of the result."""
        return any(requant.result for requant in self.requant)

    def places(self) -> tuple[OperandSite, ...]:
        """Each call at which the quantizer acts, and the operand before which it does; -1 if it acts on a result."""
        return OperandSite(*self.anchor, self.operand), *self.more

    def names(self) -> tuple[str, ...]:
        """Every dotted name by which a rule matches: of the quantizer, its value or parameter, and each module around."""
        names = dict.fromkeys((self.quantizer, self.value, *self.also, *self.aliases))
        # what a function multiplies with is known by its own path, not by that of the module around the call
        for path in (*self.paths, *([self.parameter] if self.function else ())):
            names.update(dict.fromkeys(path_and_those_around(path)))
        return tuple(name for name in names if name)

    @cached_property
    def spellings(self) -> frozenset[str]:
        """The same names with dots and with underscores."""
        # Every rule reads them, so they are made once.
        names = self.names()
        return frozenset((*names, *map(underscored, names)))

    def to_data(self) -> Data:
        """The site as data that JSON can hold."""
        data = {"kind": self.kind, **asdict(self)}
        return {name: value for name, value in data.items() if value or name not in LATE_FIELDS}

    def identity(self) -> Data:
        """The fields that the numbers of a model depend on, as data: those that take part in comparisons."""
        return {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self) if self._is_told(f)}

    def _is_told(self, field: Field[Any]) -> bool:
        """Whether a field is one of :meth:`identity`."""
        return field.compare

    @staticmethod
    def from_data(data: Data) -> Site:
        """The inverse of :meth:`to_data`.

        Raises:
          TypeError: a field is missing, unknown or of a wrong type.
          ValueError: a number is out of its range.
        """
        cls = _KINDS.get(data["kind"])
        if cls is None:
            raise TypeError(f"a site is one of {', '.join(_KINDS)}, got {data['kind']!r}")
        defaults = _DEFAULTS[cls.kind]
        values = {name: value for name, value in data.items() if name != "kind"}
        if not defaults.keys() - LATE_FIELDS <= values.keys() <= defaults.keys():
            raise TypeError(f"the site of a {cls.kind} has the fields {sorted(defaults)}, got {sorted(values)}")
        return cls(**{name: _field_from_data(name, value, defaults[name]) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True, repr=False)
class WeightSite(Site):
    """The quantizer of a parameter.

    Attributes:
      parameter: canonical name of the weight.
      axis: axis of the weight's output channels; a tuple where there are several, or none: the axes that no call that
        multiplies with the weight sums over.
      norm: path of the BatchNorm that is folded into the weight; empty without.
      bias: canonical name of the layer's bias; empty without.
      source: quantizer whose scale, times the weight's, rounds the bias; empty where the bias is not rounded.
      shape: of the weight; empty in plans read from version 2. It plays no part in comparisons, as the model has it.
      inputs: what its layers read, each once, in execution order. They are found after everything else is decided, so a
        rule sees none. They play no part in comparisons, as they follow from other sites.
    """

    role: ClassVar[Role] = "weight"
    kind: ClassVar[str] = "weight"

    parameter: str = ""
    axis: Axis = 0
    norm: str = ""
    bias: str = ""
    source: str = ""
    shape: tuple[int, ...] = field(default=(), compare=False)
    inputs: tuple[LayerInput, ...] = field(default=(), compare=False)


@dataclass(frozen=True, kw_only=True, repr=False)
class ComputedSite(Site):
    """The quantizer of a weight that is computed in the forward; it acts at the call that multiplies with the weight.

    Attributes:
      axis: as that of a :class:`WeightSite`.
      operand: slot of the weight among the operands of a function; -1 for one that is computed inside a leaf module.
      more: further calls that multiply with the weight.
      inputs: as those of a :class:`WeightSite`.
    """

    role: ClassVar[Role] = "weight"
    kind: ClassVar[str] = "computed weight"

    axis: Axis = 0
    operand: int = -1
    more: tuple[OperandSite, ...] = ()
    inputs: tuple[LayerInput, ...] = field(default=(), compare=False)

    def _is_told(self, field: Field[Any]) -> bool:
        # Without further calls the identity is that of version 3 of a plan's text, so that old checkpoints fit.
        return super()._is_told(field) and (field.name != "more" or bool(self.more))


@dataclass(frozen=True, kw_only=True, repr=False)
class ValueSite(Site):
    """The quantizer of a value, behind the call that makes the value or before some calls that take it.

    Attributes:
      value: name of the value.
      argument: name of the model's input that is quantized; empty elsewhere.
      also: names of further inputs of the model that are the same tensor.
      output: index of the tensor in the call's result; -1 for an operand.
      operand: slot of the tensor among the call's operands; -1 for a result.
      more: further calls before which the quantizer acts.
      requant: how a chip brings integers onto its grid; empty where the exact quotient is rounded. It is found after
        everything else is decided, so a rule sees none.
      unsigned: whether the chip has the codes from 0 without a zero point, so that none may be learned; found as late.
    """

    role: ClassVar[Role] = "activation"
    kind: ClassVar[str] = "value"

    value: str = ""
    argument: str = ""
    also: tuple[str, ...] = ()
    output: int = 0
    operand: int = -1
    more: tuple[OperandSite, ...] = ()
    requant: tuple[Requant, ...] = ()
    unsigned: bool = False

    def _is_told(self, field: Field[Any]) -> bool:
        # Without them the identity is that of older texts, so that old checkpoints fit.
        is_late = field.name in LATE_FIELDS
        return super()._is_told(field) and (not is_late or bool(getattr(self, field.name)))


LATE_FIELDS = frozenset(("requant", "unsigned"))
"""Fields that a text has only where they are not empty: older texts of the same version do not have them."""

_RECORDS: Mapping[str, type[OperandSite] | type[LayerInput] | type[Requant]] = {
    "more": OperandSite,
    "inputs": LayerInput,
    "requant": Requant,
}
"""By field, the type of which it has any number."""

_ITEMS: Mapping[type, tuple[type, ...]] = {
    CallSite: (str, str, int),
    OperandSite: (str, str, int, int),
    LayerInput: (str, str),
    Requant: (str, str, str, int, bool, int),
}
"""By type, the types of its fields."""

_LEAST: Mapping[str, int] = {"output": -1, "operand": -1, "call": EVERY_CALL, "groups": 1, "number": 1}
"""By field of a site, a call or a :class:`Requant`, the least number that it may be."""

_MOST_ELEMENTS = 2**60
"""More elements has no tensor of an example: torch counts bytes in 63 bits."""

_KINDS: Mapping[str, type[Site]] = {cls.kind: cls for cls in (WeightSite, ComputedSite, ValueSite)}
"""By its name in JSON, a kind of site."""


def _defaults(cls: type[Site]) -> dict[str, object]:
    empty = cls(quantizer="")
    return {field.name: getattr(empty, field.name) for field in fields(cls)}


# made once: a large plan has thousands of sites
_DEFAULTS: Mapping[str, Mapping[str, object]] = {kind: _defaults(cls) for kind, cls in _KINDS.items()}
"""By kind of site, the default of each field; its type is that of the field."""


def _field_from_data(name: str, value: object, default: object) -> Any:
    """A field of a site, from its JSON data, which has lists in the place of tuples."""
    if type(value) is str and type(default) is str:  # most fields: a large plan has a million
        return value
    if name == "axis" and isinstance(value, list | tuple):
        return _items(name, value, (int,) * len(value))
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return _tuple_from_data(name, value) if value or default else ()
    # ``isinstance`` would take a bool for an int.
    if type(value) is not type(default):
        raise TypeError(f"{name} of a site cannot be {value!r}")
    return _in_range(name, value)


def _tuple_from_data(name: str, value: Sequence[object]) -> tuple[Any, ...]:
    """A field that is a tuple, from a list."""
    if name == "anchor":
        return _record(name, CallSite, value)
    if name in _RECORDS:
        return tuple(_record(name, _RECORDS[name], item) for item in value)
    if name != "shape":
        return _items(name, value, (str,) * len(value))
    shape: tuple[int, ...] = _items(name, value, (int,) * len(value))
    if any(size < 0 for size in shape) or prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"shape of a site cannot be {value!r}")
    return shape


def _record(name: str, record: Any, value: object) -> tuple[Any, ...]:
    """One of the named tuples in a site."""
    made: tuple[Any, ...] = record(*_items(name, value, _ITEMS[record]))
    for part, item in zip(record._fields, made, strict=True):
        _in_range(part, item)
    return made


def _in_range(name: str, value: Any) -> Any:
    """A value of a field, after a check that it is no smaller than it may be."""
    if name in _LEAST and value < _LEAST[name]:
        raise ValueError(f"{name} of a site cannot be {value!r}")
    return value


def _items(name: str, value: object, expected: tuple[type, ...]) -> tuple[Any, ...]:
    """The items of a list, which must be of the expected types."""
    if not isinstance(value, list | tuple) or tuple(map(type, value)) != expected:
        raise TypeError(f"{name} of a site cannot hold {value!r}")
    return tuple(value)


def path_and_those_around(path: str) -> list[str]:
    """A dotted path, and those of which it is a part.

    Example:
      >>> path_and_those_around("layers.0.weight")
      ['layers.0.weight', 'layers.0', 'layers']
    """
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


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
