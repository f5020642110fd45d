"""Groups of calls that hardware runs as one, as data: ``ConvBnReLU2d`` and its kin (semantics.md 5.1).

Each pattern is a class, to be used as a type key in rules: ``Rule(type=sq.patterns.ConvBnReLU2d, ...)``; its name with
``_sophgo`` behind it is an alias. A new pattern is one entry here, or :func:`fused` in ``QuantConfig(patterns=...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from sophq_func.errors import ConfigError, explain
from sophq_func.functions import canonical, family
from sophq_func.graph import Graph, Node
from sophq_func.registry import Registry

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Fused:
    """Calls that follow one another directly; each but the last is read by the next alone.

    Attributes:
      parts: a module class or function for each call. A BatchNorm second is folded into the weight of the first.
    """

    parts: tuple[Any, ...]


PATTERNS: Registry[type[Fused]] = Registry("fused pattern")


def fused(name: str, *parts: type[nn.Module] | Callable[..., Any] | str) -> type[Fused]:
    """A fused pattern for ``QuantConfig(patterns=...)`` and ``Rule(type=...)``.

    Args:
      name: of the pattern, as string type keys spell it.
      *parts: two or more module classes or functions, in the order in which they are called. A class stands for the
        function of the same operation, and the other way round, but for the first.

    Raises:
      ConfigError: fewer than two parts, or one that is neither; a name that is taken.

    Example:
      >>> fused("LinearGELU", nn.Linear, nn.GELU).parts
      (<class 'torch.nn.modules.linear.Linear'>, <class 'torch.nn.modules.activation.GELU'>)
    """
    if not isinstance(name, str) or not name.isidentifier() or name in PATTERNS:
        raise ConfigError(explain("fused", "this name", got=name, allowed="an identifier that is not taken"))
    return _fused(name, *parts)


def _fused(name: str, *parts: Any) -> type[Fused]:
    if len(parts) < 2 or not all(map(_is_part, parts)):
        raise ConfigError(explain(f"fused {name!r}", "these parts", got=parts, allowed="two or more classes or functions"))
    return type(name, (Fused,), {"parts": parts, "__module__": __name__})


def _is_part(part: Any) -> bool:
    return issubclass(part, nn.Module) if isinstance(part, type) else callable(part) or isinstance(part, str)


def _pattern(name: str, *parts: Any, aliases: tuple[str, ...] = ()) -> type[Fused]:
    made = _fused(name, *parts)
    PATTERNS.add(name, made, f"{name}_sophgo", *aliases)
    return made


ConvBnReLU1d = _pattern("ConvBnReLU1d", nn.Conv1d, nn.BatchNorm1d, nn.ReLU)
ConvBnReLU2d = _pattern("ConvBnReLU2d", nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
ConvBnReLU3d = _pattern("ConvBnReLU3d", nn.Conv3d, nn.BatchNorm3d, nn.ReLU)
ConvBn1d = _pattern("ConvBn1d", nn.Conv1d, nn.BatchNorm1d)
ConvBn2d = _pattern("ConvBn2d", nn.Conv2d, nn.BatchNorm2d)
ConvBn3d = _pattern("ConvBn3d", nn.Conv3d, nn.BatchNorm3d)
ConvReLU1d = _pattern("ConvReLU1d", nn.Conv1d, nn.ReLU)
ConvReLU2d = _pattern("ConvReLU2d", nn.Conv2d, nn.ReLU)
ConvReLU3d = _pattern("ConvReLU3d", nn.Conv3d, nn.ReLU)
LinearBn1d = _pattern("LinearBn1d", nn.Linear, nn.BatchNorm1d)
LinearReLU = _pattern("LinearReLU", nn.Linear, nn.ReLU)
ConvTransposeBnReLU2d = _pattern("ConvTransposeBnReLU2d", nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU)
ConvTransposeBn2d = _pattern("ConvTransposeBn2d", nn.ConvTranspose2d, nn.BatchNorm2d)
ConvTransposeReLU2d = _pattern("ConvTransposeReLU2d", nn.ConvTranspose2d, nn.ReLU)
BnReLU2d = _pattern("BnReLU2d", nn.BatchNorm2d, nn.ReLU, aliases=("BNReLU2d",))
BnReLU3d = _pattern("BnReLU3d", nn.BatchNorm3d, nn.ReLU, aliases=("BNReLU3d",))


def __getattr__(name: str) -> type[Fused]:
    """The pattern of an alias: ``sq.patterns.ConvBnReLU2d_sophgo``."""
    if name not in PATTERNS:
        raise AttributeError(f"no fused pattern {name!r} in {__name__}")
    return PATTERNS.get(name)


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
    for node in graph:
        if node.name not in taken and (group := _longest(graph, node, patterns)) is not None:
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


def _longest(graph: Graph, lead: Node, patterns: Iterable[type[Fused]]) -> Node | None:
    matches = [(members, pattern) for pattern in patterns if (members := _match(graph, lead, pattern))]
    if not matches:
        return None
    members, pattern = max(matches, key=lambda match: len(match[0]))
    return replace(lead, type=pattern, members=tuple(members))


def _match(graph: Graph, lead: Node, pattern: type[Fused]) -> list[Node]:
    """The members of a group that starts at ``lead``; empty where the pattern does not match."""
    first, *others = pattern.parts
    if not _calls(lead, first):
        return []
    members = [lead]
    for part in others:
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
