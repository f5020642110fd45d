"""The traced calls with their quantizers between them, and that in the DOT language."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from sophq_func.capture.graph import Graph
from sophq_func.config.names import is_weight_quantizer, value_quantizer
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.text import short
from sophq_func.planning.weights import WeightPlace

OUTPUT = "output"
"""Name of the call that stands for what the model returns."""


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
    """One value on its way from the call that makes it to one that takes it, through quantizers in order."""

    source: str
    target: str
    through: tuple[str, ...] = ()


class Wiring(NamedTuple):
    """The traced model with its quantizers, in names alone. Pictures are drawn from it, and tensors of files named."""

    calls: tuple[Call, ...] = ()
    edges: tuple[Edge, ...] = ()


NO_WIRING = Wiring()


def wiring(
    graph: Graph, weights: Iterable[WeightPlace], quantizers: Container[str], inputs: Mapping[tuple[str, int], str]
) -> Wiring:
    """The calls of a graph, and each way of each value from one to another.

    Args:
      graph: fused.
      weights: each weight with the calls that use it.
      quantizers: those that there are.
      inputs: quantizers before single calls, by call and operand.
    """
    used: dict[str, list[str]] = {}
    for weight in weights:
        for call in weight.calls if weight.site.quantizer in quantizers else ():
            used.setdefault(call.name, []).append(weight.site.quantizer)
    kinds = {node.name: node.type.__name__ if node.type is not None else node.function for node in graph}
    calls = [Call(name, kind, tuple(used.get(name, ()))) for name, kind in kinds.items()]

    def edge(value: str, target: str, before: str = "") -> Edge:
        behind = value_quantizer(value)
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


def united(wirings: Sequence[Wiring]) -> Wiring:
    """The wiring of several examples: each call and each way once."""
    calls = {call.name: call for own in wirings for call in own.calls}
    edges = dict.fromkeys(edge for own in wirings for edge in own.edges)
    return Wiring(tuple(calls.values()), tuple(edges))


def ways(edges: Iterable[Edge]) -> list[tuple[str, str]]:
    """Each step of each value, from a call or quantizer to the next; steps that values share are there once."""
    steps: dict[tuple[str, str], None] = {}
    for edge in edges:
        stops = (edge.source, *edge.through, edge.target)
        steps.update(dict.fromkeys(pairwise(stops)))
    return list(steps)


def dot(wiring: Wiring, configs: Mapping[str, QuantizerConfig]) -> str:
    """The graph in the DOT language: calls in boxes, quantizers in rounded colored ones, dashed where they only observe."""
    lines = ["digraph plan {", "  rankdir=TB;", '  node [fontname="Helvetica", fontsize=10];']
    for call in wiring.calls:
        label = f"{call.name}\\n{call.does}" if call.does else call.name
        lines.append(f"  {_quoted(call.name)} [label={_quoted(label)}, shape={'box' if call.does else 'ellipse'}];")
    for name, config in configs.items():
        style = "rounded,dashed" if config.observe_only else "rounded,filled"
        color = WEIGHT_COLOR if is_weight_quantizer(name) else ACTIVATION_COLOR
        text = f'label={_quoted(short(config))}, tooltip={_quoted(name)}, style="{style}", fillcolor="{color}"'
        lines.append(f"  {_quoted(name)} [shape=box, {text}, height=0.2];")
    steps = ways(wiring.edges) + [(weight, call.name) for call in wiring.calls for weight in call.weights]
    lines += [f"  {_quoted(source)} -> {_quoted(target)};" for source, target in steps]
    return "\n".join([*lines, "}"])


WEIGHT_COLOR, ACTIVATION_COLOR = "#f6c685", "#a8d0f0"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
