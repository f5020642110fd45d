"""Names for what passes through the library without being looked into: arguments, outputs, trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Args: TypeAlias = tuple[Any, ...]
"""Positional arguments of a model or of a torch function: tensors, trees of tensors, or anything else."""

Kwargs: TypeAlias = Mapping[str, Any]
"""Keyword arguments of the same, by name."""

Output: TypeAlias = Any
"""What a model, a module or a torch function returns: a tensor, a tree of tensors, or anything else."""

Tree: TypeAlias = Any
"""Nested tuples, lists and dicts, or a single leaf: a tensor or anything else."""

Given: TypeAlias = Any
"""Params as a user gives them: a dict of tensors by name; or, where the model is a function, the tree that it takes."""
