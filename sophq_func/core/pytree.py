"""Trees of tensors; the only file that imports a tree library.

``torch.func`` flattens with ``torch.utils._pytree``, which keeps the order in which a dict was filled; ``optree`` sorts
keys. Dicts made here are filled in sorted order, so the two agree.

The arguments and outputs of a model hold more than ``torch.func`` takes apart: dataclasses that nobody registered, and
objects such as a cache of keys and values. :func:`node_of` takes those apart as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

import optree
import torch
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor, nn
from torch.utils import _pytree

from sophq_func.core.types import Tree

V = TypeVar("V")

Known: TypeAlias = dict[int, tuple[Tree, Tree]]
"""By identity, nodes and their copies; the nodes too, so that none is freed and another gets its identity."""


def sorted_dict(items: Mapping[str, V] | Iterable[tuple[str, V]]) -> dict[str, V]:
    """A dict filled in sorted key order.

    Example:
      >>> list(sorted_dict({"b": 1, "a": 2}))
      ['a', 'b']
    """
    unsorted = dict(items)
    return {key: unsorted[key] for key in sorted(unsorted)}


D = TypeVar("D", bound=type[dict])


def as_dict(cls: D) -> D:
    """Class decorator: trees take instances of a subclass of dict apart as they do a dict; without it, one is a leaf.

    Example:
      >>> @as_dict
      ... class Losses(dict[str, int]): ...
      >>> tree_map(lambda leaf: 2 * leaf, Losses(a=1))
      {'a': 2}
    """

    def flatten_dict(tree: dict[str, Tree]) -> tuple[list[Tree], list[str]]:
        return list(tree.values()), list(tree)

    def flatten_with_keys(tree: dict[str, Tree]) -> tuple[list[tuple[_pytree.KeyEntry, Tree]], list[str]]:
        return [(_pytree.MappingKey(key), part) for key, part in tree.items()], list(tree)

    def flatten_sorted(tree: Tree) -> tuple[list[Tree], tuple[str, ...], tuple[str, ...]]:
        keys = tuple(sorted(tree))  # as optree has the keys of a dict
        return [tree[key] for key in keys], keys, keys

    def unflatten(parts: Iterable[Tree], keys: Tree) -> dict[str, Tree]:
        return cls(zip(keys, parts, strict=True))

    name = f"{cls.__module__}.{cls.__qualname__}"
    _pytree.register_pytree_node(
        cls, flatten_dict, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys
    )
    optree.register_pytree_node(cls, flatten_sorted, lambda keys, parts: unflatten(parts, keys), namespace=GLOBAL_NAMESPACE)
    return cls


def tree_map(f: Callable[..., object], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``f`` to the corresponding leaves of trees of one structure; ``None`` is a leaf."""
    return _pytree.tree_map(f, tree, *rest)


def leaves(tree: Tree) -> list[Tree]:
    """All leaves, dicts in sorted key order; ``None`` is a leaf."""
    return optree.tree_leaves(tree, none_is_leaf=True)


# tuples, since Dynamo cannot trace a union of three classes
LEAVES = (Tensor, nn.Module, str, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
"""Classes whose instances are never taken apart."""

CONTAINERS = (dict, list, set)
"""Classes whose subclasses are taken apart by their items."""


def torch_leaves(tree: Tree) -> list[Tree]:
    """All leaves in the order of torch's pytree, to which an unregistered object is one leaf."""
    return _pytree.tree_leaves(tree)


Structure: TypeAlias = optree.PyTreeSpec
"""What is left of a tree without its leaves: compared by value, and filled by ``structure.unflatten(leaves)``."""


def taken_apart(tree: Tree) -> tuple[list[Tree], Structure]:
    """All leaves, dicts in sorted key order, and the structure around them, in a sixth of the time of torch's library.

    Nodes are dicts, lists and tuples, and what is registered with optree; everything else is a leaf, ``None`` too.
    """
    found, structure = optree.tree_flatten(tree, none_is_leaf=True)
    return found, structure


def steps_to_leaves(structure: Structure) -> list[str]:
    """The dotted path of each leaf of a structure.

    Example:
      >>> steps_to_leaves(taken_apart({"a": 1, "b": (2, 3)})[1])
      ['a', 'b.0', 'b.1']
    """
    return [".".join(map(str, path)) for path in structure.paths()]


class Node(NamedTuple):
    """A tree that is no leaf, taken apart by one level.

    Attributes:
      steps: the name of the way to each part: a key, an index or an attribute.
      parts: the trees below.
      shell: a new object of the same class, still empty, that :attr:`build` fills; ``None`` where it makes one at once. A
        part may refer to it, as the parts of a circle do.
      build: makes the same kind of tree of other parts.
    """

    steps: Sequence[str]
    parts: Sequence[Tree]
    shell: Tree
    build: Callable[[Sequence[Tree]], Tree]


def node_of(tree: Tree) -> Node | None:
    """A tree taken apart; ``None`` for a leaf.

    Nodes are dicts, lists, tuples and what else is registered with torch's pytree; sets; dataclasses; and instances of
    any class written in Python, by their attributes, unless the class says itself how it is pickled or deleted. Modules are
    leaves.

    Example:
      >>> node_of({"a": 1, "b": 2}).steps
      ['a', 'b']
    """
    kind = type(tree)
    if kind is dict:
        return _of_dict(tree)
    if kind is list:
        return _of_list(tree)
    if kind is tuple:
        return Node(_numbers(tree), tree, None, tuple)
    if tree is None or isinstance(tree, LEAVES):
        return None
    if kind in _pytree.SUPPORTED_NODES:
        return _of_registered(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return Node(tree._fields, tree, None, lambda parts: kind(*parts))
    if isinstance(tree, CONTAINERS):
        return _of_subclass(tree)
    slots = slots_of(kind)
    return None if slots is None else _of_object(tree, slots)


def _numbers(items: Sequence[Tree]) -> list[str]:
    return [str(i) for i in range(len(items))]


def _of_dict(tree: dict[object, Tree]) -> Node:
    shell: dict[object, Tree] = {}
    keys = list(tree)

    def build(parts: Sequence[Tree]) -> Tree:
        shell.update(zip(keys, parts, strict=True))
        return shell

    return Node([str(key) for key in keys], list(tree.values()), shell, build)


def _of_list(tree: list[Tree]) -> Node:
    shell: list[Tree] = []

    def build(parts: Sequence[Tree]) -> Tree:
        shell.extend(parts)
        return shell

    return Node(_numbers(tree), tree, shell, build)


def _of_registered(tree: Tree) -> Node:
    """A node of torch's pytree; named tuples are registered by a class of their own."""
    definition = _pytree.SUPPORTED_NODES[type(tree)]
    parts, context = definition.flatten_fn(tree)
    if definition.flatten_with_keys_fn is None:
        steps = _numbers(parts)
    else:
        with_keys, _ = definition.flatten_with_keys_fn(tree)
        steps = [_step(key) for key, _ in with_keys]
    return Node(steps, parts, None, lambda new: definition.unflatten_fn(list(new), context))


def _of_subclass(tree: Tree) -> Node:
    """A set, or an instance of a subclass of a container; the parts of a set have no names, so none is looked into."""
    shell = copy.copy(tree)
    if isinstance(tree, set):
        return Node((), (), shell, lambda _: shell)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))

    def build(parts: Sequence[Tree]) -> Tree:
        for key, part in zip(keys, parts, strict=True):
            shell[key] = part
        return shell

    return Node([str(key) for key in keys], [tree[key] for key in keys], shell, build)


def _of_object(tree: Tree, slots: tuple[str, ...]) -> Node | None:
    """A dataclass or another object, by its attributes; those are set without the class's own ``__setattr__``."""
    in_slots = {name: getattr(tree, name) for name in slots if hasattr(tree, name)}
    attributes = {**in_slots, **getattr(tree, "__dict__", {})}
    if not attributes:  # it stands for itself, as a marker does that is compared by identity
        return None
    shell = object.__new__(type(tree))

    def build(parts: Sequence[Tree]) -> Tree:
        for name, part in zip(attributes, parts, strict=True):
            object.__setattr__(shell, name, part)
        return shell

    return Node(list(attributes), list(attributes.values()), shell, build)


# Dynamo cannot read the flags of a class, and need not: this is the same in every run
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def slots_of(kind: type) -> tuple[str, ...] | None:
    """The names of the slots of a class's instances; ``None`` where a copy of the attributes is no copy of the instance."""
    return _slots_of(kind)  # type: ignore[arg-type]


WRITTEN_IN_PYTHON = 1 << 9
"""The bit of ``type.__flags__`` that a class made by a ``class`` statement has (``Py_TPFLAGS_HEAPTYPE``)."""


# a run asks this about each object among the model's arguments
@lru_cache(maxsize=1024)
def _slots_of(kind: type) -> tuple[str, ...] | None:
    slots = tuple(name for cls in kind.__mro__ for name in _own_slots(cls))
    has_attributes = kind.__dictoffset__ != 0 or slots
    owns_something = hasattr(kind, "__del__")  # which the end of a copy would close
    is_pickled_by_default = all(getattr(kind, name) is getattr(object, name) for name in ("__reduce__", "__reduce_ex__"))
    is_python = all(cls is object or cls.__flags__ & WRITTEN_IN_PYTHON for cls in kind.__mro__)
    return slots if has_attributes and is_pickled_by_default and is_python and not owns_something else None


def _own_slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def paths(spec: _pytree.TreeSpec) -> list[str]:
    """The dotted path of each leaf of a structure as ``torch.export`` describes it; ``""`` for a tree that is a leaf.

    Example:
      >>> paths(_pytree.tree_structure({"a": 1, "b": (2, 3)}))
      ['a', 'b.0', 'b.1']
    """
    tree = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    with_paths, _ = _pytree.tree_flatten_with_path(tree)
    return [".".join(map(_step, path)) for path, _ in with_paths]


def without_dataclasses(tree: Tree) -> Tree:
    """``tree`` with dicts of fields in the place of dataclasses that the tree library does not know.

    Example:
      >>> from dataclasses import dataclass
      >>> @dataclass
      ... class Point:
      ...     x: int
      ...     y: tuple[int, int]
      >>> without_dataclasses([Point(1, (2, 3))])
      [{'x': 1, 'y': (2, 3)}]
    """

    def as_fields(leaf: Tree) -> Tree:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {field.name: without_dataclasses(getattr(leaf, field.name)) for field in fields(leaf)}

    return tree_map(as_fields, tree)


def _step(entry: object) -> str:
    """One step of a path: the key in a dict, the index in a sequence, or the name of an attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def map_named(name: str, tree: Tree, f: Callable[[str, Tensor], Tree], known: Known | None = None) -> Tree:
    """A copy of a tree, with ``f(dotted name, tensor)`` in place of each tensor; other leaves stay as they are.

    Args:
      name: the name of the tree itself.
      tree: see :func:`node_of`.
      f: called with ``"name.key.0"`` and the tensor.
      known: the copies so far. Given, it keeps one object one where several places hold it, and ends circles.

    Example:
      >>> import torch
      >>> map_named("x", {"a": torch.ones(1)}, lambda name, t: name)
      {'a': 'x.a'}
    """
    if isinstance(tree, Tensor):
        return f(name, tree)
    node = node_of(tree)
    if node is None:
        return tree
    if known is not None:
        if id(tree) in known:
            return known[id(tree)][1]
        if node.shell is not None:
            known[id(tree)] = tree, node.shell
    steps = zip(node.steps, node.parts, strict=True)
    return node.build([map_named(f"{name}.{step}", part, f, known) for step, part in steps])


def copied(tree: Tree) -> Tree:
    """A copy with clones of its tensors, with their autograd graph, which a later write into the original does not change.

    Example:
      >>> import torch
      >>> original = {"x": torch.zeros(2)}
      >>> copy = copied(original)
      >>> original["x"] += 1
      >>> copy
      {'x': tensor([0., 0.])}
    """
    return map_named("", tree, lambda _, tensor: tensor.clone(), {})


def named_leaves(tree: Tree) -> list[tuple[str, Tree]]:
    """Each leaf with its dotted path; ``""`` is the path of a tree that is a leaf.

    Example:
      >>> named_leaves({"a": 1, "b": (2, 3)})
      [('a', 1), ('b.0', 2), ('b.1', 3)]
    """
    found: list[tuple[str, Tree]] = []
    _find("", tree, found, ())
    return found


def _find(path: str, tree: Tree, found: list[tuple[str, Tree]], around: tuple[Tree, ...]) -> None:
    """Append the leaves of a tree to ``found``; a node inside itself, which is one of those ``around``, is a leaf."""
    node = None if isinstance(tree, Tensor) or _is_around(tree, around) else node_of(tree)
    if node is None:
        found.append((path, tree))
        return
    for step, part in zip(node.steps, node.parts, strict=True):
        _find(f"{path}.{step}" if path else step, part, found, (*around, tree))


def _is_around(tree: Tree, around: tuple[Tree, ...]) -> bool:
    """Whether a tree is one of the nodes around it; no tuple is, but by way of another node.

    Tuples are passed over, since Dynamo cannot compare two of them by identity.
    """
    kind = type(tree)
    return kind is not tuple and any(type(one) is kind and one is tree for one in around)


def flatten(tree: Tree) -> tuple[list[Tree], Callable[[Sequence[Tree]], Tree]]:
    """All leaves, and a function that puts as many others into the same structure."""
    return [leaf for _, leaf in named_leaves(tree)], lambda new: refilled(tree, new)


def refilled(tree: Tree, items: Sequence[Tree]) -> Tree:
    """A tree of the same structure with other leaves, in the order of :func:`named_leaves`."""
    return _refilled(tree, iter(items), ())


def _refilled(tree: Tree, items: Iterator[Tree], around: tuple[Tree, ...]) -> Tree:
    """:func:`refilled` with the next of ``items``."""
    node = None if isinstance(tree, Tensor) or _is_around(tree, around) else node_of(tree)
    if node is None:
        return next(items)
    return node.build([_refilled(part, items, (*around, tree)) for part in node.parts])


def tensors(tree: Tree) -> list[Tensor]:
    """All tensors of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for _, leaf in named_leaves(tree) if isinstance(leaf, Tensor)]


def has_floating(*trees: Tree) -> bool:
    """Whether there is a floating tensor in one of the trees."""
    return any(_has_floating(tree) for tree in trees)


def _has_floating(tree: Tree) -> bool:
    if isinstance(tree, Tensor):
        return tree.is_floating_point()
    # asked at each call of a model's run: the usual containers without taking nodes apart
    kind = type(tree)
    if kind is tuple or kind is list:
        return any(_has_floating(item) for item in tree)
    if kind is dict:
        return any(_has_floating(item) for item in tree.values())
    return any(tensor.is_floating_point() for tensor in tensors(tree))
