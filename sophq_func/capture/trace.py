"""Record one run of a model as a :class:`~sophq_func.capture.graph.Graph`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import arguments, map_inputs
from sophq_func.capture.frame import Frame
from sophq_func.capture.graph import Graph, Node, Operand, Scope, Value
from sophq_func.capture.naming import CallNames
from sophq_func.capture.skeleton import Skeleton, params_of
from sophq_func.core.errors import PlanError, explain
from sophq_func.core.modes import writes_into
from sophq_func.core.pytree import flatten, has_floating, map_named, tensors

OPTIONS = (
    "affine",
    "eps",
    "groups",
    "num_features",
    "out_channels",
    "out_features",
    "track_running_stats",
)


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    leaf_module: tuple[type, ...] = (),
) -> Graph:
    """Run ``model`` once on an example and record its calls and dataflow; the model is not changed.

    Args:
      model: any module. Python control flow takes the way that the example takes.
      args: positional arguments of the example; a single tensor counts as a tuple of it.
      kwargs: keyword arguments of the example.
      leaf_module: further module classes whose inside is not looked at.

    Returns:
      The :class:`~sophq_func.capture.graph.Graph` of leaf modules and functions, in execution order.

    Raises:
      PlanError: the model cannot be copied, or writes in place into a tensor that is no buffer.

    Example:
      >>> trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), (torch.ones(1, 2),))
      Graph(input):
        0(input)
        1(0)
    """
    params = params_of(model)
    args, kwargs = _checked_call(model, args, kwargs)
    opaque = tuple(path for path, module in model.named_modules() if leaf_module and isinstance(module, leaf_module))
    skeleton = Skeleton(model, opaque)
    frame = _Recorder(skeleton)
    versions = [writes_into(constant) for constant in skeleton.constants]
    with torch.random.fork_rng(), torch.no_grad():
        args, kwargs = map_inputs(arguments(model), args, kwargs, frame.input)
        output, _ = skeleton.run(frame, params, args, kwargs)
    if versions != [writes_into(constant) for constant in skeleton.constants]:
        what = "writing in place into a tensor that is a plain attribute"
        raise PlanError(explain(type(model).__name__, f"{what} is not possible", fix="register_buffer it"))
    return frame.graph(output, model, opaque)


def retrace(
    skeleton: Skeleton, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Any
) -> Graph:
    """The same for a skeleton; ``names`` are those of its arguments, as :func:`arguments` returns them."""
    frame = _Recorder(skeleton)
    with torch.random.fork_rng(), torch.no_grad():
        args, kwargs = map_inputs(names, args, kwargs, frame.input)
        output, _ = skeleton.run(frame, params, args, kwargs)
    return frame.graph(output, skeleton.module, ())


def _checked_call(model: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and keyword arguments that ``forward`` takes."""
    fix = "example_args=(x,) and example_kwargs={'name': x}, as in model(x, name=x)"
    if not isinstance(args, Tensor | tuple | list) or not isinstance(kwargs, Mapping | None):
        got = type(args if not isinstance(args, Tensor | tuple | list) else kwargs).__name__
        raise PlanError(explain("trace", "this example is not possible", got=got, allowed="a tuple and a dict", fix=fix))
    args, kwargs = (args,) if isinstance(args, Tensor) else tuple(args), dict(kwargs or {})
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise PlanError(
            explain("trace", f"calling {type(model).__name__} is not possible", because=str(error), fix=fix)
        ) from error
    return args, kwargs


class _Recorder(Frame):
    """Writes down each call. A call that returns its own operand returns a view of it here, so that they differ."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._nodes: dict[str, Node] = {}
        self._values: dict[str, Value] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._names = CallNames(skeleton.paths)
        self._known: dict[int, tuple[Tensor, Operand]] = {}
        self._in_storage: dict[int, list[int]] = {}
        self._starts: list[int] = []
        self._scopes: list[Scope] = []
        self._inputs: dict[int, tuple[Tensor, Tensor, str]] = {}
        self._before: dict[int, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._shapes[name] = tuple(tensor.shape)
            self._note(tensor, Operand(role="", slot=0, parameter=name))

    def enter_scope(self, path: str, args: Any, kwargs: Any) -> None:
        self._starts.append(len(self._nodes))

    def leave_scope(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        self._scopes.append(Scope(path=path, start=self._starts.pop(), stop=len(self._nodes)))

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """An argument of the model, as a copy that the model may write into. A tensor given twice is one value."""
        if id(tensor) in self._inputs:
            _, copy, first = self._inputs[id(tensor)]
            self._nodes[first] = replace(self._nodes[first], also=(*self._nodes[first].also, name))
            return copy
        copy = tensor.detach().clone()
        value = self._names.take(self._names.input(name))
        self._inputs[id(tensor)] = (tensor, copy, value)
        self._add(Node(name=value, kind="input", path="", paths=("",), argument=name), [copy])
        return copy

    def before_module(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._before = _versions((args, kwargs))
        return args, kwargs

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        with self.aside():
            options = _options(module)
        node = Node(
            name=self._names.take(self._names.module(path or type(module).__name__.lower())),
            kind="module",
            path=path,
            paths=self._skeleton.paths[path],
            **self._counted(path, "", has_floating(args, kwargs, output)),
            type=type(module),
            parameters=self._skeleton.owned[path],
            options=options,
        )
        return self._record(node, self._before, args, kwargs, output)

    def function(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = _versions((args, kwargs))
        output = func(*args, **kwargs)
        if name == "setitem":
            output = args[0]
        if not tensors(output):
            return output
        path = self.scope
        node = Node(
            name=self._names.take(self._names.function(path, name)),
            kind="function",
            path=path,
            paths=self._skeleton.paths[path],
            function=name,
            **self._counted(path, name, has_floating(args, kwargs, output)),
        )
        recorded = self._record(node, before, args, kwargs, output)
        return None if name == "setitem" else recorded

    def graph(self, output: Any, model: nn.Module, opaque: tuple[str, ...]) -> Graph:
        """Everything recorded; ``output`` is what the model returned."""
        for tensor in tensors(output):
            _, known = self._known.get(id(tensor), (tensor, Operand(role="", slot=0)))
            for name in filter(None, {known.value, known.stale}):
                late = self._values[name].overwritten or bool(known.stale)
                self._values[name] = replace(self._values[name], output=True, overwritten=late)
        modules = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
        written = [self._nodes[value].argument for _, copy, value in self._inputs.values() if writes_into(copy)]
        return Graph(self._nodes, self._values, modules, opaque, tuple(written), tuple(self._scopes), self._shapes)

    def _counted(self, path: str, function: str, counted: bool) -> dict[str, Any]:
        """How many counted calls of this kind came before, and whether this one counts."""
        count = self._calls.get((path, function), 0)
        self._calls[path, function] = count + counted
        return {"call": count, "counted": counted}

    def _record(self, node: Node, before: dict[int, int], args: Any, kwargs: Any, output: Any) -> Any:
        node = replace(node, operands=self._operands(args, kwargs))
        found, rebuild = flatten(output)
        made = []
        for i, item in enumerate(found):
            if isinstance(item, Tensor):
                if id(item) in before:
                    found[i] = self._alias(item)
                made.append((item, found[i]))
        self._add(node, [new for _, new in made], tensors((args, kwargs)))
        for (old, _), name in zip(made, self._nodes[node.name].outputs, strict=True):
            if id(old) in before and before[id(old)] != writes_into(old):
                self._overwrite(old, name)
        return rebuild(found)

    def _alias(self, tensor: Tensor) -> Tensor:
        """Another object for the same data; the view is none of the model's calls."""
        with self.aside():
            return tensor.view_as(tensor)

    def _overwrite(self, tensor: Tensor, value: str) -> None:
        """``tensor`` was written into, which made ``value``: later uses of it, and of what shares its memory, are stale."""
        storage = _storage(tensor)
        for key in () if storage is None else self._in_storage[storage]:
            other, operand = self._known[key]
            if operand.value != value:
                now = value if other is tensor else operand.value
                self._known[key] = (other, replace(operand, value=now, stale=value))

    def _note(self, tensor: Tensor, operand: Operand) -> None:
        """Remember what a tensor is; it is kept alive, so that no other gets its identity or its storage."""
        storage = _storage(tensor)
        if storage is not None and id(tensor) not in self._known:
            self._in_storage.setdefault(storage, []).append(id(tensor))
        self._known[id(tensor)] = (tensor, operand)

    def _add(self, node: Node, made: list[Tensor], taken: Sequence[Tensor] = ()) -> None:
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
            self._note(tensor, Operand(role="", slot=0, value=name))
        self._nodes[node.name] = replace(node, outputs=tuple(names))

    def _operands(self, args: Any, kwargs: Any) -> tuple[Operand, ...]:
        found: list[Operand] = []

        def note(role: str, tensor: Tensor) -> Tensor:
            _, known = self._known.get(id(tensor), (tensor, Operand(role="", slot=0)))
            found.append(replace(known, role=role, slot=len(found)))
            return tensor

        for i, arg in enumerate(args):
            map_named(str(i), arg, note)
        for name, arg in kwargs.items():
            map_named(name, arg, note)
        return tuple(found)


def _options(module: nn.Module) -> dict[str, Any]:
    found = {name: getattr(module, name) for name in OPTIONS if hasattr(module, name)}
    weight = getattr(module, "weight", None)
    return found | ({"weight_shape": tuple(weight.shape)} if isinstance(weight, Tensor) else {})


def _storage(tensor: Tensor) -> int | None:
    """Which storage a tensor lies in; ``None`` where it has no elements."""
    return tensor.untyped_storage().data_ptr() if tensor.numel() else None


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in one storage."""
    return _storage(a) is not None and _storage(a) == _storage(b)


def _versions(tree: Any) -> dict[int, int]:
    return {id(tensor): writes_into(tensor) for tensor in tensors(tree)}
