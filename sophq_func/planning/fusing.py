"""Join the calls that match a fused pattern into one node of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.patterns import PATTERNS, Fused
from sophq_func.core.operations import canonical, family

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse(graph: Graph, further: Iterable[type[Fused]] = ()) -> Graph:
    """``graph`` with each group of calls that some pattern matches made one node, which has the first call's name.

    So has the value that the last call makes. A member's value must have the next member as its only use. The longest
    pattern wins; among equals a registered one.

    Args:
      graph: as traced.
      further: patterns beside those that are registered.
    """
    patterns = [*(PATTERNS.get(name) for name in PATTERNS), *further]
    groups: dict[str, Node] = {}
    taken: set[str] = set()
    # Calls of one class, or of one function, can start the same groups: which ones is found out once.
    starting: dict[tuple[str, type | None, str], list[type[Fused]]] = {}
    for node in graph:
        key = node.kind, node.type, node.function
        if key not in starting:
            starting[key] = [pattern for pattern in patterns if _calls(node, pattern.parts[0])]
        if node.name not in taken and (group := _longest(graph, node, starting[key])) is not None:
            groups[node.name] = group
            taken.update(member.name for member in group.members)
    renamed = {group.members[-1].outputs[0]: name for name, group in groups.items()}
    nodes, values = {}, {}
    for node in graph:
        if node.name in taken and node.name not in groups:
            continue
        node = groups.get(node.name, node)
        if any(operand.value in renamed for operand in node.operands):
            operands = tuple(replace(o, value=renamed.get(o.value, o.value)) for o in node.operands)
            node = replace(node, operands=operands)
        nodes[node.name] = node
        for value in node.members[-1].outputs if node.members else node.outputs:
            made, name = graph.values[value], renamed.get(value, value)
            is_same = (made.name, made.node) == (name, node.name)
            values[name] = made if is_same else replace(made, name=name, node=node.name)
    return Graph(nodes, values, graph.modules, graph.opaque, graph.written, shapes=graph.shapes)


def _longest(graph: Graph, lead: Node, patterns: Iterable[type[Fused]]) -> Node | None:
    matches = [(members, pattern) for pattern in patterns if (members := _match(graph, lead, pattern))]
    if not matches:
        return None
    members, pattern = max(matches, key=lambda match: len(match[0]))
    return replace(lead, type=pattern, members=tuple(members))


def _match(graph: Graph, lead: Node, pattern: type[Fused]) -> list[Node]:
    """The members of a group that starts at ``lead``, a call of the first part; empty where the others do not follow."""
    members = [lead]
    for part in pattern.parts[1:]:
        node = _only_user(graph, members[-1])
        if node is None or not (_calls(node, part) or (isinstance(part, type) and family(part) == node.operation != "")):
            return []
        members.append(node)
    return members if all(_foldable(lead, member) for member in members) else []


def _calls(node: Node, part: Any) -> bool:
    return node.is_module(part) if isinstance(part, type) else node.operation == canonical(part)


def _foldable(lead: Node, member: Node) -> bool:
    """Whether a member, if it is a BatchNorm, has statistics and weights of its own for each of the lead's channels."""
    if not member.is_module(*BATCH_NORMS):
        return member.operation != "batch_norm"
    channels = lead.options.get("out_channels", lead.options.get("out_features", member.options["num_features"]))
    tracks = member.options["affine"] and member.options["track_running_stats"]
    return bool(tracks and member.options["num_features"] == channels)


def _only_user(graph: Graph, node: Node) -> Node | None:
    if len(node.outputs) != 1 or graph.values[node.outputs[0]].output:
        return None
    users = graph.users(node.outputs[0])
    return users[0][0] if len(users) == 1 else None
