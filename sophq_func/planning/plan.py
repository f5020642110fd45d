"""The plan: an immutable config tree, ``{quantizer name: QuantizerConfig}``, that explains itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.names import underscored
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, PlanError, StateError, explain, near
from sophq_func.numerics.scheme import QuantizerConfig, to_data
from sophq_func.planning import diff, picture, text
from sophq_func.planning.diff import PlanDiff
from sophq_func.planning.draft import check, draft
from sophq_func.planning.picture import NO_WIRING, Call, Edge, Wiring
from sophq_func.planning.runs import Run
from sophq_func.planning.stored import VERSION, read
from sophq_func.planning.text import Tree
from sophq_func.planning.unite import Counts, unite


class Origin(NamedTuple):
    """What a plan was made from."""

    graphs: tuple[Graph, ...]
    config: QuantConfig


class Plan(Mapping[str, QuantizerConfig]):
    """What is quantized how, in execution order. Made by :func:`sophq_func.plan`; immutable, equal by value.

    Attributes:
      notes: remarks for people on what the plan left out, and why.
      unused: rules that matched nothing.
      opaque: paths of modules whose inside is not looked at.
      written: inputs that the model writes into; they enter as copies.
      wiring: the traced calls, and the ways of values through the quantizers.
      origin: the graphs and the config that it was made from; ``None`` after JSON or a pickle, since classes of modules and
        functions in rules are no data.
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
    wiring: Wiring
    origin: Origin | None
    runs: tuple[Run, ...]

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
        wiring: Wiring = NO_WIRING,
        runs: tuple[Run, ...] = (),
        origin: Origin | None = None,
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
            wiring=wiring,
            runs=runs,
            origin=origin,
        )

    @staticmethod
    def of(origin: Origin) -> Plan:
        """Plan; see :func:`sophq_func.plan`, which checks its arguments first."""
        graphs, config = origin
        drafts = [draft(graph, config) for graph in graphs]
        check(drafts, config)
        made = unite(drafts)
        used = frozenset().union(*(own.used for own in drafts))
        return Plan(
            {name: own for name, decision in made.decisions.items() if (own := decision.config) is not None},
            made.sites,
            made.counts,
            {name: decision.reasons for name, decision in made.decisions.items()},
            made.notes,
            tuple(rule for i, rule in enumerate(config.rules) if i not in used),
            made.opaque,
            made.written,
            made.wiring,
            made.runs,
            origin,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "origin": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            explain("Plan", f"setting {name!r} is not possible", because="it is immutable", fix="plan anew")
        )

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the traced model, its inputs, and its output."""
        return self.wiring.calls

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Each value on its way from the call that makes it to one that takes it."""
        return self.wiring.edges

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
            raise PlanError(explain("plan.diff", "this plan is not possible", got=type(other).__name__, allowed="a sq.Plan"))
        return diff.diff((self._configs, other._configs), (self._sites, other._sites))

    def override(self, rule: Rule) -> Plan:
        """A new plan of the same model and config, with one more rule at the end.

        Raises:
          ConfigError: as :func:`sophq_func.plan`.
          PlanError: the plan was read from JSON or a pickle, and has no traced model to plan again.
        """
        if not isinstance(rule, Rule):
            fix = 'sq.Rule(name="...", weight=sq.override(bits=4))'
            raise ConfigError(
                explain("plan.override", "this rule is not possible", got=type(rule).__name__, allowed="a sq.Rule", fix=fix)
            )
        if self.origin is None:
            because = "it was read from JSON or a pickle, without the traced model"
            fix = "sq.plan(sq.trace(model, args), config)"
            raise PlanError(explain("plan.override", "planning again is not possible", because=because, fix=fix))
        config = self.origin.config
        return Plan.of(self.origin._replace(config=replace(config, rules=(*config.rules, rule))))

    def to_dot(self) -> str:
        """The model's graph with its quantizers, in the DOT language; :func:`sophq_func.draw` makes a picture."""
        return picture.dot(self.wiring, self._configs)

    def _identity(self) -> dict[str, Any]:
        """All that decides about numbers, as data; what only explains is left out."""
        return {
            "quantizers": [
                {"name": name, "config": to_data(config), "site": self._sites[name].identity()}
                for name, config in self._configs.items()
            ],
            "counts": [sorted([path, function, n] for (path, function), n in c.items()) for c in self.counts],
            "opaque": list(self.opaque),
            "written": list(self.written),
        }

    def to_json(self) -> str:
        """The plan as JSON text: stable, and all that :func:`sophq_func.build` needs. Unused rules are left out."""
        data = self._identity()
        for entry in data["quantizers"]:
            entry["site"] = self._sites[entry["name"]].to_data()
        told = {"reasons": self._reasons, "notes": self.notes, **self.wiring._asdict(), "runs": self.runs}
        return json.dumps({"version": VERSION, **data, **told}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The inverse of :meth:`to_json`. Texts of older versions are read, too.

        Raises:
          ConfigError: the text is no plan, or of another version.
        """
        return Plan(*read(text))

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
            raise StateError(
                explain(what, "this type is not possible", got=type(names).__name__, allowed="a dict {quantizer: state}")
            )
        for name in names.keys() & types.keys():
            if not isinstance(names[name], types[name]):
                got, allowed = type(names[name]).__name__, types[name].__name__
                raise StateError(explain(f"{what}[{name!r}]", "this value is not possible", got=got, allowed=allowed))
        missing = [name for name in types if name not in names]
        if missing:
            fix = "q.init(params)" if what == "ostate" else "q.calibrate(params, batches)"
            raise StateError(f"not calibrated: {what} lacks {', '.join(map(repr, missing))}. Fix: {fix}.")
        extra = [name for name in names if name not in types and name not in known]
        if extra:
            raise StateError(f"{what} holds {extra[0]!r}, which is not in the plan; {near(extra[0], self._configs)}.")
