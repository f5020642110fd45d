"""Registries: values by name, and factories whose calls are data, a :class:`Spec`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from sophq_func.core.errors import ConfigError, explain, unknown

T = TypeVar("T")
P = ParamSpec("P")

Option: TypeAlias = Any
"""Value of an option of a factory: a number, a string, a bool, or a tuple or ``None`` where the factory says so."""


class Registry(Generic[T]):
    """Values by canonical name, each with any number of aliases.

    Example:
      >>> fruits = Registry("fruit")
      >>> fruits.add("apple", 1, "Apfel")
      >>> fruits.get("Apfel"), fruits.names()
      (1, ['apple'])
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}
        self._canonical: dict[str, str] = {}

    def add(self, name: str, value: T, *aliases: str) -> None:
        """Register ``value``; raises a :class:`ConfigError` for a name that is taken."""
        for key in (name, *aliases):
            if key in self._canonical:
                raise ConfigError(
                    explain(f"{self.kind} {key!r}", "this name is registered already", fix="choose another name")
                )
            self._canonical[key] = name
        self._values[name] = value

    def canonical(self, name: str) -> str:
        """The canonical spelling of ``name``; a :class:`ConfigError` with suggestions where there is none."""
        try:
            return self._canonical[name]
        except (KeyError, TypeError):  # the latter for what cannot be hashed, such as a list
            raise ConfigError(unknown(f"{self.kind}s", self.kind, name, self.spellings())) from None

    def get(self, name: str) -> T:
        """The value registered under ``name`` or one of its aliases."""
        return self._values[self.canonical(name)]

    def names(self) -> list[str]:
        """Canonical names in order of registration."""
        return list(self._values)

    def spellings(self) -> list[str]:
        """Every name and alias."""
        return list(self._canonical)

    def aliases(self, name: str) -> list[str]:
        """Every spelling that leads to ``name``, the canonical one included."""
        canonical = self.canonical(name)
        return [key for key, value in self._canonical.items() if value == canonical]

    def __contains__(self, name: object) -> bool:
        return name in self._canonical

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


@dataclass(frozen=True)
class Spec:
    """A registered factory and its options, as data: comparable, hashable, JSON-able.

    Attributes:
      name: canonical name in the registry that made it.
      options: the options of the factory with their values, sorted by name; those that can be given by keyword alone
        only where they differ from their defaults.

    Example:
      >>> Spec("ema_minmax", (("decay", 0.9),))
      ema_minmax(decay=0.9)
    """

    name: str
    options: tuple[tuple[str, Option], ...] = ()

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options)
        return f"{self.name}({options})"


@dataclass(frozen=True)
class _Factory(Generic[T]):
    """A function with keyword options, and other spellings of these, ``{foreign: own}``."""

    build: Callable[..., T]
    renamed: Mapping[str, str] = field(default_factory=dict)


class Factories(Registry[_Factory[T]]):
    """Registry of functions with keyword options: ``spec`` describes a call as data, ``build`` makes the call."""

    def register(self, name: str, *aliases: str, **renamed: str) -> Callable[[Callable[P, T]], Callable[P, Spec]]:
        """Decorator: register a factory, and replace it by a function that returns the :class:`Spec` of a call.

        Args:
          name: canonical name.
          *aliases: other names that mean the same.
          **renamed: other names of options, ``foreign="own"``.
        """

        def decorate(build: Callable[P, T]) -> Callable[P, Spec]:
            self.add(name, _Factory(build, renamed), *aliases)

            @functools.wraps(build)
            def make(*args: P.args, **kwargs: P.kwargs) -> Spec:
                positional = dict(zip(inspect.signature(build).parameters, args, strict=False))
                return self.spec(name, **positional, **kwargs)

            return make

        return decorate

    def spec(self, name: str, **options: Option) -> Spec:
        """Check ``name`` and ``options``, fill in defaults, and return them as data.

        Raises:
          ConfigError: unknown name or option.
        """
        factory = self.get(name)
        signature = inspect.signature(factory.build)
        by_own_name = {factory.renamed.get(key, key): value for key, value in options.items()}
        for key in by_own_name:
            if key not in signature.parameters:
                known = self.options(name) or ["(it has no options)"]
                raise ConfigError(unknown(f"{self.kind} {name}", "option", key, known))
        bound = signature.bind(**by_own_name)
        bound.apply_defaults()
        given = {key: value for key, value in bound.arguments.items() if not _is_as_ever(signature.parameters[key], value)}
        return Spec(self.canonical(name), tuple(sorted(given.items())))

    def options(self, name: str) -> list[str]:
        """Every spelling of the options of a factory."""
        factory = self.get(name)
        return [*inspect.signature(factory.build).parameters, *factory.renamed]

    def build(self, spec: Spec) -> T:
        """Call the factory that ``spec`` names with its options.

        Raises:
          ConfigError: unknown name or option.
        """
        checked = self.spec(spec.name, **dict(spec.options))
        return self.get(checked.name).build(**dict(checked.options))


def _is_as_ever(option: inspect.Parameter, value: Option) -> bool:
    """Whether a keyword-only option has its default: it is left out, so that a new one changes no stored plan."""
    return option.kind is inspect.Parameter.KEYWORD_ONLY and value == option.default
