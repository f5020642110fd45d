"""The pages of the reference: an entry for every public name, from its docstring, one page for each room of the package.

Which names are public is read off the package when the pages are made, so that a new name has an entry by itself.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

TITLES = {
    "model": "Quantized models",
    "config": "Configuration",
    "numerics": "Schemes and parts",
    "observers": "Observers",
    "fake_quantize": "Fake quantizers",
    "capture": "Traces and parameters",
    "planning": "Plans",
    "algorithms": "Algorithms",
    "reports": "Reports",
    "checkpoint": "Checkpoints",
    "codes": "Packed codes",
    "integers": "Integers",
    "export": "Export",
    "core": "Errors and specs",
}
"""Titles of the pages by room, in the order in which a reader needs them. A room without one comes last."""


ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")
"""A reference of Sphinx, of which the last part of the name is shown."""


class Entry(NamedTuple):
    """A public name, the room that its value comes from, and the first sentence on it."""

    name: str
    room: str
    summary: str
    aliases: tuple[str, ...]


def entries(package: ModuleType) -> list[Entry]:
    """Every public name of the package and of its public modules; what has several names once, under its own."""
    found: dict[object, tuple[object, list[str]]] = {}
    for name, value in _public(package):
        # Equal numbers and strings may be one object, and are still two constants.
        key = id(value) if callable(value) else name
        found.setdefault(key, (value, []))[1].append(name)
    return [_entry(package, value, known_as) for value, known_as in found.values()]


def _entry(package: ModuleType, value: object, known_as: list[str]) -> Entry:
    own = [name for name in known_as if name.rpartition(".")[2] == getattr(value, "__name__", "")]
    name = [*own, *known_as][0]
    return Entry(name, _room(package, name, value), _summary(value), tuple(other for other in known_as if other != name))


def _public(package: ModuleType) -> Iterator[tuple[str, object]]:
    """Dotted names below the package, and values: first its own, then those of its public modules."""
    own = {name: getattr(package, name) for name in names(package)}
    modules = {name: value for name, value in own.items() if inspect.ismodule(value)}
    yield from ((name, value) for name, value in own.items() if name not in modules)
    for name, module in modules.items():
        yield from ((f"{name}.{inner}", getattr(module, inner)) for inner in names(module))


def names(module: ModuleType) -> list[str]:
    """The names that a module offers: its ``__all__``; or else, without an underscore, what its file defines, or, of a
    package, what its file imports by name.

    Modules that were merely imported, and so became attributes of the package, are not among them.

    Example:
      >>> import sophq_func
      >>> "quantize" in names(sophq_func), "not_grouped" in names(sophq_func.rules), "core" in names(sophq_func)
      (True, True, False)
    """
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    tree = ast.parse(inspect.getsource(module))
    found = _imported(tree) if "." not in module.__name__ else _defined(tree)
    return sorted(name for name in found if not name.startswith("_"))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _room(package: ModuleType, name: str, value: object) -> str:
    """The room of the module of pieces that offers a name, or else of the file that defines its value."""
    owner = getattr(package, name.partition(".")[0]) if "." in name else value
    home = owner.__name__ if inspect.ismodule(owner) else getattr(value, "__module__", "")
    return f"{home}.".split(".")[1]


def _summary(value: object) -> str:
    text = inspect.getdoc(value) or ""
    return ROLE.sub(r"`\1`", " ".join(text.partition("\n\n")[0].split()))


def pages(package: ModuleType) -> dict[str, str]:
    """The Markdown of each page, by file name: an index, and one page for each room."""
    known = entries(package)
    rooms = sorted({entry.room for entry in known}, key=lambda room: (*TITLES, room).index(room))
    made = {"index.md": _index(package, known, rooms)}
    for room in rooms:
        made[f"{room}.md"] = _page(package, room, [entry for entry in known if entry.room == room])
    return made


def title(room: str) -> str:
    """The title of a room's page."""
    return TITLES.get(room, room.replace("_", " ").capitalize())


def _index(package: ModuleType, known: list[Entry], rooms: list[str]) -> str:
    parts = ["# Reference", f"Every public name of `{package.__name__}`, which these pages import as `sq`."]
    for room in rooms:
        parts += [f"## {title(room)}", "| name | |\n|---|---|"]
        rows = [_row(package, entry) for entry in known if entry.room == room]
        parts[-1] += "\n" + "\n".join(rows)
    return "\n\n".join(parts) + "\n"


def _row(package: ModuleType, entry: Entry) -> str:
    first = entry.summary.replace("|", "\\|")
    return f"| [`sq.{entry.name}`]({entry.room}.md#{package.__name__}.{entry.name}) | {first} |"


def _page(package: ModuleType, room: str, own: list[Entry]) -> str:
    about = _summary(importlib.import_module(f"{package.__name__}.{room}"))
    return "\n\n".join([f"# {title(room)}", about, *(_directive(package, entry) for entry in own)]) + "\n"


def _directive(package: ModuleType, entry: Entry) -> str:
    shown = f"::: {package.__name__}.{entry.name}\n    options:\n      heading: sq.{entry.name}"
    also = ", ".join(f"`sq.{name}`" for name in entry.aliases)
    return f"{shown}\n\nAlso {also}." if also else shown
