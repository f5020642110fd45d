"""What is planned for one example: the steps from a graph and a config to a :class:`Draft`, each a function of values.

==========================  ============================================================================
place                       which values the strategy and the rules choose
find_weights                which weights there are
decide                      how each weight is configured
quantize_values             which of the chosen values get a quantizer, and how each is configured
round_biases                by which input's scale the bias of each layer is rounded
layer_inputs                what the layer of each weight reads, and on which grid
in_execution_order          the sites that are left, in order
==========================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.matching import is_glob
from sophq_func.config.rules import Decision, QuantConfig
from sophq_func.config.site import ComputedSite, LayerInput, Site, WeightSite
from sophq_func.config.strategies import PLACEMENTS
from sophq_func.core.errors import PlanError, raise_all
from sophq_func.planning.biases import Biases, round_biases
from sophq_func.planning.checks import names_of, unknown_names, unseen_leaves
from sophq_func.planning.deciding import Outcome, decide
from sophq_func.planning.fusing import fuse
from sophq_func.planning.inputs import Planned, layer_inputs
from sophq_func.planning.picture import Wiring, wiring
from sophq_func.planning.placing import place
from sophq_func.planning.values import NO_VALUES, quantize_values
from sophq_func.planning.weights import find_weights


class Draft(NamedTuple):
    """The plan of one example, with all that stands against it.

    Attributes:
      graph: as traced.
      sites: by quantizer, in execution order.
      decisions: by quantizer.
      wiring: calls, and the ways of values through the quantizers.
      outcomes: everything decided, quantizers that rules left out included.
      used: indices of the rules that had a say.
      misfits: what stands against quantizing a value, however it is configured.
      notes: remarks for people.
    """

    graph: Graph
    sites: Mapping[str, Site]
    decisions: Mapping[str, Decision]
    wiring: Wiring
    outcomes: tuple[Outcome, ...]
    used: frozenset[int]
    misfits: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """What the chip forbids."""
        return [problem for outcome in self.outcomes for problem in outcome.problems]

    @property
    def names(self) -> set[str]:
        """Every name that a rule may call one of the quantizers."""
        return {name for outcome in self.outcomes for name in outcome.site.names()}


def draft(graph: Graph, config: QuantConfig) -> Draft:
    """Plan one example.

    Args:
      graph: as traced.
      config: what is asked for.
    """
    fused = fuse(graph, config.patterns)
    strategy = PLACEMENTS.get(config.placement)
    placement, asked = place(fused, strategy, config)
    weights = find_weights(fused, strategy, config.weight_layers)
    why = "weight of a quantized layer"
    decided = {place.site.quantizer: decide(config, place.site, why, placement.presets) for place in weights.places}
    values = NO_VALUES
    if config.quantmode == "weight_activation":
        values = quantize_values(fused, strategy, config, placement, decided)
    outcomes = (*decided.values(), *values.outcomes.values())
    kept = {outcome.site.quantizer: outcome for outcome in outcomes if outcome.decision is not None}
    configs = {name: own for name, outcome in kept.items() if (own := outcome.config) is not None}
    planned = Planned(fused, strategy, configs, values.inputs)
    biases = round_biases(planned, weights.places)
    inputs = layer_inputs(planned, weights.places)
    sites = {name: _with_inputs(outcome.site, biases, inputs) for name, outcome in kept.items()}
    return Draft(
        graph=graph,
        sites=in_execution_order(graph, sites.values()),
        decisions={name: outcome.decision for name, outcome in kept.items() if outcome.decision is not None},
        wiring=wiring(fused, weights.places, sites.keys(), values.inputs),
        outcomes=outcomes,
        used=asked.union(*(outcome.used for outcome in outcomes)),
        misfits=values.misfits,
        notes=(*weights.notes, *biases.notes),
    )


def _with_inputs(site: Site, biases: Biases, inputs: Mapping[str, tuple[LayerInput, ...]]) -> Site:
    """The site of a weight with what its layers read."""
    if isinstance(site, WeightSite):
        source = biases.sources.get(site.quantizer, "")
        return replace(site, source=source, inputs=inputs[site.quantizer])
    if isinstance(site, ComputedSite):
        return replace(site, inputs=inputs[site.quantizer])
    return site


def in_execution_order(graph: Graph, sites: Iterable[Site]) -> dict[str, Site]:
    """Sites by quantizer: inputs of the model first, then call by call the weight, the quantizers before it, the results.

    Args:
      graph: as traced: a fused group acts at its last call, its weight at its first.
      sites: in any order.
    """
    rank = {(node.path, node.function, node.call): i for i, node in enumerate(graph) if node.kind != "input"}

    def key(site: Site) -> tuple[int, int, int]:
        if site.argument:
            return -1, 0, 0
        behind = 1 if site.role == "activation" and site.operand < 0 else 0
        return rank[site.anchor], behind, site.output

    return {site.quantizer: site for site in sorted(sites, key=key)}


def check(drafts: Sequence[Draft], config: QuantConfig) -> None:
    """Raise for everything that stands against the drafts of a config.

    Raises:
      ConfigError: a rule names what the model does not have, or a config is beyond the chip's limits; all at once.
      PlanError: a value to be quantized was made in place, and is used under its old name later.
    """
    graphs = [own.graph for own in drafts]
    problems = [problem for graph in graphs for problem in unseen_leaves(graph, config)]
    classes = {cls.__name__ for graph in graphs for cls in graph.modules.values()}
    names: set[str] = set()
    if any(rule.name is not None and not is_glob(rule.name) for rule in config.rules):
        names = names.union(*(names_of(graph) for graph in graphs), *(own.names for own in drafts))
    problems += unknown_names(names, classes, config)
    problems += [problem for own in drafts for problem in own.problems]
    # Several examples have most of their problems in common.
    raise_all(list(dict.fromkeys(problems)))
    raise_all(list(dict.fromkeys(misfit for own in drafts for misfit in own.misfits)), PlanError)
