"""What the rules of a config decide about one quantizer.

:func:`resolve` gives the config of every quantizer: it starts from the default of the quantizer's role, then each rule
that matches, from first to last, replaces the fields that it sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sophq_func.config.rules import STATE_FLAGS, QuantConfig, Rule
from sophq_func.config.site import Role, Site
from sophq_func.config.strategies import Preset
from sophq_func.numerics.scheme import Override, QuantizerConfig


@dataclass(frozen=True)
class Decision:
    """The config of one quantizer, and what decided it.

    Attributes:
      config: ``None`` where the quantizer is left out.
      reasons: for each field of the config, and of its scheme, the default or rule that set it last.
      matched: indices of the rules that changed something.
    """

    config: QuantizerConfig | None
    reasons: Mapping[str, str]
    matched: tuple[int, ...] = ()


def resolve(config: QuantConfig, site: Site, preset: Preset | None = None) -> Decision:
    """The config of the quantizer at a site: the default of its role, then the preset, then each rule that matches.

    Args:
      config: what the user asks for.
      site: where the quantizer sits.
      preset: what the strategy sets for this quantizer.

    Example:
      >>> from sophq_func.config.site import WeightSite
      >>> from sophq_func.numerics.scheme import override
      >>> config = QuantConfig(rules=(Rule(name="fc", weight=override(bits=4)),))
      >>> decision = resolve(config, WeightSite(quantizer="fc.weight_fake_quant", paths=("fc",)))
      >>> decision.reasons["bits"], decision.reasons["observer"]
      ("Rule(name='fc', weight=override(bits=4))", 'default (BM1690)')
    """
    start = resolve_without_rules(config, site.role, preset)
    # What an override changes where the config or an earlier rule left the quantizer out.
    anew = Decision(start.config or config.chip_default(site.role), start.reasons)
    decision = start
    matched: list[int] = []
    for index, rule in enumerate(config.rules):
        # The cheaper question comes first: a plan asks both for each pair of a rule and a quantizer.
        if rule.changes(site.role) and rule.matches(site):
            decision = _changed(decision, rule, site.role, anew)
            matched.append(index)
    return Decision(decision.config, decision.reasons, tuple(matched))


def resolve_without_rules(config: QuantConfig, role: Role, preset: Preset | None = None) -> Decision:
    """What :func:`resolve` would decide without rules: the default of a role, changed by the strategy's preset."""
    default, sources = config.default(role), config.sources(role)
    if default is None or preset is None:
        return Decision(default, sources)
    if preset.yields and config.sets(role, preset.change):
        return Decision(default, sources)
    reasons = {**sources, **dict.fromkeys(preset.change.names(), preset.why)}
    return Decision(preset.change(default), reasons)


def _changed(before: Decision, rule: Rule, role: Role, anew: Decision) -> Decision:
    """An earlier decision, changed by a rule that matches.

    Args:
      before: the earlier decision.
      rule: the rule.
      role: that of the quantizer.
      anew: what an override changes where ``before`` has no quantizer.
    """
    half, reason = rule.half(role), repr(rule)
    config, reasons = before.config, before.reasons
    if half is None:
        return Decision(None, reasons)
    if isinstance(half, QuantizerConfig):
        config, reasons = half, dict.fromkeys((*anew.reasons, *STATE_FLAGS), reason)
    elif isinstance(half, Override):
        base = anew if config is None else before
        assert base.config is not None, "a new quantizer has a config"
        config, reasons = half(base.config), {**base.reasons, **dict.fromkeys(half.names(), reason)}
    flags = rule.state_change()
    if config is None or not flags.values:
        return Decision(config, reasons)
    return Decision(flags(config), {**reasons, **dict.fromkeys(flags.names(), reason)})


class Request(NamedTuple):
    """What the rules say about a flag.

    Attributes:
      answer: the flag of the last rule that matches; ``None`` where none does.
      matched: indices of the rules that match.
    """

    answer: bool | None
    matched: tuple[int, ...]


def requested(config: QuantConfig, site: Site) -> Request:
    """What the rules say about the quantizers for which the call at a site asks."""
    return _answered(config, site, "requests")


def shared(config: QuantConfig, site: Site) -> Request:
    """What the rules say about sharing the quantizer at a site with the other calls of its place."""
    return _answered(config, site, "share")


def _answered(config: QuantConfig, site: Site, flag: str) -> Request:
    """The flag of the last rule that matches a site and has it."""
    matched = tuple(i for i, rule in enumerate(config.rules) if getattr(rule, flag) is not None and rule.matches(site))
    answer = getattr(config.rules[matched[-1]], flag) if matched else None
    return Request(answer, matched)
