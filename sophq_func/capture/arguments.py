"""The arguments of a model: a batch as a call, and the names of the tensors in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sophq_func.capture.functions import signature
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import is_compiling
from sophq_func.core.pytree import Known, map_named
from sophq_func.core.types import Args, Kwargs, Tree


def as_call(batch: object, where: str = "calibrate") -> tuple[Args, dict[str, Tree]]:
    """Positional and keyword arguments of a batch.

    Args:
      batch: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
      where: the function that an error names.

    Raises:
      StateError: it is something else.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    allowed = "a tensor, a tuple of arguments or a dict of keyword arguments"
    fix = "yield (x,) or {'name': x} for each batch, as in model(x) or model(name=x)"
    raise StateError(
        explain(where, "this batch is not a call of the model", got=type(batch).__name__, allowed=allowed, fix=fix)
    )


class Arguments(NamedTuple):
    """Names of the arguments of a model's ``forward``.

    Attributes:
      positional: those that may be given by position.
      rest: the name of ``*args``, which collects further ones; ``"args"`` where there is none.
    """

    positional: tuple[str, ...]
    rest: str


def arguments(model: nn.Module) -> Arguments:
    """Names of the arguments of ``model.forward``, or of a function without its params."""
    kinds = inspect.Parameter
    positional, rest = [], "args"
    for name, parameter in signature(model).parameters.items():
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
            positional.append(name)
        elif parameter.kind is kinds.VAR_POSITIONAL:
            rest = name
    return Arguments(tuple(positional), rest)


def map_inputs(
    names: Arguments, args: Args, kwargs: Kwargs, f: Callable[[str, Tensor], Tree]
) -> tuple[Args, dict[str, Tree]]:
    """A copy of a call's arguments with ``f(name, tensor)`` in place of each tensor, named such as ``x.0`` inside a list.

    Dicts, caches and all else that may be written into is new: what a model is given enters each run as it was.
    """
    known: Known | None = None if is_compiling() else {}  # Dynamo cannot tell identities of what the program makes itself
    further = (f"{names.rest}.{i}" for i in range(len(args) - len(names.positional)))
    by_position = zip((*names.positional, *further), args, strict=False)
    new_args = tuple(map_named(name, arg, f, known) for name, arg in by_position)
    return new_args, {name: map_named(name, arg, f, known) for name, arg in kwargs.items()}
