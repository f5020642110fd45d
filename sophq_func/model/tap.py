"""See what modules and functions of a run are called with, and what they return."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sophq_func.capture.calls import one_call
from sophq_func.capture.frame import unwatched
from sophq_func.capture.naming import CallNames, apart
from sophq_func.capture.transforms import depth, wholes
from sophq_func.config.names import underscored
from sophq_func.core.errors import ConfigError, StateError, unknown
from sophq_func.core.modes import outside_of_transforms
from sophq_func.core.public import public_as
from sophq_func.core.pytree import copied, tensors
from sophq_func.core.types import Args, Kwargs, Output, Tree
from sophq_func.model.engine import Engine
from sophq_func.model.loop import MakeRunner
from sophq_func.model.runner import Effect, Function, Runner
from sophq_func.model.schedule import Pair, Schedule
from sophq_func.model.weight_quantizer import Params
from sophq_func.numerics.contracts import QParams
from sophq_func.planning.runs import Run

Given = tuple[Args, Kwargs]
"""What a call was given."""


class Call(NamedTuple):
    """One call of a module or function, as the run made it.

    Attributes:
      args: positional arguments; tensors are copies, made before the call.
      kwargs: keyword arguments, likewise.
      output: what it returned, on its grid where a quantizer sits there; a copy.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Output


Seen = dict[str, list[Call]]
"""Calls in the order of execution, by the name that was asked for."""


class Tapped(Protocol):
    """What :meth:`sophq_func.Quantized.tap` returns."""

    def __call__(
        self, params: Params, qparams: Mapping[str, QParams] | None, /, *args: Any, **kwargs: Any
    ) -> tuple[Output, Seen]: ...


class Enough(BaseException):
    """Ends a run behind the last call that is wanted. No ``Exception``, so that a model does not catch it."""


class Wanted(NamedTuple):
    """The calls that a tap keeps.

    Attributes:
      paths: by first path of a module, the name that was asked for.
      values: names of values.
      globs: patterns, for paths and values.
      modules: every path of each module of the model, by its first.
      ends: how many wanted calls a run makes, after which it ends; ``None``: it goes on to its end.
    """

    paths: Mapping[str, str]
    values: frozenset[str]
    globs: tuple[str, ...]
    modules: Mapping[str, tuple[str, ...]]
    ends: int | None = None

    def key(self, path: str, value: str) -> str:
        """Under which name a call is kept; empty where it is not wanted.

        Args:
          path: of the module that is called; empty for a function, an input, or the model itself.
          value: what the call makes; empty for a module that is no leaf.
        """
        if path in self.paths:
            return self.paths[path]
        if value in self.values:
            return value
        name = path or value
        return name if name and any(fnmatchcase(name, glob) for glob in self.globs) else ""


def tap(engine: Engine, at: str | Collection[str], stop: bool) -> Tapped:
    """See :meth:`sophq_func.Quantized.tap`."""
    skeleton, runs = engine.skeleton, engine.plan.runs
    values = {made.name for run in runs for made in run.calls}
    calls = wanted(at, skeleton.paths, values)
    if stop and runs:  # a plan of an older version has no runs; then the run goes on to its end
        calls = calls._replace(ends=max(calls_of(calls, run) for run in runs))
    root_name = type(skeleton.entry).__name__.lower()

    @public_as("tap")
    @one_call("quantized_tap")
    def tapped(params: Params, qparams: Mapping[str, QParams] | None, /, *args: Any, **kwargs: Any) -> tuple[Output, Seen]:
        effect = unchanged if qparams is None else engine.quantizing(qparams)
        runners: list[Tap] = []

        def watch(schedule: Schedule) -> Tap:
            runners.append(Tap(schedule, effect, calls, root_name))
            return runners[0]

        output = None
        try:
            output = _run(engine, params, qparams, effect, args, kwargs, watch)
        except Enough:
            runners[0].check_so_far()
        return None if stop else output, runners[0].seen

    return tapped


def _run(
    engine: Engine,
    params: Params,
    qparams: Mapping[str, QParams] | None,
    effect: Effect,
    args: Args,
    kwargs: Kwargs,
    watch: MakeRunner,
) -> Output:
    """The output of the quantized model; without qparams of the float model."""
    if qparams is None:
        named = engine.skeleton.check(params, "tap")
        return engine.run_float(named, effect, args, kwargs, watch)
    named = engine.check(params, qparams, "tap", "qparams")
    output, _ = engine.run_quantized(named, qparams, effect, args, kwargs, watch)
    return output


def wanted(at: str | Collection[str], modules: Mapping[str, tuple[str, ...]], values: Collection[str]) -> Wanted:
    """The calls that ``at`` names.

    Args:
      at: paths of modules, names of values and globs, dotted or underscored; one or several.
      modules: every path of each module of the model, by its first.
      values: names of the values of the traced model. Empty for a plan of an older version, which has none: then any name
        may be that of a value, and the run tells, see :meth:`Tap.check`.

    Raises:
      ConfigError: a name that fits nothing; all of them at once.
    """
    names = [at] if isinstance(at, str) else list(at)
    first_of = {path: first for first, paths in modules.items() for path in paths if path}
    known = (*values, *first_of)
    spelled = {underscored(name): name for name in known}
    spelled.update({name: name for name in known})  # a dotted name wins over another one's underscored spelling
    paths, wanted_values, globs, problems = {}, set(), [], []
    for name in names:
        if not isinstance(name, str) or not name:
            problems.append(unknown("tap", "path or value", name, list(dict.fromkeys([*first_of, *values]))))
            continue
        target = spelled.get(name)
        if any(sign in name for sign in "*?["):
            globs.append(name)
        elif target in first_of:
            paths[first_of[target]] = name
        elif target is not None:
            wanted_values.add(target)
        elif values:
            problems.append(unknown("tap", "path or value", name, list(dict.fromkeys([*first_of, *values]))))
        else:
            wanted_values.add(name)
    if problems:
        raise ConfigError("\n".join(problems))
    return Wanted(paths, frozenset(wanted_values), tuple(globs), modules)


def calls_of(wanted: Wanted, run: Run) -> int:
    """How many calls of an example's run are wanted."""
    keys = [wanted.key("" if made.function else made.path, made.name) for made in run.calls]
    keys += [wanted.key(scope.path, "") for scope in run.scopes]
    return sum(bool(key) for key in keys)


def unchanged(name: str, x: Tensor) -> Tensor:
    """The effect of a run in float."""
    return x


class Open(NamedTuple):
    """A call that has started.

    Attributes:
      pair: path of the module, or module path and function.
      name: under which it is kept; empty where it is not wanted.
      given: copies of its arguments; empty where it is not wanted.
    """

    pair: Pair
    name: str
    given: Given


NOTHING: Given = ((), {})


class Tap(Runner):
    """A runner that keeps copies of the calls that are wanted.

    Args:
      schedule, effect: see :class:`Runner`.
      wanted: which calls.
      root_name: what a model that is a leaf itself is called.

    Attributes:
      wanted: as given.
      seen: the calls so far.
    """

    def __init__(self, schedule: Schedule, effect: Effect, wanted: Wanted, root_name: str) -> None:
        super().__init__(schedule, effect)
        self.wanted = wanted
        self.seen: Seen = {name: [] for name in (*wanted.paths.values(), *sorted(wanted.values))}
        self._names = CallNames(wanted.modules)
        self._root_name = root_name
        self._apart: Counter[Pair] = Counter()
        self._open: list[Open] = []
        self._left = wanted.ends
        self._outer = depth()

    @property
    def takes_inputs(self) -> bool:
        return True

    def input(self, name: str, tensor: Tensor) -> Tensor:
        result = super().input(name, tensor)
        value = self._names.take(self._names.input(name))
        self._keep(self.wanted.key("", value), NOTHING, result)
        return result

    def before_module(self, path: str, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        self._start((path, ""), self.wanted.key(path, self._value(path, "")), args, kwargs)
        return super().before_module(path, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Args, kwargs: Kwargs, output: Output) -> Output:
        result = super().after_module(path, module, args, kwargs, output)
        self._take(path, "", self._value(path, ""))
        name, given = self._end((path, ""))
        self._keep(name, given, result)
        return result

    def enter_scope(self, path: str, args: Args, kwargs: Kwargs) -> None:
        super().enter_scope(path, args, kwargs)
        self._start((path, ""), self.wanted.key(path, ""), args, kwargs)

    def leave_scope(self, path: str, args: Args, kwargs: Kwargs, output: Output) -> None:
        name, given = self._end((path, ""))
        self._keep(name, given, output)

    def function(self, name: str, func: Function, args: Args, kwargs: Kwargs) -> Output:
        value = self._value(self.scope, name)
        self._start((self.scope, name), self.wanted.key("", value), args, kwargs)
        result = super().function(name, func, args, kwargs)
        key, given = self._end((self.scope, name))
        made = args[0] if name == "setitem" else result  # x[i] = y returns nothing; it makes a new x
        if tensors(made):
            self._take(self.scope, name, value)
            self._keep(key, given, made)
        return result

    def _value(self, path: str, function: str) -> str:
        """The name of the value that the call makes that starts now: that of the plan."""
        pair = self._pair(path, function)
        if (path, function) in self.schedule.known.told_apart:
            return apart(path, function, self.before[-1], self._apart[pair])
        return self._names.function(path, function) if function else self._names.module(path or self._root_name)

    def _take(self, path: str, function: str, value: str) -> None:
        """Count a call that made a value, so that the next one gets another name."""
        if (path, function) in self.schedule.known.told_apart:
            self._apart[self._pair(path, function)] += 1
        else:
            self._names.take(value)

    def _start(self, pair: Pair, name: str, args: Args, kwargs: Kwargs) -> None:
        """A call starts: copy its arguments, if it is wanted, before it may write into them."""
        given: Given = self._copied((args, kwargs)) if name else NOTHING
        self._open.append(Open(pair, name, given))

    def _copied(self, tree: Tree) -> Tree:
        """Copies of tensors, of the whole ones under a transform of the model, which they outlive; no calls of the model."""
        with self.aside(), unwatched():
            if depth() == self._outer:
                return copied(tree)
            return outside_of_transforms(lambda: copied(wholes(tree, self._outer)), self._outer)

    def _end(self, pair: Pair) -> tuple[str, Given]:
        """A call ends: its name and its arguments."""
        while self._open[-1].pair != pair:
            self._open.pop()  # it raised an error that the model caught
        _, name, given = self._open.pop()
        return name, given

    def _keep(self, name: str, given: Given, output: Output) -> None:
        """Keep a call that has ended, if it is wanted; after the last one that is wanted, the run ends."""
        if not name:
            return
        result = self._copied(output)
        args, kwargs = given
        self.seen.setdefault(name, []).append(Call(args, dict(kwargs), result))
        if self._left is None or self.mode.compiling:  # a compiled program has no way to end early
            return
        self._left -= 1
        if self._left <= 0:
            raise Enough

    def check(self) -> None:
        super().check()
        missing = [name for name in sorted(self.wanted.values) if not self.seen[name]]
        if missing:
            raise StateError(f"tap: this run makes no value {missing[0]!r}. Fix: sq.trace(model, args) shows the names.")
