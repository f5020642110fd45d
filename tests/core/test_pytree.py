"""What a tree is taken apart into, and that every walk over trees agrees on it."""

from __future__ import annotations

import enum
import functools
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sophq_func.core.pytree import copied, flatten, has_floating, map_named, named_leaves, node_of, refilled, tensors


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Fields:
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    a: Any
    b: Any


@dataclass
class Registered:
    a: Any
    b: Any


_pytree.register_dataclass(Registered)


class Plain:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class Slots:
    __slots__ = ("a", "b")

    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class Guarded(Plain):
    """Its attributes cannot be set from outside."""

    def __init__(self, a: Any, b: Any) -> None:
        self.__dict__.update(a=a, b=b)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class Named(dict):
    """A dict with attributes of its own."""


NODES: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda a, b: {"a": a, "b": b},
    "OrderedDict": lambda a, b: OrderedDict(a=a, b=b),
    "defaultdict": lambda a, b: defaultdict(list, a=a, b=b),
    "a subclass of dict": lambda a, b: Named(a=a, b=b),
    "UserDict": lambda a, b: UserDict(a=a, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "deque": lambda a, b: deque([a, b]),
    "named tuple": Pair,
    "another named tuple": namedtuple("Other", "a b"),
    "dataclass": Fields,
    "frozen dataclass with slots": Frozen,
    "registered dataclass": Registered,
    "object": Plain,
    "object with slots": Slots,
    "guarded object": Guarded,
}
over_nodes = pytest.mark.parametrize("make", NODES.values(), ids=NODES)


@over_nodes
def test_every_walk_finds_the_same_tensors_in_the_same_order(make: Callable[[Any, Any], Any]) -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = (make(a, [b, None]), {"c": c})
    assert [t.numel() for t in tensors(tree)] == [1, 2, 3]
    leaves, _ = flatten(tree)
    assert [leaf for leaf in leaves if not isinstance(leaf, Tensor)] == [None]
    seen: list[str] = []
    map_named("x", tree, lambda name, t: seen.append(name) or t)
    assert seen == [f"x.{name}" for name, leaf in named_leaves(tree) if isinstance(leaf, Tensor)]
    assert has_floating(tree)
    assert not has_floating(make(torch.ones(1, dtype=torch.int64), "text"))


@over_nodes
def test_a_tree_is_put_together_from_other_leaves_in_its_own_class(make: Callable[[Any, Any], Any]) -> None:
    tree = make(torch.zeros(1), {"k": torch.zeros(2)})
    leaves, rebuild = flatten(tree)
    new = rebuild([leaf + 1 for leaf in leaves])
    assert type(new) is type(tree)
    assert [float(t.sum()) for t in tensors(new)] == [1.0, 2.0]
    assert [float(t.sum()) for t in tensors(tree)] == [0.0, 0.0]
    assert type(refilled(tree, leaves)) is type(tree)


@over_nodes
def test_a_copy_has_containers_of_its_own(make: Callable[[Any, Any], Any]) -> None:
    inner: dict[str, Any] = {"t": torch.zeros(2)}
    tree = make(inner, [inner])
    copy = copied(tree)
    first, second = (part for _, part in zip("ab", _parts(copy), strict=True))
    assert first is second[0], "one object in two places stays one"
    first["t"] += 1
    first["new"] = 1
    assert inner.keys() == {"t"}
    assert not inner["t"].any()


def _parts(tree: Any) -> list[Any]:
    if isinstance(tree, UserDict):
        return list(tree.values())
    node = node_of(tree)
    assert node is not None
    return list(node.parts)


def test_attributes_that_are_no_fields_are_copied_too() -> None:
    @dataclass
    class Lazy:
        a: Tensor
        made: int = field(init=False, default=7)

        def __post_init__(self) -> None:
            self.made = 8

    given = Lazy(torch.zeros(1))
    given.extra = torch.ones(1)  # type: ignore[attr-defined]
    copy = copied(given)
    assert (copy.made, float(copy.extra)) == (8, 1.0)


class Stage(enum.Enum):
    FIRST = 1


class Closes:
    """Closes what it holds when it is gone."""

    def __init__(self) -> None:
        self.held = [torch.ones(1)]

    def __del__(self) -> None:
        self.held.clear()


class Marker:
    """Compared by identity."""


LEAVES = {
    "module": nn.Linear(2, 2),
    "function": copied,
    "partial": functools.partial(copied, 1),
    "lambda": lambda: None,
    "class": Fields,
    "dtype": torch.float32,
    "device": torch.device("cpu"),
    "generator": torch.Generator(),
    "enum": Stage.FIRST,
    "error": ValueError("x"),
    "range": range(3),
    "bytes": b"ab",
    "module of Python": torch,
    "marker": Marker(),
    "what ends with its holder": Closes(),
}


@pytest.mark.parametrize("leaf", LEAVES.values(), ids=LEAVES)
def test_what_is_no_tree_stays_itself(leaf: Any) -> None:
    assert copied([leaf])[0] is leaf
    assert flatten(leaf)[0] == [leaf]


def test_circles_end() -> None:
    parent = Plain(torch.zeros(1), None)
    parent.b = Plain(torch.ones(1), parent)
    assert [float(t) for t in tensors(parent)] == [0.0, 1.0]
    copy = copied(parent)
    assert copy.b.b is copy
    ring: list[Any] = [torch.zeros(1)]
    ring.append(ring)
    copy_of_ring = copied(ring)
    assert copy_of_ring[1] is copy_of_ring
    assert copy_of_ring is not ring


def test_sets_are_copied_whole() -> None:
    given = {"k": {1, 2}}
    copied(given)["k"].add(3)
    assert given == {"k": {1, 2}}


def test_paths_are_joined_by_dots_whatever_the_keys_are() -> None:
    tree = {"a": [Pair(1, {0: 2})], 3: Registered(4, (5,))}
    assert named_leaves(tree) == [("a.0.a", 1), ("a.0.b.0", 2), ("3.a", 4), ("3.b.0", 5)]
    assert named_leaves(6) == [("", 6)]
