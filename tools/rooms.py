"""The rooms of a package, read from its imports alone: who imports whom, and whether the limits hold.

``python tools/rooms.py`` prints the folder graph of ``sophq_func`` and one sentence for each offence, and exits with 1 if
there is one; ``--files`` prints the imports behind every arrow, ``--torch`` looks for private names of torch, too.

A room is a folder or a file at the top of the package. An import under ``TYPE_CHECKING`` does not count, one inside a
function does. A name that a file only passes on counts as imported from the file that defines it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Edges = Mapping[str, set[str]]

# What a newcomer can keep in mind. The layout was drawn with 17 rooms, 76 arrows and 10 floors, and is to grow little.
MOST_ROOMS, MOST_ARROWS, MOST_FLOORS = 18, 90, 11

HOLDERS: Mapping[str, tuple[str, str]] = {
    "core/modes.py": ("", "asks torch which compiler, transform or derivative looks at a computation"),
    "capture/_torch.py": ("", "reads and replaces what a module and a tensor keep to themselves"),
    "core/pytree.py": ("torch.utils._pytree", "flattens trees as torch.func does, for which there is no public name"),
}
"""Files that may hold private names of torch: with which beginning, and why."""

MEMBERS = frozenset(
    "_backward_hooks _backward_pre_hooks _base _buffers _forward_hooks _forward_hooks_always_called "
    "_forward_hooks_with_kwargs _forward_pre_hooks _forward_pre_hooks_with_kwargs _load_state_dict_pre_hooks _modules "
    "_non_persistent_buffers_set _parameters _state_dict_hooks _version".split()
)
"""Private attributes of ``nn.Module`` and ``Tensor``. Read from ``self`` they are the reading class's own."""

REMOVED_SOON = ("torch.ops.quantized_decomposed",)
"""Public by their spelling, but registered by private modules of ``torch.ao``."""


class Import(NamedTuple):
    """``from module import name``, bound to ``bound``; ``import module`` has no name."""

    module: str
    name: str
    bound: str
    line: int

    def full(self) -> str:
        """The dotted name of what is imported."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def meaning(self) -> str:
        """The dotted name that ``bound`` stands for: ``import a.b`` binds ``a``, ``import a.b as c`` binds ``a.b``."""
        first = self.module.partition(".")[0]
        return first if not self.name and self.bound == first else self.full()


class File(NamedTuple):
    """A source file: its place in the package, its dotted name, and what it imports."""

    path: str
    module: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        """The folder or file at the top of the package."""
        return Path(self.path).parts[0].removesuffix(".py")


class Graph(NamedTuple):
    """The files of a package, and which file's names each of them imports."""

    files: dict[str, File]
    """By dotted name."""
    edges: Edges
    """Between dotted names."""

    def rooms(self) -> list[str]:
        """All rooms, in order of their names."""
        return sorted({file.room for file in self.files.values()})

    def behind(self) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """For each arrow between two rooms, the paths of the files that import and are imported."""
        found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
        for source, targets in sorted(self.edges.items()):
            for target in sorted(targets):
                a, b = self.files[source], self.files[target]
                if a.room != b.room:
                    found[a.room, b.room].append((a.path, b.path))
        return dict(found)

    def arrows(self) -> dict[str, set[str]]:
        """For each room, the rooms that it imports from."""
        found: dict[str, set[str]] = {room: set() for room in self.rooms()}
        for source, target in self.behind():
            found[source].add(target)
        return found


def read(root: Path) -> Graph:
    """The graph of the package in folder ``root``."""
    files = {file.module: file for file in (parsed(root, path) for path in sorted(root.rglob("*.py")))}
    edges = {
        module: {defining(files, item.module, item.name) for item in file.imports if item.module in files} - {module}
        for module, file in files.items()
    }
    return Graph(files, edges)


def parsed(root: Path, path: Path) -> File:
    """One file of the package in ``root``."""
    relative = path.relative_to(root)
    parts = (root.name, *relative.with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    package = module if relative.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    return File(relative.as_posix(), module, tree, tuple(imports(tree, package)))


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """What a file imports when it runs; ``package`` is what a relative import starts from."""
    for node in executed(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", alias.asname or alias.name.partition(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module, alias.name, alias.asname or alias.name, node.lineno)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield from executed(other)
        else:
            yield from executed(child)


def is_type_checking(test: ast.expr) -> bool:
    """Whether a condition is ``TYPE_CHECKING`` or ``typing.TYPE_CHECKING``."""
    return ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING"


def defining(files: Mapping[str, File], module: str, name: str) -> str:
    """The module that defines what ``from module import name`` gives."""
    for item in files[module].imports:
        # A room that lists its own files (``from room import file``) passes nothing on.
        if item.bound == name and item.name and item.module in files and (item.module, item.name) != (module, name):
            return defining(files, item.module, item.name)
    inner = f"{module}.{name}"
    return inner if inner in files else module


def floors(arrows: Edges) -> dict[str, int]:
    """For each room the length of the longest chain of imports that starts there; rooms in or above a cycle are left out."""
    found: dict[str, int] = {}
    while ready := [room for room in arrows if room not in found and arrows[room] <= found.keys()]:
        for room in ready:
            found[room] = 1 + max((found[below] for below in arrows[room]), default=0)
    return found


def cycle(edges: Edges) -> list[str]:
    """A shortest circle of arrows, its first member again at its end; empty if there is none."""
    circles = [path for start in sorted(edges) if (path := shortest(edges, start))]
    return min(circles, key=len, default=[])


def shortest(edges: Edges, start: str) -> list[str]:
    """A shortest path from ``start`` back to it; empty if there is none."""
    paths = [[start]]
    seen: set[str] = set()
    for path in paths:  # grows while it is walked: breadth first
        for target in sorted(edges.get(path[-1], ())):
            if target == start:
                return [*path, target]
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def offences(graph: Graph) -> Iterator[str]:
    """A sentence for each limit that the package's imports break."""
    arrows = graph.arrows()
    height = max(floors(arrows).values(), default=0)
    count = sum(map(len, arrows.values()))
    for what, found, most in (
        ("rooms", len(arrows), MOST_ROOMS),
        ("arrows between rooms", count, MOST_ARROWS),
        ("floors", height, MOST_FLOORS),
    ):
        if found > most:
            yield f"The package has {found} {what}; at most {most} are allowed."
    for kind, edges in (("Rooms", arrows), ("Files", graph.edges)):
        if circle := cycle(edges):
            yield f"{kind} import each other in a circle: {' -> '.join(circle)}."
    yield from private_files(graph)


def private_files(graph: Graph) -> Iterator[str]:
    """A sentence for each import of another room's private file."""
    for file in graph.files.values():
        for item in file.imports:
            named = item.full() if item.full() in graph.files else item.module
            target = graph.files.get(named)
            if target is not None and target.room != file.room and is_private(named):
                yield f"{file.path}:{item.line} imports {target.path}, which is private to the room {target.room}."


def is_private(dotted: str) -> bool:
    """Whether a part of a dotted name has one leading underscore (``__version__`` and its like are public)."""
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def private_names(graph: Graph) -> Iterator[str]:
    """A sentence for each private name of torch in a file that may not hold it."""
    for file in graph.files.values():
        allowed, _ = HOLDERS.get(file.path, (None, ""))
        for line, name in sorted(set(torch_names(file))):
            if allowed is None or not name.startswith(allowed):
                yield f"{file.path}:{line} holds {name}, a private name of torch."


def torch_names(file: File) -> Iterator[tuple[int, str]]:
    """Line and full name of each private name of torch in a file: imported, read, or spelled in a string."""
    for item in file.imports:
        if is_torchs(name := item.full()):
            yield item.line, name
    meant = {item.bound: item.meaning() for item in file.imports}
    for node in outermost(file.tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            name = f"{meant.get(first, first)}.{rest}"
            members = [part for part in rest.split(".") if part in MEMBERS and first != "self"]
            yield from ((node.lineno, found) for found in ([name] if is_torchs(name) else members))
        elif isinstance(node, ast.Constant) and (node.value in MEMBERS or is_torchs(str(node.value))):
            yield node.lineno, str(node.value)


def outermost(node: ast.AST) -> Iterator[ast.AST]:
    """Strings, and whole chains of attributes: of ``a.b.c`` not ``a.b`` again."""
    inside = node
    while isinstance(inside, ast.Attribute):
        inside = inside.value
    if inside is not node or isinstance(node, ast.Constant):
        yield node
    for child in ast.iter_child_nodes(inside):
        yield from outermost(child)


def is_torchs(name: str) -> bool:
    """Whether a full name is torch's and private."""
    is_name = re.fullmatch(r"torch(\.\w+)+", name) is not None
    return is_name and (is_private(name) or name.startswith(REMOVED_SOON))


def drawn(graph: Graph, with_files: bool = False) -> Iterator[str]:
    """The graph as lines of text: the highest floor first, each room with the rooms that it imports from."""
    arrows, behind = graph.arrows(), graph.behind()
    level = floors(arrows)
    for room in sorted(arrows, key=lambda room: (-level.get(room, 0), room)):
        targets = sorted(arrows[room], key=lambda target: (-level.get(target, 0), target))
        told = ", ".join(f"{target} ({len(behind[room, target])})" for target in targets)
        yield f"{level.get(room, '?'):>3}  {room:<14} {told}".rstrip()
        if with_files:
            yield from (f"{'':20}{a} -> {b}" for target in targets for a, b in behind[room, target])
    count, imported = sum(map(len, arrows.values())), sum(map(len, behind.values()))
    yield (
        f"{len(arrows)} rooms, {count} arrows between them, {imported} imports of files behind these, "
        f"{max(level.values(), default=0)} floors."
    )


def main(arguments: Iterable[str]) -> int:
    """Print the graph and the offences; their presence is the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", nargs="?", type=Path, default=Path(__file__).parents[1] / "sophq_func")
    parser.add_argument("--files", action="store_true", help="print the imports of files behind each arrow")
    parser.add_argument("--torch", action="store_true", help="look for private names of torch, too")
    options = parser.parse_args([*arguments])
    graph = read(options.package.resolve())
    found = [*offences(graph), *(private_names(graph) if options.torch else ())]
    print(*drawn(graph, options.files), *found, sep="\n")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
