"""Whether a name, a glob or a type key of a rule matches the site of a quantizer."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any, TypeAlias

from torch import nn

from sophq_func.config.patterns import PATTERNS, Fused
from sophq_func.config.site import Site
from sophq_func.core.operations import FAMILIES, canonical, canonical_name, is_operation

TypeKey: TypeAlias = type | str | Callable[..., Any]
"""A module class, a fused pattern, a torch function, a Tensor method, or the name of one."""

TYPE_KEYS = "a module class, a fused pattern, a torch function, a Tensor method, or the name of one"
"""The same in words, for errors."""

WILDCARDS = frozenset("*?[")
"""Characters that make a name a glob, those of :mod:`fnmatch`."""


def matches_name(pattern: str, site: Site) -> bool:
    """Whether a name or glob of a rule matches ``site``.

    A name matches if it equals one of the site's names, a glob if it fits one of them as a whole. Among the names are the
    paths of all modules around the site, so that a module's path matches everything in the module.
    """
    return fits_any(pattern, site.spellings)


def fits_any(pattern: str, names: Collection[str]) -> bool:
    """Whether a name is one of several, or a glob fits one of them as a whole."""
    fits = _glob_matcher(pattern)
    return pattern in names if fits is None else any(map(fits, names))


def is_glob(name: str) -> bool:
    """Whether a name of a rule is a glob.

    Example:
      >>> is_glob("layer1.*"), is_glob("layer1.0")
      (True, False)
    """
    return not WILDCARDS.isdisjoint(name)


# A plan matches each rule with each quantizer, so a glob is compiled once. Of more than 1,024 the oldest are compiled again.
@lru_cache(maxsize=1024)
def _glob_matcher(pattern: str) -> Callable[[str], object] | None:
    """What tells whether a text fits a glob, upper and lower case told apart; ``None`` for a name without wildcards."""
    return re.compile(fnmatch.translate(pattern)).match if is_glob(pattern) else None


def matches_type(key: TypeKey, site: Site) -> bool:
    """Whether a type key matches ``site``.

    A function matches its operation, be it called as a function, a method, an operator or a module. A class of ``torch.nn``
    matches the function of the same operation, too. Fused and quantized classes of other libraries match by their name.
    """
    if isinstance(key, str):
        return _matches_class_name(key, site)
    if not isinstance(key, type):
        return canonical(key) == site.operation
    if matches_by_name(key):
        return _matches_class_name(key.__name__, site)
    if issubclass(key, Fused):
        return site.pattern == key.__name__
    return _matches_class(key, site)


def matches_by_name(key: object) -> bool:
    """Whether a type key is a fused or quantized class of torch or sophgo-mq, which no model here is made of.

    Such a class matches what the class or pattern of the same name matches.
    """
    if not isinstance(key, type):
        return False
    is_of_torch = key.__module__.startswith(("torch.ao.nn", "torch.nn.intrinsic", "torch.nn.qat"))
    return is_of_torch or key.__name__.endswith("_sophgo")


def _matches_class(cls: type, site: Site) -> bool:
    """Whether a class is one of a site's module or of a module around it, or does the operation of the site's function."""
    # Every module is one: ``class_names`` leaves it out.
    if cls is nn.Module:
        return True
    if f"{cls.__module__}.{cls.__qualname__}" in site.types:
        return True
    function = FAMILIES.get(cls, "")
    return function != "" and function == site.function


def _matches_class_name(text: str, site: Site) -> bool:
    """Whether the name of a pattern, class or function matches; a module before the name and a ``_sophgo`` are ignored."""
    name = text.rpartition(".")[2]
    if name in PATTERNS:
        return site.pattern == PATTERNS.canonical(name)
    if name == site.pattern:
        return True
    name = name.removesuffix("_sophgo")
    if any(full.rpartition(".")[2] == name for full in site.types):
        return True
    function = FAMILIES.get(getattr(nn, name, nn.Module), "")
    if function != "" and function == site.function:
        return True
    return canonical_name(name) == site.operation


def type_text(key: TypeKey) -> str:
    """A type key as a person would write it.

    Example:
      >>> type_text(nn.Conv2d), type_text("Conv2d")
      ('Conv2d', "'Conv2d'")
    """
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))


def is_type_key(key: object) -> bool:
    """Whether a value can be a type key. Whether a string names anything is found out when the model is known."""
    if isinstance(key, type | str):
        return True
    return is_operation(canonical_name(getattr(key, "__name__", "")))
