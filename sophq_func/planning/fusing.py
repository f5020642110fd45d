"""Before the first step: join the calls that match a fused pattern into one node of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.patterns import PATTERNS, Fused, Part
from sophq_func.core.operations import canonical, family

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Modules that can be folded into the weight of the call before them."""


def fuse(graph: Graph, further: Iterable[type[Fused]] = ()) -> Graph:
    """``graph`` with each group of calls that a pattern matches as one node.

    The node has the name of the group's first call, and so has the value that the last call makes. Each member but the last
    must have the next one as the only user of its value. Of several patterns the longest counts, of equally long ones the
    first, where registered ones come before further ones.

    Args:
      graph: as traced.
      further: patterns beside those that are registered.
    """
    patterns = [*(PATTERNS.get(name) for name in PATTERNS), *further]
    groups = _groups(graph, patterns)
    members = {member.name for group in groups.values() for member in group.members}
    renamed = {group.members[-1].outputs[0]: name for name, group in groups.items()}
    nodes, values = {}, {}
    for node in graph:
        if node.name in groups:
            node = groups[node.name]
        elif node.name in members:
            continue
        # Most nodes and values stay as they are, and copies of dataclasses are slow.
        if any(operand.value in renamed for operand in node.operands):
            operands = tuple(replace(o, value=renamed.get(o.value, o.value)) for o in node.operands)
            node = replace(node, operands=operands)
        nodes[node.name] = node
        for old_name in node.last.outputs:
            value, name = graph.values[old_name], renamed.get(old_name, old_name)
            is_same = (value.name, value.node) == (name, node.name)
            values[name] = value if is_same else replace(value, name=name, node=node.name)
    return Graph(
        nodes,
        values,
        graph.modules,
        graph.opaque,
        graph.written,
        shapes=graph.shapes,
        kinds=graph.kinds,
        buffers=graph.buffers,
    )


def _groups(graph: Graph, patterns: Sequence[type[Fused]]) -> dict[str, Node]:
    """By the name of its first call, the node of each group; no call is in two of them."""
    groups: dict[str, Node] = {}
    taken: set[str] = set()
    # Calls of one class, or of one function, can start the same groups: which ones is found out once.
    starting: dict[tuple[str, type | None, str], list[type[Fused]]] = {}
    for node in graph:
        key = node.kind, node.type, node.function
        if key not in starting:
            starting[key] = [pattern for pattern in patterns if _calls(node, pattern.parts[0])]
        if node.name in taken:
            continue
        group = _longest_group(graph, node, starting[key])
        if group is not None:
            groups[node.name] = group
            taken.update(member.name for member in group.members)
    return groups


def _longest_group(graph: Graph, lead: Node, patterns: Iterable[type[Fused]]) -> Node | None:
    """The node of the longest group that starts at a call; ``None`` without any."""
    longest: list[Node] = []
    longest_pattern: type[Fused] | None = None
    for pattern in patterns:
        members = _members(graph, lead, pattern)
        if len(members) > len(longest):
            longest, longest_pattern = members, pattern
    return replace(lead, type=longest_pattern, members=tuple(longest)) if longest else None


def _members(graph: Graph, lead: Node, pattern: type[Fused]) -> list[Node]:
    """The members of a group that starts at ``lead``, a call of the first part; empty where the others do not follow."""
    members = [lead]
    for part in pattern.parts[1:]:
        node = _only_user(graph, members[-1])
        if node is None or not (_calls(node, part) or _does_the_same(node, part)):
            return []
        members.append(node)
    return members if all(_can_be_folded(lead, member) for member in members) else []


def _calls(node: Node, part: Part) -> bool:
    """Whether a node calls a module of a class, or does the operation of a function."""
    return node.is_module(part) if isinstance(part, type) else node.operation == canonical(part)


def _does_the_same(node: Node, part: Part) -> bool:
    """Whether a node calls the function that does what modules of a class do."""
    return isinstance(part, type) and node.operation != "" and family(part) == node.operation


def _can_be_folded(lead: Node, member: Node) -> bool:
    """Whether a member is no BatchNorm, or one with statistics and weights for each of the lead's channels."""
    if not member.is_module(*BATCH_NORMS):
        return member.operation != "batch_norm"
    features = member.options["num_features"]
    channels = lead.options.get("out_channels", lead.options.get("out_features", features))
    has_both = member.options["affine"] and member.options["track_running_stats"]
    return bool(has_both) and features == channels


def _only_user(graph: Graph, node: Node) -> Node | None:
    """The only call that takes the only value of a node; ``None`` where there are more, or the model returns the value."""
    if len(node.outputs) != 1 or graph.values[node.outputs[0]].output:
        return None
    users = graph.users(node.outputs[0])
    return users[0][0] if len(users) == 1 else None
