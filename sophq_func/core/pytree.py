"""Trees of tensors; the only file that imports a tree library.

``torch.func`` flattens with ``torch.utils._pytree``, which keeps the order in which a dict was filled; ``optree`` sorts
keys. Dicts made here are filled in sorted order, so the two agree.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TypeVar

import optree
from torch import Tensor, nn
from torch.utils import _pytree

from sophq_func.core.types import Tree

V = TypeVar("V")


def sorted_dict(items: Mapping[str, V] | Iterable[tuple[str, V]]) -> dict[str, V]:
    """A dict filled in sorted key order.

    Example:
      >>> list(sorted_dict({"b": 1, "a": 2}))
      ['a', 'b']
    """
    unsorted = dict(items)
    return {key: unsorted[key] for key in sorted(unsorted)}


def tree_map(f: Callable[..., object], tree: Tree, *rest: Tree) -> Tree:
    """Apply ``f`` to the corresponding leaves of trees of one structure; ``None`` is a leaf."""
    return _pytree.tree_map(f, tree, *rest)


def leaves(tree: Tree) -> list[Tree]:
    """All leaves, dicts in sorted key order; ``None`` is a leaf."""
    return optree.tree_leaves(tree, none_is_leaf=True)


def flatten(tree: Tree) -> tuple[list[Tree], Callable[[list[Tree]], Tree]]:
    """All leaves, and a function that puts a list of as many leaves back into the same structure."""
    items, spec = _pytree.tree_flatten(tree)
    return items, lambda new: _pytree.tree_unflatten(new, spec)


def paths(spec: _pytree.TreeSpec) -> list[str]:
    """The dotted path of each leaf of a structure as ``torch.export`` describes it; ``""`` for a tree that is a leaf.

    Example:
      >>> paths(_pytree.tree_structure({"a": 1, "b": (2, 3)}))
      ['a', 'b.0', 'b.1']
    """
    tree = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    with_paths, _ = _pytree.tree_flatten_with_path(tree)
    return [".".join(map(_step, path)) for path, _ in with_paths]


def named_leaves(tree: Tree) -> list[tuple[str, Tree]]:
    """Each leaf with its dotted path; ``""`` for a tree that is a leaf. ``None`` is a leaf.

    Example:
      >>> named_leaves({"a": 1, "b": (2, None)})
      [('a', 1), ('b.0', 2), ('b.1', None)]
    """
    with_paths, _ = _pytree.tree_flatten_with_path(tree)
    return [(".".join(map(_step, path)), leaf) for path, leaf in with_paths]


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


def tensors(tree: Tree) -> list[Tensor]:
    """All tensors of a tree, those in the fields of plain dataclasses included."""
    result: list[Tensor] = []
    for leaf in _pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            result.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):  # an output of Hugging Face, for example
            for field in fields(leaf):
                result.extend(tensors(getattr(leaf, field.name)))
    return result


def has_floating(*trees: Tree) -> bool:
    """Whether there is a floating tensor in one of the trees."""
    return any(_has_floating(tree) for tree in trees)


def _has_floating(tree: Tree) -> bool:
    if isinstance(tree, Tensor):
        return tree.is_floating_point()
    # asked at each call of a model's run: tuples and lists without the cost of a tree library
    if type(tree) is tuple or type(tree) is list:
        return any(_has_floating(item) for item in tree)
    return any(t.is_floating_point() for t in tensors(tree))


def map_named(name: str, tree: Tree, f: Callable[[str, Tensor], Tree]) -> Tree:
    """Replace each tensor in nested dicts, lists and tuples by ``f(dotted name, tensor)``.

    Args:
      name: the name of the tree itself.
      tree: other objects in it stay as they are.
      f: called with ``"name.key.0"`` and the tensor.

    Example:
      >>> import torch
      >>> map_named("x", {"a": torch.ones(1)}, lambda name, t: name)
      {'a': 'x.a'}
    """
    if isinstance(tree, Tensor):
        return f(name, tree)
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, map_named(f"{name}.{key}", item, f)) for key, item in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)([map_named(f"{name}.{i}", item, f) for i, item in enumerate(tree)])
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[map_named(f"{name}.{key}", getattr(tree, key), f) for key in tree._fields])
    return tree


def copied(tree: Tree) -> Tree:
    """A tree with clones of its tensors, which a later write into the original does not change.

    Tensors in lists, tuples, dicts and the attributes of other objects (a cache of keys and values, say) are cloned, with
    their autograd graph; modules stay as they are.

    Example:
      >>> import torch
      >>> original = {"x": torch.zeros(2)}
      >>> copy = copied(original)
      >>> original["x"] += 1
      >>> copy
      {'x': tensor([0., 0.])}
    """
    if isinstance(tree, Tensor):
        return tree.clone()
    if type(tree) in (tuple, list):
        return type(tree)([copied(item) for item in tree])
    if type(tree) is dict:
        return {key: copied(item) for key, item in tree.items()}
    # ``deepcopy`` itself refuses a tensor that has a graph: it finds clones in the memo instead
    memo: dict[int, object] = {}
    _clone_into(memo, tree)
    return copy.deepcopy(tree, memo) if memo else tree


def _clone_into(memo: dict[int, object], item: object) -> None:
    """Put into a memo of ``deepcopy``, by identity, a clone of each tensor inside ``item``, and each module as itself."""
    if id(item) in memo or isinstance(item, type | str | bytes | int | float | None):
        return
    if isinstance(item, Tensor):
        memo[id(item)] = item.clone()
    elif isinstance(item, nn.Module):
        memo[id(item)] = item
    elif isinstance(item, Mapping):
        for value in item.values():
            _clone_into(memo, value)
    elif isinstance(item, tuple | list | set):
        for value in item:
            _clone_into(memo, value)
    elif hasattr(item, "__dict__"):
        _clone_into(memo, vars(item))
