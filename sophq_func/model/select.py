"""Which weights an algorithm works on: names, globs, paths of modules, types and predicates, as rules have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from sophq_func.config.matching import TypeKey, is_type_key, matches_name, matches_type
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.planning.plan import Plan

Which: TypeAlias = TypeKey | Callable[[Site], bool]
"""A name, glob or path; a class or function; or a predicate on the site of a quantizer."""

Where: TypeAlias = Which | Iterable[Which] | None
"""One or several of these; ``None`` for all."""

ALLOWED = "a name, a glob, a path, a type, a predicate on the site, or a list of these"


def selected(where_from: str, plan: Plan, where: Where) -> list[str]:
    """The weight quantizers that are chosen, in execution order; without those that only observe.

    Args:
      where_from: the function that an error names.
      plan: of the model.
      where: what is chosen. A string is a name, glob or path as of :class:`~sophq_func.config.rules.Rule`, or the name of a
        class or function.

    Raises:
      ConfigError: something that chooses no weight, or that cannot choose; all problems in one message.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)), torch.ones(1, 2)
      >>> plan = sq.plan(sq.trace(model, (x,)), sq.QuantConfig())
      >>> selected("example", plan, "1"), len(selected("example", plan, torch.nn.Linear))
      (['1.weight_fake_quant'], 2)
    """
    sites = [plan.site(name) for name in plan if not plan[name].observe_only]
    weights = [site for site in sites if site.role == "weight"]
    if where is None:
        return [site.quantizer for site in weights]
    each = where if isinstance(where, Iterable) and not isinstance(where, str | type) else (where,)
    chosen: set[str] = set()
    problems = []
    for which in each:
        matches = _matcher(which)
        if matches is None:
            problems.append(explain(where_from, "where chooses nothing", got=which, allowed=ALLOWED, fix='where="layer1"'))
            continue
        found = {site.quantizer for site in weights if matches(site)}
        if not found:
            problems.append(unknown(where_from, "weight", which, [site.quantizer for site in weights]))
        chosen |= found
    raise_all(problems, ConfigError)
    return [site.quantizer for site in weights if site.quantizer in chosen]


def _matcher(which: object) -> Callable[[Site], bool] | None:
    """What tells whether a site is chosen; ``None`` for what cannot choose."""
    if isinstance(which, str):
        return lambda site: matches_name(which, site) or matches_type(which, site)
    if is_type_key(which):
        return lambda site: matches_type(which, site)  # type: ignore[arg-type]
    if callable(which):
        return lambda site: bool(which(site))
    return None
