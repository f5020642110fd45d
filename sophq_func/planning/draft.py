"""The plan of one graph while it is made: sites in execution order, decisions, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.matching import matches_type
from sophq_func.config.names import before_ending, input_quantizer, value_quantizer, weight_quantizer
from sophq_func.config.rules import Decision, Preset, QuantConfig, requested, resolve
from sophq_func.config.site import Site
from sophq_func.core.errors import explain
from sophq_func.core.registry import Spec
from sophq_func.numerics.scheme import PerChannel, PerGroup, QuantizerConfig
from sophq_func.planning.biases import Placed, bias_sources
from sophq_func.planning.checks import is_integer, violations
from sophq_func.planning.fusing import fuse
from sophq_func.planning.picture import Call, Edge
from sophq_func.planning.strategies import PLACEMENTS, Placement, Requests, SharedInput
from sophq_func.planning.values import activation_site, aliases, node_site
from sophq_func.planning.weights import weight_sites


class Draft:
    """The plan of one graph while it is made: sites in execution order, decisions, and what is wrong."""

    def __init__(self, graph: Graph, config: QuantConfig) -> None:
        self.raw, self.graph, self.config = graph, fuse(graph, config.patterns), config
        self.strategy = PLACEMENTS.get(config.placement)
        self.sites: dict[str, Site] = {}
        self.decisions: dict[str, Decision] = {}
        self.removed: dict[str, Decision] = {}
        self.used: set[int] = set()
        self.names: set[str] = set()
        self.problems: list[str] = []
        self.misfits: list[str] = []
        self.inputs: dict[tuple[str, int], str] = {}
        placement = self._place()
        self.weights, self.notes = weight_sites(self.graph, self.strategy, config.weight_layers)
        for site, _ in self.weights:
            self._decide(site, "weight of a quantized layer", placement.presets)
        if config.quantmode == "weight_activation":
            self._place_activations(placement)
        sources, notes = bias_sources(Placed(self.graph, self.strategy, self.configs, self.inputs), self.weights)
        self.notes += notes
        self.sites |= {name: replace(self.sites[name], source=source) for name, source in sources.items()}
        self._in_execution_order()

    @property
    def configs(self) -> dict[str, QuantizerConfig]:
        """What is decided so far, by quantizer."""
        return {name: config for name, d in self.decisions.items() if (config := d.config) is not None}

    def _place(self) -> Placement:
        """What the strategy says, and the results that rules ask for."""
        requests = Requests(self._asks, self._listed, self.config.weight_layers, self.config.chip is None)
        placement = self.strategy.place(self.graph, requests)
        wishes = [(i, rule) for i, rule in enumerate(self.config.rules) if rule.outputs]
        for value in self.graph.values if wishes else ():
            site = activation_site(self.graph, self.graph.producer(value), value)
            for i, rule in wishes:
                if rule.matches(site):
                    self.used.add(i)
                    placement.chosen.setdefault(value, repr(rule))
        return placement

    def _decide(self, site: Site, placed: str, presets: Mapping[str, Preset]) -> None:
        self.names.update(site.names())
        decision = resolve(self.config, site, self._preset(site, presets))
        self.used.update(decision.matched)
        if decision.config is None:
            self.removed[site.quantizer] = resolve(replace(self.config, rules=()), site, self._preset(site, presets))
            return
        config = _with_quant_type(_with_axis(decision.config, site), site)
        reasons = {"placed": placed, **decision.reasons}
        self.problems += violations(self.config, site, config, reasons)
        self.sites[site.quantizer] = site
        self.decisions[site.quantizer] = replace(decision, config=config, reasons=reasons)

    def _preset(self, site: Site, presets: Mapping[str, Preset]) -> Preset | None:
        """What the strategy knows about a quantizer; bits mean nothing to a format that is no integer grid."""
        preset = presets.get(site.quantizer)
        config = resolve(self.config, site).config if preset else None
        only_bits = preset is not None and preset.change.names() == ["bits"]
        return None if only_bits and config is not None and not is_integer(config) else preset

    def _place_activations(self, placement: Placement) -> None:
        chosen = placement.chosen
        for node in self.graph:
            for value in node.outputs:
                if value in chosen:
                    site = activation_site(self.graph, node, value)
                    self._decide(site, chosen[value], placement.presets)
                    self._check_in_place(site)
            if any(value in chosen for value in node.outputs):
                self._add_int4_input(node)
        for name, shared in placement.inputs.items():
            self._add_input(name, shared, placement.presets)

    def _listed(self, node: Node) -> bool:
        site = node_site(self.graph, node)
        return any(matches_type(key, site) for key in self.config.operations)

    def _asks(self, node: Node) -> bool | None:
        found, indices = requested(self.config, node_site(self.graph, node))
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
        weight = self.decisions.get(weight_quantizer(node.parameters.get("weight", "")))
        site = activation_site(self.graph, node, node.outputs[0])
        output = self.decisions.get(site.quantizer)
        if weight is None or output is None or not node.operands or not self.strategy.int4_inputs:
            return
        asked = all(d.reasons["bits"].startswith("Rule(") for d in (weight, output))
        four = all(d.config is not None and d.config.scheme.bits == 4 for d in (weight, output))
        if asked and four:
            own = SharedInput(node.name, ((node.name, 0),), f"4-bit layer {node.name}")
            self._add_input(input_quantizer(node.name), own, {})

    def _add_input(self, name: str, shared: SharedInput, presets: Mapping[str, Preset]) -> None:
        """A quantizer before some calls only, configured as the first of them."""
        first, slot = self.graph.nodes[shared.consumer], shared.uses[0][1]
        operand = first.operands[slot]
        calls = [((lead := self.graph.nodes[user].first).path, lead.function, lead.call, at) for user, at in shared.uses]
        site = replace(
            activation_site(self.graph, first, first.outputs[0]),
            quantizer=name,
            aliases=aliases(first, before_ending(name), input_quantizer),
            anchor=calls[0][:3],
            output=-1,
            operand=slot,
            more=tuple(calls[1:]),
            shape=self.graph.values[operand.value].shape if operand.value else (),
            note=f"operand of {', '.join(dict.fromkeys(user for user, _ in shared.uses))}",
        )
        self._decide(site, shared.why, presets)
        post = value_quantizer(shared.value)
        behind = self.decisions.get(post) or self.removed.get(post)
        if name in self.sites and behind and _kind(behind) == _kind(self.decisions[name]):
            del self.sites[name], self.decisions[name]
        if name in self.sites:
            self.inputs.update(dict.fromkeys(shared.uses, name))

    def calls(self) -> list[Call]:
        """Each call, for pictures."""
        weights: dict[str, list[str]] = {}
        for site, nodes in self.weights:
            for node in nodes if site.quantizer in self.sites else ():
                weights.setdefault(node.name, []).append(site.quantizer)
        kinds = {node.name: node.type.__name__ if node.type is not None else node.function for node in self.graph}
        return [*(Call(name, kind, tuple(weights.get(name, ()))) for name, kind in kinds.items()), Call("output", "")]

    def edges(self) -> list[Edge]:
        """Each way of each value, for pictures."""
        found = []
        for node in self.graph:
            for operand in (o for o in node.operands if o.value):
                before = self.inputs.get((node.name, operand.slot), "")
                found.append(self._edge(operand.value, node.name, before))
        outputs = (value.name for value in self.graph.values.values() if value.output)
        return [*found, *(self._edge(value, "output") for value in outputs)]

    def _edge(self, value: str, target: str, before: str = "") -> Edge:
        behind = value_quantizer(value)
        through = (behind if behind in self.sites else "", before)
        return Edge(self.graph.producer(value).name, target, tuple(filter(None, through)))

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


def _with_axis(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the axis of its granularity written out."""
    granularity = config.scheme.granularity
    if not isinstance(granularity, PerChannel | PerGroup) or granularity.axis is not None:
        return config
    axis = site.axis if site.role == "weight" else 1
    return replace(config, scheme=replace(config.scheme, granularity=replace(granularity, axis=axis)))


def _with_quant_type(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the option ``quant_type``, where a piece has one and leaves it open, as the role says."""
    kind = "param" if site.role == "weight" else "input" if site.argument else "tensor"

    def filled(spec: Spec) -> Spec:
        return Spec(spec.name, tuple((k, kind if k == "quant_type" and v is None else v) for k, v in spec.options))

    return replace(config, observer=filled(config.observer), fake_quantize=filled(config.fake_quantize))


def _kind(decision: Decision) -> str:
    return decision.config.fake_quantize.name if decision.config is not None else ""
