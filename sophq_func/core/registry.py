"""Registries: values by name, and factories whose calls are data, a :class:`Spec`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar

from sophq_func.core import plugins
from sophq_func.core.errors import ConfigError, explain, near, raise_all, unknown
from sophq_func.core.public import constructor, surplus

T = TypeVar("T")
P = ParamSpec("P")

Option: TypeAlias = Any
"""Value of an option of a factory: a number, a string, a bool, or a tuple or ``None`` where the factory says so."""


class Registry(Generic[T]):
    """Values by canonical name, each with any number of aliases.

    Upper and lower case are the same, and a name that is not there is looked for once more after the plugins of other
    packages were loaded; neither in an ``exact`` registry.

    Example:
      >>> fruits = Registry("fruit")
      >>> fruits.add("apple", 1, "Apfel")
      >>> fruits.get("APFEL"), fruits.names()
      (1, ['apple'])
    """

    def __init__(self, kind: str, exact: bool = False) -> None:
        self.kind = kind
        self.exact = exact
        self._values: dict[str, T] = {}
        self._canonical: dict[str, str] = {}
        self._keys: dict[str, str] = {}  # the same as names are compared

    def add(self, name: str, value: T, *aliases: str) -> None:
        """Register ``value``; for a name that is no text or is taken it adds nothing, and raises a :class:`ConfigError`."""
        self.check_new(name, *aliases)
        for key in (name, *aliases):
            self._canonical[key] = name
            self._keys[self._key(key)] = name
        self._values[name] = value

    def check_new(self, *names: str) -> None:
        """Raise a :class:`ConfigError` about names that cannot be added."""
        raise_all([problem for name in names if (problem := self._not_new(name))])

    def _not_new(self, key: object) -> str:
        """Why a name cannot be added; empty if it can."""
        if not isinstance(key, str) or not key:
            return explain(self.kind, "its name must be a text", got=key, allowed="a string")
        if self._key(key) in self._keys:
            return explain(f"{self.kind} {key!r}", "this name is registered already", fix="choose another name")
        return ""

    def find(self, name: object) -> str | None:
        """The canonical spelling of ``name``, or ``None``."""
        if not isinstance(name, str):
            return None
        key = self._key(name)
        if key not in self._keys and not self.exact:
            plugins.load()
        return self._keys.get(key)

    def _key(self, name: str) -> str:
        """A name as it is compared."""
        return name if self.exact else name.casefold()

    def canonical(self, name: str) -> str:
        """The canonical spelling of ``name``; a :class:`ConfigError` with suggestions where there is none."""
        found = self.find(name)
        if found is None:
            raise ConfigError(unknown(f"{self.kind}s", self.kind, name, self.spellings()))
        return found

    def name_of(self, value: object) -> str | None:
        """The canonical name under which this very object is registered, or ``None``."""
        return next((name for name, known in self._values.items() if known is value), None)

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
        return self.find(name) is not None

    def __repr__(self) -> str:
        return f"Registry of {self.kind}s: {', '.join(self)}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


@constructor
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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.options, tuple):
            got, allowed = (self.name, self.options), "a name, and a tuple of pairs of a name and a value"
            fix = "sq.observers.minmax(), which returns one"
            raise ConfigError(explain("Spec", "this is no name with options", got=got, allowed=allowed, fix=fix))

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

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self._functions: dict[str, Callable[..., Spec]] = {}

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
                parameters = inspect.signature(build).parameters
                raise_all(list(surplus(f"{self.kind} {name}", parameters, args, kwargs)))
                by_position = dict(zip(parameters, args, strict=False))
                spec = self.spec(name, **by_position, **kwargs)
                self.build(spec)  # so that a wrong value is reported where the user wrote it
                return spec

            self._functions[name] = make
            return make

        return decorate

    def function(self, name: str, module: str) -> Callable[..., Spec]:
        """The function that :meth:`register` made of a name, as an attribute of a module that does not have it itself.

        Raises:
          AttributeError: as modules raise it, with suggestions.
        """
        found = None if name.startswith("_") else self.find(name)
        if found is None:
            hint = near(name, self.spellings())
            raise AttributeError(f"module {module!r} has no attribute {name!r}" + (f", {hint}" if hint else ""))
        return self._functions[found]

    def spec(self, name: str, **options: Option) -> Spec:
        """Check ``name`` and ``options``, fill in defaults, and return them as data.

        Raises:
          ConfigError: unknown name or option.
        """
        factory = self.get(name)
        signature = inspect.signature(factory.build)
        by_own_name = {factory.renamed.get(key, key): value for key, value in options.items()}
        where, known = f"{self.kind} {name}", self.options(name) or ["(it has no options)"]
        raise_all([unknown(where, "option", key, known) for key in by_own_name if key not in signature.parameters])
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
