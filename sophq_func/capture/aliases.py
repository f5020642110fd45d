"""Plain attributes of modules that hold registered tensors, and what stands for these tensors in a skeleton.

A model may keep a parameter in a list, or a second time under another attribute. A template is such an attribute's value
with names in the place of tensors; a run fills in the tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sophq_func.capture.snapshot import OWN


class _Name(str):
    """Stands in a template for the parameter or buffer of this name."""


def aliases(module: nn.Module, names: Mapping[int, str]) -> list[tuple[str, str, Any]]:
    """Plain attributes that hold registered tensors: ``(module path, attribute, template)``."""
    found = []
    for path, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute not in OWN:
                template, holds = _template(value, names)
                found += [(path, attribute, template)] if holds else []
    return found


def _template(value: Any, names: Mapping[int, str]) -> tuple[Any, bool]:
    """``value`` with a :class:`_Name` for each registered tensor in lists, tuples and dicts; and whether there is one."""
    if id(value) in names:
        return _Name(names[id(value)]), True
    if type(value) is dict:
        items = {key: _template(item, names) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(holds for _, holds in items.values())
    if type(value) in (list, tuple):
        parts = [_template(item, names) for item in value]
        return type(value)(item for item, _ in parts), any(holds for _, holds in parts)
    return value, False


def names_in(template: Any) -> list[str]:
    """The parameters and buffers that a template names."""
    if isinstance(template, _Name):
        return [str(template)]
    parts = template.values() if type(template) is dict else template if type(template) in (list, tuple) else ()
    return [name for part in parts for name in names_in(part)]


def filled(template: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that a template stands for."""
    if isinstance(template, _Name):
        return tensors[str(template)]
    if type(template) is dict:
        return {key: filled(item, tensors) for key, item in template.items()}
    if type(template) in (list, tuple):
        return type(template)([filled(item, tensors) for item in template])
    return template
