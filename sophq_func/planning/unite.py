"""Last step: one plan's values from the drafts of several examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.rules import Decision
from sophq_func.config.site import Site, WeightSite
from sophq_func.core.errors import PlanError, explain
from sophq_func.planning.draft import Draft
from sophq_func.planning.picture import Wiring, united
from sophq_func.planning.runs import Run

Counts = Mapping[tuple[str, str], int]
"""Number of calls of each (module path, function) that some quantizer is anchored to; function is empty for modules."""


class United(NamedTuple):
    """What is planned for all examples together.

    Attributes:
      sites: by quantizer, in execution order.
      decisions: by quantizer, in the same order.
      counts: for each example, how often the planned modules and functions were called.
      notes: remarks for people.
      wiring: calls, and the ways of values through the quantizers.
      runs: what each example called, in order.
      opaque: paths of modules whose inside is not looked at.
      written: inputs that the model writes into.
    """

    sites: Mapping[str, Site]
    decisions: Mapping[str, Decision]
    counts: tuple[Counts, ...]
    notes: tuple[str, ...]
    wiring: Wiring
    runs: tuple[Run, ...]
    opaque: tuple[str, ...]
    written: tuple[str, ...]


def unite(drafts: Sequence[Draft]) -> United:
    """The union of what is planned for several examples.

    A model may take another way through its modules with each example. The union has every quantizer of every way, so that
    one set of states serves all of them; ``counts`` keeps the ways apart, and a run must take one of them. Say the first
    example goes through ``conv``, ``bn`` and ``fc``, the second through ``conv`` and ``fc`` alone:

    * ``sites``: ``conv.weight_fake_quant`` is in both, with ``bn`` behind it in the first alone: it is not folded.
    * ``order``: ``x, conv, bn, fc`` and ``x, conv, fc`` together are ``x, conv, bn, fc``.
    * ``counts``: ``{conv: 1, bn: 1, fc: 1}`` and ``{conv: 1, bn: 0, fc: 1}``.
    * ``decisions``: the config is the same in both, for rules see sites; the reasons are those of the first.

    Args:
      drafts: one for each example, at least one.

    Raises:
      PlanError: two examples have different calls of one name.
    """
    sites, notes = _sites_of_all(drafts)
    order = merged_order([list(draft.sites) for draft in drafts])
    decisions = _first_of_each(draft.decisions for draft in drafts)
    return United(
        sites={name: sites[name] for name in order},
        decisions={name: decisions[name] for name in order},
        counts=_counts(drafts, sites.values()),
        notes=tuple(dict.fromkeys([*(note for draft in drafts for note in draft.notes), *notes])),
        wiring=united([draft.wiring for draft in drafts]),
        runs=tuple(Run.of(draft.graph) for draft in drafts),
        opaque=tuple(sorted({path for draft in drafts for path in draft.graph.opaque})),
        written=tuple(sorted({name for draft in drafts for name in draft.graph.written})),
    )


def _sites_of_all(drafts: Iterable[Draft]) -> tuple[dict[str, Site], list[str]]:
    """The site of every quantizer, that of the latest example where several have it; and notes on what differs."""
    sites: dict[str, Site] = {}
    notes = []
    for draft in drafts:
        for name, site in draft.sites.items():
            if name in sites:
                site, note = agreed(sites[name], site)
                notes += [note] if note else []
            sites[name] = site
    return sites, notes


def agreed(before: Site, now: Site) -> tuple[Site, str]:
    """The site of a quantizer that two examples have, and a note on what they do not agree on.

    Raises:
      PlanError: it sits at different calls.
    """
    if now.role == "activation" and before.places() != now.places():
        fix = "give the model examples that take the same way to this value, or rename the module"
        raise PlanError(
            explain(now.quantizer, "one name for different calls in different examples is not possible", fix=fix)
        )
    if not isinstance(before, WeightSite) or not isinstance(now, WeightSite):
        return now, ""
    now = replace(now, inputs=tuple(dict.fromkeys((*before.inputs, *now.inputs))))
    if before.norm != now.norm:
        # A weight has one tensor of codes, which is folded in every run or in none; so is the bias behind it.
        note = f"{now.parameter} has a normalization behind it in some examples only: unfolded"
        return replace(now, norm="", source="", note="unfolded"), note
    if before.source != now.source:
        # The bias would be rounded to another step in each example.
        return replace(now, source=""), ""
    return now, ""


def merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names that keeps, as far as they agree, the order of each; the longest is the spine.

    Example:
      >>> merged_order([["x", "a", "c"], ["x", "a", "b", "c", "d"], ["y", "a", "e"]])
      ['y', 'x', 'a', 'e', 'b', 'c', 'd']
    """
    spine, *others = sorted(orders, key=len, reverse=True)
    # A linked list: a name is put behind another one without a search. None is before the first and behind the last.
    behind: dict[str | None, str | None] = dict(zip([None, *spine], [*spine, None], strict=True))
    for order in others:
        last: str | None = None
        for name in order:
            if name not in behind:
                behind[last], behind[name] = name, behind[last]
            last = name
    merged: list[str] = []
    following = behind[None]
    while following is not None:
        merged.append(following)
        following = behind[following]
    return merged


def _first_of_each(found: Iterable[Mapping[str, Decision]]) -> dict[str, Decision]:
    first: dict[str, Decision] = {}
    for decisions in found:
        first = {**decisions, **first}
    return first


def _counts(drafts: Iterable[Draft], sites: Iterable[Site]) -> tuple[Counts, ...]:
    """For each example, how often it calls the modules and functions at which quantizers act."""
    acting = [site for site in sites if not site.argument and not site.parameter]
    pairs = sorted({place[:2] for site in acting for place in site.places()})
    made = [calls_of(draft.graph) for draft in drafts]
    return tuple({pair: counter[pair] for pair in pairs} for counter in made)


def calls_of(graph: Graph) -> Counter[tuple[str, str]]:
    """How often each module, or function in a module, is called with a floating tensor."""
    return Counter((node.path, node.function) for node in graph if node.kind != "input" and node.counted)
