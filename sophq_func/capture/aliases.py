"""Plain attributes of modules that hold registered tensors, as templates that a run fills in.

A model may keep a parameter in a list, or a second time under another attribute. A template is the value of such an
attribute with names instead of tensors; a run replaces the names by the tensors that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from sophq_func.capture.snapshot import OWN
from sophq_func.core.types import Tree

Template: TypeAlias = Tree
"""Nested dicts, lists and tuples with a :class:`_Name` for each registered tensor; other objects stay as they are.

Subclasses of these containers count as other objects: not every one can be made from its items.
"""


@dataclass(frozen=True)
class _Name:
    """The canonical name of a parameter or buffer, in a template; not a string, since a model may hold strings."""

    name: str


class Alias(NamedTuple):
    """A plain attribute of a module that holds registered tensors.

    Attributes:
      path: of the module.
      attribute: name of the attribute.
      template: value of the attribute.
    """

    path: str
    attribute: str
    template: Template


def aliases(module: nn.Module, names: Mapping[int, str]) -> list[Alias]:
    """Every plain attribute that holds registered tensors; ``names`` has their canonical names, by identity."""
    result = []
    for path, part in module.named_modules():
        for attribute, value in part.__dict__.items():
            if attribute in OWN:
                continue
            template = _template(value, names)
            if names_in(template):
                result.append(Alias(path, attribute, template))
    return result


def _template(value: Tree, names: Mapping[int, str]) -> Template:
    """``value`` with a :class:`_Name` for each registered tensor in lists, tuples and dicts."""
    if id(value) in names:
        return _Name(names[id(value)])
    if type(value) is dict:
        return {key: _template(item, names) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_template(item, names) for item in value)
    return value


def names_in(template: Template) -> list[str]:
    """The canonical names of the parameters and buffers in a template."""
    if isinstance(template, _Name):
        return [template.name]
    if type(template) is dict:
        parts = list(template.values())
    elif type(template) in (list, tuple):
        parts = list(template)
    else:
        return []
    return [name for part in parts for name in names_in(part)]


def filled(template: Template, tensors: Mapping[str, Tensor]) -> Tree:
    """The value of a template with these tensors, by canonical name."""
    if isinstance(template, _Name):
        return tensors[template.name]
    if type(template) is dict:
        return {key: filled(item, tensors) for key, item in template.items()}
    if type(template) in (list, tuple):
        return type(template)([filled(item, tensors) for item in template])
    return template
