"""Names for the types of a model's arguments and output, and of trees: whatever a user's model takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Args: TypeAlias = tuple[Any, ...]
"""Positional arguments of a model, module or function."""

Kwargs: TypeAlias = Mapping[str, Any]
"""Keyword arguments of a model, module or function."""

Output: TypeAlias = Any
"""What a model, module or function returns."""

Tree: TypeAlias = Any
"""Nested containers of tensors and other leaves, as :mod:`sophq_func.core.pytree` reads them."""
