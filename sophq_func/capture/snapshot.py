"""What modules remember in Python attributes from one call to the next, saved and put back, so that runs are pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_, itemgetter
from typing import Any

from torch import nn

OWN = frozenset(nn.Module().__dict__)
"""Attributes that every module has."""

HOOKS = tuple(name for name in sorted(OWN) if "_hooks" in name)
"""Those that hold hooks; a model may install some in its first call."""

_hooks_of = itemgetter(*HOOKS)


class _Absent:
    """Stands for an attribute that a module did not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Memory:
    """The plain attributes of some modules at one time; lists, dicts and sets among them with their contents."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [(module, dict(module.__dict__)) for module in modules]
        self._containers = [
            _contents(value)
            for _, attributes in self._modules
            for name, value in attributes.items()
            if name not in OWN and type(value) in (list, dict, set)
        ]
        hooks = [hooks for _, attributes in self._modules for hooks in _hooks_of(attributes) if hooks is not None]
        self._hooks = [(value, dict(value)) for value in hooks if value]
        self._no_hooks = [value for value in hooks if not value]

    def restore(self) -> list[tuple[nn.Module, str, Any]]:
        """Put everything back.

        Returns:
          The attributes that had been bound anew, with the values they have again.
        """
        for contents in self._containers:
            contents()
        for value, hooks in self._hooks:
            if value != hooks:
                _filled(value, hooks)
        for value in self._no_hooks:
            if value:
                value.clear()
        changed = []
        for module, attributes in self._modules:
            now = module.__dict__
            if len(now) == len(attributes) and all(map(is_, now.values(), attributes.values())):
                continue
            names = [k for k in now.keys() | attributes.keys() if now.get(k, ABSENT) is not attributes.get(k, ABSENT)]
            changed += [(module, name, attributes.get(name, ABSENT)) for name in names]
            if names:
                now.clear()
                now.update(attributes)
        return changed


def _contents(value: Any) -> Callable[[], Any]:
    """A function that gives a container its present contents back, those of containers inside it too."""
    if type(value) is list:
        items = [_contents(item) for item in value]
        return lambda: _filled(value, [item() for item in items])
    if type(value) is dict:
        pairs = {key: _contents(item) for key, item in value.items()}
        return lambda: _filled(value, {key: item() for key, item in pairs.items()})
    if type(value) is set:
        members = set(value)
        return lambda: _filled(value, members)
    return lambda: value


def _filled(value: Any, contents: Any) -> Any:
    value.clear()
    (value.extend if type(value) is list else value.update)(contents)
    return value


def rebind(changes: Iterable[tuple[nn.Module, str, Any]]) -> None:
    """Bind attributes as :meth:`Memory.restore` returned them; simple enough for Dynamo to follow."""
    for module, name, value in changes:
        if value is not ABSENT:
            setattr(module, name, value)
        elif hasattr(module, name):
            delattr(module, name)
