"""Configs as JSON text and back. Classes and functions are stored as the path by which Python imports them.

The data are also what a person writes in YAML: every entry may be left out, a half is the fields that :func:`override`
takes, and an observer, fake quantizer or granularity may be a name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from sophq_func.config.paths import Named, at, is_registered, path_of
from sophq_func.config.patterns import PATTERNS, Fused, fused
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.core.plain import plain
from sophq_func.core.registry import Factories, Spec
from sophq_func.numerics.granularity import GRANULARITIES, SPELLINGS, Granularity
from sophq_func.numerics.scheme import (
    OVERRIDE_FIELDS,
    PIECES,
    SCHEME_FIELDS,
    Data,
    Override,
    QScheme,
    QuantizerConfig,
    override,
    to_data,
)

T = TypeVar("T")

VERSION = 1
"""Of the text that is written. It grows when a field, or the default of one that may be left out, changes its meaning."""

FROM_JSON = "QuantConfig.from_json"


# Writing


def text(config: object, unset: object) -> str:
    """The JSON text of a config.

    Args:
      config: a ``QuantConfig``.
      unset: the value of a half that says nothing.

    Raises:
      ConfigError: for every function or class that no import finds.
    """
    return json.dumps({"version": VERSION, **_fields(config, unset)}, indent=1, sort_keys=True, default=_refused)


def digest(config: object, unset: object) -> str:
    """SHA-256 of a config, in hexadecimal; equal for equal configs, on every machine.

    Raises:
      ConfigError: see :func:`text`.
    """
    data = _fields(config, unset)
    for rule in data.get("rules", ()):
        rule.pop("origin", None)  # plays no part in comparisons
    return hashlib.sha256(json.dumps(_as_compared(data), sort_keys=True, default=_refused).encode()).hexdigest()


def _refused(option: object) -> Data:
    """For :func:`json.dumps`: an option of a user's own piece that is no data."""
    allowed = "numbers, strings, booleans, None, and tuples of them"
    raise ConfigError(explain("QuantConfig.to_json", "an option cannot be stored", got=option, allowed=allowed))


def _as_compared(data: Data) -> Data:
    """Data in which numbers that Python takes for equal are written in one way."""
    if isinstance(data, dict):
        return {key: _as_compared(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return list(map(_as_compared, data))
    is_whole = isinstance(data, bool) or (isinstance(data, float) and data.is_integer())
    return int(data) if is_whole else data


def _fields(value: Any, unset: object) -> dict[str, Data]:
    """The fields of a config or rule that say something, as data; all problems in one message."""
    found, problems = {}, []
    for field in dataclasses.fields(value):
        entry = getattr(value, field.name)
        if entry is unset or (entry == field.default and field.default is not unset):
            continue
        try:
            found[field.name] = WRITERS[field.name](entry, unset) if field.name in WRITERS else entry
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems)
    return found


def _rules_data(rules: tuple[object, ...], unset: object) -> list[Data]:
    found, problems = [], []
    for rule in rules:
        try:
            found.append(_fields(rule, unset))
        except ConfigError as error:
            problems.append(f"{rule!r}: {error}")
    raise_all(problems)
    return found


def _half_data(half: QuantizerConfig | Override | None, unset: object) -> Data:
    if half is None:
        return None
    if isinstance(half, QuantizerConfig):
        return {"config": to_data(half)}
    return {name: to_data(value) for name, value in half.values}


def _type_data(key: Named | str, unset: object = None) -> Data:
    """A type key: a name as it is; a class or function by its path; a fused pattern by its name, or its parts."""
    if isinstance(key, str):
        return key
    if not (isinstance(key, type) and issubclass(key, Fused)):
        return {"type": path_of(key)}
    if is_registered(key):
        return {"pattern": key.__name__}
    return {"pattern": key.__name__, "parts": [_type_data(part) for part in key.parts]}


WRITERS: Mapping[str, Callable[[Any, object], Data]] = {
    "type": _type_data,
    "where": lambda found, unset: path_of(found),
    "weight": _half_data,
    "activation": _half_data,
    "rules": _rules_data,
    "leaf_module": lambda classes, unset: [path_of(cls) for cls in classes],
    "weight_layers": lambda classes, unset: [path_of(cls) for cls in classes],
    "operations": lambda keys, unset: [_type_data(key) for key in keys],
    "patterns": lambda patterns, unset: [_type_data(pattern) for pattern in patterns],
}
"""By field of a config or rule, what makes data of it; other fields are data."""


# Reading


class Kinds(NamedTuple):
    """The classes that data are read into.

    Attributes:
      config: ``QuantConfig``.
      rule: ``Rule``.
    """

    config: type
    rule: type


def parse(text: object) -> Data:
    """The data of a JSON text.

    Raises:
      ConfigError: it is no JSON, or no object.
    """
    sentence, fix = "the text holds no config", "pass a text from config.to_json(); a dict goes to QuantConfig.from_dict"
    if not isinstance(text, str | bytes):
        raise ConfigError(explain(FROM_JSON, sentence, got=type(text).__name__, allowed="a string", fix=fix))
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(explain(FROM_JSON, sentence, because=str(error), fix=fix)) from None
    if not isinstance(data, dict):
        raise ConfigError(explain(FROM_JSON, sentence, got=type(data).__name__, allowed="a JSON object", fix=fix))
    return data


def read(data: object, kinds: Kinds) -> Any:
    """The config that data describe.

    Raises:
      ConfigError: with all problems.
    """
    where = "QuantConfig.from_dict"
    entries = plain(data)
    if not isinstance(entries, dict):
        fix = 'QuantConfig.from_dict({"chip": "BM1690"})'
        raise ConfigError(explain(where, "this is no dict", got=type(data).__name__, allowed="a dict", fix=fix))
    version = entries.pop("version", VERSION)
    if version != VERSION:
        fix = "install the version of the library that wrote it"
        raise ConfigError(explain(where, "this version cannot be read", got=version, allowed=str(VERSION), fix=fix))
    return _made(kinds.config, where, entries, kinds)


def _made(cls: type[T], where: str, entries: object, kinds: Kinds) -> T:
    """A config or rule from the data of its fields."""
    if not isinstance(entries, dict):
        raise ConfigError(explain(where, "this is no dict", got=entries, allowed="a dict of fields", fix='{"name": "head"}'))
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    problems = [unknown(where, "field", name, known) for name in entries if name not in known]
    values = {}
    for name in entries.keys() & set(known):
        try:
            values[name] = READERS[name](f"{where}: {name}", entries[name], kinds) if name in READERS else entries[name]
        except ConfigError as error:
            problems.append(str(error))
    if cls is kinds.rule:  # without a selector that could not be read, a rule would have a problem more
        raise_all(sorted(problems))
    try:
        made = cls(**values)
    except ConfigError as error:
        problems.append(f"{where}: {error}")
    raise_all(sorted(problems))
    return made


def _rules(where: str, data: object, kinds: Kinds) -> tuple[Any, ...]:
    if isinstance(data, dict):
        fix = '[{"name": "head", "weight": {"bits": 8}}]'
        raise ConfigError(explain(where, "this is no list", got=data, allowed="a list of dicts", fix=fix))
    return _each(where, data, lambda place, entry: _made(kinds.rule, place, entry, kinds))


def _each(where: str, data: object, read: Callable[[str, Data], T]) -> tuple[T, ...]:
    """The items of a list; all problems in one message."""
    if not isinstance(data, list | tuple):
        raise ConfigError(explain(where, "this is no list", got=data, allowed="a list"))
    items, problems = [], []
    for index, entry in enumerate(map(plain, data)):
        try:
            items.append(read(f"{where}[{index}]", entry))
        except ConfigError as error:
            problems.append(str(error))
    raise_all(problems)
    return tuple(items)


def _half(where: str, data: object, kinds: Kinds) -> QuantizerConfig | Override | None:
    if data is None:
        return None
    allowed = 'null, {"config": {...}}, or the fields that sq.override takes'
    if not isinstance(data, dict):
        fix = '{"bits": 4}, or null to leave it float'
        raise ConfigError(explain(where, "this is no dict", got=data, allowed=allowed, fix=fix))
    fields = data["config"] if data.keys() == {"config"} else data
    if not isinstance(fields, dict):
        raise ConfigError(explain(where, "this is no config", got=fields, allowed=allowed, fix='{"bits": 4}'))
    raise_all([unknown(where, "field", name, OVERRIDE_FIELDS) for name in fields if name not in OVERRIDE_FIELDS])
    values = {name: _field(f"{where}: {name}", name, value) for name, value in fields.items()}
    if fields is data:
        return _named(where, lambda: override(**values))
    return _named(where, lambda: QuantizerConfig(**values))


def _named(where: str, make: Callable[[], T]) -> T:
    """What ``make`` returns; its errors name the place in the data."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _field(where: str, name: str, value: Data) -> Any:
    """A field of a quantizer's config, or of its scheme, from data."""
    if name in PIECES:
        return _spec(where, value, PIECES[name])
    if name == "granularity":
        return _granularity(where, value)
    if name == "scheme" and isinstance(value, dict):
        raise_all([unknown(where, "field", key, SCHEME_FIELDS) for key in value if key not in SCHEME_FIELDS])
        fields = {key: _field(f"{where}: {key}", key, item) for key, item in value.items()}
        return _named(where, lambda: QScheme(**fields))
    return value


def _spec(where: str, data: Data, registry: Factories[Any]) -> Data:
    """An observer or fake quantizer from its name and options; a name alone is for :func:`override` to look up."""
    if not isinstance(data, dict):
        return data
    name, options = data.get("name"), data.get("options", {})
    if not isinstance(name, str) or not isinstance(options, dict) or not data.keys() <= {"name", "options"}:
        allowed = 'a name, or {"name": ..., "options": {...}}'
        flat = {key: value for key, value in data.items() if key != "name"}  # options beside the name, not below "options"
        is_flat = isinstance(name, str) and "options" not in data
        fix = json.dumps({"name": name, "options": flat}, default=str) if is_flat else '{"name": "mse"}'
        raise ConfigError(explain(where, f"this is no {registry.kind}", got=data, allowed=allowed, fix=fix))
    given = {key: _hashable(value) for key, value in options.items()}
    if name in registry:
        return _named(where, lambda: registry.spec(name, **given))
    # of a package that registers it later; the plan reports a name that nobody registers
    return Spec(name, tuple(sorted(given.items())))


def _hashable(value: Data) -> Data:
    """The value of an option: JSON has no tuples."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _granularity(where: str, data: Data) -> Data:
    """A granularity from its name and fields; a name alone is for :func:`override` to look up."""
    if not isinstance(data, dict):
        return data
    fields = dict(data)
    if "name" not in fields:
        allowed, fix = 'a name, or {"name": ...} with its fields', '{"name": "PerGroup", "size": 32}'
        raise ConfigError(explain(where, "this is no granularity", got=data, allowed=allowed, fix=fix))
    name, known = fields.pop("name"), {**GRANULARITIES, **SPELLINGS}
    if name not in known:
        raise ConfigError(unknown(where, "granularity", name, tuple(known)))
    cls: type[Granularity] = known[name]
    return _named(where, lambda: cls(**fields))


def _type(where: str, data: Data, kinds: Kinds | None = None) -> Named | str:
    """What :func:`_type_data` wrote."""
    if isinstance(data, str):
        return data
    keys = data.keys() if isinstance(data, dict) else set()
    if keys == {"type"}:
        return _named(where, lambda: at(data["type"]))
    if keys == {"pattern"}:
        return _named(where, lambda: PATTERNS.get(data["pattern"]))
    if keys == {"pattern", "parts"}:
        parts = _each(f"{where}: parts", data["parts"], _type)
        return _named(where, lambda: fused(data["pattern"], *parts))
    allowed = 'a name, {"type": "torch.nn.Linear"}, {"type": "package.module:Block"} or {"pattern": "ConvBnReLU2d"}'
    raise ConfigError(explain(where, "this is no type", got=data, allowed=allowed))


def _class(where: str, data: Data) -> Named:
    """A class from its path."""
    return _named(where, lambda: at(data))


def _condition(where: str, data: Data, kinds: Kinds) -> Named:
    return _named(where, lambda: at(data))


READERS: Mapping[str, Callable[[str, Data, Kinds], object]] = {
    "type": _type,
    "where": _condition,
    "weight": _half,
    "activation": _half,
    "rules": _rules,
    "leaf_module": lambda where, data, kinds: _each(where, data, _class),
    "weight_layers": lambda where, data, kinds: _each(where, data, _class),
    "operations": lambda where, data, kinds: _each(where, data, _type),
    "patterns": lambda where, data, kinds: _each(where, data, _type),
}
"""By field of a config or rule, what reads its data; other fields are data."""
