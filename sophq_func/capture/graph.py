"""The record of a trace: calls, the values that they make, and which call takes which value. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from sophq_func.capture.axes import Axes
from sophq_func.core.operations import family
from sophq_func.core.texts import printable
from sophq_func.core.types import Args, Kwargs

Class: TypeAlias = type
"""The builtin ``type``, for annotations in a class whose field ``type`` hides it."""

Option: TypeAlias = Any
"""Value of a module's plain attribute: a bool, a number, or a tuple of ints."""


class Factor(NamedTuple):
    """A tensor that a leaf module multiplies and sums, and that depends on parameters alone.

    Attributes:
      function: canonical name of the function that multiplies.
      slot: index of the tensor among all tensors of that call.
      parameter: canonical name of the parameter that it is, or of which it is a view; empty where it is computed.
      sources: canonical names of all parameters that it is computed from.
      shape: of the tensor in the example.
    """

    function: str
    slot: int
    parameter: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


REPARAMETRIZE = "reparametrize"
"""``Node.function`` of a tensor that a parametrization, or a hook before a module's forward, computes from parameters."""


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One tensor that a call takes.

    Attributes:
      role: which argument: ``"0"`` the first, ``"weight"`` a keyword, ``"0.1"`` the second item of a list given first.
      slot: its index among all tensors of the call.
      value: name of the value that it is; empty for parameters and constants.
      parameter: canonical name of the parameter that it is; empty for others.
      stale: name of the value that an in-place operation wrote into the memory of this tensor, where the call is given
        the tensor object from before that operation; else empty. A call with that object does not see the tensor that a
        quantizer puts in the place of the value.
      shape: of the tensor in the traced example.
      axes: of a parameter, or a tensor that was only moved from one: for each axis, which axes of the parameter run along
        it (:mod:`sophq_func.capture.axes`); ``None`` for others.
      kind: ``"complex"`` or ``"sparse"`` where its numbers are so; else empty.
    """

    role: str
    slot: int
    value: str = ""
    parameter: str = ""
    stale: str = ""
    shape: tuple[int, ...] = ()
    axes: Axes | None = None
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One tensor that a call makes, or an input of the model.

    Attributes:
      name: unique; the call's name, with ``.<index>`` where the call makes several tensors.
      node: name of the call.
      index: its place among the tensors that the call makes, from 0.
      floating: whether its dtype is a floating one, and it is dense.
      shape: that of the tensor in the traced example.
      output: whether the model returns it.
      view: whether it shares memory with an operand of its call.
      overwritten: whether the model returns it and an in-place operation has written into its memory.
      kind: ``"complex"`` or ``"sparse"`` where its numbers are so; else empty.
    """

    name: str
    node: str
    index: int
    floating: bool
    shape: tuple[int, ...]
    output: bool = False
    view: bool = False
    overwritten: bool = False
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One call, or one input of the model, or (after fusion) a group of calls that is quantized as one.

    Attributes:
      name: ``layer1.0.conv1``, ``layer1.0.add``, ``x``; with ``_1``, ``_2`` for further calls. A group has the name of its
        first call.
      kind: ``"input"``, ``"module"`` or ``"function"``.
      path: path of the leaf module called, or of the module in which a function is called.
      paths: every path of that module; more than one where it is registered twice.
      function: canonical name; empty for modules.
      call: number of the call, from 0: how many counted calls of this module, or of this function in this module, came
        before.
      counted: whether a floating tensor goes in or comes out. Other calls, such as arithmetic on indices, do not count,
        since a compiled run may leave some out.
      type: class of the leaf module, or of the fused pattern; ``None`` for functions and inputs.
      operands: the tensors that it takes.
      outputs: names of the values that it makes.
      parameters: canonical names of a leaf module's own tensors, by attribute.
      options: plain attributes of a leaf module that decide about quantization (``groups``, ``eps``, ...).
      constants: of a contraction, its arguments that are no tensors, by role: the equation of an ``einsum``.
      factors: what a leaf module multiplies inside, as far as it is its own.
      multiplications: how many the call makes in products that are summed, inside leaf modules, too; see
        :func:`sophq_func.capture.products.multiplications`.
      members: the calls of a fused group, first to last; empty otherwise.
      argument: of an input, the name of the argument of ``forward``.
      also: of an input, names of further arguments for which the example has the same tensor.
      after: the module with parameters that the scope around the call called last before: its path; empty at the start of
        the scope. To take an item of a parameter by its number counts as one: ``experts.weight[2]``.
      told_apart: whether calls of this module, or of this function in this module, are counted apart for each ``after``,
        since examples come to them by different ways.
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
    options: Mapping[str, Option] = field(default_factory=dict)
    constants: Mapping[str, Option] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    multiplications: int = 0
    members: tuple[Node, ...] = ()
    argument: str = ""
    also: tuple[str, ...] = ()
    after: str = ""
    told_apart: bool = False

    @property
    def step(self) -> str:
        """What calls in or of ``path`` are counted by: the function, and what was called before where that matters."""
        return step(self.function, self.after) if self.told_apart else self.function

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
        """The BatchNorm that is the second member of a group; ``None`` where there is none."""
        # Only a BatchNorm directly behind the layer can be folded into its weight.
        if len(self.members) < 2 or self.members[1].operation != "batch_norm":
            return None
        return self.members[1]

    @property
    def operation(self) -> str:
        """Canonical name of the function that is called; for a module, of the function that its class stands for.

        A group has the operation of its first call.
        """
        first = self.first
        if first.kind == "module" and first.type is not None:
            return family(first.type)
        return first.function

    def is_module(self, *types: Class) -> bool:
        """Whether it calls a leaf module of one of these classes, or is a group whose first call does."""
        first = self.first
        return first.kind == "module" and first.type is not None and issubclass(first.type, types)


def step(function: str, after: str) -> str:
    """What the calls of a function (empty for a module's own calls) are counted by, if they are told apart.

    Example:
      >>> step("mul", "experts.2"), step("mul", "")
      ('mul@experts.2', 'mul@')
    """
    return f"{function}@{after}"


def is_told_apart(step: str) -> bool:
    """Whether a step is that of calls that are told apart."""
    return "@" in step


def function_of(step: str) -> str:
    """The function in a step, told apart or not.

    Example:
      >>> function_of("mul@experts.2"), function_of("mul")
      ('mul', 'mul')
    """
    return step.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """One call of a module that is not a leaf.

    Attributes:
      path: of the module, the first where it has several.
      start: index of the first call made in it, among the nodes of the graph.
      stop: index of the last one, plus 1.
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
      opaque: paths of modules that the user made leaves.
      written: names of inputs that the model writes into.
      scopes: calls of modules that are not leaves, in the order in which they end.
      shapes: of the parameters and buffers, by canonical name.
      kinds: of those parameters and buffers that are complex or sparse, which of the two, by canonical name.
      example: the positional and keyword arguments that were traced, with tensors on ``meta``, which have shape and dtype
        alone; ``None`` where the arguments hold other objects than tensors and plain values.
      buffers: canonical names of the buffers.
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
        kinds: Mapping[str, str] | None = None,
        example: tuple[Args, Kwargs] | None = None,
        buffers: frozenset[str] = frozenset(),
    ) -> None:
        self.nodes, self.values, self.modules = dict(nodes), dict(values), dict(modules)
        self.opaque, self.written, self.scopes, self.shapes = opaque, written, scopes, dict(shapes or {})
        self.kinds, self.example, self.buffers = dict(kinds or {}), example, buffers
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
        """Each call that takes a value, with the operand as which it takes the value."""
        return self._users[value]

    def producer(self, value: str) -> Node:
        """The call that makes a value."""
        return self.nodes[self.values[value].node]

    def changed(self, nodes: Mapping[str, Node]) -> Graph:
        """The graph with other nodes in the place of some, by their names; a value takes the name of its node.

        Args:
          nodes: by present name. They may have other names, and else differ in what does not concern values.
        """
        names: dict[str, str] = {}
        for old, new in nodes.items():
            outputs = self.nodes[old].outputs
            names.update({value: value.replace(old, new.name, 1) for value in outputs})

        def renamed(node: Node) -> Node:
            operands = tuple(
                replace(o, value=names.get(o.value, o.value), stale=names.get(o.stale, o.stale)) for o in node.operands
            )
            outputs = tuple(names.get(value, value) for value in node.outputs)
            return replace(node, operands=operands, outputs=outputs)

        changed = [renamed(nodes.get(name, node)) for name, node in self.nodes.items()]
        values = [
            replace(value, name=names.get(name, name), node=nodes[value.node].name if value.node in nodes else value.node)
            for name, value in self.values.items()
        ]
        return Graph(
            {node.name: node for node in changed},
            {value.name: value for value in values},
            self.modules,
            self.opaque,
            self.written,
            self.scopes,
            self.shapes,
            self.kinds,
            self.example,
            self.buffers,
        )

    def __repr__(self) -> str:
        inputs = [node.name for node in self if node.kind == "input"]
        return printable(f"Graph({', '.join(inputs)}: {len(self) - len(inputs)} calls)")

    def __str__(self) -> str:
        inputs = ", ".join(node.name for node in self if node.kind == "input")
        lines = [f"Graph({inputs}):"]
        for node in self:
            if node.kind != "input":
                # "..." stands for a constant, which has no name.
                operands = ", ".join(o.value or o.parameter or "..." for o in node.operands)
                lines.append(f"  {node.name}({operands})")
        return "\n".join(map(printable, lines))
