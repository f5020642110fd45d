"""Other bit widths for some quantizers of a plan, without planning again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from sophq_func.config.matching import is_glob, matches_name
from sophq_func.config.names import underscored
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.config.site import Site
from sophq_func.core.errors import ConfigError, explain, raise_all, unknown
from sophq_func.numerics.scheme import QuantizerConfig, as_bits, override
from sophq_func.planning.checks import is_integer, shape_problems, violations

Widths = Mapping[str, int]
"""Bit widths by name or glob of quantizers, or by path of modules."""


def widths_of(where: str, bits: int | Widths, sites: Mapping[str, Site]) -> dict[str, int]:
    """The bit width of each quantizer that is named; a later entry overrides an earlier one.

    Args:
      where: the function that an error names.
      bits: one width for all quantizers; or widths by name of a quantizer, dotted or underscored, by glob of such names, or
        by path of a module, which stands for the weights in the module.
      sites: of all quantizers, by name.

    Raises:
      ConfigError: names that fit nothing, and widths outside 2..16; all problems in one message.
    """
    given = bits if isinstance(bits, Mapping) else {"*": bits}
    widths: dict[str, int] = {}
    problems: list[str] = []
    for pattern, width in given.items():
        try:
            checked = as_bits(width, where)
            names = fitting(where, pattern, sites)
        except ConfigError as error:
            problems.append(str(error))
            continue
        widths.update(dict.fromkeys(names, checked))
    raise_all(problems)
    return widths


def fitting(where: str, pattern: str, sites: Mapping[str, Site]) -> list[str]:
    """The quantizers that a name, a glob, or the path of a module stands for.

    Raises:
      ConfigError: it fits none.
    """
    if not isinstance(pattern, str):
        sentence, allowed = "this names no quantizer", "a quantizer's name, a glob, or the path of a module"
        raise ConfigError(explain(where, sentence, got=pattern, allowed=allowed, fix="'*weight_fake_quant'"))
    if is_glob(pattern):
        found = [name for name in sites if fnmatchcase(name, pattern)]
    else:
        found = [name for name in sites if pattern in (name, underscored(name))]
    if not found:
        # a module's path: of its quantizers, those of weights, as activations belong to whoever reads them, too
        found = [name for name, site in sites.items() if site.role == "weight" and matches_name(pattern, site)]
    if not found:
        raise ConfigError(unknown(where, "quantizer", pattern, list(sites)))
    return found


def resized(config: QuantizerConfig, bits: int) -> QuantizerConfig:
    """A config with another bit width."""
    return replace(config, scheme=replace(config.scheme, bits=bits))


def problems(where: str, name: str, config: QuantizerConfig, site: Site, asked: QuantConfig | None) -> list[str]:
    """Why a quantizer cannot have the width in its new config.

    Args:
      where: the function that an error names.
      name: of the quantizer.
      config: with the new width.
      site: of the quantizer.
      asked: the config of which the plan was made, whose chip may forbid the width; ``None`` where it is not known.
    """
    if not is_integer(config):
        because = "its codes are no integers on a uniform grid"
        return [explain(f"{where}: {name}", f"{config.fake_quantize} has no bit width", because=because)]
    found = shape_problems(site, config, "")
    if asked is not None:
        found += violations(asked, site, config, {"bits": where, "fake_quantize": "the plan"})
    return found


def as_rules(widths: Mapping[str, int], sites: Mapping[str, Site]) -> tuple[Rule, ...]:
    """Rules that set the same widths, so that a plan which is made anew has them, too."""

    def rule(name: str, bits: int) -> Rule:
        if sites[name].role == "weight":
            return Rule(name=name, weight=override(bits=bits))
        return Rule(name=name, activation=override(bits=bits))

    return tuple(rule(name, bits) for name, bits in widths.items())
