"""Run a model as a pure function, and let a frame see every call that it makes.

A :class:`Skeleton` is a private copy of a model without its weights. A run of it is a pure function of parameters and
arguments. A :class:`Frame` that is passed to the run sees each call of a leaf module (by hooks) and of a torch function
outside leaf modules (by a ``TorchFunctionMode``), and may replace operands and results. Python control flow runs as it
is. This file is the only caller of ``functional_call``.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import ParametrizationList

from sophq_func.capture._torch import (
    READS_ITS_OWN,
    Store,
    has_only_one_hook_before,
    is_hooked,
    is_parameter,
    keeps_buffers,
    mode_depth,
    own_tensors,
    pop_modes,
    push_mode,
    store_of,
    wrap_hooks_before,
)
from sophq_func.capture.aliases import aliases, filled, names_in
from sophq_func.capture.contents import all_paths, copied_without_weights, is_leaf, registered_tensors
from sophq_func.capture.frame import (
    Frame,
    ModuleInfo,
    OwnHook,
    Slot,
    Watch,
    calls_leaves_alone,
    drop_finished,
    enter,
    leave,
    report_by_forward,
    unhook,
)
from sophq_func.capture.functions import FunctionModule
from sophq_func.capture.hidden import report
from sophq_func.capture.lazy import Deferred
from sophq_func.capture.params import check_of
from sophq_func.capture.snapshot import Binding, Memory, rebind
from sophq_func.capture.turns import Turn, Undo
from sophq_func.core import modes
from sophq_func.core.errors import StateError, explain, near, other_prefix, raise_all
from sophq_func.core.pytree import sorted_dict
from sophq_func.core.types import Args, Given, Kwargs, Output, Tree

Result: TypeAlias = tuple[Output, dict[str, Tensor]]
"""The output of a run, and the buffers after it."""

UNWRAP = (
    "params = sq.params_of(model) of the model that was planned: model._orig_mod inside torch.compile(model), "
    "model.module inside a parallel wrapper"
)
"""What to do about names that have a prefix."""


class Place(NamedTuple):
    """Where a module holds a parameter or buffer, and what it holds there."""

    store: Store
    attribute: str
    name: str
    tensor: Tensor


class Skeleton:
    """A private copy of a model without its weights, whose runs are pure functions.

    Attributes:
      module: the copy, with the model's own hooks; parameters and buffers are on the ``meta`` device.
      root: path of the module that a run calls; empty for the whole model, see :meth:`part`.
      names: canonical names of the parameters and buffers that a run uses.
      all_names: canonical names of all parameters and buffers of the whole model.
      buffers: those of ``names`` that are buffers.
      owned: for the first path of each module, the canonical names of its own tensors, by attribute.
      paths: every path of each module, by its first.
      constants: copies of the tensors that are plain attributes of modules.
      structure: where the model is a function, the tree of its params.
      calls_leaves_alone: whether no code of the model's own lies between its leaves, but chains of modules.
      keeps_state: whether what a run changes in modules and arguments stays, as in a module; else each run is pure.
    """

    keeps_state = False

    def __init__(self, model: nn.Module, opaque: Collection[str] = ()) -> None:
        registered = registered_tensors(model)
        by_id = {id(tensor): name for name, tensor in registered.items()}
        self.root = ""
        self.names = self.all_names = frozenset(registered)
        self.buffers = self._cloned = frozenset(name for name, _ in model.named_buffers())
        self.owned = {
            path: {attribute: by_id[id(t)] for attribute, t in own_tensors(module)} for path, module in model.named_modules()
        }
        self._owned_in_all = self.owned
        self.paths = all_paths(model)
        self.structure = model.structure if isinstance(model, FunctionModule) else None
        self._check = check_of(model, registered, self.structure is not None)
        self.module, self.constants, names = copied_without_weights(model, registered)
        self._module_at = dict(self.module.named_modules())
        self._aliases = aliases(self.module, names)
        self._unfilled = {place[:2]: self._module_at[place.path].__dict__[place.attribute] for place in self._aliases}
        self._tensors = self._named_tensors()
        self._holders = self._holders_by_name()
        self._rebound: list[Binding] = []  # what the model bound anew in an eager run
        self._slot = Slot()
        self._turn = Turn()
        self._memory: Memory | None = None
        self._places: list[Place] | None = None
        for path, module in self._module_at.items():
            self._hook(path, module, path in opaque or is_leaf(module))
        self.calls_leaves_alone = all(calls_leaves_alone(module) for module in self._module_at.values())

    # copied without the turn, whose lock cannot be copied, and without what is remembered of the modules: a copy has its own

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_turn", "_memory", "_places")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._turn = Turn()
        self._memory = self._places = None
        # a ScriptModule copies nothing of what Python has added to it, and its parts are other objects then
        self._module_at = dict(self.module.named_modules())
        for path, module in self._module_at.items():
            if not is_hooked(module):
                self._hook(path, module, leaf=True)

    def _hook(self, path: str, module: nn.Module, leaf: bool) -> None:
        """Let a module report its calls to the run in progress."""
        info = ModuleInfo(path, leaf, module, self._slot)
        module._sophq_info = info  # type: ignore[assignment]
        wrap_hooks_before(module, partial(OwnHook, info=info))
        # by the class, since a ScriptModule has methods of these names that refuse
        nn.Module.register_forward_pre_hook(module, enter, with_kwargs=True)  # type: ignore[arg-type]
        nn.Module.register_forward_hook(module, leave, with_kwargs=True, always_call=True)

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

    def owners(self) -> dict[str, frozenset[str]]:
        """The modules that have parameters themselves: by path, the canonical names of these.

        What computes a parameter of another module belongs to that module.
        """
        own = {path: frozenset(names.values()) - self.buffers for path, names in self.owned.items()}
        return {
            path: names
            for path, names in own.items()
            if names and not isinstance(self._module_at[path], ParametrizationList)
        }

    def tensors_of(self, path: str) -> Mapping[str, str]:
        """Canonical names of the tensors of a module of the whole model, by attribute; empty for an unknown path."""
        return self._owned_in_all.get(path, {})

    def part(self, path: str, also: Collection[str] = ()) -> Skeleton:
        """A skeleton of the same modules, of which a run calls only the one at ``path``.

        Names and paths stay those of the whole model. Modules and turn are shared, so that one of the two runs at a time.

        Args:
          path: of the module, the first where it has several.
          also: names of further parameters and buffers that belong to ``names``.
        """
        other = copy.copy(self)
        other._turn = self._turn
        other.root = path
        inside = {id(module) for module in other.entry.modules()}
        other.owned = {at: names for at, names in self.owned.items() if id(self._module_at[at]) in inside}
        other.paths = {at: self.paths[at] for at in other.owned}
        other._aliases = [alias for alias in self._aliases if alias.path in other.owned]
        in_modules = {name for names in other.owned.values() for name in names.values()}
        in_aliases = {name for alias in other._aliases for name in names_in(alias.template)}
        other.names = frozenset(in_modules | in_aliases | set(also))
        other.buffers = other._cloned = self.buffers & other.names
        other._tensors = other._named_tensors()
        other._holders = other._holders_by_name()
        return other

    def first_path(self, path: str) -> str | None:
        """The first path of the module at ``path``; ``None`` where there is no module."""
        return next((first for first, paths in self.paths.items() if path in paths), None)

    def is_list_item(self, path: str) -> bool:
        """Whether the module at a path is an item of a ``ModuleList`` or ``Sequential``."""
        parent, _, _ = path.rpartition(".")
        return bool(path) and isinstance(self.module.get_submodule(parent), nn.ModuleList | nn.Sequential)

    def altered(self, skipped: Collection[str], biases: Mapping[str, tuple[str, Tensor]]) -> Skeleton:
        """A copy in which some modules return their input, and some layers have a bias.

        Args:
          skipped: paths of modules that return their first argument.
          biases: for the path of each layer, the canonical name of its bias, and a tensor of the bias's shape.
        """
        other = copy.deepcopy(self)
        other.calls_leaves_alone = False  # what it calls instead is not torch's
        for path in skipped:
            other._module_at[path].forward = _first_argument  # type: ignore[method-assign]
        for path, (name, like) in biases.items():
            other._module_at[path].bias = nn.Parameter(torch.empty_like(like, device="meta"))
            other.owned[path]["bias"] = name
        other._tensors = other._named_tensors()
        other._holders = other._holders_by_name()
        return other

    def bare(self, reporting: Collection[str]) -> Skeleton:
        """A copy for eager runs that report only the calls of the modules at some paths."""
        other = copy.deepcopy(self, {id(constant): constant for constant in self.constants})
        for path, module in other._module_at.items():
            unhook(module)
            if path in reporting:
                report_by_forward(module)
        held_by = {name: [other._module_at[path] for path, _ in places] for name, places in self._holders.items()}
        other._cloned = frozenset(name for name in self.buffers if not all(map(keeps_buffers, held_by[name])))
        return other

    def holders(self, name: str) -> list[tuple[str, str]]:
        """Path and attribute of each module that holds a parameter or buffer."""
        return list(self._holders.get(name, ()))

    def check(self, params: Given, where: str) -> Mapping[str, Tensor]:
        """The tensors that a run uses, and maybe others of the model, by name.

        Args:
          params: a dict of these; or, where the model is a function, the tree that it takes.
          where: the function that an error names.

        Raises:
          StateError: with every parameter that is missing, unknown or not a tensor.
        """
        if self.structure is not None:
            params = self.structure.named(params, where)
        fix = "params = sq.params_of(model)" if self.structure is None else "params as the function was planned with"
        if not isinstance(params, Mapping):
            got, allowed = type(params).__name__, "a dict {name: Tensor}"
            raise StateError(explain(where, "params must be a dict of tensors", got=got, allowed=allowed, fix=fix))
        if params and not any(isinstance(value, Tensor) for value in params.values()):
            got = type(next(iter(params.values()))).__name__  # qparams in the place of params: one mistake, one problem
            allowed, order = "a dict {name: Tensor}", f"{fix}, which come before qparams"
            raise StateError(explain(where, "params hold no tensors", got=got, allowed=allowed, fix=order))
        problems = self._check.problems(params, where, fix)
        # methods, not operators: Dynamo of torch 2.11 cannot compare a frozenset with keys
        if not (self.names.issubset(params.keys()) and self.all_names.issuperset(params)):
            problems += self._misnamed(params.keys(), where, fix)
        raise_all(problems, StateError)
        return params

    def _misnamed(self, given: Collection[str], where: str, fix: str) -> list[str]:
        """What is wrong with the names of params, in a sentence each; one for a prefix that all have in common."""
        renamed = other_prefix(given, self.names, self.all_names)
        if renamed:
            return [explain(where, f"params {renamed}", fix=UNWRAP)]
        missing = sorted(self.names - set(given))
        problems = [f"{where}: params lack {name!r}. Fix: {fix} has every name." for name in missing]
        for name in sorted(map(str, set(given) - self.all_names)):
            hint = near(name, missing or self.names) or "leave it out"
            problems.append(explain(where, f"params hold {name!r}, which is not in the model", fix=hint))
        return problems

    def detached(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``params`` with buffers detached, so that no gradient reaches them."""
        if not modes.may_differentiate():
            return dict(params)
        return {**params, **{name: modes.as_constant(params[name]) for name in self.buffers}}

    def registered(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its canonical name, as tensors on the ``meta`` device."""
        return registered_tensors(self.module)

    def deferrable(self, path: str, parameter: str) -> bool:
        """Whether only the forward of the layer at ``path`` reads a parameter, so that :meth:`run` may compute it then."""
        holders = self._holders[parameter]
        if [holder for holder, _ in holders] != [path]:
            return False
        module = self._module_at[path]
        # a hook of the model's own could read the parameter
        is_plain = isinstance(module, READS_ITS_OWN) and is_leaf(module) and has_only_one_hook_before(module)
        is_aliased = any(parameter in names_in(alias.template) for alias in self._aliases)
        _, attribute = holders[0]
        return is_plain and not is_aliased and is_parameter(module, attribute)

    def run(
        self,
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: Args,
        kwargs: Kwargs,
        later: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> Result:
        """Call the model with ``params``, and report its calls to ``frame``.

        Buffers are cloned, since the model may write into them. In eager a lock lets one thread at a time run a skeleton;
        nested runs are fine.

        Args:
          frame: what sees each call; ``None`` for a run without any interception.
          params: parameters and buffers by canonical name; see :meth:`detached`.
          args: positional arguments of the model.
          kwargs: keyword arguments of the model.
          later: functions that compute :meth:`deferrable` parameters when their layers start; needs a frame.

        Returns:
          The model's output, and its buffers afterwards.
        """
        if frame is not None and later:
            frame.deferred = Deferred(later, params)
        mode = modes.now() if frame is None else frame.mode
        if mode.compiling:
            # Dynamo cannot trace a ``Memory``: put back those attributes that an eager run bound anew
            result = self._run(self._call, frame, params, args, kwargs)
            rebind(self._rebound)
            for path, attribute, _ in self._aliases:  # a tensor of a transform that stays here could not leave the program
                self._module_at[path].__dict__[attribute] = self._unfilled[path, attribute]
            return result
        return self._take_turn(self.entry, frame, params, args, kwargs)

    def _take_turn(
        self, fn: Callable[..., Output], frame: Frame | None, params: Mapping[str, Tensor], args: Args, kwargs: Kwargs
    ) -> Result:
        """A run of the model, or of a part ``fn`` of it, in eager: alone, and with nothing left of it."""

        def run() -> Result:
            self._turn.note(partial(self._restore, self._remembered()))
            return self._run(partial(self._call_bound, fn), frame, params, args, kwargs)

        return self._turn.take(run)

    def _remembered(self) -> Memory:
        """The attributes of the modules, to be restored after a run.

        Between runs nobody changes a private copy, so that what was remembered once stays true. Another run around this one
        may have changed some.
        """
        if self._turn.is_nested():
            return Memory(self.entry.modules())
        self._memory = self._memory or Memory(self.entry.modules())
        return self._memory

    def _note(self, undo: Undo) -> None:
        """Note what takes back a change of the run; a compiler does not trace this, and its program makes no such change."""
        if not modes.is_compiling():
            self._turn.note(undo)

    def _restore(self, memory: Memory) -> None:
        """Put back the attributes of modules."""
        # not tensors, such as aliases, which each run binds itself
        changed = [binding for binding in memory.restore() if not isinstance(binding[2], Tensor)]
        self._rebound = changed or self._rebound

    def _run(
        self,
        call: Callable[[Mapping[str, Tensor], Args, Kwargs], Result],
        frame: Frame | None,
        params: Mapping[str, Tensor],
        args: Args,
        kwargs: Kwargs,
    ) -> Result:
        """A run by one of the two ways to call the model: with aliases filled in, and with the frame's mode active."""
        now = {**params, **{name: params[name].clone() for name in self._cloned}}
        for path, attribute, template in self._aliases:
            self._module_at[path].__dict__[attribute] = filled(template, now)
        if frame is not None:
            frame.begin(now)
        watch = None if frame is None else self._watch(frame, now)
        outer = self._slot.watch  # of the run around this one
        self._note(partial(setattr, self._slot, "watch", outer))
        self._slot.watch = watch
        try:
            if watch is None:
                output, buffers = call(now, args, kwargs)
            elif watch.frame.mode.compiling:
                with watch:
                    output, buffers = call(now, args, kwargs)
            else:
                report(self._turn, watch.frame.sees_functions)
                output, buffers = self._watched(watch, partial(call, now, args, kwargs))
        finally:
            self._slot.watch = outer
        return output, sorted_dict(buffers)

    def _watch(self, frame: Frame, now: Mapping[str, Tensor]) -> Watch:
        """What reports the calls of a run to a frame."""
        # of a bound model, a user may have put hooks on a layer
        sees_all = frame.sees_leaves_alone and self.calls_leaves_alone and not self.keeps_state
        return Watch(frame, partial(self._rerun, now), stays_away=sees_all)

    def _watched(self, watch: Watch, call: Callable[[], Result]) -> Result:
        """A call with a function mode on the stack, where it has something to see."""
        if watch.stays_away:
            return call()
        if mode_depth():
            drop_finished()
        depth = mode_depth()
        self._note(watch.finish)
        try:
            try:
                push_mode(watch)
                return call()
            except BaseException as error:
                if watch.is_missing():
                    # else torch would put it back when its context, which waits in these frames, is deleted: after the run
                    traceback.clear_frames(error.__traceback__)
                raise
            finally:
                watch.finish()
                pop_modes(depth)
        finally:  # again, since an interrupt may have cut it short
            watch.finish()
            pop_modes(depth)

    def _rerun(
        self, now: Mapping[str, Tensor], frame: Frame, fn: Callable[..., Output], args: Args, kwargs: Kwargs
    ) -> Output:
        """Compute a part of a run once more, with its tensors; buffers stay as they are.

        A checkpoint does so in a backward pass, when the run may be over and the modules hold no tensors.
        """
        rebound = self._rebound
        output, _ = self._take_turn(fn, frame, now, args, kwargs)
        self._rebound = rebound
        return output

    def _call(self, now: Mapping[str, Tensor], args: Args, kwargs: Kwargs) -> Result:
        """The model's output with these tensors, and its buffers afterwards; Dynamo can trace it."""
        if self.structure is not None:  # a function reads its params from an attribute, which the run has filled in
            return self.entry(*args, **kwargs), {name: now[name] for name in self.buffers}
        tensors = {place: now[name] for place, name in self._tensors.items()}
        output = functional_call(self.entry, tensors, args, dict(kwargs), tie_weights=False)
        return output, {name: tensors[place] for place, name in self._tensors.items() if name in self.buffers}

    def _call_bound(self, fn: Callable[..., Output], now: Mapping[str, Tensor], args: Args, kwargs: Kwargs) -> Result:
        """The output of the model, or of a part ``fn`` of it, in eager.

        Faster than :meth:`_call`: ``functional_call`` takes longer to find the modules than a small model to run.
        """
        places = self._places_now()
        self._note(partial(bind, places))
        for store, attribute, name, _ in places:
            store[attribute] = now[name]
        output = fn(*args, **kwargs)
        return output, {name: store[attribute] for store, attribute, name, _ in places if name in self.buffers}

    def _places_now(self) -> list[Place]:
        """Where each parameter and buffer is held, and what is there before a run: between runs always the same."""
        if self.keeps_state or self._turn.is_nested():
            return list(self._stored())
        self._places = self._places or list(self._stored())
        return self._places

    def _stored(self) -> Iterator[Place]:
        """Where each parameter and buffer is held, and what is there now."""
        return (Place(*place, place[0][place[1]]) for place in self._stores())

    def _stores(self) -> Iterator[tuple[Store, str, str]]:
        """Where each parameter and buffer is held: the dict, the attribute, and the canonical name."""
        for path, attributes in self.owned.items():
            module = self._module_at[path]
            for attribute, name in attributes.items():
                yield store_of(module, attribute), attribute, name

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
        holders: dict[str, list[tuple[str, str]]] = {name: [] for name in self.names}
        for path, attributes in self.owned.items():
            for attribute, name in attributes.items():
                holders.setdefault(name, []).append((path, attribute))
        return holders


def bind(places: Collection[Place]) -> None:
    """Put tensors where modules hold them."""
    for store, attribute, _, tensor in places:
        store[attribute] = tensor


def _first_argument(x: Tree, *_: object, **__: object) -> Tree:
    """The forward of a module that is skipped."""
    return x
