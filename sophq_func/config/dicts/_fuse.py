"""``extra_fuse_dict``: fused patterns and weight layers for one plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from sophq_func.config.dicts._keys import Table
from sophq_func.config.matching import TypeKey, matches_by_name, type_text
from sophq_func.config.patterns import PATTERNS, Fused, Part, fused

BUILT_IN = {PATTERNS.get(name).parts: PATTERNS.get(name) for name in PATTERNS}
"""The registered patterns by their parts. A dictionary that spells one out means that one, not a second of another name."""


class Fusion(NamedTuple):
    """What the dictionary adds.

    Attributes:
      patterns: fused patterns beside those that are registered.
      layers: module classes whose weights are quantized.
      aliases: by class, the type key that it means. The class is what sophgo-mq fuses a pattern to or replaces a class by;
        no model here is made of it.
    """

    patterns: tuple[type[Fused], ...] = ()
    layers: tuple[type[nn.Module], ...] = ()
    aliases: Mapping[TypeKey, TypeKey] = {}


def read_fusion(given: Table) -> Fusion:
    """What the tables of the dictionary add: the first two patterns, the third and fourth layers."""
    sequences = dict(given.get("additional_fuser_method_mapping") or {})
    sequences |= {_in_order(key): value for key, value in (given.get("additional_fusion_pattern") or {}).items()}
    # sophgo-mq reads the key in both spellings, each in another place.
    replaced = dict(given.get("additional_qat_module_mapping") or {})
    replaced |= given.get("additional_qat_module_mappings") or {}
    patterns = {parts: BUILT_IN.get(parts) or fused(_name(parts), *parts) for parts in sequences}
    aliases: dict[TypeKey, TypeKey] = {
        target: patterns[parts] for parts, target in sequences.items() if isinstance(target, type)
    }
    # A class that stands for a pattern may be replaced once more: its replacement means the pattern, too.
    aliases |= {target: aliases.get(source, source) for source, target in replaced.items()}
    layers = tuple(source for source in replaced if _is_layer(source) and source not in aliases)
    further = tuple(pattern for parts, pattern in patterns.items() if parts not in BUILT_IN)
    return Fusion(further, layers, aliases)


def _in_order(pattern: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parts of a nested pattern in the order of the calls, where torch writes the last call first.

    Example:
      >>> _in_order(("ReLU", ("BatchNorm2d", "Conv2d")))
      ('Conv2d', 'BatchNorm2d', 'ReLU')
    """
    flat: list[Any] = []
    for part in reversed(pattern):
        flat += _in_order(part) if isinstance(part, tuple) else [part]
    return tuple(flat)


def _name(parts: tuple[Part, ...]) -> str:
    """A pattern's name from its parts: ``LinearGELU``."""
    return "".join(type_text(part).strip("'").rpartition(".")[2] for part in parts)


def _is_layer(source: object) -> bool:
    """Whether a class is that of a module, and no fused group."""
    return isinstance(source, type) and issubclass(source, nn.Module) and not matches_by_name(source)
