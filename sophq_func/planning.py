"""From a graph and a config to a :class:`~sophq_func.plan.Plan`: fuse, place, resolve, check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from sophq_func.base import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.errors import ConfigError, PlanError, explain, near, raise_all
from sophq_func.functions import canonical, is_operation
from sophq_func.graph import Graph, Node
from sophq_func.patterns import PATTERNS, fuse
from sophq_func.plan import Plan
from sophq_func.rules import Decision, QuantConfig, Rule, requested, resolve, underscored
from sophq_func.scheme import PerChannel, PerGroup, PerTensor, QuantizerConfig
from sophq_func.site import Site
from sophq_func.strategies import PLACEMENTS, source_of
from sophq_func.weight_sites import node_types, pattern_name, weight_sites


def plan(graph: Graph | Sequence[Graph], config: QuantConfig) -> Plan:
    """Decide for a traced model which quantizers there are, and how each is configured.

    Args:
      graph: from :func:`sophq_func.trace`; of several traces the plan is the union.
      config: what is asked for.

    Returns:
      The :class:`~sophq_func.plan.Plan`.

    Raises:
      ConfigError: a rule names what the model has not, or a config is beyond the chip's limits; all problems at once.
      PlanError: a value to be quantized was made in place, and is used under its old name later.

    Example:
      >>> import torch, sophq_func as sq
      >>> list(sq.plan(sq.trace(nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig()))
      ['input.post_act_fake_quantizer', 'weight_fake_quant']
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(explain("plan", "this config", got=type(config).__name__, allowed="sq.QuantConfig"))
    graphs = [graph] if isinstance(graph, Graph) else graph
    if not isinstance(graphs, list | tuple) or not graphs or not all(isinstance(g, Graph) for g in graphs):
        got, allowed = type(graph).__name__, "a Graph, or a list of at least one"
        raise ConfigError(explain("plan", "this graph", got=got, allowed=allowed, fix="sq.trace(model, args)"))
    names = set().union(*(_names(g) for g in graphs))
    classes = {cls.__name__ for g in graphs for cls in g.modules.values()}
    drafts = [_Draft(g, config) for g in graphs]
    problems = [p for g in graphs for p in _unseen_leaves(g, config)]
    problems += _unknown_names(names, classes, config.rules)
    problems += [p for draft in drafts for p in draft.problems]
    raise_all(list(dict.fromkeys(problems)))
    raise_all(list(dict.fromkeys(p for draft in drafts for p in draft.misfits)), PlanError)
    return _union(drafts, config)


class _Draft:
    """The plan of one graph while it is made: sites in execution order, decisions, and what is wrong."""

    def __init__(self, graph: Graph, config: QuantConfig) -> None:
        self.raw, self.graph, self.config = graph, fuse(graph), config
        self.strategy = PLACEMENTS.get(config.placement)
        self.sites: dict[str, Site] = {}
        self.decisions: dict[str, Decision] = {}
        self.used: set[int] = set()
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.misfits: list[str] = []
        weights, notes = weight_sites(self.graph, self.strategy)
        self.notes += notes
        for site, _ in weights:
            self._decide(site, "weight of a quantized layer")
        if config.quantmode == "weight_activation":
            self._place_activations()
        self._tie_biases(weights)
        self._in_execution_order()

    def _decide(self, site: Site, placed: str, observe_only: bool = False) -> None:
        decision = resolve(self.config, site)
        self.used.update(decision.matched)
        if decision.config is None:
            return
        config = _with_axis(decision.config, site)
        reasons = {"placed": placed, **decision.reasons}
        if observe_only and "observe_only" not in decision.reasons:
            config = replace(config, observe_only=True)
            reasons["observe_only"] = f"strategy {self.config.placement}: no contraction reads it"
        self.problems += _violations(self.config, site, config, reasons)
        self.sites[site.quantizer] = site
        self.decisions[site.quantizer] = replace(decision, config=config, reasons=reasons)

    def _place_activations(self) -> None:
        chosen, observed = self.strategy.place(self.graph, self._asks)
        for node in self.graph:
            for value in node.outputs:
                if value in chosen:
                    site = _activation_site(self.graph, node, value)
                    self._decide(site, chosen[value], value in observed)
                    self._check_in_place(site)
            if any(value in chosen for value in node.outputs):
                self._add_int4_input(node)

    def _asks(self, node: Node) -> bool | None:
        found, indices = requested(self.config, _node_site(self.graph, node))
        self.used.update(indices)
        return found

    def _check_in_place(self, site: Site) -> None:
        decision = self.decisions.get(site.quantizer)
        if decision is None or decision.config is None or decision.config.observe_only:
            return
        value = self.graph.values[site.value]
        names = [(node.name, operand) for node in self.graph for operand in node.operands if operand.stale]
        late = [n for n, o in names if o.stale == value.name or (value.view and o.value == value.name)]
        late += ["the model's result"] if value.overwritten else []
        if late:
            what = f"quantizing {site.value}, which is written in place and which {late[0]} uses under an old name,"
            fix = "write the operation out of place, or give the value activation=None"
            self.misfits.append(explain(site.quantizer, what, fix=fix))

    def _add_int4_input(self, node: Node) -> None:
        """Layers that rules give 4-bit weights and activations get a quantizer of their own on the input."""
        weight = self.decisions.get(f"{node.parameters.get('weight', '')}_fake_quant")
        site = _activation_site(self.graph, node, node.outputs[0])
        output = self.decisions.get(site.quantizer)
        if weight is None or output is None or not node.operands or not self.strategy.int4_inputs:
            return
        asked = all(d.reasons["bits"].startswith("Rule(") for d in (weight, output))
        four = all(d.config is not None and d.config.scheme.bits == 4 for d in (weight, output))
        if asked and four:
            lead = node.members[0] if node.members else node
            own = replace(
                site,
                quantizer=f"{node.name}.input_act_fake_quantizer",
                anchor=(lead.path, lead.function, lead.call),
                output=-1,
                operand=0,
                shape=self.graph.values[node.operands[0].value].shape if node.operands[0].value else (),
                note=f"operand of {node.name}",
            )
            self._decide(own, f"4-bit layer {node.name}")

    def _tie_biases(self, weights: Sequence[tuple[Site, Sequence[Node]]]) -> None:
        """Say for each weight which input scale rounds the bias of its layer, where that is one scale for one bias."""
        carriers = Counter(carrier for _, nodes in weights for carrier in {_bias_carrier(node) for node in nodes})
        for site, nodes in weights:
            if site.quantizer not in self.sites or not self._rounds_bias(site, nodes[0]):
                continue
            sources = {self._input_quantizer(node) for node in nodes}
            own = {_bias_carrier(node) for node in nodes}
            if len(sources) == len(own) == 1 and carriers[own.pop()] == 1:
                self.sites[site.quantizer] = replace(site, source=sources.pop())
            elif sources != {""}:
                self.notes.append(
                    f"the bias behind {site.parameter} is shared, or has inputs of several scales: not rounded"
                )

    def _rounds_bias(self, site: Site, node: Node) -> bool:
        config = self.decisions[site.quantizer].config
        layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *((nn.ConvTranspose2d,) if site.norm else ()))
        return bool(
            config is not None
            and self.strategy.rounds_bias
            and node.is_module(*layers)
            and site.parameter
            and (site.bias or site.norm)
            and _is_integer_grid(config)
            and config.scheme.granularity in (PerTensor(), PerChannel(site.axis))
        )

    def _input_quantizer(self, node: Node) -> str:
        """The quantizer whose scale the codes of a layer's input have; empty where there is none."""
        own = f"{node.name}.input_act_fake_quantizer"
        operand = node.operands[0]
        if self.strategy.functions:
            operand = source_of(self.graph, operand)
        while operand.value and self.graph.producer(operand.value).is_module(nn.Dropout):
            operand = self.graph.producer(operand.value).operands[0]
        name = own if own in self.sites else f"{operand.value}.post_act_fake_quantizer"
        config = self.decisions[name].config if name in self.decisions else None
        scalar = config is not None and config.scheme.granularity == PerTensor()
        return name if config is not None and scalar and _is_integer_grid(config) else ""

    def _in_execution_order(self) -> None:
        """Inputs first, then call by call: weight, own input, result."""
        rank = {(node.path, node.function, node.call): i for i, node in enumerate(self.raw) if node.kind != "input"}
        order = {"weight": 0, "activation": 1}

        def key(item: tuple[str, Site]) -> tuple[int, int, int]:
            site = item[1]
            if site.argument:
                return (-1, 0, 0)
            return (rank[site.anchor], order[site.role] if site.operand < 0 else 0, site.output)

        self.sites = dict(sorted(self.sites.items(), key=key))


def _bias_carrier(node: Node) -> str:
    """Name of the tensor that takes up what rounding changes: the layer's bias, or that of the BatchNorm behind it."""
    return node.parameters.get("bias") or (node.norm.parameters["bias"] if node.norm else "")


def _with_axis(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the axis of its granularity written out."""
    granularity = config.scheme.granularity
    if not isinstance(granularity, PerChannel | PerGroup) or granularity.axis is not None:
        return config
    axis = site.axis if site.role == "weight" else 1
    return replace(config, scheme=replace(config.scheme, granularity=replace(granularity, axis=axis)))


def _is_integer_grid(config: QuantizerConfig) -> bool:
    """Whether codes are integers times a scale that is known before the forward."""
    integer = FAKE_QUANTIZERS.build(config.fake_quantize).integer
    return integer and not config.observe_only and not config.scheme.dynamic


def _violations(config: QuantConfig, site: Site, found: QuantizerConfig, reasons: dict[str, str]) -> list[str]:
    """What the chip forbids about one quantizer."""
    FAKE_QUANTIZERS.canonical(found.fake_quantize.name)
    OBSERVERS.canonical(found.observer.name)
    allowed = config.spec.weight_bits if site.role == "weight" else config.spec.activation_bits
    if config.chip is None or allowed is None or not FAKE_QUANTIZERS.build(found.fake_quantize).integer:
        return []
    if found.scheme.bits in allowed:
        return []
    text = " or ".join(map(str, allowed))
    because = f"chip {config.chip}; bits set by {reasons['bits']}"
    what = f"{found.scheme.bits} bits"
    return [explain(site.quantizer, what, got=found.scheme.bits, allowed=text, because=because, fix=f"bits={allowed[-1]}")]


def _node_site(graph: Graph, node: Node) -> Site:
    """The site that rules see when they say whether a call asks for quantizers."""
    return Site(
        quantizer=f"{node.name}.post_act_fake_quantizer",
        role="activation",
        value=node.name,
        path=node.path,
        paths=(*node.paths, *(path for m in node.members[1:] if m.kind == "module" for path in m.paths)),
        types=node_types(graph, node),
        pattern=pattern_name(node),
        members=tuple(m.name for m in node.members),
        function=node.function,
        also=node.also,
        groups=int(node.options.get("groups", 1)),
    )


def _activation_site(graph: Graph, node: Node, value: str) -> Site:
    last, made = node.last, graph.values[value]
    return replace(
        _node_site(graph, node),
        quantizer=f"{value}.post_act_fake_quantizer",
        value=value,
        anchor=(last.path, last.function, last.call),
        output=made.index,
        shape=made.shape,
        argument=node.argument,
        aliases=tuple(f"{path}.post_act_fake_quantizer" for path in node.paths[1:] if node.kind == "module"),
    )


def _unseen_leaves(graph: Graph, config: QuantConfig) -> list[str]:
    """Problems with modules that the config calls leaves, but into which the trace has looked."""
    inside = [path for path, cls in graph.modules.items() if issubclass(cls, config.leaf_module or ())]
    if set(inside) <= set(graph.opaque) or not config.leaf_module:
        return []
    types = ", ".join(cls.__name__ for cls in config.leaf_module)
    what = f"planning with leaf_module=({types},)"
    because = "the graph was traced without it"
    return [explain("plan", what, because=because, fix="sq.trace(model, args, kwargs, leaf_module=config.leaf_module)")]


def _names(graph: Graph) -> set[str]:
    """Every dotted name that a rule may use for a part of a traced model."""
    names = set(graph.modules) | set(graph.nodes) | set(graph.values) | {name for node in graph for name in node.also}
    names |= {f"{value}.post_act_fake_quantizer" for value in graph.values}
    names |= {f"{node.name}.input_act_fake_quantizer" for node in graph}
    names |= {f"{p}_fake_quant" for node in graph for p in node.parameters.values()}
    names |= {f"{path}.{attribute}_fake_quant" for n in graph for path in n.paths for attribute in (*n.parameters, "weight")}
    names |= {f"{path}.post_act_fake_quantizer" for node in graph for path in node.paths if path}
    return names | {f"{o.parameter}_fake_quant" for node in graph for o in node.operands if o.parameter}


def _unknown_names(names: set[str], classes: set[str], rules: Sequence[Rule]) -> list[str]:
    """Problems with exact names and type names in rules that the traced model does not have."""
    problems = []
    for rule in rules:
        if rule.name is not None and not any(c in rule.name for c in "*?["):
            fits = sorted({name for name in names if rule.name in (name, underscored(name))})
            if not fits:
                hint = near(rule.name, names) or "see sq.trace(model, args) for the names"
                problems.append(f"{rule!r}: the model has no {rule.name!r}. Fix: {hint}")
            elif len(fits) > 1:
                problems.append(f"{rule!r}: {rule.name!r} fits {' and '.join(map(repr, fits))}. Fix: write the dots.")
        if isinstance(rule.type, str):
            text = rule.type.rpartition(".")[2]
            own = text.removesuffix("_sophgo")
            if not (text in PATTERNS or hasattr(nn, own) or own in classes or is_operation(canonical(rule.type))):
                hint = near(own, [*PATTERNS, *classes, *dir(nn)])
                problems.append(f"{rule!r}: type {rule.type!r} is not known. Fix: {hint or 'use the class itself'}")
    return problems


def _union(drafts: Sequence[_Draft], config: QuantConfig) -> Plan:
    """One plan of all drafts; a quantizer that several have must sit at one place."""
    sites: dict[str, Site] = {}
    decisions: dict[str, Decision] = {}
    notes = [note for draft in drafts for note in draft.notes]
    for draft in drafts:
        for name, site in draft.sites.items():
            if name in sites and sites[name].anchor != site.anchor and site.role == "activation":
                fix = "give the model examples that take the same way to this value, or rename the module"
                raise PlanError(explain(name, "one name for different calls in different examples", fix=fix))
            if name in sites and sites[name].norm != site.norm:
                site = replace(site, norm="", source="", note="unfolded")
                notes.append(f"{site.parameter} has a normalization behind it in some examples only: unfolded")
            elif name in sites and sites[name].source != site.source:
                site = replace(site, source="")
            sites[name] = site
            decisions.setdefault(name, draft.decisions[name])
    order = _merged_order([list(draft.sites) for draft in drafts])
    pairs = {site.anchor[:2] for site in sites.values() if not site.argument and not site.parameter}
    counts = tuple(
        {pair: sum((n.path, n.function) == pair and n.kind != "input" for n in draft.raw) for pair in sorted(pairs)}
        for draft in drafts
    )
    used = set().union(*(draft.used for draft in drafts))
    configs = {name: c for name, d in decisions.items() if (c := d.config) is not None}
    return Plan(
        {name: configs[name] for name in order},
        {name: sites[name] for name in order},
        counts,
        {name: decisions[name].reasons for name in order},
        tuple(dict.fromkeys(notes)),
        tuple(rule for i, rule in enumerate(config.rules) if i not in used),
        opaque=tuple(sorted({path for draft in drafts for path in draft.raw.opaque})),
        written=tuple(sorted({name for draft in drafts for name in draft.raw.written})),
    )


def _merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names that keeps, as far as they agree, the order of each; the longest is the spine."""
    merged: list[str] = []
    for order in sorted(orders, key=len, reverse=True):
        at = 0
        for name in order:
            if name in merged:
                at = merged.index(name) + 1
            else:
                merged.insert(at, name)
                at += 1
    return merged
