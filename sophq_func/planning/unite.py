"""Last step: the drafts of several examples, united to what one plan holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.resolving import Decision
from sophq_func.config.site import ComputedSite, Site, WeightSite
from sophq_func.core.errors import PlanError, explain
from sophq_func.planning.coverage import Coverage, coverage
from sophq_func.planning.draft import Draft
from sophq_func.planning.picture import Wiring, merged
from sophq_func.planning.runs import Run

Counts = Mapping[tuple[str, str], int]
"""By module path and function, the number of calls, for those at which quantizers act; the function is empty for modules."""


class United(NamedTuple):
    """What is planned for all examples together.

    Attributes:
      sites: by quantizer, in execution order.
      decisions: by quantizer, in the same order.
      counts: for each example, how often the planned modules and functions were called.
      notes: remarks for the table of the plan.
      wiring: the calls, and the values that pass from one to another through quantizers.
      runs: the calls of each example, in order.
      opaque: paths of leaf modules, whose inner calls are not recorded.
      written: inputs that the model writes into.
      coverage: what is quantized, and what stays float.
    """

    sites: Mapping[str, Site]
    decisions: Mapping[str, Decision]
    counts: tuple[Counts, ...]
    notes: tuple[str, ...]
    wiring: Wiring
    runs: tuple[Run, ...]
    opaque: tuple[str, ...]
    written: tuple[str, ...]
    coverage: Coverage


def unite(drafts: Sequence[Draft]) -> United:
    """The union of what is planned for several examples.

    A model may call other modules with each example. The union has the quantizers of all examples, so that one set of states
    serves all of them; ``counts`` tells the examples apart, and a run of the quantized model must match one of them. Let the
    first example call ``conv``, ``bn`` and ``fc``, and the second ``conv`` and ``fc`` alone. Then

    * in ``sites``, ``conv.weight_fake_quant`` has no ``bn`` to fold, since only the first example has one behind it;
    * the order of ``x, conv, bn, fc`` and ``x, conv, fc`` together is ``x, conv, bn, fc``;
    * ``counts`` are ``{conv: 1, bn: 1, fc: 1}`` and ``{conv: 1, bn: 0, fc: 1}``;
    * ``decisions`` are those of the first example: the configs are equal in both, as rules match sites.

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
        wiring=merged([draft.wiring for draft in drafts]),
        runs=tuple(Run.of(draft.graph) for draft in drafts),
        opaque=tuple(sorted({path for draft in drafts for path in draft.graph.opaque})),
        written=tuple(sorted({name for draft in drafts for name in draft.graph.written})),
        coverage=coverage([draft.work for draft in drafts]),
    )


def _sites_of_all(drafts: Iterable[Draft]) -> tuple[dict[str, Site], list[str]]:
    """The site of every quantizer, with notes on what examples do not agree on."""
    sites: dict[str, Site] = {}
    notes: list[str] = []
    for draft in drafts:
        for name, site in draft.sites.items():
            if name not in sites:
                sites[name] = site
                continue
            sites[name], note = agreed(sites[name], site)
            if note:
                notes.append(note)
    return sites, notes


def agreed(before: Site, now: Site) -> tuple[Site, str]:
    """The site of a quantizer that two examples have, and a note on what they do not agree on.

    Args:
      before: in the earlier example.
      now: in the later one, which counts where a difference has no effect.

    Raises:
      PlanError: the quantizer acts at different calls.
    """
    if now.role == "activation" and before.places() != now.places():
        because, fix = "it is one name for different calls in different examples", "plan with examples that agree on it"
        raise PlanError(explain(now.quantizer, "the examples cannot be united", because=because, fix=fix))
    if isinstance(before, ComputedSite) and isinstance(now, ComputedSite):
        return _with_all_calls(before, now), ""
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


def _with_all_calls(before: ComputedSite, now: ComputedSite) -> ComputedSite:
    """The site of a computed weight, with the calls of two examples that multiply with it."""
    first, *more = dict.fromkeys((*before.places(), *now.places()))
    return replace(now, anchor=first.made, operand=first.operand, more=tuple(more))


def merged_order(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names, which keeps each of some orders as far as they agree.

    It starts from the longest order. A name that only another one has is put behind the name that it follows there.

    Example:
      >>> merged_order([["x", "a", "c"], ["x", "a", "b", "c", "d"], ["y", "a", "e"]])
      ['y', 'x', 'a', 'e', 'b', 'c', 'd']
    """
    longest, *others = sorted(orders, key=len, reverse=True)
    # A linked list: a name is put behind another one without a search. None is before the first and behind the last.
    following: dict[str | None, str | None] = dict(zip([None, *longest], [*longest, None], strict=True))
    for order in others:
        previous: str | None = None
        for name in order:
            if name not in following:
                following[previous], following[name] = name, following[previous]
            previous = name
    merged_names: list[str] = []
    current = following[None]
    while current is not None:
        merged_names.append(current)
        current = following[current]
    return merged_names


def _first_of_each(decisions_of_examples: Iterable[Mapping[str, Decision]]) -> dict[str, Decision]:
    """By quantizer, the decision in the first example that has it."""
    first: dict[str, Decision] = {}
    for decisions in decisions_of_examples:
        first = {**decisions, **first}
    return first


def _counts(drafts: Iterable[Draft], sites: Iterable[Site]) -> tuple[Counts, ...]:
    """For each example, how often it calls the modules and functions at which quantizers act."""
    # Inputs of the model are no calls, and parameters are quantized before all calls.
    at_calls = [site for site in sites if not site.argument and not isinstance(site, WeightSite)]
    pairs = sorted({place.pair for site in at_calls for place in site.places()})
    counters = [calls_of(draft.graph) for draft in drafts]
    return tuple({pair: counter[pair] for pair in pairs} for counter in counters)


def calls_of(graph: Graph) -> Counter[tuple[str, str]]:
    """How often each module, or function in a module, is called with a floating tensor."""
    return Counter((node.path, node.step) for node in graph if node.kind != "input" and node.counted)
