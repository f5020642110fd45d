"""How one quantizer is configured: its site and the config to an :class:`Outcome`. Weights and values share this step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from sophq_func.config.rules import Decision, QuantConfig, resolve, resolve_without_rules
from sophq_func.config.site import Site
from sophq_func.config.strategies import Preset
from sophq_func.core.registry import Spec
from sophq_func.numerics.scheme import PerChannel, PerGroup, QuantizerConfig
from sophq_func.planning.checks import is_integer, violations


class Outcome(NamedTuple):
    """What was decided about one quantizer.

    Attributes:
      site: where it would sit.
      decision: its config and who decided it; ``None`` where it is left out.
      without_rules: where rules left it out, what was decided without them; else the decision.
      used: indices of the rules that changed something.
      problems: what the chip forbids about it.
    """

    site: Site
    decision: Decision | None
    without_rules: Decision
    used: tuple[int, ...]
    problems: tuple[str, ...] = ()

    @property
    def config(self) -> QuantizerConfig | None:
        """Its config; ``None`` where it is left out."""
        return None if self.decision is None else self.decision.config

    @property
    def kind(self) -> str:
        """Name of the fake quantizer that it has, or had if no rule left it out; empty without."""
        config = self.without_rules.config
        return "" if config is None else config.fake_quantize.name


def decide(config: QuantConfig, site: Site, placed: str, presets: Mapping[str, Preset]) -> Outcome:
    """What a config says about the quantizer at ``site``.

    Args:
      config: what is asked for.
      site: the quantizer's.
      placed: why it is there, in words.
      presets: what the strategy knows about quantizers, by name.
    """
    preset = _preset(config, site, presets)
    found = resolve(config, site, preset)
    if found.config is None:
        without_rules = resolve_without_rules(config, site.role, preset)
        return Outcome(site, None, without_rules, found.matched)
    own = _with_quant_type(_with_axis(found.config, site), site)
    reasons = {"placed": placed, **found.reasons}
    problems = violations(config, site, own, reasons)
    decision = Decision(own, reasons, found.matched)
    return Outcome(site, decision, decision, found.matched, tuple(problems))


def _preset(config: QuantConfig, site: Site, presets: Mapping[str, Preset]) -> Preset | None:
    """What the strategy knows about a quantizer; bits mean nothing to a format that is no integer grid."""
    preset = presets.get(site.quantizer)
    if preset is None or preset.change.names() != ["bits"]:
        return preset
    own = resolve(config, site).config
    return None if own is not None and not is_integer(own) else preset


def _with_axis(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the axis of its granularity written out."""
    granularity = config.scheme.granularity
    if not isinstance(granularity, PerChannel | PerGroup) or granularity.axis is not None:
        return config
    # The channels of an activation lie along axis 1, behind the batch.
    axis = site.axis if site.role == "weight" else 1
    return replace(config, scheme=replace(config.scheme, granularity=replace(granularity, axis=axis)))


def _with_quant_type(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the option ``quant_type``, where a piece has one and leaves it open, as the role says."""
    kind = "param" if site.role == "weight" else "input" if site.argument else "tensor"
    observer, fake = _filled(config.observer, kind), _filled(config.fake_quantize, kind)
    if observer is config.observer and fake is config.fake_quantize:
        return config
    return replace(config, observer=observer, fake_quantize=fake)


def _filled(spec: Spec, kind: str) -> Spec:
    if ("quant_type", None) not in spec.options:
        return spec
    return Spec(spec.name, tuple((k, kind if k == "quant_type" and v is None else v) for k, v in spec.options))
