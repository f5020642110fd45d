"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sophq_func.config.site import Site
from sophq_func.core.texts import printable
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.text import FIELDS, setting


@dataclass(frozen=True)
class PlanDiff:
    """What differs between a plan and another one; false if all quantizers, configs and sites are equal.

    Attributes:
      added: names of quantizers that only the other plan has.
      removed: names of quantizers that only this plan has.
      changed: by name of a quantizer that both have, and by field of its config, the value in this plan and in the other;
        under ``"site"`` the two sites.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        lines = [f"- {printable(name)}" for name in self.removed] + [f"+ {printable(name)}" for name in self.added]
        for name, fields in self.changed.items():
            for field_name, (before, after) in fields.items():
                is_site = field_name == "site"
                change = "sits elsewhere" if is_site else f"{field_name} {before!r} -> {after!r}"
                lines.append(f"~ {printable(name)}: {change}")
        return "\n".join(lines) or "no difference"


def diff(
    configs: tuple[Mapping[str, QuantizerConfig], Mapping[str, QuantizerConfig]],
    sites: tuple[Mapping[str, Site], Mapping[str, Site]],
) -> PlanDiff:
    """What differs between two plans.

    Args:
      configs: of each plan, by quantizer.
      sites: of each plan, by quantizer.
    """
    here, there = configs
    sites_here, sites_there = sites
    changed: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name in here:
        if name not in there:
            continue
        pairs = {field: (setting(here[name], field), setting(there[name], field)) for field in FIELDS}
        pairs["site"] = (sites_here[name], sites_there[name])
        differing = {field: (before, after) for field, (before, after) in pairs.items() if before != after}
        if differing:
            changed[name] = differing
    added = tuple(name for name in there if name not in here)
    removed = tuple(name for name in here if name not in there)
    return PlanDiff(added, removed, changed)
