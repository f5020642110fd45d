"""A plan as a graph in the DOT language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from sophq_func.config.names import is_weight_quantizer
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.text import short


class Call(NamedTuple):
    """One call of the traced model, or one input or output, for pictures.

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


def ways(edges: Iterable[Edge]) -> list[tuple[str, str]]:
    """Each step of each value, from a call or quantizer to the next; steps that values share are there once."""
    steps: dict[tuple[str, str], None] = {}
    for edge in edges:
        stops = (edge.source, *edge.through, edge.target)
        steps.update(dict.fromkeys(pairwise(stops)))
    return list(steps)


def dot(calls: Iterable[Call], edges: Iterable[Edge], configs: Mapping[str, QuantizerConfig]) -> str:
    """The graph in the DOT language: calls in boxes, quantizers in rounded colored ones, dashed where they only observe."""
    lines = ["digraph plan {", "  rankdir=TB;", '  node [fontname="Helvetica", fontsize=10];']
    for call in calls:
        label = f"{call.name}\\n{call.does}" if call.does else call.name
        lines.append(f"  {_quoted(call.name)} [label={_quoted(label)}, shape={'box' if call.does else 'ellipse'}];")
    for name, config in configs.items():
        style = "rounded,dashed" if config.observe_only else "rounded,filled"
        color = WEIGHT_COLOR if is_weight_quantizer(name) else ACTIVATION_COLOR
        text = f'label={_quoted(short(config))}, tooltip={_quoted(name)}, style="{style}", fillcolor="{color}"'
        lines.append(f"  {_quoted(name)} [shape=box, {text}, height=0.2];")
    steps = ways(edges) + [(weight, call.name) for call in calls for weight in call.weights]
    lines += [f"  {_quoted(source)} -> {_quoted(target)};" for source, target in steps]
    return "\n".join([*lines, "}"])


WEIGHT_COLOR, ACTIVATION_COLOR = "#f6c685", "#a8d0f0"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
