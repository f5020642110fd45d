"""The arguments of a model: a batch as a call, and the names of the tensors in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from sophq_func.capture.functions import name_of, signature
from sophq_func.core.errors import StateError, explain
from sophq_func.core.modes import is_compiling
from sophq_func.core.pytree import Known, map_named, tensors
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


def check_call(model: nn.Module, examples: Collection[str] | None, args: Args, kwargs: Kwargs, where: str) -> None:
    """Raise a :class:`StateError` unless a batch is a call of a model as its examples were.

    A loader often yields a label beside each input. The model may refuse it, or take it for an argument that may be left
    out, as all examples do.

    Args:
      model: the model.
      examples: the arguments that are tensors in an example; ``None`` where they are not known.
      args, kwargs: the batch.
      where: the function that an error names.
    """
    key = 0 if args else next(iter(kwargs), 0)
    fix = f"inputs=lambda batch: batch[{key!r}] picks the inputs from what a loader yields"
    try:
        signature(model).bind(*args, **kwargs)
    except TypeError as error:
        raise StateError(
            explain(where, "this batch is not a call of the model", because=f"{name_of(model)}: {error}", fix=fix)
        ) from error
    if examples is None:
        return
    given = [name for name, arg in zip(arguments(model).positional, args, strict=False) if tensors(arg)]
    further = [name for name in given if name not in examples]
    if further:
        sentence = "this batch gives by position what no example gives"
        otherwise = "; a dict of keyword arguments if it is meant, or plan with an example that has it"
        raise StateError(explain(where, sentence, got=further, allowed=sorted(examples), fix=fix + otherwise))


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
    names: Arguments,
    args: Args,
    kwargs: Kwargs,
    f: Callable[[str, Tensor], Tree],
    only: Collection[str] | None = None,
) -> tuple[Args, dict[str, Tree]]:
    """A copy of a call's arguments with ``f(name, tensor)`` in place of each tensor, named such as ``x.0`` inside a list.

    Dicts, caches and all else that may be written into is new: what a model is given enters each run as it was.

    Args:
      names: of the model's arguments.
      args, kwargs: of the call.
      f: what happens to a tensor.
      only: names of the arguments that are copied; the others enter as they are. ``None``: all are copied.
    """
    known: Known | None = None if is_compiling() else {}  # Dynamo cannot tell identities of what the program makes itself
    further = (f"{names.rest}.{i}" for i in range(len(args) - len(names.positional)))
    # as many names as arguments: Dynamo of torch 2.9 takes ``strict=False`` for True
    by_position = zip((*names.positional[: len(args)], *further), args, strict=True)

    def mapped(name: str, arg: Tree) -> Tree:
        return map_named(name, arg, f, known) if only is None or name.partition(".")[0] in only else arg

    new_args = tuple(mapped(name, arg) for name, arg in by_position)
    return new_args, {name: mapped(name, arg) for name, arg in kwargs.items()}
