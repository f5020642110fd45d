"""What differs between two plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sophq_func.config.site import Site
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.text import FIELDS, setting


@dataclass(frozen=True)
class PlanDiff:
    """What another plan has that is different; empty, and false, for plans of the same configs and places.

    Attributes:
      added: quantizers that only the other plan has.
      removed: quantizers that it lacks.
      changed: for quantizers of both, by field, the value here and there; ``"site"`` where they sit otherwise.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def __str__(self) -> str:
        lines = [f"- {name}" for name in self.removed] + [f"+ {name}" for name in self.added]
        for name, fields in self.changed.items():
            lines += [f"~ {name}: {f} {before!r} -> {after!r}" for f, (before, after) in fields.items() if f != "site"]
            lines += [f"~ {name}: sits elsewhere"] if "site" in fields else []
        return "\n".join(lines) or "no difference"


def diff(
    configs: tuple[Mapping[str, QuantizerConfig], Mapping[str, QuantizerConfig]],
    sites: tuple[Mapping[str, Site], Mapping[str, Site]],
) -> PlanDiff:
    """What is different between two plans."""
    here, there = configs
    changed: dict[str, dict[str, tuple[Any, Any]]] = {}
    for name in (name for name in here if name in there):
        pairs = {f: (setting(here[name], f), setting(there[name], f)) for f in FIELDS}
        pairs["site"] = (sites[0][name], sites[1][name])
        found = {f: pair for f, pair in pairs.items() if pair[0] != pair[1]}
        if found:
            changed[name] = found
    return PlanDiff(tuple(n for n in there if n not in here), tuple(n for n in here if n not in there), changed)
