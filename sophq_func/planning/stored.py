"""A plan's JSON text, read: the text of an older version is brought to this one step by step first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from sophq_func.config.rules import Rule
from sophq_func.config.site import ComputedSite, Site, ValueSite, WeightSite
from sophq_func.core.errors import ConfigError, explain
from sophq_func.numerics.scheme import QuantizerConfig, config_from_data
from sophq_func.planning.picture import Call, Edge, Wiring
from sophq_func.planning.runs import Run
from sophq_func.planning.unite import Counts

VERSION = 3

Data: TypeAlias = dict[str, Any]


class Stored(NamedTuple):
    """The parts of a plan that its text has, in the order in which a plan takes them."""

    configs: Mapping[str, QuantizerConfig]
    sites: Mapping[str, Site]
    counts: tuple[Counts, ...]
    reasons: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]
    unused: tuple[Rule, ...]
    opaque: tuple[str, ...]
    written: tuple[str, ...]
    wiring: Wiring
    runs: tuple[Run, ...]


def read(text: str) -> Stored:
    """The parts of the plan that a JSON text is.

    Raises:
      ConfigError: the text is no plan, or of a version that is not known.
    """
    try:
        return _parts(_migrated(json.loads(text)))
    except ConfigError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        because = f"{type(error).__name__}: {error}"
        raise ConfigError(explain("Plan.from_json", "reading a plan is not possible", because=because)) from error


def digest_of_version_2(text: str) -> str:
    """The digest that the library gave a plan when it wrote its text in version 2; empty for other versions.

    Checkpoints hold the digest of their plan. It was over the sites as version 2 had them, so that a plan of an old
    checkpoint has another one now.
    """
    data = json.loads(text)
    if data["version"] != 2:
        return ""
    identity = {key: data[key] for key in ("quantizers", "counts", "opaque", "written")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _parts(data: Data) -> Stored:
    """The parts of a plan of this version; raises whatever a wrong type raises."""
    entries = {_text(entry["name"]): entry for entry in data["quantizers"]}
    sites = {name: Site.from_data(entry["site"]) for name, entry in entries.items()}
    if any(site.quantizer != name for name, site in sites.items()):
        raise ValueError("a site belongs to another quantizer")
    return Stored(
        configs={name: config_from_data(entry["config"]) for name, entry in entries.items()},
        sites=sites,
        counts=tuple(_counts(counts) for counts in data["counts"]),
        reasons={name: {_text(k): _text(v) for k, v in data["reasons"][name].items()} for name in entries},
        notes=_texts(data["notes"]),
        unused=(),
        opaque=_texts(data["opaque"]),
        written=_texts(data["written"]),
        wiring=Wiring(
            tuple(Call(_text(name), _text(does), _texts(weights)) for name, does, weights in data["calls"]),
            tuple(Edge(_text(source), _text(target), _texts(through)) for source, target, through in data["edges"]),
        ),
        runs=tuple(map(Run.from_data, data["runs"])),
    )


def _counts(entries: list[tuple[str, str, int]]) -> Counts:
    return {(_text(path), _text(function)): int(n) for path, function, n in entries}


def _texts(values: list[str]) -> tuple[str, ...]:
    return tuple(map(_text, values))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _migrated(data: Data) -> Data:
    """The data of a plan of any version that is known, as this version has it."""
    version = data["version"]
    known = (*MIGRATIONS, VERSION)
    if version not in known:
        allowed = " or ".join(map(str, known))
        raise ConfigError(explain("Plan.from_json", "this version is not possible", got=version, allowed=allowed))
    for step in range(version, VERSION):
        data = MIGRATIONS[step](data)
    return data


SITES_OF_VERSION_2 = frozenset(
    "aliases also anchor argument axis bias function groups members more norm note operand operation output parameter path "
    "paths pattern quantizer role shape source types value".split()
)
"""The fields of a site of version 2, of whatever kind."""


def _from_2(data: Data) -> Data:
    """In version 2 all sites had the same fields, empty where a kind of site has no such thing.

    Shapes of weights, and what their layers read, were not known; what the examples called, not at first.
    """
    quantizers = [{**entry, "site": _site_from_2(entry["site"])} for entry in data["quantizers"]]
    return {"runs": [], **data, "version": 3, "quantizers": quantizers}


def _site_from_2(old: Data) -> Data:
    if old.keys() != SITES_OF_VERSION_2:
        raise TypeError(f"a site has the fields {sorted(SITES_OF_VERSION_2)}, got {sorted(old)}")
    new: Site
    if old["role"] == "activation":
        new = ValueSite(quantizer="")
    elif old["parameter"]:
        new = WeightSite(quantizer="")
    else:
        new = ComputedSite(quantizer="")
    data = new.to_data()
    return data | {name: value for name, value in old.items() if name in data}


MIGRATIONS: Mapping[int, Callable[[Data], Data]] = {2: _from_2}
"""By version, what brings its data to the next one."""
