"""The residual stream of a model: values joined by additions, what writes to them and what reads them, as the graph says."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from sophq_func.algorithms._pairs import Fold, Linear, Skipped, linear_of, parameters_of
from sophq_func.core.operations import DROPOUTS

if TYPE_CHECKING:
    from sophq_func.capture.graph import Graph, Node

KEEPS = DROPOUTS | {"clone", "contiguous", "detach", "float", "to", "type_as"}
"""Operations whose result lies in the same stream as their operand."""

OF_RMS = KEEPS | {"add", "div", "mean", "mul", "pow", "rsqrt", "sqrt", "square"}
"""Operations that a norm by the root mean square is written with."""


class Norm(NamedTuple):
    """A norm of the stream.

    Attributes:
      weight: canonical name of its weight.
      readers: the linear layers that read what it returns.
    """

    weight: str
    readers: tuple[Linear, ...]


class Stream(NamedTuple):
    """Values that can be rotated together.

    Attributes:
      channels: of each value.
      writers: parameters that are rotated, each along one axis: embeddings, and rows and biases of linear layers.
      norms: that read it, by the root mean square.
      values: names of all values of the stream.
    """

    channels: int
    writers: tuple[Fold, ...]
    norms: tuple[Norm, ...]
    values: tuple[str, ...]


def streams_of(graph: Graph) -> tuple[list[Stream], list[Skipped]]:
    """The streams of a model that can be rotated, and those that cannot, with the reason."""
    finder = _Finder(graph)
    streams, skipped = [], []
    for values in finder.groups():
        found = finder.stream(values)
        if isinstance(found, Stream):
            streams.append(found)
        else:
            skipped.append(Skipped(values[0], found))
    return streams, skipped


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.linear = {node.name: found for node in graph if (found := linear_of(graph, node)) is not None}
        self.uses = Counter(name for node in graph for name in parameters_of(node))

    def groups(self) -> list[list[str]]:
        """Values that additions join, in execution order, each group with two addends at least."""
        group: dict[str, str] = {name: name for name in self.graph.values}

        def root(name: str) -> str:
            while group[name] != name:
                name = group[name]
            return name

        added = set()
        for node in self.graph:
            joined = self._joined(node)
            for value in joined:
                group[root(value)] = root(node.outputs[0])
            if len(joined) > 1:
                added.add(node.outputs[0])
        by_root: dict[str, list[str]] = {}
        for name in self.graph.values:
            by_root.setdefault(root(name), []).append(name)
        return [names for names in by_root.values() if added & set(names)]

    def _joined(self, node: Node) -> list[str]:
        """The operands of a call that lie in the same stream as its result."""
        if len(node.outputs) != 1:
            return []
        shape = self.graph.values[node.outputs[0]].shape
        same = [operand.value for operand in node.operands if operand.value and operand.shape == shape]
        if node.function == "add" and len(same) == 2:
            return same
        is_kept = node.operation in KEEPS and len(node.operands) == 1
        return same if is_kept else []

    def stream(self, values: list[str]) -> Stream | str:
        """The stream of a group, or why it cannot be rotated."""
        inside = set(values)
        channels = self.graph.values[values[0]].shape[-1]
        if any(self.graph.values[name].output for name in values):
            return "the model returns it"
        writers: list[Fold] = []
        norms: dict[str, Norm] = {}
        for name in values:
            node = self.graph.producer(name)
            if not any(operand.value in inside for operand in node.operands):
                found = self._writers(node)
                if isinstance(found, str):
                    return found
                writers += found
            for user, _ in self.graph.users(name):
                if user.outputs and user.outputs[0] in inside:
                    continue
                problem = self._read(user, channels, norms)
                if problem:
                    return problem
        if not norms:
            return "no norm reads it"
        touched = [fold.parameter for fold in writers] + [r.weight for norm in norms.values() for r in norm.readers]
        shared = [name for name in (*touched, *norms) if self.uses[name] > 1]
        if shared:
            return f"{shared[0]} is used elsewhere, too; give each use a parameter of its own"
        return Stream(channels, tuple(writers), tuple(norms.values()), tuple(values))

    def _writers(self, node: Node) -> list[Fold] | str:
        """The parameters that make a value of the stream, with the axes of its channels."""
        if node.name in self.linear:
            linear = self.linear[node.name]
            return [Fold(linear.weight, linear.rows), *([Fold(linear.bias, 0)] if linear.bias else [])]
        if node.operation == "embedding" and "weight" in node.parameters:
            return [Fold(node.parameters["weight"], 1)]
        return f"{node.name} makes it"

    def _read(self, user: Node, channels: int, norms: dict[str, Norm]) -> str:
        """Add the norm that a call belongs to; returns why that is not possible, or nothing."""
        pending, seen = [user], set()
        while pending:
            node = pending.pop()
            if node.name in seen:
                continue
            seen.add(node.name)
            weight = self._norm_weight(node, channels)
            if weight:
                readers = [self.linear.get(reader.name) for reader, _ in self.graph.users(node.outputs[0])]
                known = tuple(reader for reader in readers if reader is not None)
                if len(known) < len(readers) or self.graph.values[node.outputs[0]].output:
                    return f"what {node.name} returns is read by more than linear layers"
                norms[weight] = Norm(weight, known)
            elif node.kind == "function" and node.function in OF_RMS and not any(o.parameter for o in node.operands):
                pending += [reader for value in node.outputs for reader, _ in self.graph.users(value)]
            else:
                return f"{node.name} reads it, which is no norm by the root mean square"
        return ""

    def _norm_weight(self, node: Node, channels: int) -> str:
        """The weight with which a norm ends; empty where a call ends none."""
        if node.kind == "module" and node.operation == "rms_norm":
            return node.parameters.get("weight", "")
        if node.function in ("mul", "rms_norm"):
            return next((o.parameter for o in node.operands if o.parameter and o.shape == (channels,)), "")
        return ""
