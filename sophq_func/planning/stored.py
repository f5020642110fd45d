"""Read a plan from its JSON text. The data of an older version is converted to the next version, step by step, first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from sophq_func.config.rules import Rule
from sophq_func.config.site import ComputedSite, Data, Site, ValueSite, WeightSite
from sophq_func.core.errors import ConfigError, explain
from sophq_func.numerics.scheme import QuantizerConfig, config_from_data
from sophq_func.planning.coverage import Coverage
from sophq_func.planning.picture import Call, Edge, Wiring
from sophq_func.planning.runs import UNKNOWN_WAY, Run
from sophq_func.planning.unite import Counts

VERSION = 4
"""The version of the text that is written. It grows when the fields of a plan or of a site change."""


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
    excluded: tuple[str, ...]
    coverage: Coverage


def read(text: str) -> Stored:
    """The parts of the plan that a JSON text holds.

    Raises:
      ConfigError: the text holds no plan, or one of an unknown version.
    """
    try:
        return _parts(_migrated(json.loads(text)))
    except ConfigError:
        raise
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        because = f"{type(error).__name__}: {error}"
        fix = "pass a text from plan.to_json()"
        raise ConfigError(explain("Plan.from_json", "the text holds no plan", because=because, fix=fix)) from error


def digest_of_version_2(text: str) -> str:
    """The digest that a plan had when its text was written in version 2; empty for texts of other versions.

    Checkpoints hold the digest of their plan. In version 2 it was computed from other fields of the sites, so it differs
    from the digest that the same plan has now.
    """
    data = json.loads(text)
    if data["version"] != 2:
        return ""
    identity = {key: data[key] for key in ("quantizers", "counts", "opaque", "written")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _parts(data: Data) -> Stored:
    """The parts of a plan of this version. Wrong data raises any of the errors that :func:`read` turns into its own."""
    entries = {_text(entry["name"]): entry for entry in data["quantizers"]}
    if len(entries) < len(data["quantizers"]):
        raise ValueError("a quantizer is there twice")
    sites = {name: _site(name, entry["site"]) for name, entry in entries.items()}
    counts = tuple(map(_counts, data["counts"]))
    if not counts:
        raise ValueError("there is no example")
    if any(other.keys() != counts[0].keys() for other in counts):
        raise ValueError("the examples count other calls")
    wiring = Wiring(
        tuple(Call(_text(name), _text(does), _texts(weights)) for name, does, weights in data["calls"]),
        tuple(Edge(_text(source), _text(target), _texts(through)) for source, target, through in data["edges"]),
    )
    _check_wiring(wiring, entries)
    read_config = _ConfigReader()
    return Stored(
        configs={name: read_config(entry["config"]) for name, entry in entries.items()},
        sites=sites,
        counts=counts,
        reasons={name: {_text(k): _text(v) for k, v in data["reasons"][name].items()} for name in entries},
        notes=_texts(data["notes"]),
        unused=(),
        opaque=_texts(data["opaque"]),
        written=_texts(data["written"]),
        wiring=wiring,
        runs=tuple(map(Run.from_data, data["runs"])),
        excluded=_texts(data["excluded"]),
        coverage=Coverage.from_data(data["coverage"]),
    )


def _site(name: str, data: Data) -> Site:
    try:
        site = Site.from_data(data)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is no quantizer: {error}") from error
    if site.quantizer != name:
        raise ValueError(f"the site of {name!r} belongs to another quantizer")
    return site


class _ConfigReader:
    """Reads the configs of a plan: thousands of quantizers have a few configs in common, which are immutable."""

    def __init__(self) -> None:
        self._known: dict[str, QuantizerConfig] = {}

    def __call__(self, data: Data) -> QuantizerConfig:
        # unlike the data itself, its text can be looked up, and tells 1 from True
        text = repr(data)
        if text not in self._known:
            self._known[text] = config_from_data(data)
        return self._known[text]


def _check_wiring(wiring: Wiring, quantizers: Collection[str]) -> None:
    """Raise a ValueError unless the edges lead from call to call, through quantizers of the plan."""
    calls = {call.name for call in wiring.calls}
    if len(calls) < len(wiring.calls):
        raise ValueError("a call is there twice")
    if any(edge.source not in calls or edge.target not in calls for edge in wiring.edges):
        raise ValueError("an edge belongs to a call that is not there")
    named = {name for call in wiring.calls for name in call.weights}
    named.update(name for edge in wiring.edges for name in edge.through)
    if not named <= set(quantizers):
        raise ValueError(f"{min(named - set(quantizers))!r} is no quantizer of the plan")


def _counts(entries: list[tuple[str, str, int]]) -> Counts:
    counts = {(_text(path), _text(function)): _count(n) for path, function, n in entries}
    if len(counts) < len(entries):
        raise ValueError("a call is counted twice")
    return counts


def _count(number: object) -> int:
    # ``isinstance`` would take a bool for an int
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r} is no number of calls")
    return number


def _texts(values: list[str]) -> tuple[str, ...]:
    return tuple(map(_text, values))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _migrated(data: Data) -> Data:
    """The data of a plan of any known version, converted to this version."""
    version = data["version"]
    readable = (*MIGRATIONS, VERSION)
    if version not in readable:
        allowed, fix = " or ".join(map(str, readable)), "plan the model again with this version of the library"
        raise ConfigError(explain("Plan.from_json", "this version cannot be read", got=version, allowed=allowed, fix=fix))
    for step in range(version, VERSION):
        data = MIGRATIONS[step](data)
    return data


SITES_OF_VERSION_2 = frozenset(
    "aliases also anchor argument axis bias function groups members more norm note operand operation output parameter path "
    "paths pattern quantizer role shape source types value".split()
)
"""The fields of every site in version 2."""


def _from_2(data: Data) -> Data:
    """From version 2, where all sites had the same fields, which were empty for kinds of sites that do not have them.

    Shapes of weights and the inputs of their layers were not stored, nor, in its early texts, the runs of the examples.
    """
    quantizers = [{**entry, "site": _site_from_2(entry["site"])} for entry in data["quantizers"]]
    return {"runs": [], **data, "version": 3, "quantizers": quantizers}


def _from_3(data: Data) -> Data:
    """From version 3, where a computed weight was quantized at one call.

    It did not say what stays float, what rules leave so (a run may reach anything, as it might then), and what is called
    before each call.
    """
    quantizers = [_with_calls(entry) for entry in data["quantizers"]]
    runs = [[[[*made, UNKNOWN_WAY] for made in calls], scopes] for calls, scopes in data["runs"]]
    return {**data, "version": 4, "quantizers": quantizers, "runs": runs, "excluded": ["*"], "coverage": None}


def _with_calls(entry: Data) -> Data:
    """A quantizer of version 3, with the further calls of its site, of which there were none."""
    if entry["site"]["kind"] != ComputedSite.kind:
        return entry
    return {**entry, "site": {**entry["site"], "more": []}}


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
    if isinstance(new, ComputedSite):
        del data["more"]  # version 3 did not have it
    return data | {name: value for name, value in old.items() if name in data}


MIGRATIONS: Mapping[int, Callable[[Data], Data]] = {2: _from_2, 3: _from_3}
"""By version, what converts its data to the next version."""
