"""Groups of calls that hardware runs as one, as data: ``ConvBnReLU2d`` and its kin (semantics.md 5.1).

Each pattern is a class, to be used as a type key in rules: ``Rule(type=sq.patterns.ConvBnReLU2d, ...)``; its name with
``_sophgo`` behind it is an alias. A new pattern is one entry here, or :func:`fused` in ``QuantConfig(patterns=...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.registry import Registry


class Fused:
    """Calls that follow one another directly; each but the last is read by the next alone.

    Attributes:
      parts: a module class or function for each call. A BatchNorm second is folded into the weight of the first.
    """

    parts: tuple[Any, ...]


PATTERNS: Registry[type[Fused]] = Registry("fused pattern")


def fused(name: str, *parts: type[nn.Module] | Callable[..., Any] | str) -> type[Fused]:
    """A fused pattern for ``QuantConfig(patterns=...)`` and ``Rule(type=...)``.

    Args:
      name: of the pattern, as string type keys spell it.
      *parts: two or more module classes or functions, in the order in which they are called. A class stands for the
        function of the same operation, and the other way round, but for the first.

    Raises:
      ConfigError: fewer than two parts, or one that is neither; a name that is taken.

    Example:
      >>> fused("LinearGELU", nn.Linear, nn.GELU).parts
      (<class 'torch.nn.modules.linear.Linear'>, <class 'torch.nn.modules.activation.GELU'>)
    """
    if not isinstance(name, str) or not name.isidentifier() or name in PATTERNS:
        raise ConfigError(explain("fused", "this name is not possible", got=name, allowed="an identifier that is not taken"))
    return _fused(name, *parts)


def _fused(name: str, *parts: Any) -> type[Fused]:
    if len(parts) < 2 or not all(map(_is_part, parts)):
        raise ConfigError(
            explain(f"fused {name!r}", "these parts is not possible", got=parts, allowed="two or more classes or functions")
        )
    return type(name, (Fused,), {"parts": parts, "__module__": __name__})


def _is_part(part: Any) -> bool:
    return issubclass(part, nn.Module) if isinstance(part, type) else callable(part) or isinstance(part, str)


def _pattern(name: str, *parts: Any, aliases: tuple[str, ...] = ()) -> type[Fused]:
    made = _fused(name, *parts)
    PATTERNS.add(name, made, f"{name}_sophgo", *aliases)
    return made


ConvBnReLU1d = _pattern("ConvBnReLU1d", nn.Conv1d, nn.BatchNorm1d, nn.ReLU)
ConvBnReLU2d = _pattern("ConvBnReLU2d", nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
ConvBnReLU3d = _pattern("ConvBnReLU3d", nn.Conv3d, nn.BatchNorm3d, nn.ReLU)
ConvBn1d = _pattern("ConvBn1d", nn.Conv1d, nn.BatchNorm1d)
ConvBn2d = _pattern("ConvBn2d", nn.Conv2d, nn.BatchNorm2d)
ConvBn3d = _pattern("ConvBn3d", nn.Conv3d, nn.BatchNorm3d)
ConvReLU1d = _pattern("ConvReLU1d", nn.Conv1d, nn.ReLU)
ConvReLU2d = _pattern("ConvReLU2d", nn.Conv2d, nn.ReLU)
ConvReLU3d = _pattern("ConvReLU3d", nn.Conv3d, nn.ReLU)
LinearBn1d = _pattern("LinearBn1d", nn.Linear, nn.BatchNorm1d)
LinearReLU = _pattern("LinearReLU", nn.Linear, nn.ReLU)
ConvTransposeBnReLU2d = _pattern("ConvTransposeBnReLU2d", nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU)
ConvTransposeBn2d = _pattern("ConvTransposeBn2d", nn.ConvTranspose2d, nn.BatchNorm2d)
ConvTransposeReLU2d = _pattern("ConvTransposeReLU2d", nn.ConvTranspose2d, nn.ReLU)
BnReLU2d = _pattern("BnReLU2d", nn.BatchNorm2d, nn.ReLU, aliases=("BNReLU2d",))
BnReLU3d = _pattern("BnReLU3d", nn.BatchNorm3d, nn.ReLU, aliases=("BNReLU3d",))


def __getattr__(name: str) -> type[Fused]:
    """The pattern of an alias: ``sq.patterns.ConvBnReLU2d_sophgo``."""
    if name not in PATTERNS:
        raise AttributeError(f"no fused pattern {name!r} in {__name__}")
    return PATTERNS.get(name)
