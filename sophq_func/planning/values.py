"""Sites of values: what rules see of a call, and where the quantizer behind a value sits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sophq_func.capture.graph import Graph, Node
from sophq_func.config.names import value_quantizer
from sophq_func.config.site import Site
from sophq_func.planning.weights import node_types, pattern_name


def node_site(graph: Graph, node: Node) -> Site:
    """The site that rules see when they say whether a call asks for quantizers."""
    return Site(
        quantizer=value_quantizer(node.name),
        role="activation",
        value=node.name,
        path=node.path,
        paths=(*node.paths, *(path for m in node.members[1:] if m.kind == "module" for path in m.paths)),
        types=node_types(graph, node),
        pattern=pattern_name(node),
        members=tuple(m.name for m in node.members),
        function=node.function,
        operation=node.operation,
        also=node.also,
        groups=int(node.options.get("groups", 1)),
    )


def activation_site(graph: Graph, node: Node, value: str) -> Site:
    """The site behind one of the values that a call makes."""
    last, made = node.last, graph.values[value]
    return replace(
        node_site(graph, node),
        quantizer=value_quantizer(value),
        value=value,
        anchor=(last.path, last.function, last.call),
        output=made.index,
        shape=made.shape,
        argument=node.argument,
        aliases=aliases(node, value, value_quantizer),
    )


def aliases(node: Node, value: str, quantizer_of: Callable[[str], str]) -> tuple[str, ...]:
    """Further names of a module's value, and of the quantizer on it, by the other paths of the module."""
    if node.kind != "module" or not node.path or not value.startswith(node.path):
        return ()
    others = [f"{path}{value.removeprefix(node.path)}" for path in node.paths if path != node.path]
    return (*others, *(quantizer_of(other) for other in others))
