"""Run a model purely, and let a frame see every call that it makes.

A :class:`Skeleton` is a private copy of a model without its weights. Running it with given parameters is a pure
function; a :class:`Frame` handed to the run sees each call of a leaf module (through hooks) and of a torch function
outside leaf modules (through a ``TorchFunctionMode``), and may replace operands and results. Python control flow just
runs. This file is the only caller of ``functional_call``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from sophq_func.capture.frame import Frame, Place, Slot, Watch, enter, leave
from sophq_func.capture.lazy import Deferred
from sophq_func.capture.snapshot import OWN, Memory, rebind
from sophq_func.core.errors import PlanError, StateError, explain, near, raise_all
from sophq_func.core.modes import may_differentiate
from sophq_func.core.pytree import sorted_dict

PLAIN = (_ConvNd, nn.Linear, nn.Embedding)
"""Layers that read their parameters in their forward only."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def is_leaf(module: nn.Module) -> bool:
    """Whether calls inside ``module`` are its own affair.

    A class of torch.nn without child modules, or a subclass of one that keeps its ``forward``. Parametrizations
    (``torch.nn.utils.parametrize``) do not count as children.
    """
    if isinstance(module, CONTAINERS) or any(name != "parametrizations" for name, _ in module.named_children()):
        return False
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    return owner is not nn.Module and owner.__module__.startswith("torch.nn.modules.")


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers of a model, detached, not copied; one name per tensor (the first), sorted.

    Non-persistent buffers are included. This dict is what every function of the library calls ``params``.

    Example:
      >>> list(params_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False))))
      ['0.bias', '0.weight', '1.num_batches_tracked', '1.running_mean', '1.running_var']
    """
    if not isinstance(model, nn.Module):
        raise PlanError(explain("params_of", "this model", got=type(model).__name__, allowed="a torch.nn.Module"))
    return sorted_dict({name: tensor.detach() for name, tensor in _registered(model).items()})


def _registered(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Skeleton:
    """A private copy of a model: its modules and hooks without its weights, ready to be run purely.

    Attributes:
      module: the copy; parameters and buffers are on the ``meta`` device.
      names: canonical names of all parameters and buffers.
      buffers: canonical names of the buffers.
      owned: for each module path the canonical names of its own tensors, by attribute.
      paths: every path of each module, by its first.
      constants: tensors that are plain attributes of modules, copied; they belong to the skeleton.
    """

    def __init__(self, model: nn.Module, opaque: Collection[str] = ()) -> None:
        registered = _registered(model)
        by_id = {id(tensor): name for name, tensor in registered.items()}
        self.names = frozenset(registered)
        self.buffers = frozenset(name for name, _ in model.named_buffers())
        self.owned = {
            path: {attribute: by_id[id(t)] for attribute, t in _own(module) if t is not None}
            for path, module in model.named_modules()
        }
        self.paths = _all_paths(model)
        self.module, self.constants, names = _copy_without_weights(model, registered)
        self._modules = dict(self.module.named_modules())
        self._aliases = _aliases(self.module, names)
        self._rebound: list[tuple[nn.Module, str, Any]] = []
        self._slot = Slot()
        self._lock = threading.RLock()
        for path, module in self._modules.items():
            module._sophq_place = Place(path, path in opaque or is_leaf(module), self._slot)  # type: ignore[assignment]
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True, always_call=True)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def in_mode(self, training: bool) -> Skeleton:
        """A copy whose modules all have this training flag."""
        other = copy.deepcopy(self)
        other.module.train(training)
        return other

    def check(self, params: Mapping[str, Tensor], where: str) -> None:
        """Raise a :class:`StateError` that names every parameter that is missing, unknown or no tensor."""
        fix = "params = sq.params_of(model)"
        if not isinstance(params, Mapping):
            raise StateError(explain(where, "params", got=type(params).__name__, allowed="a dict {name: Tensor}", fix=fix))
        problems = []
        if params.keys() != self.names:
            missing = sorted(self.names - params.keys())
            problems += [f"{where}: params lack {name!r}. Fix: {fix} has every name." for name in missing]
            for name in sorted(map(str, params.keys() - self.names)):
                hint = near(name, missing or self.names)
                problems.append(f"{where}: params hold {name!r}, which the model has not. Fix: {hint or 'leave it out'}.")
        for name, value in params.items():
            if not isinstance(value, Tensor):
                problems.append(explain(where, f"params[{name!r}]", got=type(value).__name__, allowed="a Tensor", fix=fix))
        raise_all(problems, StateError)

    def detached(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``params`` with buffers that are constants: no gradient reaches them."""
        if not may_differentiate():
            return dict(params)
        return {**params, **{name: params[name].detach() for name in self.buffers}}

    def registered(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its canonical name, without numbers: tensors on the ``meta`` device."""
        return _registered(self.module)

    def deferrable(self, path: str, parameter: str) -> bool:
        """Whether only the layer at ``path`` holds a parameter, and reads it nowhere but in its own forward."""
        owners = [(p, attribute) for p, own in self.owned.items() for attribute, name in own.items() if name == parameter]
        if [owner for owner, _ in owners] != [path]:
            return False
        module = self.module.get_submodule(path)
        plain = isinstance(module, PLAIN) and is_leaf(module) and len(module._forward_pre_hooks) == 1
        aliased = any(parameter in _names_in(template) for _, _, template in self._aliases)
        return plain and not aliased and owners[0][1] in module._parameters

    def run(
        self,
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        later: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Call the model with ``params`` while ``frame`` watches; without a frame nothing is intercepted.

        Buffers enter cloned; see :meth:`detached`. In eager one run at a time uses a skeleton; nested runs are fine.
        ``later`` computes parameters that are :meth:`deferrable`, and wants a frame.

        Returns:
          The model's output, and its buffers afterwards.
        """
        if frame is not None and later:
            frame.deferred = Deferred(later, self.owned, params)
        if torch.compiler.is_compiling():
            result = self._run(frame, params, args, kwargs)
            rebind(self._rebound)
            return result
        with self._lock:
            memory = Memory(self.module.modules())
            try:
                return self._run(frame, params, args, kwargs)
            finally:
                changed = [change for change in memory.restore() if not isinstance(change[2], Tensor)]
                self._rebound = changed or self._rebound

    def _run(
        self, frame: Frame | None, params: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Tensor]]:
        now = {**params, **{name: params[name].clone() for name in self.buffers}}
        for path, attribute, template in self._aliases:
            self.module.get_submodule(path).__dict__[attribute] = _filled(template, now)
        if frame is not None:
            frame.begin(now)
        watch = None if frame is None else Watch(frame)
        outer, self._slot.watch = self._slot.watch, watch
        call = self._call if torch.compiler.is_compiling() else self._call_bound
        try:
            with watch or nullcontext():
                output, buffers = call(now, args, dict(kwargs))
        finally:
            self._slot.watch = outer
        return output, sorted_dict(buffers)

    def _call(self, now: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The model's output with these tensors, and its buffers afterwards, in a way that Dynamo follows."""
        names = {
            f"{path}.{attribute}".lstrip("."): name for path, own in self.owned.items() for attribute, name in own.items()
        }
        tensors = {place: now[name] for place, name in names.items()}
        output = functional_call(self.module, tensors, args, kwargs, tie_weights=False)
        return output, {name: tensors[place] for place, name in names.items() if name in self.buffers}

    def _call_bound(self, now: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The same, for eager: to find where each tensor goes takes ``functional_call`` longer than a small model runs."""
        places = [(store, attribute, name, store[attribute]) for store, attribute, name in self._places()]
        for store, attribute, name, _ in places:
            store[attribute] = now[name]
        try:
            output = self.module(*args, **kwargs)
            return output, {name: store[attribute] for store, attribute, name, _ in places if name in self.buffers}
        finally:
            for store, attribute, _, empty in places:
                store[attribute] = empty

    def _places(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Where each parameter and buffer is held: the dict, the attribute, and the canonical name."""
        for path, own in self.owned.items():
            module = self._modules[path]
            for attribute, name in own.items():
                yield (module._parameters if attribute in module._parameters else module._buffers), attribute, name


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _all_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every path of each module, by its first; a module registered twice has two."""
    first = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[str]] = {path: [] for path in first.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        found[first[id(module)]].append(path)
    return {path: tuple(paths) for path, paths in found.items()}


class _Name(str):
    """Stands in a template for the parameter or buffer of this name."""


def _aliases(module: nn.Module, names: Mapping[int, str]) -> list[tuple[str, str, Any]]:
    """Plain attributes that hold registered tensors: ``(module path, attribute, template)``."""
    found = []
    for path, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute not in OWN:
                template, holds = _template(value, names)
                found += [(path, attribute, template)] if holds else []
    return found


def _template(value: Any, names: Mapping[int, str]) -> tuple[Any, bool]:
    """``value`` with a :class:`_Name` for each registered tensor in lists, tuples and dicts; and whether there is one."""
    if id(value) in names:
        return _Name(names[id(value)]), True
    if type(value) is dict:
        items = {key: _template(item, names) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(holds for _, holds in items.values())
    if type(value) in (list, tuple):
        parts = [_template(item, names) for item in value]
        return type(value)(item for item, _ in parts), any(holds for _, holds in parts)
    return value, False


def _names_in(template: Any) -> list[str]:
    """The parameters and buffers that a template names."""
    if isinstance(template, _Name):
        return [str(template)]
    parts = template.values() if type(template) is dict else template if type(template) in (list, tuple) else ()
    return [name for part in parts for name in _names_in(part)]


def _filled(template: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that a template stands for."""
    if isinstance(template, _Name):
        return tensors[str(template)]
    if type(template) is dict:
        return {key: _filled(item, tensors) for key, item in template.items()}
    if type(template) in (list, tuple):
        return type(template)([_filled(item, tensors) for item in template])
    return template


def _copy_without_weights(
    model: nn.Module, registered: Mapping[str, Tensor]
) -> tuple[nn.Module, list[Tensor], dict[int, str]]:
    """A deep copy with registered tensors on ``meta``; copies of tensors that are plain attributes; names by identity."""
    memo: dict[int, Any] = {}
    for tensor in registered.values():
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    constants = []
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
                constants.append(memo[id(value)])
    try:
        names = {id(memo[id(tensor)]): name for name, tensor in registered.items()}
        return copy.deepcopy(model, memo), constants, names
    except Exception as error:
        what = f"a private copy of {type(model).__name__}"
        fix = "give the class whose instance cannot be copied a __deepcopy__"
        raise PlanError(explain("trace", what, because=f"copy.deepcopy says: {error}", fix=fix)) from error
