"""Fused patterns, as data: groups of calls that hardware runs as one, such as ``ConvBnReLU2d``.

Each pattern is a class that a rule can match: ``Rule(type=sq.patterns.ConvBnReLU2d, ...)``. Its name with ``_sophgo``
appended is an alias, as sophgo-mq names the fused class. A new pattern is one entry here, or a call of :func:`fused` for
``QuantConfig(patterns=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from torch import nn

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.public import public
from sophq_func.core.registry import Registry

__all__ = [
    "BnReLU2d",
    "BnReLU3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "ConvTransposeBn2d",
    "ConvTransposeBnReLU2d",
    "ConvTransposeReLU2d",
    "Fused",
    "LinearBn1d",
    "LinearReLU",
    "fused",
]

Part: TypeAlias = type[nn.Module] | Callable[..., Any] | str
"""One call of a fused pattern: the class of the module that is called, or the function, or the name of either."""


class Fused:
    """The base of all fused patterns. A subclass is a chain of calls: each call is the only user of the one before.

    Attributes:
      parts: one for each call, in order. If the second is a BatchNorm, it is folded into the weight of the first.
    """

    parts: tuple[Part, ...]


PATTERNS: Registry[type[Fused]] = Registry("fused pattern", exact=True)
"""By names that are told apart by case, since rules compare them with the names of a model's classes, too."""


@public
def fused(name: str, *parts: Part) -> type[Fused]:
    """Make a fused pattern for ``QuantConfig(patterns=...)`` and ``Rule(type=...)``.

    Args:
      name: of the pattern, by which a rule may name it, too: ``Rule(type="LinearGELU")``.
      *parts: two or more module classes or functions, in the order in which they are called. From the second on, a class
        also matches the function of the same operation, and a function the module.

    Raises:
      ConfigError: a name that is taken or is no identifier; fewer than two parts, or one that is no class or function.

    Example:
      >>> fused("LinearGELU", nn.Linear, nn.GELU).parts
      (<class 'torch.nn.modules.linear.Linear'>, <class 'torch.nn.modules.activation.GELU'>)
    """
    _check_name(name)
    return _fused(name, *parts)


def registered(name: str, *parts: Part) -> type[Fused]:
    """A pattern like those below, which every plan fuses; raises as :func:`fused`."""
    _check_name(name)
    return _registered(name, *parts)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name in PATTERNS:
        allowed, fix = "an identifier that no pattern has yet", 'sq.patterns.fused("LinearGELU", nn.Linear, nn.GELU)'
        raise ConfigError(explain("fused", "name cannot name a new pattern", got=name, allowed=allowed, fix=fix))


def _fused(name: str, *parts: Part) -> type[Fused]:
    """A pattern whose name may be taken: that of a registered one is checked by the registry."""
    if len(parts) < 2 or not all(map(_is_part, parts)):
        allowed, fix = "two or more module classes or functions", f'sq.patterns.fused("{name}", nn.Linear, nn.GELU)'
        raise ConfigError(explain(f"fused {name!r}", "these parts are no pattern", got=parts, allowed=allowed, fix=fix))
    return _class_of(name, parts)


# one class for each name and parts, so that configs that mean the same are equal, be they read from a text
@cache
def _class_of(name: str, parts: tuple[Part, ...]) -> type[Fused]:
    calls = ", ".join(part if isinstance(part, str) else getattr(part, "__name__", repr(part)) for part in parts)
    return type(name, (Fused,), {"parts": parts, "__module__": __name__, "__doc__": f"A fused pattern: {calls}."})


def _is_part(part: object) -> bool:
    if isinstance(part, type):
        return issubclass(part, nn.Module)
    return callable(part) or isinstance(part, str)


def _registered(name: str, *parts: Part, aliases: tuple[str, ...] = ()) -> type[Fused]:
    pattern = _fused(name, *parts)
    PATTERNS.add(name, pattern, f"{name}_sophgo", *aliases)
    return pattern


ConvBnReLU1d = _registered("ConvBnReLU1d", nn.Conv1d, nn.BatchNorm1d, nn.ReLU)
ConvBnReLU2d = _registered("ConvBnReLU2d", nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
ConvBnReLU3d = _registered("ConvBnReLU3d", nn.Conv3d, nn.BatchNorm3d, nn.ReLU)
ConvBn1d = _registered("ConvBn1d", nn.Conv1d, nn.BatchNorm1d)
ConvBn2d = _registered("ConvBn2d", nn.Conv2d, nn.BatchNorm2d)
ConvBn3d = _registered("ConvBn3d", nn.Conv3d, nn.BatchNorm3d)
ConvReLU1d = _registered("ConvReLU1d", nn.Conv1d, nn.ReLU)
ConvReLU2d = _registered("ConvReLU2d", nn.Conv2d, nn.ReLU)
ConvReLU3d = _registered("ConvReLU3d", nn.Conv3d, nn.ReLU)
LinearBn1d = _registered("LinearBn1d", nn.Linear, nn.BatchNorm1d)
LinearReLU = _registered("LinearReLU", nn.Linear, nn.ReLU)
ConvTransposeBnReLU2d = _registered("ConvTransposeBnReLU2d", nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU)
ConvTransposeBn2d = _registered("ConvTransposeBn2d", nn.ConvTranspose2d, nn.BatchNorm2d)
ConvTransposeReLU2d = _registered("ConvTransposeReLU2d", nn.ConvTranspose2d, nn.ReLU)
BnReLU2d = _registered("BnReLU2d", nn.BatchNorm2d, nn.ReLU, aliases=("BNReLU2d",))
BnReLU3d = _registered("BnReLU3d", nn.BatchNorm3d, nn.ReLU, aliases=("BNReLU3d",))


def __dir__() -> list[str]:
    return sorted({"Fused", "fused", *PATTERNS.names()})


def __getattr__(name: str) -> type[Fused]:
    """The pattern of an alias: ``sq.patterns.ConvBnReLU2d_sophgo``."""
    if name not in PATTERNS:
        raise AttributeError(f"no fused pattern {name!r} in {__name__}")
    return PATTERNS.get(name)
