"""Groups of calls that hardware runs as one, as data: ``ConvBnReLU2d`` and its kin (semantics.md 5.1).

Each pattern is a class, to be used as a type key in rules: ``Rule(type=sq.patterns.ConvBnReLU2d, ...)``. A new pattern
is one entry here.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sophq_func.graph import Graph, Node
from sophq_func.registry import Registry


class Fused:
    """A weight layer or normalization, and what follows it directly.

    Attributes:
      lead: class of the first module.
      norm: class of the normalization behind it, or ``None``.
      relu: whether a ReLU, module or function, comes last.
    """

    lead: type[nn.Module]
    norm: type[nn.Module] | None
    relu: bool


PATTERNS: Registry[type[Fused]] = Registry("fused pattern")


def _pattern(name: str, lead: type[nn.Module], norm: type[nn.Module] | None, relu: bool) -> type[Fused]:
    made = type(name, (Fused,), {"lead": lead, "norm": norm, "relu": relu, "__module__": __name__})
    PATTERNS.add(name, made, f"{name}_sophgo")
    return made


ConvBnReLU1d = _pattern("ConvBnReLU1d", nn.Conv1d, nn.BatchNorm1d, True)
ConvBnReLU2d = _pattern("ConvBnReLU2d", nn.Conv2d, nn.BatchNorm2d, True)
ConvBnReLU3d = _pattern("ConvBnReLU3d", nn.Conv3d, nn.BatchNorm3d, True)
ConvBn1d = _pattern("ConvBn1d", nn.Conv1d, nn.BatchNorm1d, False)
ConvBn2d = _pattern("ConvBn2d", nn.Conv2d, nn.BatchNorm2d, False)
ConvBn3d = _pattern("ConvBn3d", nn.Conv3d, nn.BatchNorm3d, False)
ConvReLU1d = _pattern("ConvReLU1d", nn.Conv1d, None, True)
ConvReLU2d = _pattern("ConvReLU2d", nn.Conv2d, None, True)
ConvReLU3d = _pattern("ConvReLU3d", nn.Conv3d, None, True)
LinearBn1d = _pattern("LinearBn1d", nn.Linear, nn.BatchNorm1d, False)
LinearReLU = _pattern("LinearReLU", nn.Linear, None, True)
ConvTransposeBnReLU2d = _pattern("ConvTransposeBnReLU2d", nn.ConvTranspose2d, nn.BatchNorm2d, True)
ConvTransposeBn2d = _pattern("ConvTransposeBn2d", nn.ConvTranspose2d, nn.BatchNorm2d, False)
ConvTransposeReLU2d = _pattern("ConvTransposeReLU2d", nn.ConvTranspose2d, None, True)
BnReLU2d = _pattern("BnReLU2d", nn.BatchNorm2d, None, True)
BnReLU3d = _pattern("BnReLU3d", nn.BatchNorm3d, None, True)


def fuse(graph: Graph) -> Graph:
    """``graph`` with each group of calls that some pattern matches made one node, which has the first call's name.

    So has the value that the last call makes. A member's value must have the next member as its only use. The longest
    pattern wins.
    """
    groups: dict[str, Node] = {}
    taken: set[str] = set()
    for node in graph:
        if node.name not in taken and (group := _longest(graph, node)) is not None:
            groups[node.name] = group
            taken.update(member.name for member in group.members)
    renamed = {group.members[-1].outputs[0]: name for name, group in groups.items()}
    nodes, values = {}, {}
    for node in graph:
        if node.name in taken and node.name not in groups:
            continue
        node = groups.get(node.name, node)
        operands = tuple(replace(o, value=renamed.get(o.value, o.value)) for o in node.operands)
        nodes[node.name] = replace(node, operands=operands)
        for value in node.members[-1].outputs if node.members else node.outputs:
            name = renamed.get(value, value)
            values[name] = replace(graph.values[value], name=name, node=node.name)
    return Graph(nodes, values, graph.modules, graph.opaque, graph.written)


def _longest(graph: Graph, lead: Node) -> Node | None:
    matches = [(members, PATTERNS.get(name)) for name in PATTERNS if (members := _match(graph, lead, PATTERNS.get(name)))]
    if not matches:
        return None
    members, pattern = max(matches, key=lambda match: len(match[0]))
    return replace(lead, type=pattern, members=tuple(members))


def _match(graph: Graph, lead: Node, pattern: type[Fused]) -> list[Node]:
    if not lead.is_module(pattern.lead) or (lead.is_module(nn.BatchNorm2d, nn.BatchNorm3d) and not _tracks(lead)):
        return []
    members = [lead]
    if pattern.norm is not None:
        norm = _only_user(graph, members[-1])
        channels = lead.options.get("out_channels", lead.options.get("out_features"))
        if norm is None or not norm.is_module(pattern.norm) or not _tracks(norm):
            return []
        if norm.options["num_features"] != channels:
            return []
        members.append(norm)
    if pattern.relu:
        relu = _only_user(graph, members[-1])
        if relu is None or not (relu.is_module(nn.ReLU) or relu.function == "relu"):
            return []
        members.append(relu)
    return members


def _tracks(norm: Node) -> bool:
    return bool(norm.options["affine"] and norm.options["track_running_stats"])


def _only_user(graph: Graph, node: Node) -> Node | None:
    if len(node.outputs) != 1 or graph.values[node.outputs[0]].output:
        return None
    users = graph.users(node.outputs[0])
    return users[0][0] if len(users) == 1 else None
