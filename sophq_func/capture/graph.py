"""What a trace knows: calls, the values they make, and who feeds whom. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sophq_func.core.operations import family

Class: TypeAlias = type
"""``type``, where an attribute has that name."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One tensor that a call takes.

    Attributes:
      role: its argument: ``"0"`` the first, ``"weight"`` by keyword, ``"0.1"`` the second item of a list given first.
      slot: its index among all tensors of the call.
      value: the value that it is; empty for parameters and constants.
      parameter: canonical name of the parameter that it is.
      stale: the value made by an in-place operation that wrote into this tensor before; the tensor is used here under a
        name that it, or a view of it, had before that.
    """

    role: str
    slot: int
    value: str = ""
    parameter: str = ""
    stale: str = ""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One tensor that a call makes, or an input of the model.

    Attributes:
      name: unique; the call's name, with ``.<index>`` where the call makes several tensors.
      node: name of the call.
      index: which of its tensors.
      floating: whether its dtype is a floating one.
      shape: of the example.
      output: whether the model returns it.
      view: whether it shares memory with an operand of its call.
      overwritten: whether the model returns it under a name that it had before an operation in place.
    """

    name: str
    node: str
    index: int
    floating: bool
    shape: tuple[int, ...]
    output: bool = False
    view: bool = False
    overwritten: bool = False


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call, or one input of the model, or (after fusion) a group of calls that is quantized as one.

    Attributes:
      name: ``layer1.0.conv1``, ``layer1.0.add``, ``x``; ``_1``, ``_2`` for further calls. A group has its first name.
      kind: ``"input"``, ``"module"`` or ``"function"``.
      path: path of the leaf module called, or of the module in which a function is called.
      paths: every path of that module; more than one where it is registered twice.
      function: canonical name; empty for modules.
      call: how many counted calls of this module, or of this function in this module, came before.
      counted: whether a floating tensor goes in or comes out; arithmetic on indices differs between ways of running.
      type: class of the leaf module, or of the fused pattern; ``None`` for functions and inputs.
      operands: the tensors it takes.
      outputs: names of the values it makes.
      parameters: canonical names of a leaf module's own tensors, by attribute.
      options: plain attributes of a leaf module that decide about quantization (``groups``, ``eps``, ...).
      members: the calls of a fused group, first to last; empty otherwise.
      argument: of an input, the model's own name for it.
      also: names of further inputs of the model that the example gave the same tensor.
    """

    name: str
    kind: str
    path: str
    paths: tuple[str, ...]
    function: str = ""
    call: int = 0
    counted: bool = True
    type: type | None = None
    operands: tuple[Operand, ...] = ()
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[Node, ...] = ()
    argument: str = ""
    also: tuple[str, ...] = ()

    @property
    def first(self) -> Node:
        """The call that takes the node's operands."""
        return self.members[0] if self.members else self

    @property
    def last(self) -> Node:
        """The call whose result is the node's value."""
        return self.members[-1] if self.members else self

    @property
    def norm(self) -> Node | None:
        """The BatchNorm right behind the first member, if the group has one."""
        return next((m for m in self.members[1:2] if m.operation == "batch_norm"), None)

    @property
    def operation(self) -> str:
        """What the call, or a group's first, does: the function's name; of a module that which its class stands for."""
        lead = self.members[0] if self.members else self
        return family(lead.type) if lead.kind == "module" and lead.type is not None else lead.function

    def is_module(self, *types: Class) -> bool:
        """Whether it calls a leaf module of one of these classes, or is a group that starts with one."""
        lead = self.members[0] if self.members else self
        return lead.kind == "module" and lead.type is not None and issubclass(lead.type, types)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One call of a module that is no leaf.

    Attributes:
      path: of the module, the first where it has several.
      start, stop: the calls made in it are those from ``start`` up to ``stop`` in the order of execution, inputs counted.
    """

    path: str
    start: int
    stop: int


class Graph:
    """Calls in execution order.

    Attributes:
      nodes: by name, in execution order, inputs first.
      values: by name.
      modules: class of each module, by path, every path of shared modules included.
      opaque: paths of modules that the trace was told not to look into.
      written: names of inputs that the model writes into.
      scopes: calls of modules that are no leaves, in the order in which they end.
      shapes: of the parameters and buffers, by canonical name.
    """

    def __init__(
        self,
        nodes: Mapping[str, Node],
        values: Mapping[str, Value],
        modules: Mapping[str, type],
        opaque: tuple[str, ...] = (),
        written: tuple[str, ...] = (),
        scopes: tuple[Scope, ...] = (),
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.nodes, self.values, self.modules = dict(nodes), dict(values), dict(modules)
        self.opaque, self.written, self.scopes, self.shapes = opaque, written, scopes, dict(shapes or {})
        self._users: dict[str, list[tuple[Node, Operand]]] = {name: [] for name in self.values}
        for node in self:
            for operand in node.operands:
                if operand.value:
                    self._users[operand.value].append((node, operand))

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def users(self, value: str) -> list[tuple[Node, Operand]]:
        """Each use of a value: the call, and the operand that it is there."""
        return self._users[value]

    def producer(self, value: str) -> Node:
        """The call that makes a value."""
        return self.nodes[self.values[value].node]

    def __repr__(self) -> str:
        lines = [
            f"{node.name}({', '.join(o.value or o.parameter or '...' for o in node.operands)})"
            for node in self
            if node.kind != "input"
        ]
        inputs = ", ".join(node.name for node in self if node.kind == "input")
        return "\n".join([f"Graph({inputs}):", *(f"  {line}" for line in lines)])
