"""What users call: a call that does not fit its signature is a :class:`ConfigError` that names what was meant.

:func:`public` and :func:`constructor` are decorators. A call that fits costs one more frame. Only after a failure are the
arguments compared with the signature: first their names, then their types, where annotations say these.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from sophq_func.core.errors import (
    ConfigError,
    PlanError,
    StateError,
    explain,
    matches,
    problems_of,
    quoted,
    raise_all,
    unknown,
)
from sophq_func.core.modes import stands_for_another

Item = TypeVar("Item", bound=Callable[..., Any])

Parameters: TypeAlias = Mapping[str, inspect.Parameter]

OURS = (ConfigError, PlanError, StateError)
"""Errors that already say what is wrong."""

WIDER: Mapping[object, tuple[type, ...]] = {
    int: (numbers.Integral,),  # a number of numpy is one
    float: (numbers.Real,),
    tuple: (tuple, list),
    list: (tuple, list),
    collections.abc.Sequence: (collections.abc.Iterable,),
    collections.abc.Collection: (collections.abc.Iterable,),
}
"""For some types, those whose values are taken for them; a bool is no number."""

Meant: TypeAlias = Mapping[str, tuple[str, str]]
"""By a keyword that a signature does not have: the one that says here what is meant by it, and how that is written."""

RECEIVERS = ("self", "cls", "_cls")
"""Names of the argument that a method is called on, which messages leave out."""

MOST_DEPTH = 6
"""How deep containers are looked into; a circle ends there."""

LONGEST_VALUE = 80
"""A value whose ``repr`` has more characters is named by its type: a model or a tensor would fill the screen."""


def public(item: Item) -> Item:
    """Decorator of a function or class that users call.

    A keyword that the signature does not have, an argument that is missing, given twice or too many, and, where the call
    fails, an argument of another type than its annotation: each is a :class:`ConfigError`. All are reported together.

    The signature stays visible to ``inspect`` and to type checkers, and what is decorated can be pickled as before.

    Example:
      >>> @public
      ... def widen(bits: int, *, by: int = 1) -> int:
      ...     return bits + by
      >>> widen(4, bye=2)
      Traceback (most recent call last):
      sophq_func.core.errors.ConfigError: widen: keyword 'bye' is not known, did you mean 'by'? Fix: use one of bits, by.
      >>> widen("four")
      Traceback (most recent call last):
      sophq_func.core.errors.ConfigError: widen: bits has the wrong type: got 'four', allowed int.
    """
    return _decorated(item, _problems)


def public_as(where: str) -> Callable[[Item], Item]:
    """:func:`public`, for a function that messages call by another name than its own: ``export.torch``."""

    def decorate(item: Item) -> Item:
        return typing.cast(Item, _teaching(item, where, _problems))

    return decorate


class Absent:
    """What stands for an argument that was not given."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = Absent()
"""The one value of its class."""


def is_absent(value: object) -> bool:
    """Whether a method of :func:`in_loops` got nothing in the place of an argument."""
    return value is ABSENT


def in_loops(item: Item) -> Item:
    """Decorator of a method that is called so often that the frame of :func:`public` would be felt.

    A call that lacks arguments without a default arrives with :data:`ABSENT` in their place, which the method refuses. The
    signature that is seen by ``inspect`` and by type checkers is the one that is written.

    Example:
      >>> @in_loops
      ... def halved(x: float, /) -> float:
      ...     if is_absent(x):
      ...         raise ConfigError("halved: x is missing")
      ...     return x / 2
      >>> halved(3.0), inspect.signature(halved).parameters["x"].default is inspect.Parameter.empty
      (1.5, True)
      >>> halved()
      Traceback (most recent call last):
      sophq_func.core.errors.ConfigError: halved: x is missing
    """
    function = typing.cast(types.FunctionType, item)
    signature = inspect.signature(function)
    needed = [name for name in _positional(signature.parameters) if name not in RECEIVERS]
    vars(function)["__signature__"] = signature
    function.__defaults__ = (ABSENT,) * len(needed)
    return item


def constructor(item: Item) -> Item:
    """:func:`public` for what makes a value of its arguments and does nothing else.

    It can be called again, with the arguments that it knows, so that what its own checks find is reported, too.

    Example:
      >>> @constructor
      ... def positive(*, number: int = 1) -> int:
      ...     if number < 1:
      ...         raise ConfigError("positive: it is negative")
      ...     return number
      >>> positive(number=-1, base=2)
      Traceback (most recent call last):
      sophq_func.core.errors.ConfigError: 2 problems:
        1. positive: field 'base' is not known. Fix: use one of number.
        2. positive: it is negative
    """
    return _decorated(item, _problems_of_value)


def constructor_for(meant: Meant) -> Callable[[Item], Item]:
    """:func:`constructor`, for what people call with keywords of other libraries.

    Example:
      >>> @constructor_for({"width": ("bits", "bits=4")})
      ... def scheme(*, bits: int = 8) -> int:
      ...     return bits
      >>> scheme(width=4)
      Traceback (most recent call last):
      sophq_func.core.errors.ConfigError: scheme: field 'width' is not known. Fix: bits=4, or use one of bits.
    """

    # a function, and no ``functools.partial``, since a compiler traces models that make such values
    def find(call: Callable[..., Any], where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        return _problems_of_value(call, where, args, kwargs, meant)

    def decorate(item: Item) -> Item:
        return _decorated(item, find)

    return decorate


_Find: TypeAlias = Callable[[Callable[..., Any], str, Sequence[Any], Mapping[str, Any]], list[str]]
"""What is wrong with a call that failed: of the function, its name, and its arguments."""


def _decorated(item: Item, find: _Find) -> Item:
    if isinstance(item, type):
        # the class itself stays the same object, so that pickle, isinstance and type checkers see no difference
        if issubclass(item, tuple):  # a NamedTuple is made by ``__new__``, and has no checks of its own
            make = item.__new__
            make.__module__ = item.__module__  # where its annotations mean something
            item.__new__ = _teaching(_typed(make), item.__name__, find)  # type: ignore[method-assign]
        else:
            item.__init__ = _teaching(item.__init__, item.__name__, find)  # type: ignore[method-assign, misc]
        return item
    return typing.cast(Item, _teaching(item, item.__name__, find))


def _typed(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which fails for arguments whose types are not those of the annotations."""
    # once, when the class is defined: it is made often, and nothing is to be evaluated while a file is loaded
    annotations = {name: _resolved(one.annotation, call) for name, one in inspect.signature(call).parameters.items()}

    @functools.wraps(call)
    def typed(*args: Any, **kwargs: Any) -> Any:
        made = call(*args, **kwargs)
        given = {**dict(zip(annotations, args, strict=False)), **kwargs}
        wrong = (
            name
            for name, value in given.items()
            for _ in _misfits("", name, value, annotations[name])
            if not stands_for_another(value)
        )
        if any(True for _ in wrong):
            raise TypeError("an argument has the wrong type")  # which one is found out by ``_teaching``
        return made

    return typed


def _teaching(call: Callable[..., Any], where: str, find: _Find) -> Callable[..., Any]:
    """``call``, with errors that teach."""

    @functools.wraps(call)
    def taught(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except OURS:
            raise
        except Exception:
            problems = find(call, where, args, kwargs)
            if not problems:  # the arguments fit: what failed lies elsewhere, perhaps in the user's own model
                raise
        return raise_all(problems)

    return taught


def _problems(call: Callable[..., Any], where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """What is wrong with the arguments; nothing where they fit the signature and its annotations."""
    parameters = inspect.signature(call).parameters
    return [
        *surplus(where, parameters, args, kwargs, "keyword"),
        *_missing(where, parameters, args, kwargs),
        *_of_wrong_types(call, where, args, kwargs),
    ]


def _problems_of_value(
    call: Callable[..., Any],
    where: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    meant: Meant = types.MappingProxyType({}),
) -> list[str]:
    """The same, with what the function itself says about the arguments that it knows."""
    parameters = inspect.signature(call).parameters
    names = [*surplus(where, parameters, args, kwargs, "field", meant), *_missing(where, parameters, args, kwargs)]
    known = {name: given for name, given in kwargs.items() if name in _keywords(parameters)}
    if len(args) > len(_positional(parameters)) and not _has(parameters, inspect.Parameter.VAR_POSITIONAL):
        return names  # what an argument without a name was meant for is not known, so that others may be missing
    try:
        call(*args, **known)
    except OURS as error:
        return [*names, *problems_of(error)]
    except Exception:  # arguments are missing, or of types that its own checks do not expect
        return names or list(_of_wrong_types(call, where, args, known))
    return names


def surplus(
    where: str,
    parameters: Parameters,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    kind: str = "",
    meant: Meant = types.MappingProxyType({}),
) -> Iterator[str]:
    """Arguments that the signature has no place for; with an empty ``kind`` unknown keywords are left to the caller."""
    positional = _positional(parameters)
    if len(args) > len(positional) and not _has(parameters, inspect.Parameter.VAR_POSITIONAL):
        by_position, by_keyword = _listed(positional), _listed(_keywords(parameters))
        named = "keywords only" if by_keyword else "no arguments"
        allowed = f"{by_position} by position" if by_position else named
        fix = f"use the keywords {by_keyword}" if by_keyword else "leave it out"
        extra = _shown(args[len(positional)])
        yield explain(where, "there are too many positional arguments", got=extra, allowed=allowed, fix=fix)
    for name in positional[: len(args)]:
        if name in kwargs and not _is_nameless(parameters, name):
            yield explain(where, f"{name} is given twice", fix=f"give {name} once")
    if kind and not _has(parameters, inspect.Parameter.VAR_KEYWORD):
        known = _keywords(parameters)
        for name in kwargs:
            if name not in known and not _is_nameless(parameters, name):
                keyword, written = meant.get(name, ("", ""))
                yield unknown(where, kind, name, known or [f"(it takes no {kind}s)"], written if keyword in known else "")


def _missing(where: str, parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Arguments that must be given and are not. One that a misspelt keyword stands for is reported with that keyword."""
    by_position = _positional(parameters)[: len(args)]
    misspelt = {match for name in kwargs if name not in parameters for match in matches(name, _keywords(parameters))}
    needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind not in _VARIADIC]
    call = f"{where}({_listed([*needed, *_rest(parameters)])})"
    for name in needed:
        if name in by_position or name in misspelt:
            continue
        if name not in kwargs:
            yield explain(where, f"{name} is missing", fix=f"give {name}, as in {call}")
        elif _is_nameless(parameters, name):
            yield explain(where, f"{name} is given by keyword", allowed="by position", fix=call)


def _is_nameless(parameters: Parameters, name: str) -> bool:
    """Whether a parameter can be given by position alone."""
    return name in parameters and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY


def _rest(parameters: Parameters) -> list[str]:
    """How a call shows that more arguments may follow."""
    return ["..."] if _has(parameters, inspect.Parameter.VAR_POSITIONAL) else []


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _has(parameters: Parameters, kind: object) -> bool:
    return any(parameter.kind is kind for parameter in parameters.values())


def _positional(parameters: Parameters) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def _keywords(parameters: Parameters) -> list[str]:
    """Names of the parameters that can be given by keyword."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind in kinds and name not in RECEIVERS]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if name not in RECEIVERS)


def _of_wrong_types(call: Callable[..., Any], where: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Arguments whose types are not those of the annotations."""
    parameters = inspect.signature(call).parameters
    given = {**dict(zip(_positional(parameters), args, strict=False)), **kwargs}
    for name, value in given.items():
        if name not in parameters or name in RECEIVERS or parameters[name].kind in _VARIADIC:
            continue
        annotation = _resolved(parameters[name].annotation, call)
        if value is parameters[name].default:
            continue
        yield from _misfits(where, name, value, annotation)


def check_fields(where: str, value: tuple[object, ...]) -> None:
    """Raise a :class:`ConfigError` about the fields of a NamedTuple whose types are not those of its annotations."""
    raise_all([*_items_of_wrong_types(where, type(value).__name__, value, type(value))])


def _misfits(where: str, name: str, value: object, annotation: object, depth: int = 0) -> Iterator[str]:
    """Why a value does not have a type, or something in it not the type that it is to have, in a line each."""
    if isinstance(value, float) and math.isnan(value):
        yield explain(where, f"{name} is not a number", got=value, allowed=_spelled(annotation))
    elif not fits(value, annotation):
        yield explain(where, f"{name} has the wrong type", got=_shown(value), allowed=_spelled(annotation))
    else:
        yield from _items_of_wrong_types(where, name, value, annotation, depth)


def _items_of_wrong_types(where: str, name: str, value: object, annotation: object, depth: int = 0) -> Iterator[str]:
    """Keys and items of containers whose types are not those of the annotation, in a line each; the first of each level."""
    arguments = typing.get_args(annotation)
    if depth > MOST_DEPTH:
        return
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        fitting = [one for one in arguments if fits(value, one)]
        yield from _items_of_wrong_types(where, name, value, fitting[0], depth + 1) if len(fitting) == 1 else ()
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            if not fits(key, arguments[0]):
                allowed = _spelled(arguments[0])
                yield explain(where, f"a key of {name} has the wrong type", got=_shown(key), allowed=allowed)
                return
            yield from _misfits(where, f"{name}[{quoted(key)}]", item, arguments[1], depth + 1)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        hints = getattr(type(value), "__annotations__", {})
        for field, item in zip(value._fields, value, strict=True):
            hint = _resolved(hints.get(field, Any), type(value))
            yield from _misfits(where, f"{name}.{field}", item, hint, depth + 1)
    elif isinstance(value, tuple | list) and arguments:
        items = arguments[:1] * len(value) if typing.get_origin(annotation) is not tuple or ... in arguments else arguments
        for i, item in enumerate(value[: len(items)]):
            yield from _misfits(where, f"{name}[{i}]", item, items[i], depth + 1)


class _Quoted:
    """A value that is shown by its type."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _shown(value: object) -> object:
    """A value for a message, or its type where its ``repr`` is long."""
    text = quoted(value)
    is_short = len(text) <= LONGEST_VALUE and "\n" not in text and " object at 0x" not in text
    return value if is_short else _Quoted(f"a {type(value).__name__}")


def _resolved(annotation: object, call: Callable[..., Any] | type) -> object:
    """The type that an annotation names; ``Any`` where it is not there at run time."""
    if isinstance(annotation, typing.ForwardRef):  # of a NamedTuple
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(call.__module__)
    try:
        return eval(annotation, vars(module) if module else {})
    except (NameError, AttributeError, TypeError):  # a name that only type checkers import
        return Any


def fits(value: object, annotation: object) -> bool:
    """Whether a value may have a type, as far as can be told without looking into containers.

    Example:
      >>> fits(3, int | None), fits("3", int | None), fits([3], collections.abc.Sequence[int]), fits(3, float)
      (True, False, True, True)
    """
    if annotation is None or annotation is type(None):
        return value is None
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    cls = origin if isinstance(origin, type) else annotation
    if cls is collections.abc.Callable:
        return callable(value)
    if getattr(cls, "_is_protocol", False):
        return callable(value) or "__call__" not in vars(cls)
    if cls in (Any, inspect.Parameter.empty) or not isinstance(cls, type):
        return True
    # wider than Python's own view where a function takes more than its annotation says: an error must not name an argument
    # that another call would have accepted
    if cls in WIDER:
        return isinstance(value, WIDER[cls]) and not isinstance(value, bool)
    return isinstance(value, cls)


def _spelled(annotation: object) -> str:
    """A type in words."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spelled(one) for one in typing.get_args(annotation)))
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    if annotation is None or annotation is type(None):
        return "None"
    cls = origin if isinstance(origin, type) else annotation
    return cls.__name__ if isinstance(cls, type) else str(annotation)
