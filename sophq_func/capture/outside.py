"""Tensors that a function reads from outside of its arguments: in its closure, in globals, in attributes of what these hold.

:func:`places` finds where they are held. Reading the places again finds what is held there now, so that a name that was
bound anew is noticed.
"""

from __future__ import annotations

import functools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.core.types import Tree

Read = Callable[[Any, Any], Any]
"""What an object holds under a key."""

MOST = 100_000
"""How many objects are looked at: more than a model of a thousand layers has, and still less than a second."""

OPAQUE = (Tensor, ModuleType, type, str, bytes, int, float, torch.dtype, torch.device)
"""What holds no tensors, or, as a module of Python, too much."""

LIBRARIES = ("torch", "sophq_func")
"""Packages into whose globals nobody puts tensors of a model."""


class Step(NamedTuple):
    """From one object to what it holds: ``read(objects[parent], key)``."""

    parent: int
    read: Read
    key: Any
    name: str


class Places(NamedTuple):
    """Where tensors are held that a function reads.

    Attributes:
      root: the function.
      steps: from the function to what it holds, and so on; the object of step ``i`` has number ``i + 1``, the function 0.
      found: the numbers of the tensors.
      names: how a reader finds each of them, such as ``buffers.0.running_mean``.
    """

    root: object
    steps: tuple[Step, ...]
    found: tuple[int, ...]
    names: tuple[str, ...]

    def read(self) -> list[Tree]:
        """What is held there now.

        Raises:
          KeyError, IndexError, AttributeError, ValueError: nothing is held at one of the places.
        """
        objects = [self.root]
        for parent, read, key, _ in self.steps:
            objects.append(read(objects[parent], key))
        return [objects[number] for number in self.found]


GONE = (KeyError, IndexError, AttributeError, ValueError)
"""What reading a place raises where nothing is held any more; ``ValueError`` for a name of a closure that was deleted."""


def places(root: object, wanted: list[Tensor]) -> tuple[Places, list[Tensor]]:
    """Where each tensor is held; and those that are held nowhere, which have no place.

    Example:
      >>> def scaled_by(scale):
      ...     return lambda x: x * scale
      >>> two = torch.tensor(2.0)
      >>> found, lost = places(scaled_by(two), [two])
      >>> found.names, found.read()[0] is two, lost
      (('scale',), True, [])
    """
    missing = {id(tensor) for tensor in wanted}
    walked: list[Step] = []
    number_of: dict[int, int] = {}
    queue = deque([(0, root)])
    alive = [root]  # so that no identity is used twice
    seen = {id(root)}
    while queue and missing and len(alive) < MOST:
        parent, holder = queue.popleft()
        for read, key, name in _held(holder):
            try:
                held = read(holder, key)
            except GONE:  # a name of a closure that has no value yet
                continue
            if id(held) in seen:
                continue
            seen.add(id(held))
            alive.append(held)
            walked.append(Step(parent, read, key, name))
            if id(held) in missing:
                missing.discard(id(held))
                number_of[id(held)] = len(walked)
            elif not isinstance(held, OPAQUE):
                queue.append((len(walked), held))
    found = [tensor for tensor in wanted if id(tensor) in number_of]
    lost = [tensor for tensor in wanted if id(tensor) not in number_of]
    return _needed(root, walked, [number_of[id(tensor)] for tensor in found]), lost


def _needed(root: object, walked: list[Step], wanted: list[int]) -> Places:
    """The steps that lead to the objects of these numbers, numbered anew."""
    ways = [_way(walked, number) for number in wanted]
    needed = sorted({number for way in ways for number in way})
    renumbered = {0: 0, **{number: new for new, number in enumerate(needed, 1)}}
    steps = tuple(walked[number - 1]._replace(parent=renumbered[walked[number - 1].parent]) for number in needed)
    names = tuple(".".join(name for number in way if (name := walked[number - 1].name)) for way in ways)
    return Places(root, steps, tuple(renumbered[number] for number in wanted), names)


def _way(walked: list[Step], number: int) -> list[int]:
    """The numbers of the objects on the way to one, itself the last."""
    way = []
    while number:
        way.append(number)
        number = walked[number - 1].parent
    return way[::-1]


def _held(holder: object) -> Iterator[tuple[Read, Any, str]]:
    """What an object holds: how it is read, and its name, which is empty where it says nothing to a reader."""
    if isinstance(holder, FunctionType):
        yield from _held_by_function(holder)
    elif isinstance(holder, MethodType):
        yield from ((getattr, attribute, "") for attribute in ("__self__", "__func__"))
    elif isinstance(holder, functools.partial):
        yield from ((getattr, attribute, "") for attribute in ("func", "args", "keywords"))
    elif isinstance(holder, Mapping):
        yield from ((operator.getitem, key, str(key)) for key in list(holder))
    elif isinstance(holder, list | tuple):
        yield from ((operator.getitem, index, str(index)) for index in range(len(holder)))
    else:
        # the dicts in which a module holds its tensors and modules say nothing in a name
        yield from ((_attribute, key, "" if key.startswith("_") else key) for key in list(getattr(holder, "__dict__", ())))


def _held_by_function(function: FunctionType) -> Iterator[tuple[Read, Any, str]]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((_content, cell, name) for name, cell in cells)
    yield from ((getattr, attribute, "") for attribute in ("__defaults__", "__kwdefaults__"))
    package = str(function.__globals__.get("__name__", "")).partition(".")[0]
    if package not in LIBRARIES:
        read = sorted(set(_names(function.__code__)) & function.__globals__.keys())
        yield from ((_global, name, name) for name in read)


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes that a function reads, and the functions that are written inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _content(_: FunctionType, cell: CellType) -> object:
    return cell.cell_contents


def _global(function: FunctionType, name: str) -> object:
    return function.__globals__[name]


def _attribute(holder: object, name: str) -> object:
    # not ``getattr``, which may compute something
    return vars(holder)[name]
