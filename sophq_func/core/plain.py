"""Containers of other packages as dicts and lists: those of OmegaConf, for example, which resolve references when read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sophq_func.core.types import Tree

WHOLE = (str, bytes, bytearray, memoryview, tuple)
"""Sequences that stay as they are: texts, and tuples, in which every place has its meaning."""


def plain(tree: Tree) -> Tree:
    """A copy with a dict for each mapping and a list for each sequence, at every level; leaves are the same objects.

    Example:
      >>> from collections import ChainMap, deque
      >>> plain(ChainMap({"a": deque([1, 2])}))
      {'a': [1, 2]}
    """
    if isinstance(tree, Mapping):
        return {key: plain(item) for key, item in tree.items()}
    if is_list(tree):
        return [plain(item) for item in tree]
    return tree


def is_list(value: object) -> bool:
    """Whether a value is a list, or a sequence of another class that stands for one.

    Example:
      >>> is_list([1]), is_list("text"), is_list((1, 2))
      (True, False, False)
    """
    return isinstance(value, Sequence) and not isinstance(value, WHOLE)
