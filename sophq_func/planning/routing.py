"""Before the first step, where there are several examples: tell calls apart where their numbers mean nothing.

A call is known by its place (a module, or a function in a module) and by its number among the calls of that place. Where
examples take different ways, numbers do not agree: the second ``x[index]`` of a mixture of experts is the input of expert 1
with one batch, and of expert 3 with another. Such calls are told apart by the module that their scope called before, see
:attr:`sophq_func.capture.graph.Node.after`; and a value that they make is quantized where it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.capture.naming import apart
from sophq_func.config.names import input_quantizer
from sophq_func.config.strategies import Placement, SharedInput
from sophq_func.planning.strategies import moves

Place = tuple[str, str]
"""A module, or a function in a module: its path, and the function, empty for the module's own calls."""


class Calls(NamedTuple):
    """The calls of a place in one example, first to last."""

    graph: Graph
    nodes: Sequence[Node]


def told_apart(graphs: Sequence[Graph]) -> list[Graph]:
    """The graphs of several examples, with the calls of varying places told apart by what was called before.

    Args:
      graphs: as traced.
    """
    calls: dict[Place, list[Calls]] = {}
    for graph in graphs:
        for place, nodes in _calls(graph).items():
            calls.setdefault(place, []).append(Calls(graph, nodes))
    varying = {place for place, of_examples in calls.items() if _vary(of_examples)}
    return [_marked(graph, varying) for graph in graphs] if varying else list(graphs)


def _calls(graph: Graph) -> dict[Place, list[Node]]:
    """The counted calls of each place; not those of modules with parameters, which their paths tell apart."""
    calls: dict[Place, list[Node]] = {}
    for node in graph:
        if node.kind != "input" and node.counted and not _is_layer(node):
            calls.setdefault((node.path, node.function), []).append(node)
    return calls


def _is_layer(node: Node) -> bool:
    """Whether a call is that of a module with parameters, be they its own or those of its parametrizations."""
    return bool(node.parameters or node.factors)


def _vary(examples: Sequence[Calls]) -> bool:
    """Whether a number stands for different calls of a place in different examples."""
    longest = max(examples, key=lambda calls: len(calls.nodes))
    return any(calls is not longest and not _agree(calls, longest) for calls in examples)


def _agree(one: Calls, other: Calls) -> bool:
    """Whether calls with one number come at one point of their scope, and have the same readers, or one more of them."""
    # what is called once in each example is found without a number, wherever it comes
    is_single = len(one.nodes) == len(other.nodes) == 1
    for node, twin in zip(one.nodes, other.nodes, strict=False):
        if node.after != twin.after and not is_single:
            return False
        readers, of_twin = _readers(one.graph, node), _readers(other.graph, twin)
        if not (readers <= of_twin or of_twin <= readers):
            return False
    return True


def _readers(graph: Graph, node: Node) -> set[tuple[str, str, str]]:
    """The modules with parameters that read what a call makes, and other calls that come after another such module.

    Through calls that come after the same module the search goes on: a view that is read by expert 1 is not the view that
    is read by expert 3.
    """
    readers: set[tuple[str, str, str]] = set()
    pending, seen = [node], {node.name}
    while pending:
        for user, _ in _users(graph, pending.pop()):
            if _is_layer(user):
                readers.add((user.path, "", ""))
            elif user.after != node.after or user.path != node.path:
                readers.add((user.path, user.function, user.after))
            elif user.name not in seen:
                seen.add(user.name)
                pending.append(user)
    return readers


def _users(graph: Graph, node: Node) -> Iterator[tuple[Node, Operand]]:
    """Each call that takes what a call makes, and as which operand."""
    for value in node.outputs:
        yield from graph.users(value)


def _marked(graph: Graph, varying: set[Place]) -> Graph:
    """A graph with the calls of some places told apart."""
    counted: Counter[Place] = Counter()
    named: Counter[Place] = Counter()  # calls that do not count have names, too
    changed: dict[str, Node] = {}
    for node in graph:
        if node.kind == "input" or (node.path, node.function) not in varying:
            continue
        marked = replace(node, told_apart=True)
        place = (node.path, marked.step)
        name = apart(node.path, node.function, node.after, named[place])
        changed[node.name] = replace(marked, call=counted[place], name=name)
        counted[place] += node.counted
        named[place] += 1
    return graph.changed(changed)


def read_apart(graph: Graph, placement: Placement) -> Placement:
    """A placement in which values of calls that are told apart are quantized where they are read, each reader for itself.

    What a scope computes before it calls an expert comes after another expert, or none; so it is known by its reader only.
    A value that nothing reads, such as a result of the model, stays as it is.

    Args:
      graph: fused.
      placement: by the strategy and the rules.
    """
    chosen = dict(placement.chosen)
    inputs = dict(placement.inputs)
    for value, why in placement.chosen.items():
        readers = _groups(graph, value) if _is_read_apart(graph, value) else {}
        if not readers:
            continue
        del chosen[value]
        for uses in readers.values():
            consumer, slot = uses[0]
            # by its slot, and not by its order, a quantizer has one name in all examples
            inputs[input_quantizer(consumer, slot)] = SharedInput(consumer, tuple(uses), why)
    return placement._replace(chosen=chosen, inputs=inputs)


def _is_read_apart(graph: Graph, value: str) -> bool:
    """Whether a call that is told apart makes a value, or selects a part of it that has a quantizer of its own."""
    if graph.producer(value).last.told_apart:
        return True
    return any(moves(user) and user.told_apart for user, _ in graph.users(value))


def _groups(graph: Graph, value: str) -> Mapping[str, list[tuple[str, int]]]:
    """The calls that read a value, perhaps through calls that only move it, by the module that the value's scope calls.

    Returns:
      For each such module, and for each call in the scope itself, the names of the calls and the operands' slots.
    """
    scope = graph.producer(value).path
    groups: dict[str, list[tuple[str, int]]] = {}
    pending = [value]
    while pending:
        for user, operand in graph.users(pending.pop()):
            is_moved = moves(user) and operand.slot == 0
            if is_moved and not user.told_apart:
                pending += user.outputs
            elif not is_moved:
                groups.setdefault(_reader(graph, scope, user), []).append((user.name, operand.slot))
    return groups


def _reader(graph: Graph, scope: str, user: Node) -> str:
    """The module called in a scope in which a call is made; for a call in the scope itself, the name of the call."""
    prefix = f"{scope}." if scope else ""
    if user.path == scope or not user.path.startswith(prefix):
        return user.name
    parts = user.path.removeprefix(prefix).split(".")
    for length in range(1, len(parts) + 1):
        path = prefix + ".".join(parts[:length])
        if not issubclass(graph.modules.get(path, nn.Module), nn.ModuleList | nn.ModuleDict):
            return path
    return user.name
