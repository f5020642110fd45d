"""One name for each operation, however it is spelled: operator, Tensor method, ``torch`` or ``torch.nn.functional``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SAME: dict[str, str] = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "expit": "sigmoid",
    "floordiv": "floor_divide",
    "iadd": "add",
    "imatmul": "matmul",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "log_sigmoid": "logsigmoid",
    "mod": "remainder",
    "multiply": "mul",
    "negative": "neg",
    "radd": "add",
    "rdiv": "div",
    "rmatmul": "matmul",
    "rmul": "mul",
    "rsub": "sub",
    "rtruediv": "div",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}
"""Spellings that differ by more than underscores."""


def canonical_name(name: str) -> str:
    """The canonical spelling of a function's ``__name__``.

    Example:
      >>> [canonical_name(n) for n in ("add_", "__radd__", "__itruediv__", "concat", "sigmoid")]
      ['add', 'add', 'div', 'cat', 'sigmoid']
    """
    bare = name.strip("_")
    return SAME.get(bare, bare)


def canonical(func: Callable[..., Any] | str) -> str:
    """The canonical name of a function, a Tensor method, an operator, or of a string that names one of them.

    Example:
      >>> import operator
      >>> {canonical(f) for f in (torch.add, torch.Tensor.add_, operator.iadd, "torch.add")}
      {'add'}
    """
    return canonical_name(func.rpartition(".")[2] if isinstance(func, str) else func.__name__)


def is_operation(name: str) -> bool:
    """Whether a canonical name is one that torch has."""
    places = (torch, torch.Tensor, torch.nn.functional)
    spellings = [name, *(alias for alias, own in SAME.items() if own == name)]
    return any(hasattr(place, spelling) for place in places for spelling in spellings)
