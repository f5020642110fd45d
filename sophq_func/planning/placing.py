"""First step of a draft: what the strategy and the rules say about where activation quantizers go."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from sophq_func.capture.graph import REPARAMETRIZE, Graph, Node
from sophq_func.config.matching import matches_type
from sophq_func.config.names import input_quantizer
from sophq_func.config.resolving import requested
from sophq_func.config.rules import QuantConfig
from sophq_func.config.site import Site
from sophq_func.config.strategies import Placement, Requests, SharedInput, Strategy
from sophq_func.planning.routing import read_apart
from sophq_func.planning.strategies import constants
from sophq_func.planning.values import node_site, value_site


class Placed(NamedTuple):
    """A placement, and the rules that had a part in it.

    Attributes:
      placement: where activation quantizers go: those of the strategy, and those behind calls for which rules ask.
      used: indices of the rules that matched.
    """

    placement: Placement
    used: frozenset[int]


def place(graph: Graph, strategy: Strategy, config: QuantConfig) -> Placed:
    """Choose the values that get activation quantizers, by a strategy and the rules of a config.

    Args:
      graph: fused.
      strategy: that of the config.
      config: what is asked for.
    """
    used: set[int] = set()

    # Cached, as a strategy goes over the graph several times, and asks about each node each time.
    @cache
    def site_of(name: str) -> Site:
        return node_site(graph, graph.nodes[name])

    placement = _without_constants(graph, strategy.place(graph, _requests(config, site_of, used)))
    chosen_by_rules, matched = _chosen_by_rules(graph, config)
    # Where both choose a value, the reason that is told is the strategy's.
    chosen = {**chosen_by_rules, **placement.chosen}
    placement = read_apart(graph, _read_where_used(graph, placement._replace(chosen=chosen)))
    return Placed(placement, frozenset(used | matched))


def _without_constants(graph: Graph, placement: Placement) -> Placement:
    """A placement without quantizers on zeros, ones and the like, which have no range to calibrate."""
    left_out = constants(graph)
    if not left_out:
        return placement
    chosen = {value: why for value, why in placement.chosen.items() if value not in left_out}
    return placement._replace(chosen=chosen)


def _read_where_used(graph: Graph, placement: Placement) -> Placement:
    """A placement in which parameters that a module computes are quantized before the calls that take them.

    A run does not report the computation, so nothing can act behind it.
    """
    chosen, inputs = dict(placement.chosen), dict(placement.inputs)
    for value in placement.chosen:
        if graph.producer(value).function != REPARAMETRIZE:
            continue
        why = chosen.pop(value)
        uses = tuple((user.name, operand.slot) for user, operand in graph.users(value))
        if uses:
            consumer, _ = uses[0]
            inputs[input_quantizer(consumer)] = SharedInput(consumer, uses, why)
    return placement._replace(chosen=chosen, inputs=inputs)


def _requests(config: QuantConfig, site_of: Callable[[str], Site], used: set[int]) -> Requests:
    """What the strategy may ask about the config; indices of the rules that answer are added to ``used``."""
    # Making sites costs time, and most configs have no such rule.
    any_requests = any(rule.requests is not None for rule in config.rules)

    def asks(node: Node) -> bool | None:
        if not any_requests:
            return None
        request = requested(config, site_of(node.name))
        used.update(request.matched)
        return request.answer

    def listed(node: Node) -> bool:
        return any(matches_type(key, site_of(node.name)) for key in config.operations)

    return Requests(
        asks,
        listed,
        config.weight_layers,
        free=config.chip is None,
        symmetric=config.is_symmetric,
        arithmetic=config.spec.arithmetic,
    )


def _chosen_by_rules(graph: Graph, config: QuantConfig) -> tuple[dict[str, str], set[int]]:
    """The values that rules with ``outputs=True`` match, each with the first such rule; and indices of these rules."""
    rules = [(index, rule) for index, rule in enumerate(config.rules) if rule.outputs]
    chosen: dict[str, str] = {}
    matched: set[int] = set()
    if not rules:
        return chosen, matched
    for value in graph.values:
        site = value_site(graph, graph.producer(value), value)
        for index, rule in rules:
            if rule.matches(site):
                matched.add(index)
                chosen.setdefault(value, repr(rule))
    return chosen, matched
