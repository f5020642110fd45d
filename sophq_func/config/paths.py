"""Classes and functions by the names under which Python finds them, for the texts and the pickles of configs."""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from sophq_func.config.patterns import PATTERNS, Fused, fused
from sophq_func.core.errors import ConfigError, explain

SPACES: Mapping[str, object] = {
    "torch.nn": nn,
    "torch.nn.functional": functional,
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch.fft": torch.fft,
    "operator": operator,
}
"""Where a class or function of torch is looked for, by the path that is stored: the public one, not that of its file."""

Named: TypeAlias = Callable[..., Any] | type
"""A class or function."""


def path_of(found: Named) -> str:
    """The path of a class or function: ``torch.nn.Linear``, ``package.module:Block``."""
    public, where = public_path(found), f"QuantConfig.to_json: {found!r}"
    if public:
        return public
    path = f"{getattr(found, '__module__', None)}:{getattr(found, '__qualname__', None)}"
    try:
        again = at(path)
    except ConfigError:
        again = None
    if again is not found:
        fix = "define it with a name at the top level of a module"
        raise ConfigError(explain(where, "it cannot be stored", because=f"no import finds it as {path}", fix=fix))
    return path


def is_registered(pattern: type[Fused]) -> bool:
    """Whether a fused pattern is found by its name alone."""
    return pattern.__name__ in PATTERNS and PATTERNS.get(pattern.__name__) is pattern


def public_path(found: object) -> str:
    """The public path of a class or function of torch; empty for any other value."""
    name = getattr(found, "__name__", "")
    paths = (f"{space}.{name}" for space, owner in SPACES.items() if name and getattr(owner, name, None) == found)
    return next(paths, "")


def at(path: object) -> Named:
    """The class or function at a path; its module is imported.

    Raises:
      ConfigError: this is no path, or leads nowhere.
    """
    sentence, allowed = "this path leads to no class or function", "torch.nn.Linear, or package.module:Block"
    if not isinstance(path, str):
        raise ConfigError(explain("path", sentence, got=path, allowed=allowed))
    module, colon, steps = path.partition(":")
    if not colon:
        return of_torch(path)
    try:
        found = operator.attrgetter(steps)(importlib.import_module(module))
    except (AttributeError, ImportError, ValueError) as error:
        because = f"{type(error).__name__}: {error}"
        raise ConfigError(explain("path", sentence, got=path, allowed=allowed, because=because)) from None
    if not callable(found):
        raise ConfigError(explain("path", sentence, got=path, allowed=allowed))
    result: Named = found
    return result


def of_torch(path: str) -> Named:
    """The class or function of torch at a public path; nothing is imported.

    Raises:
      ConfigError: there is none.
    """
    space, _, name = path.rpartition(".")
    found = getattr(SPACES.get(space), name, None)
    if callable(found):
        result: Named = found
        return result
    sentence, allowed = "this path leads to no class or function", f"a name in {', '.join(SPACES)}, or package.module:Block"
    raise ConfigError(explain("path", sentence, got=path, allowed=allowed))


# Pickles


class Reference(NamedTuple):
    """A class or function of torch, or a fused pattern, as a pickle holds it: by a name that needs no import.

    So ``torch.load`` reads it in its safe mode, and a pattern can be pickled that is in no module.

    Attributes:
      name: the public path, or the name of a pattern.
      parts: of a pattern that is not registered; else empty.
    """

    name: str
    parts: tuple[object, ...] = ()


def state_of(value: Any) -> dict[str, object]:
    """The fields of a config or rule for a pickle, with references in them."""
    return {field.name: _as_reference(getattr(value, field.name)) for field in dataclasses.fields(value)}


def fields_of(state: Mapping[str, object]) -> dict[str, object]:
    """What :func:`state_of` was made of."""
    return {name: _from_reference(value) for name, value in state.items()}


def _as_reference(value: object) -> object:
    if type(value) is tuple:
        return tuple(map(_as_reference, value))
    if not (isinstance(value, type) and issubclass(value, Fused)):
        path = public_path(value)
        return Reference(path) if path else value
    return Reference(value.__name__, () if is_registered(value) else tuple(map(_as_reference, value.parts)))


def _from_reference(value: object) -> object:
    if type(value) is tuple:
        return tuple(map(_from_reference, value))
    if not isinstance(value, Reference):
        return value
    if value.parts:
        return fused(value.name, *map(_from_reference, value.parts))  # type: ignore[arg-type]
    return PATTERNS.get(value.name) if value.name in PATTERNS else of_torch(value.name)
