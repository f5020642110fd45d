"""What is planned for one example: the steps from a graph and a config to a :class:`Draft`, each a pure function.

==========================  ============================================================================
place                       which values the strategy and the rules choose
find_weights                which weights there are
decide                      how each weight is configured
quantize_values             which of the chosen values get a quantizer, and how each is configured
share                       which quantizers act at every call of a place, instead of one for each call
round_biases                by which input's scale the bias of each layer is rounded
requantize                  where integers come from that a chip brings onto a grid by a small multiplier
layer_inputs                what the layer of each weight reads, and on which grid
measure                     what the example multiplies, and how much of that is quantized
in_execution_order          the sites that are left, in order
==========================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.matching import is_glob
from sophq_func.config.resolving import Decision
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import EVERY_CALL, CallSite, ComputedSite, LayerInput, Site, ValueSite, WeightSite
from sophq_func.config.strategies import PLACEMENTS
from sophq_func.core.errors import PlanError, raise_all
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.biases import Biases, round_biases
from sophq_func.planning.checks import names_of, shape_problems, stray_globs, unknown_names, unseen_leaves
from sophq_func.planning.deciding import Outcome, decide
from sophq_func.planning.fusing import fuse
from sophq_func.planning.inputs import Planned, layer_inputs
from sophq_func.planning.picture import Wiring, wiring
from sophq_func.planning.placing import place
from sophq_func.planning.requantizing import NOT_EXACT, Exact, requantize
from sophq_func.planning.sharing import share
from sophq_func.planning.values import NO_VALUES, quantize_values
from sophq_func.planning.weights import WeightPlace, find_weights
from sophq_func.planning.work import Decided, Work, measure


class Draft(NamedTuple):
    """The plan of one example, with every problem that was found.

    Attributes:
      graph: as traced.
      sites: by quantizer, in execution order.
      decisions: by quantizer.
      wiring: the calls, and the values that pass from one to another through quantizers.
      outcomes: everything decided, quantizers that rules left out included.
      used: indices of the rules that changed something.
      misfits: problems with values that cannot be quantized, and with weights that cannot be cut into groups as configured.
      notes: remarks for the table of the plan.
      work: what the example multiplies, and how much of that is quantized.
    """

    graph: Graph
    sites: Mapping[str, Site]
    decisions: Mapping[str, Decision]
    wiring: Wiring
    outcomes: tuple[Outcome, ...]
    used: frozenset[int]
    misfits: tuple[str, ...]
    notes: tuple[str, ...]
    work: Work

    @property
    def problems(self) -> list[str]:
        """What the chip forbids about the quantizers."""
        return [problem for outcome in self.outcomes for problem in outcome.problems]

    @property
    def names(self) -> set[str]:
        """Every name by which a rule matches one of the quantizers."""
        return {name for outcome in self.outcomes for name in outcome.site.names()}


def draft(graph: Graph, config: QuantConfig) -> Draft:
    """Plan one example.

    Args:
      graph: as traced.
      config: what is asked for.
    """
    fused = fuse(graph, config.patterns)
    strategy = PLACEMENTS.get(config.placement)
    placement, used_to_place = place(fused, strategy, config)
    weights = find_weights(fused, strategy, config.weight_layers)
    why = "weight of a quantized layer"
    of_weights = {w.site.quantizer: decide(config, w.site, why, placement.presets) for w in weights.places}
    values = NO_VALUES
    if config.quantmode == "weight_activation":
        values = quantize_values(fused, strategy, config, placement, of_weights)
    sharing = share(config, (*of_weights.values(), *values.outcomes.values()))
    outcomes = sharing.outcomes
    decisions: dict[str, Decision] = {}
    configs: dict[str, QuantizerConfig] = {}
    for outcome in outcomes:
        if outcome.decision is not None and outcome.config is not None:
            decisions[outcome.site.quantizer] = outcome.decision
            configs[outcome.site.quantizer] = outcome.config
    shared_inputs = {use: sharing.replaced.get(name, name) for use, name in values.inputs.items()}
    planned = Planned(fused, strategy, configs, shared_inputs, sharing.replaced)
    biases = round_biases(planned, weights.places)
    inputs = layer_inputs(planned, weights.places)
    arithmetic = config.spec.arithmetic
    exact = NOT_EXACT
    if strategy.exact and arithmetic is not None:
        exact = requantize(planned, arithmetic, config.is_symmetric)
    by_name = {outcome.site.quantizer: outcome for outcome in outcomes}
    sites = [_with_inputs(outcome.site, biases, inputs, exact) for outcome in outcomes if outcome.decision is not None]
    return Draft(
        graph=graph,
        sites=in_execution_order(graph, sites),
        decisions=decisions,
        wiring=wiring(fused, weights.places, decisions.keys(), shared_inputs, sharing.replaced),
        outcomes=outcomes,
        used=used_to_place.union(sharing.used, *(outcome.used for outcome in outcomes)),
        misfits=(*values.misfits, *sharing.problems, *_shape_problems(weights.places, of_weights)),
        notes=(*weights.notes, *biases.notes),
        work=measure(Decided(planned, config, weights.places, by_name)),
    )


def _shape_problems(places: Sequence[WeightPlace], outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """Problems with weights that cannot be cut into groups or blocks as they are configured."""
    for weight in places:
        outcome = outcomes[weight.site.quantizer]
        if outcome.config is not None:
            yield from shape_problems(outcome.site, outcome.config, weight.unknown)


def _with_inputs(site: Site, biases: Biases, inputs: Mapping[str, tuple[LayerInput, ...]], exact: Exact) -> Site:
    """A site, completed with what the layers of a weight read, or with how a chip computes a value."""
    if isinstance(site, ValueSite) and site.quantizer in (exact.requants.keys() | exact.unsigned):
        requant = exact.requants.get(site.quantizer, ())
        return replace(site, requant=requant, unsigned=site.quantizer in exact.unsigned)
    if isinstance(site, WeightSite):
        source = biases.sources.get(site.quantizer, "")
        return replace(site, source=source, inputs=inputs[site.quantizer])
    if isinstance(site, ComputedSite):
        return replace(site, inputs=inputs[site.quantizer])
    return site


def in_execution_order(graph: Graph, sites: Iterable[Site]) -> dict[str, Site]:
    """Sites by quantizer: inputs of the model first, then for each call what acts before it, and then its results.

    Args:
      graph: as traced, not fused: the value of a group is made by its last call, its weight is used by the first.
      sites: in any order.
    """
    position: dict[CallSite, int] = {}
    for i, node in enumerate(graph):
        if node.kind != "input":
            position[CallSite(node.path, node.step, node.call)] = i
            position.setdefault(CallSite(node.path, node.step, EVERY_CALL), i)

    def key(site: Site) -> tuple[int, bool, int]:
        if site.argument:
            return -1, False, 0
        is_result = site.role == "activation" and site.operand < 0
        return position[site.anchor], is_result, site.output

    return {site.quantizer: site for site in sorted(sites, key=key)}


def names_in(drafts: Sequence[Draft]) -> set[str]:
    """Every dotted name that a rule may use. A large model has many: ask only where a rule has to fit one."""
    return set().union(*(names_of(draft.graph) for draft in drafts), *(draft.names for draft in drafts))


def strays(drafts: Sequence[Draft], unused: Sequence[Rule]) -> list[str]:
    """What a user should be warned of: rules, among those that changed nothing, whose globs fit no name of the model."""
    has_globs = any(rule.name is not None and is_glob(rule.name) for rule in unused)
    return stray_globs(names_in(drafts), unused) if has_globs else []


def check(drafts: Sequence[Draft], config: QuantConfig) -> None:
    """Raise the problems of all drafts of a config, each once.

    Raises:
      ConfigError: a rule names what the model does not have, or a config is beyond the chip's limits; all problems in one
        message.
      PlanError: a value to be quantized is written in place, and used under its old name later; weights that cannot be cut
        into groups or blocks.
    """
    graphs = [draft.graph for draft in drafts]
    problems = [problem for graph in graphs for problem in unseen_leaves(graph, config)]
    classes = {cls.__name__ for graph in graphs for cls in graph.modules.values()}
    has_names = any(rule.name is not None and not is_glob(rule.name) for rule in config.rules)
    names = names_in(drafts) if has_names else set()
    problems += unknown_names(names, classes, config)
    problems += [problem for draft in drafts for problem in draft.problems]
    misfits = [misfit for draft in drafts for misfit in draft.misfits]
    # Several examples have most of their problems in common.
    raise_all(list(dict.fromkeys(problems)))
    raise_all(list(dict.fromkeys(misfits)), PlanError)
