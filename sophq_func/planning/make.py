"""From graphs and a config to a :class:`~sophq_func.planning.plan.Plan`: draft one for each, check, and unite them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sophq_func.capture.graph import Graph
from sophq_func.config.rules import Decision, QuantConfig, Rule
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, PlanError, explain, raise_all
from sophq_func.planning.checks import names_of, unknown_names, unseen_leaves
from sophq_func.planning.draft import Draft
from sophq_func.planning.plan import Plan
from sophq_func.planning.runs import Run


def plan(graph: Graph | Sequence[Graph], config: QuantConfig) -> Plan:
    """Decide for a traced model which quantizers there are, and how each is configured.

    Args:
      graph: from :func:`sophq_func.trace`; of several traces the plan is the union.
      config: what is asked for.

    Returns:
      The :class:`~sophq_func.planning.plan.Plan`.

    Raises:
      ConfigError: a rule names what the model has not, or a config is beyond the chip's limits; all problems at once.
      PlanError: a value to be quantized was made in place, and is used under its old name later.

    Example:
      >>> import torch, sophq_func as sq
      >>> list(sq.plan(sq.trace(torch.nn.Linear(2, 3), (torch.ones(1, 2),)), sq.QuantConfig()))
      ['input.post_act_fake_quantizer', 'weight_fake_quant']
    """
    if not isinstance(config, QuantConfig):
        raise ConfigError(explain("plan", "this config", got=type(config).__name__, allowed="sq.QuantConfig"))
    graphs = [graph] if isinstance(graph, Graph) else graph
    if not isinstance(graphs, list | tuple) or not graphs or not all(isinstance(g, Graph) for g in graphs):
        got, allowed = type(graph).__name__, "a Graph, or a list of at least one"
        raise ConfigError(explain("plan", "this graph", got=got, allowed=allowed, fix="sq.trace(model, args)"))
    classes = {cls.__name__ for g in graphs for cls in g.modules.values()}
    drafts = [Draft(g, config) for g in graphs]
    problems = [p for g in graphs for p in unseen_leaves(g, config)]
    names = set().union(*(names_of(g) for g in graphs), *(draft.names for draft in drafts))
    problems += unknown_names(names, classes, config)
    problems += [p for draft in drafts for p in draft.problems]
    raise_all(list(dict.fromkeys(problems)))
    raise_all(list(dict.fromkeys(p for draft in drafts for p in draft.misfits)), PlanError)
    return _union(drafts, config)


def _union(drafts: Sequence[Draft], config: QuantConfig) -> Plan:
    """One plan of all drafts; a quantizer that several have must sit at one place."""
    sites: dict[str, Site] = {}
    decisions: dict[str, Decision] = {}
    notes = [note for draft in drafts for note in draft.notes]
    for draft in drafts:
        for name, site in draft.sites.items():
            if name in sites and sites[name].places() != site.places() and site.role == "activation":
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
    pairs = {place[:2] for site in sites.values() if not site.argument and not site.parameter for place in site.places()}
    counts = [
        Counter((node.path, node.function) for node in draft.raw if node.kind != "input" and node.counted)
        for draft in drafts
    ]
    used = set().union(*(draft.used for draft in drafts))
    configs = {name: c for name, d in decisions.items() if (c := d.config) is not None}
    return Plan(
        {name: configs[name] for name in order},
        {name: sites[name] for name in order},
        tuple({pair: count[pair] for pair in sorted(pairs)} for count in counts),
        {name: decisions[name].reasons for name in order},
        tuple(dict.fromkeys(notes)),
        tuple(rule for i, rule in enumerate(config.rules) if i not in used),
        opaque=tuple(sorted({path for draft in drafts for path in draft.raw.opaque})),
        written=tuple(sorted({name for draft in drafts for name in draft.raw.written})),
        calls=tuple({call.name: call for draft in drafts for call in draft.calls()}.values()),
        edges=tuple(dict.fromkeys(edge for draft in drafts for edge in draft.edges())),
        runs=tuple(Run.of(draft.raw) for draft in drafts),
        again=partial(_override, [draft.raw for draft in drafts], config),
    )


def _override(graphs: Sequence[Graph], config: QuantConfig, rule: Rule) -> Plan:
    return plan(graphs, replace(config, rules=(*config.rules, rule)))


def _merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names that keeps, as far as they agree, the order of each; the longest is the spine."""
    spine, *others = sorted(orders, key=len, reverse=True)
    merged = list(spine)
    for order in others:
        at = 0
        for name in order:
            if name in merged:
                at = merged.index(name) + 1
            else:
                merged.insert(at, name)
                at += 1
    return merged
