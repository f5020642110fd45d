"""Between two steps of a draft: one quantizer for all calls of a place, where rules ask for it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from sophq_func.config.resolving import shared
from sophq_func.config.rules import QuantConfig
from sophq_func.config.site import EVERY_CALL, ComputedSite, OperandSite, Site, ValueSite, WeightSite
from sophq_func.core.errors import explain
from sophq_func.planning.deciding import Outcome


class Sharing(NamedTuple):
    """What is shared.

    Attributes:
      outcomes: those that were given, without those of quantizers that another one replaces.
      replaced: by name of a quantizer that is left out, the one that acts in its place.
      used: indices of the rules that asked for it.
      problems: places of which rules match some calls only.
    """

    outcomes: tuple[Outcome, ...]
    replaced: Mapping[str, str]
    used: frozenset[int]
    problems: tuple[str, ...]


def share(config: QuantConfig, outcomes: Iterable[Outcome]) -> Sharing:
    """Let the first quantizer of a place act at every call of it.

    Args:
      config: what is asked for.
      outcomes: what was decided about each quantizer.
    """
    outcomes = tuple(outcomes)
    if not any(rule.share for rule in config.rules):
        return Sharing(outcomes, {}, frozenset(), ())
    kept: list[Outcome] = []
    first: dict[Hashable, str] = {}
    replaced: dict[str, str] = {}
    used: set[int] = set()
    for outcome in outcomes:
        site = outcome.site
        request = shared(config, site)
        used.update(request.matched)
        if not request.answer or isinstance(site, WeightSite) or site.argument:
            kept.append(outcome)
            continue
        every = _at_every_call(site)
        key = (every.kind, every.places(), every.output)
        if outcome.decision is None or first.setdefault(key, site.quantizer) == site.quantizer:
            kept.append(outcome._replace(site=every))
        else:
            replaced[site.quantizer] = first[key]
    return Sharing(tuple(kept), replaced, frozenset(used), tuple(_problems(kept)))


def _at_every_call(site: Site) -> Site:
    """A site that acts at every call of the places at which it acts."""
    lead, *more = dict.fromkeys(place._replace(call=EVERY_CALL) for place in site.places())
    if isinstance(site, ValueSite | ComputedSite):
        return replace(site, anchor=lead.made, more=tuple(more))
    return site


def _problems(outcomes: Iterable[Outcome]) -> Iterable[str]:
    """Problems with places of which some calls share a quantizer, and some do not."""
    sites = [outcome.site for outcome in outcomes if outcome.decision is not None]
    places = [
        (site, place) for site in sites if not isinstance(site, WeightSite) and not site.argument for place in site.places()
    ]
    shared_pairs = {place.pair for _, place in places if _is_every(place)}
    for site, place in places:
        if place.pair in shared_pairs and not _is_every(place):
            sentence = "it has a quantizer of its own at one call of a place whose other calls share one"
            yield explain(site.quantizer, sentence, fix="a rule with share=True that matches all calls of the place")


def _is_every(place: OperandSite) -> bool:
    return place.call == EVERY_CALL
