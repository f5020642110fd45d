"""What a check is given: a name, a registered function, or what that returns; and what the laws call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.registry import Factories, Registry, Spec

Piece: TypeAlias = str | Spec
"""A registered piece: its name where all of its options have their defaults, else its spec."""

T = TypeVar("T")


def named(piece: Piece) -> str:
    """The name under which a piece is registered."""
    return piece.name if isinstance(piece, Spec) else piece


def piece_of(registry: Factories[T], given: str | Spec | Callable[[], Spec], where: str) -> Piece:
    """The piece that a user means by a name, a spec, or a function that returns one.

    Raises:
      ConfigError: an unknown name or option; or a piece that is not registered, which no config can name.
    """
    made = given() if callable(given) else given
    if isinstance(made, str):
        return registry.canonical(made)
    if not isinstance(made, Spec):
        allowed = "a name, a registered function, or what it returns"
        fix = f'@sq.register.{registry.kind.replace(" ", "_")}("mine") above a function that returns it'
        raise ConfigError(explain(where, f"this {registry.kind} has no name", got=made, allowed=allowed, fix=fix))
    spec = registry.spec(made.name, **dict(made.options))
    return spec.name if spec == registry.spec(spec.name) else spec


def entry_of(registry: Registry[T], given: str | T, where: str, fix: str) -> str:
    """The name of what a user means by a name or by the registered value itself.

    Raises:
      ConfigError: it is not registered.
    """
    if isinstance(given, str):
        return registry.canonical(given)
    name = registry.name_of(given)
    if name is None:
        allowed = f"the name of a registered {registry.kind}, or its value"
        raise ConfigError(explain(where, f"this {registry.kind} is not registered", got=given, allowed=allowed, fix=fix))
    return name
