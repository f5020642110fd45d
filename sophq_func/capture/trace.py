"""Record one run of a model as a :class:`~sophq_func.capture.graph.Graph`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import Arguments, arguments, map_inputs
from sophq_func.capture.frame import Frame, Function
from sophq_func.capture.functions import as_module, name_of, signature
from sophq_func.capture.graph import Graph, Node, Operand, Option, Scope, Value
from sophq_func.capture.naming import CallNames
from sophq_func.capture.skeleton import Skeleton, params_of
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.pytree import flatten, has_floating, named_leaves, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree

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


def trace(
    model: nn.Module | Callable[..., Output],
    args: Args = (),
    kwargs: Kwargs | None = None,
    *,
    params: Tree = None,
    leaf_module: tuple[type, ...] = (),
) -> Graph:
    """Run ``model`` once on an example and record its calls and dataflow; the model is not changed.

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
    model = as_module(model, params, "trace")
    given = params_of(model)
    args, kwargs = _checked_call(model, args, kwargs)
    opaque = tuple(path for path, module in model.named_modules() if leaf_module and isinstance(module, leaf_module))
    skeleton = Skeleton(model, opaque)
    frame = _Recorder(skeleton)
    versions = [writes_into(constant) for constant in skeleton.constants]
    versions_of_params = {name: writes_into(tensor) for name, tensor in given.items()}
    with torch.random.fork_rng(), torch.no_grad():
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
    return frame.graph(output, model, opaque)


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
    with torch.random.fork_rng(), torch.no_grad():
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


PAD = (
    "plan with torch.nested.to_padded_tensor(x, 0.0); a model whose weights alone are quantized runs on nested tensors, too"
)
"""What to do instead of planning with a nested tensor."""

UNKNOWN = Operand(role="", slot=0)
"""The operand for a tensor that no recorded call made, such as a constant."""


class _Recorder(Frame):
    """Records each call of a run as a node of the graph.

    Tensors are told apart by identity. Therefore a call that returns its own operand returns a view of it here.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._nodes: dict[str, Node] = {}
        self._values: dict[str, Value] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names = CallNames(skeleton.paths)
        self._counts: dict[tuple[str, str], int] = {}  # of counted calls, by path and function
        self._inputs: dict[int, _Input] = {}  # by identity of the original
        self._known: dict[int, _Known] = {}  # by identity of the tensor
        self._in_storage: dict[int, list[int]] = {}  # identities of known tensors, by storage
        self._starts: list[int] = []  # of the scopes that are running
        self._scopes: list[Scope] = []
        self._before: dict[int, int] = {}  # versions of the operands of the leaf that is running

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._shapes[name] = tuple(tensor.shape)
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
        copy = tensor.detach().clone()
        value = self._names.take(self._names.input(name))
        self._inputs[id(tensor)] = _Input(tensor, copy, value)
        self._add(Node(name=value, kind="input", path="", paths=("",), argument=name), [copy])
        return copy

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self._before = _versions((args, kwargs))
        return args, kwargs

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        with self.aside():  # to read a parametrized weight calls functions
            options = _options(module)
        counted = has_floating(args, kwargs, output)
        node = Node(
            name=self._names.take(self._names.module(path or type(module).__name__.lower())),
            kind="module",
            path=path,
            paths=self._skeleton.paths[path],
            call=self._count(path, "", counted),
            counted=counted,
            type=type(module),
            parameters=self._skeleton.owned[path],
            options=options,
        )
        return self._record(node, self._before, args, kwargs, output)

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        before = _versions((args, kwargs))
        output = func(*args, **kwargs)
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
        )
        recorded = self._record(node, before, args, kwargs, output)
        return None if name == "setitem" else recorded

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
        return Graph(self._nodes, self._values, modules, opaque, tuple(written), tuple(self._scopes), self._shapes)

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
            if id(tensor) in before and before[id(tensor)] != writes_into(tensor):
                self._overwrite(tensor, value)
        return rebuild(items)

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another object for the same data; making it is not a call of the model."""
        with self.aside():
            return tensor.view_as(tensor)

    def _overwrite(self, tensor: Tensor, value: str) -> None:
        """A call wrote into ``tensor``, which made ``value``: mark the tensor, and all that share its memory, as stale."""
        storage = _storage(tensor)
        sharing = () if storage is None else self._in_storage[storage]
        for key in sharing:
            other, operand = self._known[key]
            if operand.value != value:
                current = value if other is tensor else operand.value
                self._known[key] = _Known(other, replace(operand, value=current, stale=value))

    def _note(self, tensor: Tensor, operand: Operand) -> None:
        """Remember which operand a tensor is."""
        storage = _storage(tensor)
        if storage is not None and id(tensor) not in self._known:
            self._in_storage.setdefault(storage, []).append(id(tensor))
        self._known[id(tensor)] = _Known(tensor, operand)

    def _operand(self, tensor: Tensor) -> Operand:
        """Which operand a tensor is."""
        known = self._known.get(id(tensor))
        return UNKNOWN if known is None else known.operand

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
                floating=tensor.is_floating_point(),
                shape=tuple(tensor.shape),
                view=any(_share_memory(tensor, other) for other in taken),
            )
            self._note(tensor, replace(UNKNOWN, value=name))
        self._nodes[node.name] = replace(node, outputs=tuple(names))

    def _operands(self, args: Args, kwargs: Kwargs) -> tuple[Operand, ...]:
        """Each tensor among the arguments of a call."""
        given = [*named_leaves(args), *named_leaves(dict(kwargs))]
        named = [(role, leaf) for role, leaf in given if isinstance(leaf, Tensor)]
        return tuple(replace(self._operand(tensor), role=role, slot=i) for i, (role, tensor) in enumerate(named))


def _options(module: nn.Module) -> dict[str, Option]:
    """Those of :data:`OPTIONS` that a module has, and the shape of its weight."""
    options = {name: getattr(module, name) for name in OPTIONS if hasattr(module, name)}
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        options["weight_shape"] = tuple(weight.shape)
    return options


def _storage(tensor: Tensor) -> int | None:
    """The address of a tensor's storage; ``None`` without elements, since empty storages share one address."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else None


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return _storage(a) is not None and _storage(a) == _storage(b)


def _versions(tree: Tree) -> dict[int, int]:
    """How often each tensor of a tree was written into, by identity."""
    return {id(tensor): writes_into(tensor) for tensor in tensors(tree)}
