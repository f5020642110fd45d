"""The plan: an immutable mapping from the names of quantizers to their configs, with the reason for each of their fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.names import underscored
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Data, Site
from sophq_func.core.errors import (
    ConfigError,
    PlanError,
    PlanWarning,
    StateError,
    UnknownNameError,
    explain,
    near,
    other_prefix,
    quoted,
    raise_all,
    warn,
)
from sophq_func.core.tables import WIDTH, check_width, wrapped
from sophq_func.numerics.scheme import QuantizerConfig, to_data
from sophq_func.planning import diff, picture, text
from sophq_func.planning.coverage import NOT_MEASURED, Coverage, complaints
from sophq_func.planning.diff import PlanDiff
from sophq_func.planning.draft import check, draft, strays
from sophq_func.planning.excluded import excluded
from sophq_func.planning.picture import NO_WIRING, Call, Edge, Wiring
from sophq_func.planning.record import record
from sophq_func.planning.routing import told_apart
from sophq_func.planning.runs import Run
from sophq_func.planning.stored import VERSION, read
from sophq_func.planning.text import Tree
from sophq_func.planning.unite import Counts, unite
from sophq_func.planning.widths import Widths, as_rules, problems, resized, widths_of


class Origin(NamedTuple):
    """What a plan was made from: the traced examples and the config."""

    graphs: tuple[Graph, ...]
    config: QuantConfig


class Plan(Mapping[str, QuantizerConfig]):
    """The quantizers of a model by name, in execution order, each with its config. Immutable, and compared by value.

    :func:`sophq_func.plan` makes it.

    Attributes:
      notes: remarks on what the plan left out, and why.
      unused: rules that changed nothing.
      opaque: paths of leaf modules, whose inner calls are not recorded.
      written: names of the inputs that the model writes into; a quantized model gets copies of them.
      wiring: the traced calls, and the values that pass from one to another through quantizers.
      origin: the graphs and the config that it was made from; ``None`` for a plan from JSON or a pickle, as classes and
        functions cannot be stored there.
      runs: the calls of each example, in order.
      excluded: names, as in rules, of modules and functions that a run may reach although no example does, because rules
        leave them float.
      coverage: share of parameters and of multiplications that are quantized, and a line for each layer or contraction
        that is not, with the reason.

    Example:
      >>> import torch, sophq_func as sq
      >>> plan = sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig())
      >>> plan["weight_fake_quant"].scheme.bits, plan.reasons("weight_fake_quant")["bits"]
      (8, 'default (BM1690)')
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
    excluded: tuple[str, ...]
    coverage: Coverage

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
        excluded: tuple[str, ...] = (),
        coverage: Coverage = NOT_MEASURED,
        origin: Origin | None = None,
    ) -> None:
        self.__dict__.update(
            _configs=dict(configs),
            _sites=dict(sites),
            _reasons={name: dict(by_field) for name, by_field in reasons.items()},
            _counts=tuple(dict(c) for c in counts),
            notes=tuple(notes),
            unused=tuple(unused),
            opaque=tuple(opaque),
            written=tuple(written),
            wiring=wiring,
            runs=runs,
            excluded=tuple(excluded),
            coverage=coverage,
            origin=origin,
        )

    @staticmethod
    def of(origin: Origin) -> Plan:
        """The plan that is made from graphs and a config; :func:`sophq_func.plan` checks these first."""
        graphs, config = origin
        drafts = [draft(graph, config) for graph in told_apart(graphs)]
        check(drafts, config)
        united = unite(drafts)
        used = frozenset().union(*(draft.used for draft in drafts))
        unused = tuple(rule for i, rule in enumerate(config.rules) if i not in used)
        warnings = [*complaints([draft.work for draft in drafts], config), *strays(drafts, unused)]
        for warning in warnings:
            warn(warning, PlanWarning)
        record(config, drafts, united, unused, warnings)
        return Plan(
            {name: decision.config for name, decision in united.decisions.items() if decision.config is not None},
            united.sites,
            united.counts,
            {name: decision.reasons for name, decision in united.decisions.items()},
            united.notes,
            unused,
            united.opaque,
            united.written,
            united.wiring,
            united.runs,
            excluded(graphs, config),
            united.coverage,
            origin,
        )

    def __getstate__(self) -> Data:
        return {**self.__dict__, "origin": None}

    def __setstate__(self, state: Data) -> None:
        self.__dict__.update(state)

    def __setattr__(self, name: str, value: object) -> None:
        fix = "plan.override(rule) makes a new plan"
        raise AttributeError(explain("Plan", f"{name!r} cannot be set", because="a plan is immutable", fix=fix))

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    @property
    def given(self) -> frozenset[str] | None:
        """The arguments of the model in which an example has tensors; ``None`` where the graphs are not known."""
        if self.origin is None:
            return None
        inputs = [node for graph in self.origin.graphs for node in graph if node.kind == "input"]
        # of ``x.0``, a tensor in a list, the argument is ``x``
        return frozenset(name.partition(".")[0] for node in inputs for name in (node.argument, *node.also))

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the traced model, its inputs, and its output."""
        return self.wiring.calls

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Each use of a value: the call that makes it, the quantizers that it passes, and the call that takes it."""
        return self.wiring.edges

    @property
    def counts(self) -> tuple[Counts, ...]:
        """For each example, how often it calls each module and function at which quantizers act."""
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
        """The name of a quantizer as the plan spells it, with dots.

        Args:
          name: with dots, or with underscores in their place.

        Raises:
          ConfigError: there is no such quantizer (a ``KeyError``, too); a name with underscores fits several.
        """
        if isinstance(name, str) and name in self._configs:
            return name
        fitting = [full for full in self._configs if underscored(full) == name]
        if len(fitting) > 1:
            raise ConfigError(f"plan: {name!r} fits {' and '.join(map(repr, fitting))}. Fix: write the dots.")
        if not fitting:
            below = [full for full in self._configs if full.startswith(f"{name}.")]
            hint = f"it has {' and '.join(map(repr, below[:3]))}" if below else near(str(name), self._configs)
            sentence, fix = f"there is no quantizer {quoted(name)}", hint or "list(plan) has the names"
            raise UnknownNameError(explain("plan", sentence, fix=fix))
        return fitting[0]

    def site(self, name: str) -> Site:
        """Where a quantizer sits."""
        return self._sites[self.find(name)]

    def reasons(self, name: str) -> Mapping[str, str]:
        """For each field of a quantizer's config, which default or rule decided it.

        Under ``"placed"`` is the reason why there is a quantizer.
        """
        return dict(self._reasons[self.find(name)])

    def rows(self) -> list[dict[str, str]]:
        """The plan as rows of text, one for each quantizer."""
        return [text.row(config, self._sites[name], self._reasons[name]) for name, config in self._configs.items()]

    def table(self, columns: str | Sequence[str] | None = None, width: int = WIDTH) -> str:
        """The plan as text: each quantizer, its config, where it sits, and which rule or default decided each field.

        Columns that do not fit beside each other follow below their row. At the end it says what stays float.

        Args:
          columns: those to show: ``"quantizer"``, ``"grid"``, ``"granularity"``, ``"observer"``, ``"fake quantizer"``,
            ``"where"``, ``"why"``; all by default.
          width: characters in a line.

        Raises:
          ConfigError: a column that there is not, or a width of less than 40.

        Example:
          >>> import torch, sophq_func as sq
          >>> plan = sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig())
          >>> print(plan.table(columns=("quantizer", "grid", "where")))
          quantizer                      grid  where
          -----------------------------  ----  -------------
          input.post_act_fake_quantizer  int8  after input
          weight_fake_quant              int8  weight weight
          <BLANKLINE>
          coverage: 66.6 % of parameters and 100.0 % of multiplications are quantized
        """
        check_width("plan.table", width)
        chosen = text.table(self.rows()).pick("plan.table", columns)
        parts = [chosen.text(width)] if self else ["nothing is quantized"]
        remarks = [line for remark in self._remarks() for line in wrapped(remark, width)]
        if remarks:
            parts.append("\n".join(remarks))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return text.table(self.rows()).html(repr(self), self._remarks())

    def _remarks(self) -> list[str]:
        """What the table says below its rows: notes, rules that changed nothing, and what stays float."""
        remarks = [f"note: {note}" for note in self.notes] + [f"unused: {rule!r}" for rule in self.unused]
        # Of an empty plan the table says that nothing is quantized.
        is_known = bool(self) and self.coverage.shares is not None
        return [*remarks, *(self.coverage.lines() if is_known else ())]

    def explain(self, name: str) -> str:
        """Everything about one quantizer as text: where it sits, and each field with what decided it."""
        full = self.find(name)
        return text.explain(self._configs[full], self._sites[full], self._reasons[full])

    def tree(self) -> Tree:
        """The configs nested by module path, a dict of dicts; ``print`` draws it."""
        return text.tree(self._configs)

    def diff(self, other: Plan) -> PlanDiff:
        """What ``other`` has that is different: quantizers added, removed, or with changed fields."""
        if not isinstance(other, Plan):
            got, allowed, fix = type(other).__name__, "a sq.Plan", "plan.diff(other_q.plan)"
            raise PlanError(explain("plan.diff", "only plans can be compared", got=got, allowed=allowed, fix=fix))
        return diff.diff((self._configs, other._configs), (self._sites, other._sites))

    def override(self, rule: Rule) -> Plan:
        """A new plan of the same model and config, with one more rule at the end.

        Raises:
          ConfigError: as :func:`sophq_func.plan`.
          PlanError: the plan was read from JSON or a pickle, and has no traced model to plan again.
        """
        if not isinstance(rule, Rule):
            got, allowed, fix = type(rule).__name__, "a sq.Rule", 'sq.Rule(name="head", weight=sq.override(bits=4))'
            raise ConfigError(explain("plan.override", "rule has the wrong type", got=got, allowed=allowed, fix=fix))
        if self.origin is None:
            because = "it was read from JSON or a pickle, without the traced model"
            fix = "sq.plan(sq.trace(model, args), config)"
            raise PlanError(explain("plan.override", "this plan cannot be made again", because=because, fix=fix))
        config = self.origin.config
        return Plan.of(self.origin._replace(config=replace(config, rules=(*config.rules, rule))))

    def with_bits(self, bits: int | Widths) -> Plan:
        """A new plan with other bit widths: the same quantizers at the same sites, nothing planned again.

        Qparams of this plan at other widths come from :func:`sophq_func.with_bits`, with the ranges that they have, or from
        ``q.qparams(params, ostate, bits=...)``, with those that the observers find for these widths. Both fit the new plan,
        too, and give there the model that they give here. A later :meth:`override` keeps the widths.

        Args:
          bits: one width for all quantizers; or widths by name of a quantizer, by glob of names, or by path of a module,
            which stands for the weights in it. A later entry overrides an earlier one.

        Raises:
          ConfigError: names that fit nothing; widths outside 2..16, or that the chip does not allow; a quantizer whose codes
            are no integers. All problems in one message.

        Example:
          >>> import torch, sophq_func as sq
          >>> plan = sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig(chip=None))
          >>> plan.with_bits({"weight_fake_quant": 4})["weight_fake_quant"].scheme.bits
          4
        """
        widths = widths_of("plan.with_bits", bits, self._sites)
        asked = None if self.origin is None else self.origin.config
        changed = {name: resized(self._configs[name], width) for name, width in widths.items()}
        raise_all(
            [
                problem
                for name, config in changed.items()
                for problem in problems("plan.with_bits", name, config, self._sites[name], asked)
            ]
        )
        reasons = {name: {**of, "bits": "plan.with_bits"} if name in widths else of for name, of in self._reasons.items()}
        origin = self.origin
        if origin is not None:
            rules = (*origin.config.rules, *as_rules(widths, self._sites))
            origin = origin._replace(config=replace(origin.config, rules=rules))
        return Plan(
            {**self._configs, **changed},
            self._sites,
            self._counts,
            reasons,
            self.notes,
            self.unused,
            self.opaque,
            self.written,
            self.wiring,
            self.runs,
            self.excluded,
            self.coverage,
            origin,
        )

    def to_dot(self) -> str:
        """The model's graph with its quantizers, in the DOT language; :func:`sophq_func.draw` draws it."""
        return picture.dot(self.wiring, self._configs)

    def _identity(self) -> Data:
        """All that a model's numbers depend on, as data; what only explains is left out."""
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
        """The plan as JSON text, with all that :func:`sophq_func.build` needs. Unused rules are left out."""
        data = self._identity()
        for entry in data["quantizers"]:
            entry["site"] = self._sites[entry["name"]].to_data()
        explanations = {
            "reasons": self._reasons,
            "notes": self.notes,
            **self.wiring._asdict(),
            "runs": self.runs,
            "excluded": self.excluded,
            "coverage": self.coverage.to_data(),
        }
        return json.dumps({"version": VERSION, **data, **explanations}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan from a text of :meth:`to_json`, of this version of the text or an older one.

        Raises:
          ConfigError: the text holds no plan, or one of an unknown version.
        """
        return Plan(*read(text))

    def digest(self) -> str:
        """SHA-256 of everything that a model's numbers depend on, in hexadecimal; equal exactly for equal plans."""
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def check(self, names: Mapping[str, object], what: str, types: Mapping[str, type], known: Collection[str] = ()) -> None:
        """Check that a state has an entry of the right class for each quantizer, and no others.

        Args:
          names: the state, by quantizer.
          what: what it is, for errors: ``"ostate"`` or ``"qparams"``.
          types: by quantizer, the class of each entry that there must be.
          known: names of further entries that there may be.

        Raises:
          StateError: an entry is missing, of another class, or of a quantizer that is not in the plan.
        """
        fix = "q.init(params)" if what == "ostate" else "q.calibrate(params, batches)"
        if not isinstance(names, Mapping):
            got, allowed = type(names).__name__, "a dict {quantizer: state}"
            raise StateError(explain(what, f"{what} is no dict", got=got, allowed=allowed, fix=fix))
        # In the order of the plan, not of a set, so that the error names the same one in every process.
        for name in types:
            if name in names and not isinstance(names[name], types[name]):
                got, allowed = type(names[name]).__name__, types[name].__name__
                raise StateError(explain(f"{what}[{name!r}]", "the class is wrong", got=got, allowed=allowed, fix=fix))
        missing = [name for name in types if name not in names]
        renamed = other_prefix(names, types, {*types, *known}) if missing else ""
        if renamed:
            raise StateError(
                explain(what, f"the names {renamed}", fix="take the qparams and the plan of one model, not of a wrapper")
            )
        if missing and any(name.rpartition(".")[0] in types for name in map(str, names) if name not in types):
            sentence, fix = f"{what} are in leaves, as q.split gives them", "sq.merge(learned, rest)"
            raise StateError(explain(what, sentence, fix=fix))
        if missing:
            raise StateError(f"not calibrated: {what} lacks {', '.join(map(repr, missing))}. Fix: {fix}.")
        extra = [name for name in names if name not in types and name not in known]
        if extra:
            hint = near(extra[0], self._configs) or "leave it out"
            raise StateError(explain(what, f"it holds {quoted(extra[0])}, which is not in the plan", fix=hint))
