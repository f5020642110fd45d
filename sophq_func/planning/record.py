"""Last of all: what was decided, for those who read logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from sophq_func.config.resolving import Decision
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import EVERY_CALL, Site
from sophq_func.core.logs import PLANNING
from sophq_func.planning.draft import Draft
from sophq_func.planning.text import grid, place, why
from sophq_func.planning.unite import United


def record(
    config: QuantConfig, drafts: Sequence[Draft], united: United, unused: Sequence[Rule], warnings: Sequence[str]
) -> None:
    """Write to the logger ``sophq_func.planning`` what a plan decides.

    Args:
      config: what was asked for.
      drafts: one for each example.
      united: what was decided for all examples.
      unused: rules that changed nothing.
      warnings: what the user is warned of.
    """
    # the texts are made only for those who read them
    if not PLANNING.isEnabledFor(logging.INFO):
        return
    for line in _of_the_whole(config, drafts, united, unused, warnings):
        PLANNING.info("%s", line)
    if not PLANNING.isEnabledFor(logging.DEBUG):
        return
    for rule in config.rules:
        if rule not in unused:
            PLANNING.debug("in effect: %r", rule)
    for name, site in united.sites.items():
        PLANNING.debug("%s", _of_quantizer(site, united.decisions[name]))
    for line in dict.fromkeys(line for draft in drafts for line in _left_out(config, draft)):
        PLANNING.debug("%s", line)
    for left in united.coverage.left:
        PLANNING.debug("float: %s", left)


def _of_the_whole(
    config: QuantConfig, drafts: Sequence[Draft], united: United, unused: Sequence[Rule], warnings: Sequence[str]
) -> Iterator[str]:
    weights = sum(site.role == "weight" for site in united.sites.values())
    activations = len(united.sites) - weights
    asked = f"chip {config.chip}, strategy {config.placement}" if config.chip else f"strategy {config.placement}"
    examples = "1 example" if len(drafts) == 1 else f"{len(drafts)} examples"
    yield f"plan of {examples} with {asked}: {weights} weight and {activations} activation quantizers"
    yield from (f"note: {note}" for note in united.notes)
    yield from (f"unused: {rule!r}" for rule in unused)
    yield united.coverage.lines()[0]
    yield from (f"warned: {warning}" for warning in warnings)


def _of_quantizer(site: Site, decision: Decision) -> str:
    """One quantizer: its grid, where it sits, what else is decided there, and why."""
    config = decision.config
    texts = []
    if config is not None:
        texts.append(f"{grid(config)} {config.scheme.granularity}")
        if config.observe_only:
            texts.append("observes only")
    texts.append(place(site))
    if site.norm:
        texts.append(f"{site.norm} folded into it")
    if site.source:
        texts.append(f"bias rounded with the scale of {site.source}")
    if site.aliases:
        texts.append(f"tied, also named {', '.join(site.aliases)}")
    if any(call.call == EVERY_CALL for call in site.places()):
        texts.append("shared by all calls")
    return f"{site.quantizer}: {', '.join(texts)}; {'; '.join(why(decision.reasons))}"


def _left_out(config: QuantConfig, draft: Draft) -> Iterator[str]:
    """A line for each quantizer that a rule or the config left out."""
    for outcome in draft.outcomes:
        if outcome.decision is None:
            half = "weight" if outcome.site.role == "weight" else "activation"
            said = repr(config.rules[outcome.used[-1]]) if outcome.used else f"config {half}=None"
            yield f"{outcome.site.quantizer}: left out: {said}"
