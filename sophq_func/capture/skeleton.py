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

from sophq_func.capture._torch import READS_ITS_OWN, has_only_one_hook_before, is_parameter, own_tensors, store_of
from sophq_func.capture.aliases import aliases, filled, names_in
from sophq_func.capture.frame import Frame, Place, Slot, Watch, enter, leave
from sophq_func.capture.lazy import Deferred
from sophq_func.capture.snapshot import Memory, rebind
from sophq_func.core import modes
from sophq_func.core.errors import PlanError, StateError, explain, near, raise_all
from sophq_func.core.pytree import sorted_dict

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
        raise PlanError(
            explain("params_of", "this model is not possible", got=type(model).__name__, allowed="a torch.nn.Module")
        )
    return sorted_dict({name: tensor.detach() for name, tensor in _registered(model).items()})


def _registered(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Skeleton:
    """A private copy of a model: its modules and hooks without its weights, ready to be run purely.

    Attributes:
      module: the copy; parameters and buffers are on the ``meta`` device.
      root: path of the module that a run calls; empty for the whole model, see :meth:`part`.
      names: canonical names of the parameters and buffers that a run uses.
      known: canonical names of all parameters and buffers of the whole model.
      buffers: those of ``names`` that are buffers.
      owned: for each module path the canonical names of its own tensors, by attribute.
      paths: every path of each module, by its first.
      constants: tensors that are plain attributes of modules, copied; they belong to the skeleton.
    """

    def __init__(self, model: nn.Module, opaque: Collection[str] = ()) -> None:
        registered = _registered(model)
        by_id = {id(tensor): name for name, tensor in registered.items()}
        self.root = ""
        self.names = self.known = frozenset(registered)
        self.buffers = frozenset(name for name, _ in model.named_buffers())
        self.owned = {
            path: {attribute: by_id[id(t)] for attribute, t in own_tensors(module)} for path, module in model.named_modules()
        }
        self._owned_in_all = self.owned
        self.paths = _all_paths(model)
        self.module, self.constants, names = _copy_without_weights(model, registered)
        self._module_at = dict(self.module.named_modules())
        self._aliases = aliases(self.module, names)
        self._tensors = self._named_tensors()
        self._holders = self._holders_by_name()
        self._rebound: list[tuple[nn.Module, str, Any]] = []
        self._slot = Slot()
        self._lock = threading.RLock()
        for path, module in self._module_at.items():
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

    @property
    def entry(self) -> nn.Module:
        """The module that a run calls."""
        module: nn.Module = self._module_at[self.root]
        return module

    def tensors_of(self, path: str) -> Mapping[str, str]:
        """Canonical names of the tensors of a module of the whole model, by attribute; empty where there is none."""
        return self._owned_in_all.get(path, {})

    def part(self, path: str, also: Collection[str] = ()) -> Skeleton:
        """The same skeleton, of which a run calls only the module at ``path``.

        Names and paths stay those of the whole model. Modules and lock are shared, so that one of the two runs at a time.

        Args:
          path: of the module, the first where it has several.
          also: names of further parameters and buffers that belong to ``names``.
        """
        other = copy.copy(self)
        other._lock = self._lock
        other.root = path
        inside = {id(module) for module in other.entry.modules()}
        other.owned = {own: names for own, names in self.owned.items() if id(self._module_at[own]) in inside}
        other.paths = {own: self.paths[own] for own in other.owned}
        other._aliases = [alias for alias in self._aliases if alias[0] in other.owned]
        held = {name for names in other.owned.values() for name in names.values()}
        also_read = {name for _, _, template in other._aliases for name in names_in(template)}
        other.names = frozenset(held | also_read | set(also))
        other.buffers = self.buffers & other.names
        other._tensors = other._named_tensors()
        other._holders = other._holders_by_name()
        return other

    def first_path(self, path: str) -> str | None:
        """The path by which the library calls the module at ``path``: its first; ``None`` where there is no module."""
        return next((first for first, paths in self.paths.items() if path in paths), None)

    def stands_in_list(self, path: str) -> bool:
        """Whether the module at a path is an item of a ``ModuleList`` or ``Sequential``."""
        around, _, _ = path.rpartition(".")
        return bool(path) and isinstance(self.module.get_submodule(around), nn.ModuleList | nn.Sequential)

    def altered(self, skipped: Collection[str], biases: Mapping[str, tuple[str, Tensor]]) -> Skeleton:
        """A copy in which some modules return their input, and some layers have a bias.

        Args:
          skipped: paths of modules that return their first argument.
          biases: by path of a layer, the canonical name of its bias and a tensor of its shape.
        """
        other = copy.deepcopy(self)
        for path in skipped:
            other._module_at[path].forward = _first_argument  # type: ignore[method-assign]
        for path, (name, like) in biases.items():
            other._module_at[path].bias = nn.Parameter(torch.empty_like(like, device="meta"))
            other.owned[path]["bias"] = name
        other._tensors = other._named_tensors()
        other._holders = other._holders_by_name()
        return other

    def _named_tensors(self) -> dict[str, str]:
        """Canonical name of each tensor, by the name that ``functional_call`` has for it in the module that a run calls."""
        first = {id(module): path for path, module in self._module_at.items()}
        return {
            f"{path}.{attribute}".lstrip("."): name
            for path, module in self.entry.named_modules()
            for attribute, name in self.owned[first[id(module)]].items()
        }

    def _holders_by_name(self) -> dict[str, list[tuple[str, str]]]:
        """Path and attribute of each module that holds a parameter or buffer, by its canonical name."""
        found: dict[str, list[tuple[str, str]]] = {name: [] for name in self.names}
        for path, own in self.owned.items():
            for attribute, name in own.items():
                found.setdefault(name, []).append((path, attribute))
        return found

    def holders(self, name: str) -> list[tuple[str, str]]:
        """Path and attribute of each module that holds a parameter or buffer."""
        return list(self._holders.get(name, ()))

    def check(self, params: Mapping[str, Tensor], where: str) -> None:
        """Raise a :class:`StateError` that names every parameter that is missing, unknown or no tensor."""
        fix = "params = sq.params_of(model)"
        if not isinstance(params, Mapping):
            raise StateError(
                explain(where, "params is not possible", got=type(params).__name__, allowed="a dict {name: Tensor}", fix=fix)
            )
        problems = []
        if not self.names <= params.keys() <= self.known:
            missing = sorted(self.names - params.keys())
            problems += [f"{where}: params lack {name!r}. Fix: {fix} has every name." for name in missing]
            for name in sorted(map(str, params.keys() - self.known)):
                hint = near(name, missing or self.names)
                problems.append(f"{where}: params hold {name!r}, which the model has not. Fix: {hint or 'leave it out'}.")
        for name, value in params.items():
            if not isinstance(value, Tensor):
                problems.append(
                    explain(
                        where, f"params[{name!r}] is not possible", got=type(value).__name__, allowed="a Tensor", fix=fix
                    )
                )
        raise_all(problems, StateError)

    def detached(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``params`` with buffers that are constants: no gradient reaches them."""
        if not modes.may_differentiate():
            return dict(params)
        return {**params, **{name: params[name].detach() for name in self.buffers}}

    def registered(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its canonical name, without numbers: tensors on the ``meta`` device."""
        return _registered(self.module)

    def deferrable(self, path: str, parameter: str) -> bool:
        """Whether only the layer at ``path`` holds a parameter, and reads it nowhere but in its own forward."""
        holders = self._holders[parameter]
        if [holder for holder, _ in holders] != [path]:
            return False
        module = self._module_at[path]
        plain = isinstance(module, READS_ITS_OWN) and is_leaf(module) and has_only_one_hook_before(module)
        aliased = any(parameter in names_in(template) for _, _, template in self._aliases)
        return plain and not aliased and is_parameter(module, holders[0][1])

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
        mode = modes.now() if frame is None else frame.mode
        if mode.compiling:
            result = self._run(self._call, frame, params, args, kwargs)
            rebind(self._rebound)
            return result
        with self._lock:
            memory = Memory(self.entry.modules())
            try:
                return self._run(self._call_bound, frame, params, args, kwargs)
            finally:
                changed = [change for change in memory.restore() if not isinstance(change[2], Tensor)]
                self._rebound = changed or self._rebound

    def _run(
        self,
        call: Callable[..., tuple[Any, dict[str, Tensor]]],
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        now = {**params, **{name: params[name].clone() for name in self.buffers}}
        for path, attribute, template in self._aliases:
            self._module_at[path].__dict__[attribute] = filled(template, now)
        if frame is not None:
            frame.begin(now)
        watch = None if frame is None else Watch(frame)
        outer, self._slot.watch = self._slot.watch, watch
        try:
            with watch or nullcontext():
                output, buffers = call(now, args, dict(kwargs))
        finally:
            self._slot.watch = outer
        return output, sorted_dict(buffers)

    def _call(self, now: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The model's output with these tensors, and its buffers afterwards, in a way that Dynamo follows."""
        tensors = {place: now[name] for place, name in self._tensors.items()}
        output = functional_call(self.entry, tensors, args, kwargs, tie_weights=False)
        return output, {name: tensors[place] for place, name in self._tensors.items() if name in self.buffers}

    def _call_bound(self, now: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The same, for eager: to find where each tensor goes takes ``functional_call`` longer than a small model runs."""
        places = [(store, attribute, name, store[attribute]) for store, attribute, name in self._places()]
        for store, attribute, name, _ in places:
            store[attribute] = now[name]
        try:
            output = self.entry(*args, **kwargs)
            return output, {name: store[attribute] for store, attribute, name, _ in places if name in self.buffers}
        finally:
            for store, attribute, _, empty in places:
                store[attribute] = empty

    def _places(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Where each parameter and buffer is held: the dict, the attribute, and the canonical name."""
        for path, own in self.owned.items():
            module = self._module_at[path]
            for attribute, name in own.items():
                yield store_of(module, attribute), attribute, name


def _all_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every path of each module, by its first; a module registered twice has two."""
    first = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[str]] = {path: [] for path in first.values()}
    for path, module in model.named_modules(remove_duplicate=False):
        found[first[id(module)]].append(path)
    return {path: tuple(paths) for path, paths in found.items()}


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
        raise PlanError(
            explain("trace", f"{what} is not possible", because=f"copy.deepcopy says: {error}", fix=fix)
        ) from error


def _first_argument(x: Any, *_: Any, **__: Any) -> Any:
    """The forward of a module that is skipped."""
    return x
