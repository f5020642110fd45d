"""Record one run of a model as a :class:`~sophq_func.capture.graph.Graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from sophq_func.capture import axes
from sophq_func.capture._torch import parameters_in, without_fakes
from sophq_func.capture.arguments import Arguments, arguments, map_inputs
from sophq_func.capture.frame import Frame, Function, item
from sophq_func.capture.functions import as_module, name_of, signature
from sophq_func.capture.graph import REPARAMETRIZE, Factor, Graph, Node, Operand, Option, Scope, Value
from sophq_func.capture.naming import CallNames
from sophq_func.capture.products import multiplications, multiplied
from sophq_func.capture.skeleton import Skeleton, params_of, registered_tensors
from sophq_func.capture.transforms import depth, innermost, whole
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.operations import CONTRACTIONS, LAYERS, MOVES, called
from sophq_func.core.pytree import flatten, has_floating, named_leaves, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree

UNSEEN = frozenset(("requires_grad", "make_dual"))
"""Functions that mark their operand for a derivative and return it, so that they are no calls of the model."""

OPTIONS = (
    "affine",
    "eps",
    "groups",
    "num_features",
    "out_channels",
    "out_features",
    "track_running_stats",
)
"""Attributes of leaf modules on which quantization depends."""

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
"""Layouts of tensors without a storage of their own."""


def trace(
    model: nn.Module | Callable[..., Output],
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    params: Tree = None,
    leaf_module: tuple[type, ...] = (),
) -> Graph:
    """Run ``model`` once on an example and record its calls and dataflow; the model is not changed.

    The example runs in the grad mode of the caller, since a model may ask for derivatives in its forward. Parameters are
    detached, so that autograd keeps nothing for a model that does not.

    Args:
      model: any module, or a function of params and inputs. Python control flow takes the branches that the example takes.
      args: positional arguments of the example; a single tensor counts as a tuple of it.
      kwargs: keyword arguments of the example.
      params: of a function, the tree that it takes first; see :func:`sophq_func.quantize`.
      leaf_module: further module classes that are recorded as one call, without the calls inside.

    Returns:
      The :class:`~sophq_func.capture.graph.Graph` of leaf modules and functions, in execution order.

    Raises:
      PlanError: the example does not fit ``forward``, or the model cannot be copied, or writes in place into a tensor that
        is an attribute but no buffer.

    Example:
      >>> trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.ones(1, 2),))
      Graph(input):
        0(input)
        1(0)
    """
    if isinstance(model, torch.jit.ScriptModule):
        fix = "quantize the module from which it was scripted or traced"
        raise PlanError(explain("trace", "a ScriptModule runs where no call of it can be seen", fix=fix))
    model = as_module(model, params, "trace")
    given = params_of(model)
    args, kwargs = _checked_call(model, args, kwargs)
    opaque = tuple(path for path, module in model.named_modules() if leaf_module and isinstance(module, leaf_module))
    skeleton = Skeleton(model, opaque)
    frame = _Recorder(skeleton, {id(tensor): name for name, tensor in registered_tensors(model).items()})
    versions = [writes_into(constant) for constant in skeleton.constants]
    versions_of_params = {name: writes_into(tensor) for name, tensor in given.items()}
    with torch.random.fork_rng():
        args, kwargs = map_inputs(arguments(model), args, kwargs, frame.input)
        try:
            output, _ = skeleton.run(frame, given, args, kwargs)
        except Exception as error:
            if any(tensor.is_meta for tensor in given.values()) and not _on_meta((args, kwargs)):
                raise _offloaded(model, given) from error
            raise
    # that it ran with numbers, though its parameters have none, was the work of hooks
    if not _on_meta(output) and any(given[name].is_meta for name in frame.reached()):
        raise _offloaded(model, given)
    if versions != [writes_into(constant) for constant in skeleton.constants]:
        sentence = "forward must not write in place into a tensor that is a plain attribute"
        because = "a run is a pure function of parameters and buffers"
        fix = "self.register_buffer(name, tensor)"
        raise PlanError(explain(name_of(model), sentence, because=because, fix=fix))
    if skeleton.structure is not None:
        written = [name for name, version in versions_of_params.items() if writes_into(given[name]) != version]
        if written:
            sentence, because = "a function must not write into its params", "a run is a pure function of them"
            fix = "write into a clone, and return it if it is a new state"
            raise PlanError(explain(name_of(model), sentence, got=written, because=because, fix=fix))
    graph = frame.graph(output, model, opaque)
    graph.example = _without_numbers(args, kwargs)
    return graph


def _without_numbers(args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
    """The arguments of a call with tensors on ``meta``; ``None`` where some are neither tensors nor plain values."""
    leaves, rebuild = flatten((args, kwargs))
    if not all(isinstance(leaf, Tensor | str | int | float | bool | None) for leaf in leaves):
        return None
    empty = [torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    example: tuple[Args, Kwargs] = rebuild(empty)
    return example


def _on_meta(tree: Tree) -> bool:
    """Whether a tree holds tensors on the ``meta`` device, or none at all."""
    found = tensors(tree)
    return not found or any(tensor.is_meta for tensor in found)


def _offloaded(model: nn.Module, params: Mapping[str, Tensor]) -> PlanError:
    """The error for parameters without numbers, in a model that is given numbers."""
    names = [name for name, tensor in params.items() if tensor.is_meta]
    sentence = "parameters are on the meta device, and the example is not"
    because = "hooks that load them when a layer starts, as those of offloading do, would replace the params of a run"
    fix = (
        "load the model whole, or take the hooks off (accelerate.hooks.remove_hook_from_module(model, recurse=True)); "
        "or plan with an example on meta, and give the numbers as params"
    )
    shown = names[:3] + ["..."] * (len(names) > 3)
    return PlanError(explain(name_of(model), sentence, got=shown, because=because, fix=fix))


def retrace(skeleton: Skeleton, params: Mapping[str, Tensor], args: Args, kwargs: Kwargs, names: Arguments) -> Graph:
    """Like :func:`trace`, for a skeleton and given parameters; ``names`` are the names of the model's arguments."""
    frame = _Recorder(skeleton)
    with torch.random.fork_rng():
        args, kwargs = map_inputs(names, args, kwargs, frame.input)
        output, _ = skeleton.run(frame, params, args, kwargs)
    return frame.graph(output, skeleton.module, ())


def _checked_call(model: nn.Module, args: object, kwargs: object) -> tuple[Args, dict[str, Tree]]:
    """The example as positional and keyword arguments, checked against the signature of ``forward``."""
    fix = "example_args=(x,) and example_kwargs={'name': x}, as in model(x, name=x)"
    if not isinstance(args, Tensor | tuple | list):
        raise _example_error("args", args, "a tuple", fix)
    if not isinstance(kwargs, Mapping | None):
        raise _example_error("kwargs", kwargs, "a dict", fix)
    positional = (args,) if isinstance(args, Tensor) else tuple(args)
    keywords = dict(kwargs or {})
    try:
        signature(model).bind(*positional, **keywords)
    except TypeError as error:
        sentence = f"{name_of(model)} cannot be called with this example"
        raise PlanError(explain("trace", sentence, because=str(error), fix=fix)) from error
    return positional, keywords


def _example_error(argument: str, got: object, allowed: str, fix: str) -> PlanError:
    sentence = f"{argument} of the example must be {allowed}"
    return PlanError(explain("trace", sentence, got=type(got).__name__, allowed=allowed, fix=fix))


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


class _Recorder(Frame):
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
            if kind := _kind(tensor):
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
        self._before = _versions((args, kwargs))
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
            if _kind(tensor):
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
        before = _versions((args, kwargs))
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
            constants=_constants(func, args, kwargs) if name in CONTRACTIONS else {},
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
        if known is None and not (self._operand(source).parameter and _is_floating(source)):
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
        storage = _storage(tensor)
        sharing = () if storage is None else self._in_storage[storage]
        for key in sharing:
            other, operand = self._known[key]
            if operand.value != value:
                current = value if other is tensor else operand.value
                self._known[key] = _Known(other, replace(operand, value=current, stale=value))

    def _note(self, tensor: Tensor, operand: Operand) -> None:
        """Remember which operand a tensor is."""
        tensor = innermost(tensor)
        storage = _storage(tensor)
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
        storage = _storage(tensor)
        if storage is None:
            return None
        layout = _layout(tensor)
        known = (self._known[key] for key in reversed(self._in_storage.get(storage, ())))
        return next((other for other in known if _layout(other.tensor) == layout), None)

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
                floating=_is_floating(tensor),
                shape=tuple(whole(tensor, self._outer).shape),
                kind=_kind(tensor),
                view=any(_share_memory(tensor, other) for other in taken),
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
        axes, kind = self._axes(tensor, known), _kind(tensor)
        return replace(known, role=role, slot=slot, shape=tuple(tensor.shape), axes=axes, kind=kind)


def _constants(func: Function, args: Args, kwargs: Kwargs) -> dict[str, Option]:
    """The arguments of a call that are no tensors and hold none, by role; and whether it takes its operands in reverse."""
    named = [*((str(i), arg) for i, arg in enumerate(args)), *kwargs.items()]
    constants = {role: arg for role, arg in named if not tensors(arg)}
    if getattr(func, "__name__", "") == "__rmatmul__":  # a.__rmatmul__(b) is b @ a
        constants["reversed"] = True
    return constants


def _is_floating(tensor: Tensor) -> bool:
    """Whether a tensor is dense, and its dtype a floating one."""
    return tensor.is_floating_point() and not _kind(tensor)


def _kind(tensor: Tensor) -> str:
    """``"complex"`` or ``"sparse"``; empty for other tensors."""
    if tensor.layout in SPARSE:
        return "sparse"
    return "complex" if tensor.is_complex() else ""


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; ``None`` without one.

    Empty storages share one address, and so count as none. Sparse tensors have several, which no view shares.
    """
    tensor = innermost(tensor)
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return _storage(a) is not None and _storage(a) == _storage(b)


def _layout(tensor: Tensor) -> tuple[torch.dtype, int | torch.SymInt, list[tuple[int, int]]]:
    """Which numbers of its storage a tensor has, in whatever order its axes are."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.dtype, tensor.storage_offset(), sorted((size, stride) for size, stride in axes if size > 1)


def _versions(tree: Tree) -> dict[int, int]:
    """How often each tensor of a tree was written into, by identity."""
    return {id(tensor): writes_into(innermost(tensor)) for tensor in tensors(tree)}
