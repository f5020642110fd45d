"""See what modules and functions of a run are called with, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from sophq_func.capture.frame import unwatched
from sophq_func.capture.naming import CallNames
from sophq_func.config.names import underscored
from sophq_func.core.errors import ConfigError, StateError, unknown
from sophq_func.core.pytree import copied, tensors
from sophq_func.model.runner import Effect, Runner
from sophq_func.model.schedule import Pair, Schedule
from sophq_func.planning.runs import Run


class Call(NamedTuple):
    """One call of a module or function, as the run made it.

    Attributes:
      args: positional arguments; tensors are copies, made before the call.
      kwargs: keyword arguments, likewise.
      output: what it returned, on its grid where a quantizer sits there; a copy.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Enough(BaseException):
    """Ends a run behind the last call that is wanted. No ``Exception``, so that a model does not catch it."""


class Wanted(NamedTuple):
    """The calls that somebody wants to see.

    Attributes:
      paths: by path of a module, the name that was asked for.
      values: names of values.
      globs: patterns, for paths and values.
      modules: every path of each module of the model, by its first.
      ends: how many calls a run makes of what is wanted; ``None``: not known, or the run shall not end there.
    """

    paths: Mapping[str, str]
    values: frozenset[str]
    globs: tuple[str, ...]
    modules: Mapping[str, tuple[str, ...]]
    ends: int | None = None

    def key(self, path: str, value: str) -> str:
        """Under which name a call is shown; empty where it is not wanted.

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


def wanted(at: str | Collection[str], modules: Mapping[str, tuple[str, ...]], values: Collection[str]) -> Wanted:
    """What ``at`` names.

    Args:
      at: paths of modules, names of values and globs, dotted or underscored; one or several.
      modules: every path of each module of the model, by its first.
      values: names of the values of the traced model; empty where they are not known, and any name may be one.

    Raises:
      ConfigError: a name that fits nothing; all of them at once.
    """
    names = [at] if isinstance(at, str) else list(at)
    first = {path: own for own, paths in modules.items() for path in paths if path}
    spelled = {underscored(name): name for name in (*values, *first)} | {name: name for name in (*values, *first)}
    paths, own, globs, problems = {}, set(), [], []
    for name in names:
        if not isinstance(name, str) or not name:
            problems.append(unknown("tap", "path or value", name, [*first, *values]))
        elif any(sign in name for sign in "*?["):
            globs.append(name)
        elif (known := spelled.get(name)) in first:
            paths[first[known]] = name
        elif known is not None:
            own.add(known)
        elif values:
            problems.append(unknown("tap", "path or value", name, [*first, *values]))
        else:
            own.add(name)
    if problems:
        raise ConfigError("\n".join(problems))
    return Wanted(paths, frozenset(own), tuple(globs), modules)


def calls_of(wanted: Wanted, run: Run) -> int:
    """How many calls of an example's run are wanted."""
    leaves = sum(bool(wanted.key("" if made.function else made.path, made.name)) for made in run.calls)
    return leaves + sum(bool(wanted.key(scope.path, "")) for scope in run.scopes)


def unchanged(name: str, x: Tensor) -> Tensor:
    """The effect of a run in float."""
    return x


class Tap(Runner):
    """A runner that keeps copies of the calls that are wanted.

    Args:
      schedule, effect: see :class:`Runner`.
      wanted: which calls.
      root_name: what a model that is a leaf itself is called.
    """

    def __init__(self, schedule: Schedule, effect: Effect, wanted: Wanted, root_name: str) -> None:
        super().__init__(schedule, effect)
        self.wanted = wanted
        self.seen: dict[str, list[Call]] = {name: [] for name in (*wanted.paths.values(), *sorted(wanted.values))}
        self._names, self._root_name = CallNames(wanted.modules), root_name
        self._open: list[tuple[Pair, str, Any]] = []
        self._left = wanted.ends

    @property
    def takes_inputs(self) -> bool:
        return True

    def input(self, name: str, tensor: Tensor) -> Tensor:
        result = super().input(name, tensor)
        self._keep(self.wanted.key("", self._names.take(self._names.input(name))), ((), {}), result)
        return result

    def before_module(self, path: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        name = self._names.module(path or self._root_name)
        self._start((path, ""), self.wanted.key(path, name), args, kwargs)
        return super().before_module(path, args, kwargs)

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        result = super().after_module(path, module, args, kwargs, output)
        self._names.take(self._names.module(path or self._root_name))
        self._keep(*self._started((path, "")), result)
        return result

    def enter_scope(self, path: str, args: Any, kwargs: Any) -> None:
        self._start((path, ""), self.wanted.key(path, ""), args, kwargs)

    def leave_scope(self, path: str, args: Any, kwargs: Any, output: Any) -> None:
        self._keep(*self._started((path, "")), output)

    def function(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        value = self._names.function(self.scope, name)
        self._start((self.scope, name), self.wanted.key("", value), args, kwargs)
        result = super().function(name, func, args, kwargs)
        key, given = self._started((self.scope, name))
        shown = args[0] if name == "setitem" else result
        if tensors(shown):
            self._names.take(value)
            self._keep(key, given, shown)
        return result

    def _start(self, pair: Pair, name: str, args: Any, kwargs: Any) -> None:
        """A call starts: keep what it is given, if it is wanted, before it may write into it."""
        with self.aside(), unwatched():
            self._open.append((pair, name, copied((args, kwargs)) if name else None))

    def _started(self, pair: Pair) -> tuple[str, Any]:
        """The name and what was given when the call started that is done now; those that raised an error are dropped."""
        while True:
            started, name, given = self._open.pop()
            if started == pair:
                return name, given

    def _keep(self, name: str, given: Any, output: Any) -> None:
        """A call is done; with the last one that is wanted, the run may be, too."""
        if not name:
            return
        with self.aside(), unwatched():
            result = copied(output)
        args, kwargs = given
        self.seen.setdefault(name, []).append(Call(args, kwargs, result))
        if self._left is None or self.mode.compiling:
            return
        self._left -= 1
        if self._left <= 0:
            raise Enough

    def check(self) -> None:
        super().check()
        missing = [name for name in sorted(self.wanted.values) if not self.seen[name]]
        if missing:
            raise StateError(f"tap: this run makes no value {missing[0]!r}. Fix: sq.trace(model, args) shows the names.")

    def check_so_far(self) -> None:
        """Raise a :class:`StateError` unless the run, up to here, made no more calls than one of the examples."""
        if not any(all(self.counts[pair] <= n for pair, n in counts.items()) for counts in self.schedule.counts):
            raise StateError(self._mismatch(self.schedule.counts[0]))
