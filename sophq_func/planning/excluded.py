"""What rules leave float that no example reaches, so that a run may reach it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sophq_func.capture.graph import Graph
from sophq_func.config.names import weight_quantizer
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Site, ValueSite, WeightSite, class_names
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.planning.weights import outer_types


def excluded(graphs: Sequence[Graph], config: QuantConfig) -> tuple[str, ...]:
    """Names, as rules write them, of modules and functions that rules leave float, whether an example reaches them or not.

    Args:
      graphs: the examples.
      config: what is asked for.
    """
    leaving = [rule for rule in config.rules if _leaves_float(rule)]
    if not leaving:
        return ()
    names = {rule.name for rule in leaving if rule.name is not None and rule.type is None and rule.where is None}
    others = [rule for rule in leaving if rule.type is not None or rule.where is not None]
    names.update(name for site, name in (*_modules(graphs), *_functions()) if any(rule.matches(site) for rule in others))
    return tuple(sorted(names))


def _leaves_float(rule: Rule) -> bool:
    """Whether a rule takes quantizers away from what it matches."""
    return rule.weight is None or rule.activation is None or rule.requests is False


def _modules(graphs: Sequence[Graph]) -> Iterator[tuple[Site, str]]:
    """For each module with parameters that no example calls, the site that its weight would have, and its path."""
    called = {node.path for graph in graphs for node in graph}
    shapes = graphs[0].shapes
    for path, cls in graphs[0].modules.items():
        parameter = f"{path}.weight"
        if path not in called and parameter in shapes:
            types = (*class_names(cls), *outer_types(graphs[0], path))
            name = weight_quantizer(parameter)
            yield WeightSite(quantizer=name, path=path, paths=(path,), types=types, shape=shapes[parameter]), path


def _functions() -> Iterable[tuple[Site, str]]:
    """For each contraction, a site of a call of it, and its name."""
    for name in CONTRACTIONS:
        yield ValueSite(quantizer=name, value=name, function=name, operation=name), name
