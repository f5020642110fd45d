"""How one quantizer is configured, be it that of a weight or of a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from sophq_func.config.resolving import Decision, resolve, resolve_without_rules
from sophq_func.config.rules import QuantConfig
from sophq_func.config.site import Site
from sophq_func.config.strategies import Preset
from sophq_func.core.registry import Spec
from sophq_func.numerics.granularity import PerChannel, PerGroup, PerTensor
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.checks import is_integer, violations


class Outcome(NamedTuple):
    """What was decided about one quantizer.

    Attributes:
      site: where it sits, or would if it were not left out.
      decision: its config and what decided it; ``None`` where it is left out.
      without_rules: where rules left it out, what would be decided without them; else the decision.
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
        """Name of its fake quantizer, or of that which it would have without rules; empty without either."""
        config = self.without_rules.config
        return "" if config is None else config.fake_quantize.name


def decide(config: QuantConfig, site: Site, placed: str, presets: Mapping[str, Preset]) -> Outcome:
    """Decide how the quantizer at a site is configured, and check that against the chip.

    Args:
      config: what is asked for.
      site: where the quantizer sits.
      placed: why it is there, in words.
      presets: by name of a quantizer, what the strategy sets in its config.
    """
    preset = _preset(config, site, presets)
    resolved = resolve(config, site, preset)
    if resolved.config is None:
        without_rules = resolve_without_rules(config, site.role, preset)
        return Outcome(site, None, without_rules, resolved.matched)
    quantizer = _with_quant_type(_with_axis(resolved.config, site), site)
    reasons = {"placed": placed, **resolved.reasons}
    is_inner = preset is not None and preset.inner
    problems = [] if is_inner else violations(config, site, quantizer, reasons)
    decision = Decision(quantizer, reasons, resolved.matched)
    return Outcome(site, decision, decision, resolved.matched, tuple(problems))


def _preset(config: QuantConfig, site: Site, presets: Mapping[str, Preset]) -> Preset | None:
    """What the strategy sets for a quantizer; ``None`` if that is only bits, and the quantizer's codes are no integers."""
    preset = presets.get(site.quantizer)
    if preset is None or preset.change.names() != ["bits"]:
        return preset
    quantizer = resolve(config, site).config
    has_no_bits = quantizer is not None and not is_integer(quantizer)
    return None if has_no_bits else preset


def _with_axis(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the axis of its granularity filled in where it is left open.

    A weight without an axis that is kept has one scale.
    """
    granularity = config.scheme.granularity
    if not isinstance(granularity, PerChannel | PerGroup) or granularity.axis is not None:
        return config
    # The channels of an activation lie along axis 1, behind the batch.
    axis = site.axis if site.role == "weight" else 1
    if isinstance(granularity, PerChannel) and axis == ():
        return replace(config, scheme=replace(config.scheme, granularity=PerTensor()))
    return replace(config, scheme=replace(config.scheme, granularity=replace(granularity, axis=axis)))


def _with_quant_type(config: QuantizerConfig, site: Site) -> QuantizerConfig:
    """``config`` with the option ``quant_type`` of its observer and fake quantizer filled in where it is left open."""
    if site.role == "weight":
        quant_type = "param"
    else:
        quant_type = "input" if site.argument else "tensor"
    observer = _filled(config.observer, quant_type)
    fake_quantize = _filled(config.fake_quantize, quant_type)
    if observer is config.observer and fake_quantize is config.fake_quantize:
        return config
    return replace(config, observer=observer, fake_quantize=fake_quantize)


def _filled(spec: Spec, quant_type: str) -> Spec:
    if ("quant_type", None) not in spec.options:
        return spec
    options = {**dict(spec.options), "quant_type": quant_type}
    return Spec(spec.name, tuple(options.items()))
