"""The frame that records each call of a run as a node of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sophq_func.capture import axes
from sophq_func.capture._torch import parameters_in, without_fakes
from sophq_func.capture.frame import Frame, Function, item
from sophq_func.capture.graph import REPARAMETRIZE, Factor, Graph, Node, Operand, Scope, Value
from sophq_func.capture.naming import CallNames
from sophq_func.capture.products import multiplications, multiplied
from sophq_func.capture.skeleton import Skeleton
from sophq_func.capture.tensors import (
    SPARSE,
    constants_of,
    is_floating,
    kind_of,
    layout_of,
    share_memory,
    storage_of,
    versions_of,
)
from sophq_func.capture.transforms import depth, innermost, whole
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.operations import CONTRACTIONS, LAYERS, MOVES, called
from sophq_func.core.pytree import flatten, has_floating, named_leaves, tensors
from sophq_func.core.types import Args, Kwargs, Output

UNSEEN = frozenset(("requires_grad", "make_dual"))
"""Functions that mark their operand for a derivative and return it, so that they are no calls of the model."""

OPTIONS = (
    "affine",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
    "eps",
    "groups",
    "kernel_size",
    "num_features",
    "out_channels",
    "out_features",
    "padding",
    "track_running_stats",
)
"""Attributes of leaf modules on which quantization depends."""


class _Input(NamedTuple):
    """A tensor among the model's arguments, the copy with which the model runs, and the name of its value."""

    original: Tensor
    copy: Tensor
    value: str


class _Known(NamedTuple):
    """A tensor of the run, and the operand that it is in a call that takes it (but for role and slot).

    The tensor is kept alive until the run ends, so that no other tensor gets its identity or its storage.
    """

    tensor: Tensor
    operand: Operand


class _Moved(NamedTuple):
    """Where on a parameter the numbers of a tensor lie: their indices along each axis, and which axes run along which."""

    indices: list[Tensor]
    axes: axes.Axes


class _Origin(NamedTuple):
    """Where a tensor comes from that depends on parameters alone.

    Attributes:
      parameter: canonical name of the parameter that it is, or of which it is a view; empty where it is computed.
      sources: canonical names of all parameters that it is computed from, in order.
    """

    parameter: str
    sources: tuple[str, ...]


class _Derived(NamedTuple):
    """A tensor that was computed, inside a leaf or a hook, from parameters alone; kept alive until the run ends."""

    tensor: Tensor
    origin: _Origin


PAD = (
    "plan with torch.nested.to_padded_tensor(x, 0.0); a model whose weights alone are quantized runs on nested tensors, too"
)
"""What to do instead of planning with a nested tensor."""


UNKNOWN = Operand(role="", slot=0)
"""The operand for a tensor that no recorded call made, such as a constant."""


class Recorder(Frame):
    """Records each call of a run as a node of the graph.

    Tensors are told apart by identity. Therefore a call that returns its own operand returns a view of it here.

    Args:
      skeleton: whose run is recorded.
      escaped: names of the tensors that the user's model holds, by identity. A run has its own: a call that takes one of
        these was made by a layer that is not in the copy of the model.
    """

    def __init__(self, skeleton: Skeleton, escaped: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._escaped = escaped or {}
        self._nodes: dict[str, Node] = {}
        self._values: dict[str, Value] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, str] = {}
        self._moved: dict[int, _Moved] = {}  # tensors that were only moved from a parameter, by identity
        self._names = CallNames(skeleton.paths)
        self._counts: dict[tuple[str, str], int] = {}  # of counted calls, by path and function
        self._inputs: dict[int, _Input] = {}  # by identity of the original
        self._known: dict[int, _Known] = {}  # by identity of the tensor
        self._in_storage: dict[int, list[int]] = {}  # identities of known tensors, by storage
        self._starts: list[int] = []  # of the scopes that are running
        self._scopes: list[Scope] = []
        self._before: dict[int, int] = {}  # versions of the operands of the leaf that is running
        self._derived: dict[int, _Derived] = {}  # by identity
        self._varying: dict[int, Tensor] = {}  # what the leaf that is running computes from its operands, by identity
        self._factors: list[Factor] = []  # of the leaf that is running
        self._multiplications = 0  # of the same
        self._outer = depth()  # transforms around the run

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._shapes[name] = tuple(tensor.shape)
            if kind := kind_of(tensor):
                self._kinds[name] = kind
            self._note(tensor, replace(UNKNOWN, parameter=name))

    def enter_scope(self, path: str, args: Args, kwargs: Kwargs) -> None:
        self._starts.append(len(self._nodes))

    def leave_scope(self, path: str, args: Args, kwargs: Kwargs, output: Output) -> None:
        self._scopes.append(Scope(path=path, start=self._starts.pop(), stop=len(self._nodes)))

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """Record an argument of the model, and return a copy, into which the model may write.

        A tensor that is given as several arguments is one value.
        """
        if id(tensor) in self._inputs:
            first = self._inputs[id(tensor)]
            node = self._nodes[first.value]
            self._nodes[first.value] = replace(node, also=(*node.also, name))
            return first.copy
        copy = tensor.clone()  # with a gradient where the example has one: the model may ask for it
        value = self._names.take(self._names.input(name))
        self._inputs[id(tensor)] = _Input(tensor, copy, value)
        self._add(Node(name=value, kind="input", path="", paths=("",), argument=name), [copy])
        return copy

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self._before = versions_of((args, kwargs))
        self._varying, self._factors, self._multiplications = {}, [], 0
        return args, kwargs

    def inner_function(self, func: Function, args: Args, kwargs: Kwargs) -> Output:
        output = func(*args, **kwargs)
        name, given = called(func), tensors((args, kwargs))
        origins = [self._origin(tensor) for tensor in given]
        if not self.computing:
            self._multiplications += multiplications(name, args, kwargs, output)
            self._factors += self._factors_of(name, args, kwargs)
        known = [origin for origin in origins if origin is not None]
        if any(map(self._varies, given)):
            self._varying.update({id(tensor): tensor for tensor in tensors(output)})
        elif known:
            sources = tuple(dict.fromkeys(source for origin in known for source in origin.sources))
            is_view = len(given) == 1 and name in MOVES
            origin = _Origin(known[0].parameter if is_view else "", sources)
            self._derived.update({id(tensor): _Derived(tensor, origin) for tensor in tensors(output)})
        return output

    def after_hook(self, path: str, module: nn.Module) -> None:
        for attribute, tensor in vars(module).items():
            if isinstance(tensor, Tensor) and id(tensor) in self._derived:
                self._reparametrized(path, attribute, tensor)

    def _factors_of(self, name: str, args: Args, kwargs: Kwargs) -> list[Factor]:
        """The tensors that a call inside a leaf multiplies and sums, as far as they depend on parameters alone."""
        factors = []
        for slot, tensor in multiplied(name, args, kwargs):
            origin = self._origin(tensor)
            if kind_of(tensor):
                continue
            if origin is not None:
                factors.append(Factor(name, slot, origin.parameter, origin.sources, tuple(tensor.shape)))
            elif LAYERS.get(name) == slot:  # a tensor that the model binds to the layer in the place of its weight
                factors.append(Factor(name, slot, "", (), tuple(tensor.shape)))
        return factors

    def _origin(self, tensor: Tensor) -> _Origin | None:
        """Where a tensor comes from; ``None`` for one that no parameter is known to be a source of."""
        if id(tensor) in self._derived:
            return self._derived[id(tensor)].origin
        parameter = self._operand(tensor).parameter
        return _Origin(parameter, (parameter,)) if parameter else None

    def _varies(self, tensor: Tensor) -> bool:
        """Whether a tensor inside a leaf depends on what the leaf is given."""
        if id(tensor) in self._derived:
            return False
        return id(tensor) in self._varying or bool(self._operand(tensor).value)

    def _reparametrized(self, path: str, attribute: str, tensor: Tensor) -> None:
        """Record that a module computed one of its attributes from its own tensors, unless that is recorded already."""
        known = self._operand(tensor)
        if known.value or known.parameter:
            return
        node = Node(
            name=self._names.take(self._names.function(path, attribute)),
            kind="function",
            path=path,
            paths=self._skeleton.paths[path],
            function=REPARAMETRIZE,
            # a run does not report it: what a module computes from its own tensors is no call of the model
            counted=False,
            options={"attribute": attribute},
        )
        origin = self._origin(tensor)
        sources = () if origin is None else origin.sources
        operands = tuple(Operand(role=str(slot), slot=slot, parameter=source) for slot, source in enumerate(sources))
        self._add(replace(node, operands=operands), [tensor])

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        if isinstance(module, ParametrizationList):
            # its path is "<owner>.parametrizations.<attribute>", without the owner where that is the whole model
            prefix, _, attribute = path.rpartition(".")
            self._reparametrized(prefix.removesuffix("parametrizations").removesuffix("."), attribute, output)
            return output
        counted = has_floating(args, kwargs, output)
        node = Node(
            name=self._names.take(self._names.module(path or type(module).__name__.lower())),
            kind="module",
            path=path,
            paths=self._skeleton.paths[path],
            call=self._count(path, "", counted),
            counted=counted,
            type=type(module),
            parameters=self._parameters(path, module),
            options={name: getattr(module, name) for name in OPTIONS if hasattr(module, name)},
            factors=tuple(dict.fromkeys(self._factors)),
            multiplications=self._multiplications,
            after=self.before[-1],
        )
        return self._record(node, self._before, args, kwargs, output)

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        self._check_escaped(name, args, kwargs)  # before the call, which may write into a buffer of the user's
        before = versions_of((args, kwargs))
        try:
            output = func(*args, **kwargs)
        except RuntimeError as error:
            if name == "grad":
                raise self._no_gradient(error) from error
            raise
        if name in UNSEEN:
            self._note(output, self._operand(args[0]))
            return output
        if name == "setitem":  # returns nothing; the value that it makes is the tensor it writes into
            output = args[0]
        if not tensors(output):
            return output
        path, counted = self.scope, has_floating(args, kwargs, output)
        node = Node(
            name=self._names.take(self._names.function(path, name)),
            kind="function",
            path=path,
            paths=self._skeleton.paths[path],
            function=name,
            call=self._count(path, name, counted),
            counted=counted,
            constants=constants_of(func, args, kwargs) if name in CONTRACTIONS else {},
            after=self.before[-1],
            multiplications=multiplications(name, args, kwargs, output),
        )
        self._note_item(name, args)
        recorded = self._record(node, before, args, kwargs, output)
        if name in axes.FOLLOWED:
            self._follow(name, func, args, kwargs, tensors(recorded))
        return None if name == "setitem" else recorded

    def _note_item(self, function: str, args: Args) -> None:
        """Note a parameter's item that is taken by its number: calls are told apart by it as by a module."""
        number = item(function, args)
        parameter = self._operand(args[0]).parameter if number is not None else ""
        if parameter:
            self.before[-1] = f"{parameter}[{number}]"

    def _check_escaped(self, function: str, args: Args, kwargs: Kwargs) -> None:
        """Raise a :class:`PlanError` if a call takes a tensor of the user's model."""
        if not self._escaped:
            return
        names = {self._escaped[id(tensor)] for tensor in tensors((args, kwargs)) if id(tensor) in self._escaped}
        if names:
            place = f"{self.scope}.{function}".lstrip(".")
            sentence = f"{' and '.join(sorted(names))} reach this call past params"
            because = "a function that forward calls holds a layer in its closure, and a run cannot replace it there"
            fix = "make the function a method of the model, or give it the layer as an argument"
            raise PlanError(explain(place, sentence, because=because, fix=fix))

    def _no_gradient(self, error: RuntimeError) -> PlanError:
        """The error for a gradient that the model asks for in its forward and that torch cannot compute."""
        fix = "give an example that requires grad; for gradients of parameters call torch.func.grad of functional_call"
        because = f"params are detached, and torch says: {error}"
        where = self.scope or "the model"
        return PlanError(explain(where, "torch.autograd.grad in forward finds no gradient", because=because, fix=fix))

    def _parameters(self, path: str, module: nn.Module) -> dict[str, str]:
        """Canonical names of the tensors with which a leaf module was called, by attribute.

        A parameter may be another one of the model, or none, where the model binds its own tensor for the time of the call.
        """
        held = parameters_in(module)
        names = dict(self._skeleton.owned[path])
        for attribute in names.keys() & held.keys():
            names[attribute] = self._operand(held[attribute]).parameter
        return {attribute: name for attribute, name in names.items() if name}

    def reached(self) -> set[str]:
        """Canonical names of the tensors of all modules that were called."""
        paths = {scope.path for scope in self._scopes} | {node.path for node in self._nodes.values()}
        return {name for path in paths for name in self._skeleton.owned[path].values()}

    def graph(self, output: Output, model: nn.Module, opaque: tuple[str, ...]) -> Graph:
        """The graph of the recorded run; ``output`` is what the model returned."""
        for tensor in tensors(output):
            operand = self._operand(tensor)
            for name in filter(None, {operand.value, operand.stale}):
                overwritten = self._values[name].overwritten or bool(operand.stale)
                self._values[name] = replace(self._values[name], output=True, overwritten=overwritten)
        modules = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
        written = [self._nodes[value].argument for _, copy, value in self._inputs.values() if writes_into(copy)]
        return Graph(
            self._nodes,
            self._values,
            modules,
            opaque,
            tuple(written),
            tuple(self._scopes),
            self._shapes,
            self._kinds,
            buffers=self._skeleton.buffers,
        )

    def _follow(self, name: str, func: Function, args: Args, kwargs: Kwargs, made: list[Tensor]) -> None:
        """Note where on a parameter the numbers of some results lie, if a call only moved them from there."""
        taken = tensors((args, kwargs))
        if not taken:
            return
        source = taken[0]
        known = self._moved.get(id(source))
        if known is None and not (self._operand(source).parameter and is_floating(source)):
            return
        with self.aside(), without_fakes():
            indices = axes.indices(source) if known is None else known.indices
            moved = axes.moved(name, func, args, kwargs, indices, made)
            for tensor, of_tensor in zip(made, moved, strict=True):
                if of_tensor is not None:
                    self._moved[id(tensor)] = _Moved(of_tensor, axes.axes_of(of_tensor, tensor.ndim))

    def _axes(self, tensor: Tensor, operand: Operand) -> axes.Axes | None:
        """Which axes of a parameter run along those of a tensor; ``None`` for one that was not moved from a parameter."""
        if operand.parameter:
            return axes.same_axes(tensor.ndim)
        moved = self._moved.get(id(tensor))
        return None if moved is None else moved.axes

    def _count(self, path: str, function: str, counted: bool) -> int:
        """How many counted calls of this module or function came before; one more from now on if this one counts."""
        before = self._counts.get((path, function), 0)
        self._counts[path, function] = before + 1 if counted else before
        return before

    def _record(self, node: Node, before: Mapping[int, int], args: Args, kwargs: Kwargs, output: Output) -> Output:
        """Record a call that was made, and return its output, with views of tensors that are operands, too.

        ``before`` has the version that each operand had before the call, by identity.
        """
        node = replace(node, operands=self._operands(args, kwargs))
        items, rebuild = flatten(output)
        returned = [item for item in items if isinstance(item, Tensor)]
        items = [self._alias(item) if isinstance(item, Tensor) and id(item) in before else item for item in items]
        made = [item for item in items if isinstance(item, Tensor)]
        self._add(node, made, tensors((args, kwargs)))
        for tensor, value in zip(returned, self._nodes[node.name].outputs, strict=True):
            if id(tensor) in before and before[id(tensor)] != writes_into(innermost(tensor)):
                self._overwrite(tensor, value)
        return rebuild(items)

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another object for the same data; making it is not a call of the model."""
        with self.aside():
            # A sparse tensor has no views; without a gradient, detaching makes just another object.
            return tensor.detach() if tensor.layout in SPARSE else tensor.view_as(tensor)

    def _overwrite(self, tensor: Tensor, value: str) -> None:
        """A call wrote into ``tensor``, which made ``value``: mark the tensor, and all that share its memory, as stale."""
        tensor = innermost(tensor)
        storage = storage_of(tensor)
        sharing = () if storage is None else self._in_storage[storage]
        for key in sharing:
            other, operand = self._known[key]
            if operand.value != value:
                current = value if other is tensor else operand.value
                self._known[key] = _Known(other, replace(operand, value=current, stale=value))

    def _note(self, tensor: Tensor, operand: Operand) -> None:
        """Remember which operand a tensor is."""
        tensor = innermost(tensor)
        storage = storage_of(tensor)
        if storage is not None and id(tensor) not in self._known:
            self._in_storage.setdefault(storage, []).append(id(tensor))
        self._known[id(tensor)] = _Known(tensor, operand)

    def _operand(self, tensor: Tensor) -> Operand:
        """Which operand a tensor is."""
        tensor = innermost(tensor)
        known = self._known.get(id(tensor)) or self._same_numbers(tensor)
        return UNKNOWN if known is None else known.operand

    def _same_numbers(self, tensor: Tensor) -> _Known | None:
        """The tensor of which a new one is another view of all numbers, as a transform makes it where no mode sees it."""
        storage = storage_of(tensor)
        if storage is None:
            return None
        layout = layout_of(tensor)
        known = (self._known[key] for key in reversed(self._in_storage.get(storage, ())))
        return next((other for other in known if layout_of(other.tensor) == layout), None)

    def _add(self, node: Node, made: Sequence[Tensor], taken: Sequence[Tensor] = ()) -> None:
        """Add a node, and the values of the tensors that it makes; ``taken`` are those that it takes."""
        if any(tensor.is_nested for tensor in made):
            raise PlanError(explain(node.name, "a nested tensor has no one shape to plan for", fix=PAD))
        names = [node.name] if len(made) == 1 else [f"{node.name}.{i}" for i in range(len(made))]
        for index, (name, tensor) in enumerate(zip(names, made, strict=True)):
            self._values[name] = Value(
                name=name,
                node=node.name,
                index=index,
                floating=is_floating(tensor),
                shape=tuple(whole(tensor, self._outer).shape),
                kind=kind_of(tensor),
                view=any(share_memory(tensor, other) for other in taken),
            )
            self._note(tensor, replace(UNKNOWN, value=name))
        self._nodes[node.name] = replace(node, outputs=tuple(names))

    def _operands(self, args: Args, kwargs: Kwargs) -> tuple[Operand, ...]:
        """Each tensor among the arguments of a call."""
        given = [*named_leaves(args), *named_leaves(dict(kwargs))]
        named = [(role, leaf) for role, leaf in given if isinstance(leaf, Tensor)]
        return tuple(self._as_operand(role, slot, tensor) for slot, (role, tensor) in enumerate(named))

    def _as_operand(self, role: str, slot: int, tensor: Tensor) -> Operand:
        """A tensor as an operand of a call."""
        known = self._operand(tensor)
        axes, kind = self._axes(tensor, known), kind_of(tensor)
        return replace(known, role=role, slot=slot, shape=tuple(tensor.shape), axes=axes, kind=kind)
