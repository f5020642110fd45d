"""First step: what the strategy and the rules say about where activation quantizers go."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.matching import matches_type
from sophq_func.config.rules import QuantConfig, requested
from sophq_func.config.site import Site
from sophq_func.config.strategies import Placement, Requests, Strategy
from sophq_func.planning.values import node_site, value_site


class Placed(NamedTuple):
    """What :func:`place` found.

    Attributes:
      placement: the strategy's, with the results that rules ask for.
      used: indices of the rules that had a say.
    """

    placement: Placement
    used: frozenset[int]


def place(graph: Graph, strategy: Strategy, config: QuantConfig) -> Placed:
    """Where a strategy and the rules of a config put activation quantizers.

    Args:
      graph: fused.
      strategy: that of the config.
      config: what is asked for.
    """
    used: set[int] = set()

    @cache  # a strategy goes over the graph several times
    def site_of(name: str) -> Site:
        return node_site(graph, graph.nodes[name])

    placement = strategy.place(graph, _requests(config, site_of, used))
    asked, matched = _asked_results(graph, config)
    # The strategy's own reason for a value comes before that of a rule.
    chosen = {**asked, **placement.chosen}
    return Placed(placement._replace(chosen=chosen), frozenset(used | matched))


def _requests(config: QuantConfig, site_of: Callable[[str], Site], used: set[int]) -> Requests:
    """What the strategy may ask about the config; rules that answer are added to ``used``."""
    # Most configs ask for nothing: then no site is made of each call.
    any_asks = any(rule.requests is not None for rule in config.rules)

    def asks(node: Node) -> bool | None:
        if not any_asks:
            return None
        answer, indices = requested(config, site_of(node.name))
        used.update(indices)
        return answer

    def listed(node: Node) -> bool:
        return any(matches_type(key, site_of(node.name)) for key in config.operations)

    return Requests(asks, listed, config.weight_layers, free=config.chip is None)


def _asked_results(graph: Graph, config: QuantConfig) -> tuple[dict[str, str], set[int]]:
    """The values for which rules with ``outputs=True`` ask, each with the first such rule; and all rules that matched."""
    wishes = [(index, rule) for index, rule in enumerate(config.rules) if rule.outputs]
    chosen: dict[str, str] = {}
    matched: set[int] = set()
    for value in graph.values if wishes else ():
        site = value_site(graph, graph.producer(value), value)
        for index, rule in wishes:
            if rule.matches(site):
                matched.add(index)
                chosen.setdefault(value, repr(rule))
    return chosen, matched
