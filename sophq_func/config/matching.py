"""When a name, a glob or a type key speaks of a quantizer's site."""

from __future__ import annotations

import fnmatch
from typing import Any

from torch import nn

from sophq_func.config.patterns import PATTERNS, Fused
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.operations import FAMILIES, canonical, canonical_name, is_operation


def matches_name(pattern: str, site: Site) -> bool:
    """Whether a name or glob of a rule speaks of ``site``.

    A path matches the module and everything below it.
    """
    if any(c in pattern for c in "*?["):
        return any(fnmatch.fnmatchcase(name, pattern) for name in site.spellings)
    return pattern in site.spellings


def matches_type(key: Any, site: Site) -> bool:
    """Whether a type key speaks of ``site``.

    A function's key means the operation, by whatever module class, method or operator the model calls it; a class of
    ``torch.nn`` means the function of the same operation, too. Quantized classes of other libraries count by their name.
    """
    if isinstance(key, str) or stands_for_another(key):
        return _matches_text(key if isinstance(key, str) else key.__name__, site)
    if isinstance(key, type):
        if issubclass(key, Fused):
            return site.pattern == key.__name__
        own = FAMILIES.get(key, "")
        return (
            key is nn.Module or f"{key.__module__}.{key.__qualname__}" in site.types or (bool(own) and own == site.function)
        )
    return canonical(key) == site.operation


def stands_for_another(key: object) -> bool:
    """Whether a type key is a fused or quantized class, of torch or sophgo-mq, that counts by its name."""
    return isinstance(key, type) and (
        key.__module__.startswith(("torch.ao.nn", "torch.nn.intrinsic", "torch.nn.qat")) or key.__name__.endswith("_sophgo")
    )


def _matches_text(text: str, site: Site) -> bool:
    name = text.rpartition(".")[2]
    if name in PATTERNS or name == site.pattern:
        return site.pattern == (PATTERNS.canonical(name) if name in PATTERNS else name)
    own = name.removesuffix("_sophgo")
    named = own in (full.rpartition(".")[2] for full in site.types)
    same = FAMILIES.get(getattr(nn, own, nn.Module), "")
    return named or bool(site.function and same == site.function) or canonical_name(own) == site.operation


def type_text(key: Any) -> str:
    """A type key as a person would write it."""
    return repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))


def check_type_key(key: Any, where: str) -> None:
    """Raise a :class:`ConfigError` for what can be no type key; whether a string names anything, the plan will see."""
    if problem := type_key_problem(key):
        raise ConfigError(explain(where, "this type key is not possible", got=key, allowed=problem))


def type_key_problem(key: object) -> str:
    """What would be allowed instead of ``key``; empty where it is fine."""
    if key is None or isinstance(key, type | str) or is_operation(canonical_name(getattr(key, "__name__", ""))):
        return ""
    return "a module class, a fused pattern, a torch function, a Tensor method, or the name of one"
