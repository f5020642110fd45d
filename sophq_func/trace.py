"""Record one run of a model as a :class:`~sophq_func.graph.Graph`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sophq_func.errors import PlanError, explain
from sophq_func.graph import Graph, Node, Operand, Value
from sophq_func.intercept import Frame, Skeleton, params_of
from sophq_func.pytree import flatten, map_named, tensors

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
      The :class:`~sophq_func.graph.Graph` of leaf modules and functions, in execution order.

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
    skeleton = Skeleton(model, leaf_module)
    frame = _Recorder(skeleton, params)
    versions = [constant._version for constant in skeleton.constants]
    with torch.random.fork_rng(), torch.no_grad():
        args, kwargs = map_inputs(arguments(model), args, kwargs, frame.input)
        output, _ = skeleton.run(frame, params, args, kwargs)
    if versions != [constant._version for constant in skeleton.constants]:
        what = "writing in place into a tensor that is a plain attribute"
        raise PlanError(explain(type(model).__name__, what, fix="register_buffer it"))
    return frame.graph(output, model)


def _checked_call(model: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example as positional and keyword arguments that ``forward`` takes."""
    fix = "example_args=(x,) and example_kwargs={'name': x}, as in model(x, name=x)"
    if not isinstance(args, Tensor | tuple | list) or not isinstance(kwargs, Mapping | None):
        got = type(args if not isinstance(args, Tensor | tuple | list) else kwargs).__name__
        raise PlanError(explain("trace", "this example", got=got, allowed="a tuple and a dict", fix=fix))
    args, kwargs = (args,) if isinstance(args, Tensor) else tuple(args), dict(kwargs or {})
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise PlanError(explain("trace", f"calling {type(model).__name__}", because=str(error), fix=fix)) from error
    return args, kwargs


def arguments(model: nn.Module) -> tuple[list[str], str]:
    """Names of ``forward``'s positional arguments, and the name under which further ones are collected."""
    kinds = inspect.Parameter
    positional, rest = [], "args"
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            positional.append(name)
        elif parameter.kind is kinds.VAR_POSITIONAL:
            rest = name
    return positional, rest


def map_inputs(
    names: tuple[list[str], str], args: tuple[Any, ...], kwargs: Mapping[str, Any], f: Callable[[str, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``f`` to each tensor among a call's arguments, which is told its name."""
    positional, rest = names
    args = tuple(
        map_named(positional[i] if i < len(positional) else f"{rest}.{i - len(positional)}", arg, f)
        for i, arg in enumerate(args)
    )
    return args, {name: map_named(name, arg, f) for name, arg in kwargs.items()}


class _Recorder(Frame):
    """Writes down each call. A call that returns its own operand returns a view of it here, so that they differ."""

    def __init__(self, skeleton: Skeleton, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._skeleton = skeleton
        self._nodes: dict[str, Node] = {}
        self._values: dict[str, Value] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._modules = {path for path in skeleton.paths if path}
        self._known: dict[int, tuple[Tensor, Operand]] = {
            id(tensor): (tensor, Operand(role="", slot=0, parameter=name)) for name, tensor in params.items()
        }
        self._before: dict[int, int] = {}

    def input(self, name: str, tensor: Tensor) -> Tensor:
        """An argument of the model. A tensor given twice is one value; a parameter given as an argument becomes a view."""
        known = self._known[id(tensor)][1] if id(tensor) in self._known else None
        if known is not None and known.value:
            first = self._nodes[known.value]
            self._nodes[first.name] = replace(first, also=(*first.also, name))
            return tensor
        tensor = tensor if known is None else tensor.view_as(tensor)
        self._add(Node(name=self._free_name(name), kind="input", path="", paths=("",)), [tensor])
        return tensor

    def before_module(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._before = _versions((args, kwargs))
        return args, kwargs

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.leaves += 1
        options = _options(module)
        self.leaves -= 1
        base = path or type(module).__name__.lower()
        name = self._free_name(base, own=(path, "") not in self._calls)
        node = Node(
            name=name,
            kind="module",
            path=path,
            paths=self._skeleton.paths[path],
            call=self._count(path, ""),
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
        full = f"{path}.{name}" if path else name
        node = Node(
            name=self._free_name(full),
            kind="function",
            path=path,
            paths=self._skeleton.paths[path],
            function=name,
            call=self._count(path, name),
        )
        recorded = self._record(node, before, args, kwargs, output)
        return None if name == "setitem" else recorded

    def graph(self, output: Any, model: nn.Module) -> Graph:
        """Everything recorded; ``output`` is what the model returned."""
        for tensor in tensors(output):
            if id(tensor) in self._known and (name := self._known[id(tensor)][1].value):
                self._values[name] = replace(self._values[name], output=True)
        modules = {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}
        return Graph(self._nodes, self._values, modules, model.training)

    def _count(self, path: str, function: str) -> int:
        count = self._calls.get((path, function), 0)
        self._calls[path, function] = count + 1
        return count

    def _free_name(self, base: str, own: bool = False) -> str:
        """``base``, or the first of ``base_1``, ``base_2``, ... that nobody has; module paths belong to their modules."""
        name, number = base, 0
        while name in self._nodes or (name in self._modules and not (own and name == base)):
            number += 1
            name = f"{base}_{number}"
        return name

    def _record(self, node: Node, before: dict[int, int], args: Any, kwargs: Any, output: Any) -> Any:
        node = replace(node, operands=self._operands(args, kwargs))
        found, rebuild = flatten(output)
        made = []
        for i, item in enumerate(found):
            if isinstance(item, Tensor):
                if id(item) in before:
                    found[i] = item.view_as(item)
                made.append((item, found[i]))
        self._add(node, [new for _, new in made])
        for (old, _), name in zip(made, self._nodes[node.name].outputs, strict=True):
            if id(old) in before and before[id(old)] != _version(old):
                self._known[id(old)] = (old, Operand(role="", slot=0, value=name, stale=True))
        return rebuild(found)

    def _add(self, node: Node, made: list[Tensor]) -> None:
        names = [node.name] if len(made) == 1 else [f"{node.name}.{i}" for i in range(len(made))]
        for index, (name, tensor) in enumerate(zip(names, made, strict=True)):
            self._values[name] = Value(
                name=name,
                node=node.name,
                index=index,
                floating=tensor.is_floating_point(),
                shape=tuple(tensor.shape),
            )
            self._known[id(tensor)] = (tensor, Operand(role="", slot=0, value=name))
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


def _versions(tree: Any) -> dict[int, int]:
    return {id(tensor): _version(tensor) for tensor in tensors(tree)}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
