"""Names and values of a call's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sophq_func.core.errors import StateError, explain
from sophq_func.core.pytree import map_named


def as_call(batch: Any, where: str = "calibrate") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a batch: a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    allowed = "a tensor, a tuple of arguments or a dict of keyword arguments"
    raise StateError(explain(where, "this batch is not possible", got=type(batch).__name__, allowed=allowed))


class Arguments(NamedTuple):
    """Names of a model's arguments.

    Attributes:
      positional: those of ``forward`` that may be given by position.
      rest: under which name further ones are collected.
    """

    positional: tuple[str, ...]
    rest: str


def arguments(model: nn.Module) -> Arguments:
    """Names of the arguments of ``forward``."""
    kinds = inspect.Parameter
    positional, rest = [], "args"
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            positional.append(name)
        elif parameter.kind is kinds.VAR_POSITIONAL:
            rest = name
    return Arguments(tuple(positional), rest)


def map_inputs(
    names: Arguments, args: tuple[Any, ...], kwargs: Mapping[str, Any], f: Callable[[str, Tensor], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``f`` to each tensor among a call's arguments, which is told its name."""
    positional, rest = names
    args = tuple(
        map_named(positional[i] if i < len(positional) else f"{rest}.{i - len(positional)}", arg, f)
        for i, arg in enumerate(args)
    )
    return args, {name: map_named(name, arg, f) for name, arg in kwargs.items()}
