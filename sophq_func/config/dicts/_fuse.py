"""``extra_fuse_dict``: fused patterns and weight layers for one plan (semantics.md 1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from sophq_func.config.matching import matches_by_name, type_text
from sophq_func.config.patterns import PATTERNS, Fused, fused

KNOWN_PARTS = {PATTERNS.get(name).parts: PATTERNS.get(name) for name in PATTERNS}


class Fusion(NamedTuple):
    """What the dictionary adds.

    Attributes:
      patterns: fused patterns beside those that are registered.
      layers: module classes whose weights are quantized.
      aliases: classes that mean another type key: what a pattern is fused to, or a class is replaced by.
    """

    patterns: tuple[type[Fused], ...] = ()
    layers: tuple[type[nn.Module], ...] = ()
    aliases: Mapping[Any, Any] = {}


def read_fusion(given: Mapping[str, Any]) -> Fusion:
    """Patterns of the first two tables, layers of the third; a built-in pattern of the same parts stays what it is."""
    sequences = dict(given.get("additional_fuser_method_mapping") or {})
    sequences |= {_in_order(key): value for key, value in (given.get("additional_fusion_pattern") or {}).items()}
    replaced = {**(given.get("additional_qat_module_mapping") or {}), **(given.get("additional_qat_module_mappings") or {})}
    made = {parts: KNOWN_PARTS.get(parts) or fused(_name(parts), *parts) for parts in sequences}
    aliases = {target: made[parts] for parts, target in sequences.items() if isinstance(target, type)}
    aliases |= {target: aliases.get(source, source) for source, target in replaced.items()}
    layers = tuple(source for source in replaced if _is_layer(source) and source not in aliases)
    further = tuple(pattern for parts, pattern in made.items() if parts not in KNOWN_PARTS)
    return Fusion(further, layers, aliases)


def _in_order(pattern: tuple[Any, ...]) -> tuple[Any, ...]:
    """``(ReLU, (BatchNorm2d, Conv2d))`` as the calls happen: ``(Conv2d, BatchNorm2d, ReLU)``."""
    flat: list[Any] = []
    for part in reversed(pattern):
        flat += _in_order(part) if isinstance(part, tuple) else [part]
    return tuple(flat)


def _name(parts: tuple[Any, ...]) -> str:
    return "".join(type_text(part).strip("'").rpartition(".")[2] for part in parts)


def _is_layer(source: Any) -> bool:
    """Whether a class is that of a module, and no fused group."""
    return isinstance(source, type) and issubclass(source, nn.Module) and not matches_by_name(source)
