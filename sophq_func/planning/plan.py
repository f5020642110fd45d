"""The plan: an immutable config tree, ``{quantizer name: QuantizerConfig}``, that explains itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from sophq_func.config.matching import underscored
from sophq_func.config.rules import Rule
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, PlanError, StateError, explain, near
from sophq_func.numerics.scheme import QuantizerConfig, config_from_data, to_data
from sophq_func.planning import diff, picture, text
from sophq_func.planning.diff import PlanDiff
from sophq_func.planning.picture import Call, Edge
from sophq_func.planning.runs import Run
from sophq_func.planning.text import Tree

VERSION = 2

Counts = Mapping[tuple[str, str], int]
"""Number of calls of each (module path, function) that some quantizer is anchored to; function is empty for modules."""


class Plan(Mapping[str, QuantizerConfig]):
    """What is quantized how, in execution order. Made by :func:`sophq_func.plan`; immutable, equal by value.

    Attributes:
      notes: remarks for people on what the plan left out, and why.
      unused: rules that matched nothing.
      opaque: paths of modules whose inside is not looked at.
      written: inputs that the model writes into; they enter as copies.
      calls, edges: the traced model, for pictures.
      runs: what each example called, in order.
    """

    _configs: dict[str, QuantizerConfig]
    _sites: dict[str, Site]
    _reasons: dict[str, dict[str, str]]
    _counts: tuple[dict[tuple[str, str], int], ...]
    notes: tuple[str, ...]
    unused: tuple[Rule, ...]
    opaque: tuple[str, ...]
    written: tuple[str, ...]
    calls: tuple[Call, ...]
    edges: tuple[Edge, ...]
    runs: tuple[Run, ...]
    _again: Callable[[Rule], Plan] | None

    def __init__(
        self,
        configs: Mapping[str, QuantizerConfig],
        sites: Mapping[str, Site],
        counts: tuple[Counts, ...],
        reasons: Mapping[str, Mapping[str, str]],
        notes: tuple[str, ...] = (),
        unused: tuple[Rule, ...] = (),
        opaque: tuple[str, ...] = (),
        written: tuple[str, ...] = (),
        calls: tuple[Call, ...] = (),
        edges: tuple[Edge, ...] = (),
        again: Callable[[Rule], Plan] | None = None,
        runs: tuple[Run, ...] = (),
    ) -> None:
        self.__dict__.update(
            _configs=dict(configs),
            _sites=dict(sites),
            _reasons={name: dict(own) for name, own in reasons.items()},
            _counts=tuple(dict(c) for c in counts),
            notes=tuple(notes),
            unused=tuple(unused),
            opaque=tuple(opaque),
            written=tuple(written),
            calls=tuple(calls),
            edges=tuple(edges),
            _again=again,
            runs=tuple(runs),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_again": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(explain("Plan", f"setting {name!r}", because="it is immutable", fix="plan anew"))

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    @property
    def counts(self) -> tuple[Counts, ...]:
        """For each example, how often the planned modules and functions were called."""
        return tuple(dict(counts) for counts in self._counts)

    def __getitem__(self, name: str) -> QuantizerConfig:
        return self._configs[self.find(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        weights = sum(site.role == "weight" for site in self._sites.values())
        return f"Plan({weights} weight and {len(self) - weights} activation quantizers, digest {self.digest()[:12]})"

    def find(self, name: str) -> str:
        """The full name of a quantizer that is given by it, dotted or underscored.

        Raises:
          KeyError: there is none; the message lists near matches.
          ConfigError: it fits several.
        """
        if name in self._configs:
            return name
        found = [own for own in self._configs if underscored(own) == name]
        if len(found) > 1:
            raise ConfigError(f"plan: {name!r} fits {' and '.join(map(repr, found))}. Fix: write the dots.")
        if not found:
            raise KeyError(f"no quantizer {name!r} in the plan; {near(str(name), self._configs)}")
        return found[0]

    def site(self, name: str) -> Site:
        """Where a quantizer sits."""
        return self._sites[self.find(name)]

    def reasons(self, name: str) -> Mapping[str, str]:
        """For each field of a quantizer's config, which default or rule decided it; ``"placed"`` says why it is there."""
        return dict(self._reasons[self.find(name)])

    def rows(self) -> list[dict[str, str]]:
        """The plan as rows of text, one for each quantizer."""
        return [text.row(config, self._sites[name], self._reasons[name]) for name, config in self._configs.items()]

    def table(self) -> str:
        """The plan as text: each quantizer, its config, where it sits, and which rule or default decided each field.

        With lines between the columns where rich is installed, else plain.
        """
        remarks = [f"note: {note}" for note in self.notes] + [f"unused: {rule!r}" for rule in self.unused]
        return text.table(self.rows(), remarks)

    def explain(self, name: str) -> str:
        """Everything about one quantizer as text: where it sits, and each field with who decided it."""
        full = self.find(name)
        return text.explain(self._configs[full], self._sites[full], self._reasons[full])

    def tree(self) -> Tree:
        """The configs nested by module path, a dict of dicts; ``print`` draws it."""
        return text.tree(self._configs)

    def diff(self, other: Plan) -> PlanDiff:
        """What ``other`` has that is different: quantizers added, removed, or with changed fields."""
        if not isinstance(other, Plan):
            raise PlanError(explain("plan.diff", "this plan", got=type(other).__name__, allowed="a sq.Plan"))
        return diff.diff((self._configs, other._configs), (self._sites, other._sites))

    def override(self, rule: Rule) -> Plan:
        """A new plan of the same model and config, with one more rule at the end.

        Raises:
          ConfigError: as :func:`sophq_func.plan`.
          PlanError: the plan was read from JSON or a pickle, and has no traced model to plan again.
        """
        if not isinstance(rule, Rule):
            fix = 'sq.Rule(name="...", weight=sq.override(bits=4))'
            raise ConfigError(explain("plan.override", "this rule", got=type(rule).__name__, allowed="a sq.Rule", fix=fix))
        if self._again is None:
            because, fix = (
                "it was read from JSON or a pickle, without the traced model",
                "sq.plan(sq.trace(model, args), config)",
            )
            raise PlanError(explain("plan.override", "planning again", because=because, fix=fix))
        return self._again(rule)

    def to_dot(self) -> str:
        """The model's graph with its quantizers, in the DOT language; :func:`sophq_func.draw` makes a picture."""
        return picture.dot(self.calls, self.edges, self._configs)

    def _identity(self) -> dict[str, Any]:
        """All that decides about numbers, as data; what only explains is left out."""
        return {
            "quantizers": [
                {"name": name, "config": to_data(config), "site": self._sites[name].to_data()}
                for name, config in self._configs.items()
            ],
            "counts": [sorted([path, function, n] for (path, function), n in c.items()) for c in self.counts],
            "opaque": list(self.opaque),
            "written": list(self.written),
        }

    def to_json(self) -> str:
        """The plan as JSON text: stable, and all that :func:`sophq_func.build` needs. Unused rules are left out."""
        told = {"reasons": self._reasons, "notes": self.notes, "calls": self.calls, "edges": self.edges, "runs": self.runs}
        data = {"version": VERSION, **self._identity(), **told}
        return json.dumps(data, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of :meth:`to_json`.

        Raises:
          ConfigError: the text is no plan, or of another version.
        """
        try:
            return _read(json.loads(text))
        except ConfigError:
            raise
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            because = f"{type(error).__name__}: {error}"
            raise ConfigError(explain("Plan.from_json", "reading a plan", because=because)) from error

    def digest(self) -> str:
        """SHA-256 over everything that decides about numbers; equal exactly for equal plans."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def check(self, names: Mapping[str, Any], what: str, types: Mapping[str, type], known: Collection[str] = ()) -> None:
        """Raise a :class:`StateError` unless a state has what is expected of it.

        Args:
          names: the state, by quantizer.
          what: what it is, for errors: ``"ostate"`` or ``"qparams"``.
          types: the class of each entry that there must be.
          known: names of entries that there may be beside these.
        """
        if not isinstance(names, Mapping):
            raise StateError(explain(what, "this type", got=type(names).__name__, allowed="a dict {quantizer: state}"))
        for name in names.keys() & types.keys():
            if not isinstance(names[name], types[name]):
                got, allowed = type(names[name]).__name__, types[name].__name__
                raise StateError(explain(f"{what}[{name!r}]", "this value", got=got, allowed=allowed))
        missing = [name for name in types if name not in names]
        if missing:
            fix = "q.init(params)" if what == "ostate" else "q.calibrate(params, batches)"
            raise StateError(f"not calibrated: {what} lacks {', '.join(map(repr, missing))}. Fix: {fix}.")
        extra = [name for name in names if name not in types and name not in known]
        if extra:
            raise StateError(f"{what} holds {extra[0]!r}, which is not in the plan; {near(extra[0], self._configs)}.")


def _read(data: Any) -> Plan:
    """A plan from the data that :meth:`Plan.to_json` writes; raises whatever a wrong type raises."""
    if data["version"] != VERSION:
        raise ConfigError(explain("Plan.from_json", "this version", got=data["version"], allowed=VERSION))
    entries = {_text(entry["name"]): entry for entry in data["quantizers"]}
    sites = {name: Site.from_data(entry["site"]) for name, entry in entries.items()}
    if any(site.quantizer != name for name, site in sites.items()):
        raise ValueError("a site belongs to another quantizer")
    return Plan(
        {name: config_from_data(entry["config"]) for name, entry in entries.items()},
        sites,
        tuple({(_text(path), _text(function)): int(n) for path, function, n in counts} for counts in data["counts"]),
        {name: {_text(k): _text(v) for k, v in data["reasons"][name].items()} for name in entries},
        tuple(_text(note) for note in data["notes"]),
        opaque=tuple(_text(path) for path in data["opaque"]),
        written=tuple(_text(name) for name in data["written"]),
        calls=tuple(Call(_text(name), _text(does), tuple(map(_text, weights))) for name, does, weights in data["calls"]),
        edges=tuple(Edge(_text(source), _text(end), tuple(map(_text, through))) for source, end, through in data["edges"]),
        runs=tuple(map(Run.from_data, data.get("runs", ()))),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
