"""Trees of tensors that both tree libraries read alike. The only file that imports either of them.

``torch.func`` flattens with ``torch.utils._pytree``, which keeps the order in which a dict was filled; ``optree`` sorts
keys. Dicts made here are filled in sorted order, so the two agree.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import optree
from torch import Tensor, nn
from torch.utils import _pytree

V = TypeVar("V")


def sorted_dict(items: Mapping[str, V] | Iterable[tuple[str, V]]) -> dict[str, V]:
    """A dict filled in sorted key order.

    Example:
      >>> list(sorted_dict({"b": 1, "a": 2}))
      ['a', 'b']
    """
    found = dict(items)
    return {key: found[key] for key in sorted(found)}


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f`` to corresponding leaves, as ``torch.func`` sees leaves."""
    return _pytree.tree_map(f, tree, *rest)


def leaves(tree: Any) -> list[Any]:
    """All leaves, dicts in sorted key order."""
    return optree.tree_leaves(tree, none_is_leaf=True)


def flatten(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """All leaves, and the function that puts a list of as many leaves back into the same structure."""
    found, spec = _pytree.tree_flatten(tree)
    return found, lambda new: _pytree.tree_unflatten(new, spec)


def paths(spec: Any) -> list[str]:
    """For each leaf of a structure, as ``torch.export`` describes one, its dotted path; empty where it is the only one.

    Example:
      >>> paths(_pytree.tree_structure({"a": 1, "b": (2, 3)}))
      ['a', 'b.0', 'b.1']
    """
    tree = _pytree.tree_unflatten(range(spec.num_leaves), spec)
    found, _ = _pytree.tree_flatten_with_path(tree)
    return [
        ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        for path, _ in found
    ]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree; plain dataclasses are walked too."""
    found: list[Tensor] = []
    for leaf in _pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found.extend(t for f in fields(leaf) for t in tensors(getattr(leaf, f.name)))
    return found


def has_floating(*trees: Any) -> bool:
    """Whether there is a floating tensor in one of the trees."""
    return any(_has_floating(tree) for tree in trees)


def _has_floating(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return tree.is_floating_point()
    if type(tree) is tuple or type(tree) is list:
        return any(_has_floating(item) for item in tree)
    return any(t.is_floating_point() for t in tensors(tree))


def map_named(name: str, tree: Any, f: Callable[[str, Tensor], Tensor]) -> Any:
    """Apply ``f`` to each tensor in nested dicts, lists and tuples, which is told its dotted name.

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


def copied(tree: Any) -> Any:
    """A tree whose tensors are copies, so that a later write into one of them does not show here.

    Tensors in lists, tuples, dicts and the attributes of other objects (a cache of keys and values, say) are cloned, with
    their graph for autograd; modules stay as they are.

    Example:
      >>> import torch
      >>> given = {"x": torch.zeros(2)}
      >>> kept = copied(given)
      >>> given["x"] += 1
      >>> kept
      {'x': tensor([0., 0.])}
    """
    if isinstance(tree, Tensor):
        return tree.clone()
    if type(tree) in (tuple, list):
        return type(tree)([copied(item) for item in tree])
    if type(tree) is dict:
        return {key: copied(item) for key, item in tree.items()}
    memo: dict[int, Any] = {}
    _clone_into(memo, tree)
    return copy.deepcopy(tree, memo) if memo else tree


def _clone_into(memo: dict[int, Any], item: Any) -> None:
    """Note in ``memo``, as ``deepcopy`` reads it, a clone of each tensor below ``item``, and each module as itself."""
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
