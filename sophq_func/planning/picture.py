"""The graph of a plan: the traced calls, the quantizers between them, and a drawing in the DOT language."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.names import is_weight_quantizer, value_quantizer
from sophq_func.core.texts import printable
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.text import short
from sophq_func.planning.weights import WeightPlace

WEIGHT_COLOR, ACTIVATION_COLOR = "#f6c685", "#a8d0f0"
"""Orange and blue, light enough for black text."""

OUTPUT = "output"
"""Name of the call that represents what the model returns."""


class Call(NamedTuple):
    """One call of the traced model, or one input or output.

    Attributes:
      name: of the call.
      does: what it does: class names or a function's name; empty for inputs and outputs.
      weights: its weight quantizers.
    """

    name: str
    does: str
    weights: tuple[str, ...] = ()


class Edge(NamedTuple):
    """A value that passes from the call that makes it to one that takes it.

    Attributes:
      source: name of the call that makes the value.
      target: name of the call that takes it.
      through: names of the quantizers that it passes, in order.
    """

    source: str
    target: str
    through: tuple[str, ...] = ()


class Wiring(NamedTuple):
    """The traced model with its quantizers, in names alone. It is drawn in pictures, and names tensors in exported files."""

    calls: tuple[Call, ...] = ()
    edges: tuple[Edge, ...] = ()


NO_WIRING = Wiring()


def wiring(
    graph: Graph,
    weights: Iterable[WeightPlace],
    quantizers: Container[str],
    inputs: Mapping[tuple[str, int], str],
    replaced: Mapping[str, str] = {},
) -> Wiring:
    """The calls of a graph, and an edge for each use of a value.

    Args:
      graph: fused.
      weights: each weight with the calls that use it.
      quantizers: names of the quantizers of the plan.
      inputs: quantizers before single calls, by the call's name and the operand's slot.
      replaced: by name of a quantizer that is left out, the one that acts in its place.
    """
    weights_of: dict[str, list[str]] = {}
    for weight in weights:
        name = replaced.get(weight.site.quantizer, weight.site.quantizer)
        if name in quantizers:
            for call in weight.calls:
                weights_of.setdefault(call.name, []).append(name)
    calls = []
    for node in graph:
        does = node.type.__name__ if node.type is not None else node.function
        calls.append(Call(node.name, does, tuple(weights_of.get(node.name, ()))))

    def edge(value: str, target: str, before: str = "") -> Edge:
        own = value_quantizer(value)
        behind = replaced.get(own, own)
        through = (behind if behind in quantizers else "", before)
        return Edge(graph.producer(value).name, target, tuple(filter(None, through)))

    taken = [
        edge(operand.value, node.name, inputs.get((node.name, operand.slot), ""))
        for node in graph
        for operand in node.operands
        if operand.value
    ]
    returned = [edge(value.name, OUTPUT) for value in graph.values.values() if value.output]
    return Wiring((*calls, Call(OUTPUT, "")), (*taken, *returned))


def merged(wirings: Sequence[Wiring]) -> Wiring:
    """The wiring of several examples: each call and each edge once."""
    calls = {call.name: call for wiring in wirings for call in wiring.calls}
    edges = dict.fromkeys(edge for wiring in wirings for edge in wiring.edges)
    return Wiring(tuple(calls.values()), tuple(edges))


def ways(edges: Iterable[Edge]) -> list[tuple[str, str]]:
    """The steps of all edges from a call or quantizer to the next, each once, as edges share quantizers."""
    steps: dict[tuple[str, str], None] = {}
    for edge in edges:
        stops = (edge.source, *edge.through, edge.target)
        steps.update(dict.fromkeys(pairwise(stops)))
    return list(steps)


def dot(wiring: Wiring, configs: Mapping[str, QuantizerConfig]) -> str:
    """The graph in the DOT language: calls are boxes, quantizers rounded colored ones; dashed ones only observe."""
    lines = ["digraph plan {", "  rankdir=TB;", '  node [fontname="Helvetica", fontsize=10];']
    for call in wiring.calls:
        label = f"{printable(call.name)}\n{printable(call.does)}" if call.does else call.name
        lines.append(f"  {_quoted(call.name)} [label={_quoted(label)}, shape={'box' if call.does else 'ellipse'}];")
    for name, config in configs.items():
        style = "rounded,dashed" if config.observe_only else "rounded,filled"
        color = WEIGHT_COLOR if is_weight_quantizer(name) else ACTIVATION_COLOR
        text = f'label={_quoted(short(config))}, tooltip={_quoted(name)}, style="{style}", fillcolor="{color}"'
        lines.append(f"  {_quoted(name)} [shape=box, {text}, height=0.2];")
    steps = ways(wiring.edges) + [(weight, call.name) for call in wiring.calls for weight in call.weights]
    lines += [f"  {_quoted(source)} -> {_quoted(target)};" for source, target in steps]
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    # a double quote would end the text, and a backslash before it would not
    lines = (printable(line).replace("\\", "\\\\").replace('"', "'") for line in text.split("\n"))
    return '"' + "\\n".join(lines) + '"'
