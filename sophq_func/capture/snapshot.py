"""Python attributes that a model changes while it runs, saved before and restored after, so that runs are pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import TypeAlias

from torch import nn

Binding: TypeAlias = tuple[nn.Module, str, object]
"""A module, the name of an attribute, and its value or :data:`ABSENT`."""

OWN = frozenset(nn.Module().__dict__)
"""Names of the attributes that every module has: flags, hooks, and the dicts of tensors and submodules."""

HOOKS = tuple(name for name in sorted(OWN) if "_hooks" in name)
"""Those that hold hooks, which a model may register while it runs."""

_hooks_of = itemgetter(*HOOKS)


class _Absent:
    """The value of an attribute that a module does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Memory:
    """The attributes of some modules at one time, with the contents of lists, dicts and sets among them."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(module, dict(module.__dict__)) for module in modules]
        self._containers = [
            _contents(value)
            for _, attributes in self._modules
            for name, value in attributes.items()
            if name not in OWN and type(value) in (list, dict, set)
        ]
        dicts = [hooks for _, attributes in self._modules for hooks in _hooks_of(attributes) if hooks is not None]
        self._hooks = [(hooks, dict(hooks)) for hooks in dicts if hooks]
        # most of the dicts of hooks are empty, and need no copy
        self._no_hooks = [hooks for hooks in dicts if not hooks]

    def restore(self) -> list[Binding]:
        """Put everything back.

        Returns:
          The attributes that had been bound to other objects, with the values that they have again.
        """
        for restore_contents in self._containers:
            restore_contents()
        for hooks, before in self._hooks:
            if hooks != before:
                hooks.clear()
                hooks.update(before)
        for hooks in self._no_hooks:
            if hooks:
                hooks.clear()
        changed: list[Binding] = []
        for module, attributes in self._modules:
            now = module.__dict__
            # mostly nothing was bound anew, which this finds out without a loop in Python
            if len(now) == len(attributes) and all(map(is_, now.values(), attributes.values())):
                continue
            names = [k for k in now.keys() | attributes.keys() if now.get(k, ABSENT) is not attributes.get(k, ABSENT)]
            changed += [(module, name, attributes.get(name, ABSENT)) for name in names]
            if names:
                now.clear()
                now.update(attributes)
        return changed


def _contents(value: object) -> Callable[[], object]:
    """A function that restores the present contents of a container, and of containers in it, and returns it."""
    if type(value) is list:
        items = [_contents(item) for item in value]

        def restore_list() -> object:
            value[:] = [restore() for restore in items]
            return value

        return restore_list
    if type(value) is dict:
        pairs = {key: _contents(item) for key, item in value.items()}

        def restore_dict() -> object:
            contents = {key: restore() for key, restore in pairs.items()}
            value.clear()
            value.update(contents)
            return value

        return restore_dict
    if type(value) is set:
        members = set(value)

        def restore_set() -> object:
            value.clear()
            value.update(members)
            return value

        return restore_set
    return lambda: value


def rebind(changes: Iterable[Binding]) -> None:
    """Bind attributes as :meth:`Memory.restore` returned them; Dynamo can trace it, as it could not trace a ``Memory``."""
    for module, name, value in changes:
        if value is not ABSENT:
            setattr(module, name, value)
        elif hasattr(module, name):
            delattr(module, name)
