"""Second step: which weights are quantized. One site a parameter, and one a weight that is computed in the forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import weight_quantizer
from sophq_func.config.site import CallSite, ComputedSite, WeightSite, class_names
from sophq_func.config.strategies import Strategy
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.planning.strategies import contracted, source_of

OUTPUT_AXIS_1 = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight has its output channels along axis 1."""

RIGHT_OPERANDS = ("1", "2", "mat1", "mat2", "other", "batch1", "batch2", "vec")


class WeightUse(NamedTuple):
    """One call that multiplies with a weight.

    Attributes:
      node: the call, or the fused group that starts with it.
      attribute: name of the weight in its module.
      parameter: canonical name; empty where it is computed in the forward.
      axis: axis of its output channels.
      shape: of the weight, or where it is computed in the forward, of the example's.
      operand: which tensor of a function's call a computed one is; -1 elsewhere.
      read: the other operand, which is multiplied with the weight; ``None`` without.
    """

    node: Node
    attribute: str
    parameter: str
    axis: int
    shape: tuple[int, ...]
    operand: int = -1
    read: Operand | None = None


def weight_uses(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Iterator[WeightUse]:
    """Each use of a weight of a strategy's layers or of further ``layers``, in execution order."""
    varying = input_dependent(graph)
    for node in graph:
        if node.is_module(*strategy.weights, *layers):
            yield from _uses_of_module(graph, node)
        elif strategy.functions and node.function in CONTRACTIONS:
            for operand in node.operands:
                source = source_of(graph, operand)
                if contracted(node, operand) and source.value not in varying and (source.parameter or source.value):
                    yield _use_of_function(graph, node, operand, source.parameter)


def _uses_of_module(graph: Graph, node: Node) -> Iterator[WeightUse]:
    """The weights of a leaf module: its parameters, or one that it computes, as a parametrization does."""
    axis = 1 if node.is_module(*OUTPUT_AXIS_1) else 0
    read = node.operands[0] if node.operands else None
    names = [attribute for attribute in node.parameters if attribute.startswith("weight")]
    for attribute in names:
        parameter = node.parameters[attribute]
        yield WeightUse(node, attribute, parameter, axis, graph.shapes.get(parameter, ()), read=read)
    if not names and "weight_shape" in node.options:
        yield WeightUse(node, "weight", "", axis, node.options["weight_shape"], read=read)


def _use_of_function(graph: Graph, node: Node, operand: Operand, parameter: str) -> WeightUse:
    """The weight that an operand of a function is: a parameter, perhaps turned, or a function of parameters."""
    axis = _output_axis(graph, node, operand)
    others = [other for other in node.operands if other.slot != operand.slot]
    # Contracted operands first: an embedding contracts its weight alone, and still reads indices.
    others.sort(key=lambda other: not contracted(node, other))
    read = others[0] if others else None
    if parameter:
        return WeightUse(node, "weight", parameter, axis, graph.shapes.get(parameter, ()), read=read)
    return WeightUse(node, "weight", "", axis, graph.values[operand.value].shape, operand.slot, read)


def input_dependent(graph: Graph) -> frozenset[str]:
    """Names of the values that depend on an input of the model; the others are functions of the parameters alone."""
    found: set[str] = set()
    for node in graph:
        if node.kind == "input" or any(o.value in found for o in node.operands):
            found.update(node.outputs)
    return frozenset(found)


def _output_axis(graph: Graph, node: Node, operand: Operand) -> int:
    """Axis of output channels in the parameter behind an operand, transpositions on the way undone."""
    if node.function.startswith("conv_transpose") or node.function == "embedding":
        axis = 1
    elif node.function in ("linear", "conv1d", "conv2d", "conv3d"):
        axis = 0
    else:
        axis = -1 if operand.role in RIGHT_OPERANDS else -2
    turns = 0
    while operand.value and graph.producer(operand.value).operands:
        producer = graph.producer(operand.value)
        turns += producer.function in ("t", "transpose", "get")
        operand = producer.operands[0]
    return -3 - axis if turns % 2 and axis < 0 else axis


class WeightPlace(NamedTuple):
    """One weight.

    Attributes:
      site: its site.
      uses: each call that multiplies with it, in execution order; at least one.
    """

    site: WeightSite | ComputedSite
    uses: tuple[WeightUse, ...]

    @property
    def calls(self) -> list[Node]:
        """The calls that multiply with it."""
        return [use.node for use in self.uses]


class Weights(NamedTuple):
    """What :func:`find_weights` found.

    Attributes:
      places: in execution order of their first calls.
      notes: on weights that are used in several ways.
    """

    places: tuple[WeightPlace, ...]
    notes: tuple[str, ...]


def find_weights(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Weights:
    """One site for each weight of a strategy's layers, or of further ``layers``.

    Args:
      graph: fused.
      strategy: says of which layers and functions the weights are quantized.
      layers: module classes beside those of the strategy.
    """
    by_name: dict[str, list[WeightUse]] = {}
    for use in weight_uses(graph, strategy, layers):
        owner = use.parameter or ".".join(filter(None, (use.node.path, use.attribute)))
        by_name.setdefault(weight_quantizer(owner), []).append(use)
    found = {name: _site(graph, name, uses) for name, uses in by_name.items()}
    places = [WeightPlace(found[name][0], tuple(uses)) for name, uses in by_name.items()]
    return Weights(tuple(places), tuple(note for _, note in found.values() if note))


def _site(graph: Graph, name: str, uses: list[WeightUse]) -> tuple[WeightSite | ComputedSite, str]:
    """The site of a weight, described as its first use that is no embedding; and a note on what hinders folding."""
    first = next((use for use in uses if not use.node.is_module(nn.Embedding)), uses[0])
    common = _common(graph, name, first, uses)
    if not first.parameter:
        note = "computed in the forward, quantized at the call"
        return ComputedSite(**common, axis=first.axis, operand=first.operand, note=note), ""
    norm, hinders = _norm_behind(uses)
    site = WeightSite(
        **common,
        parameter=first.parameter,
        axis=first.axis,
        norm=norm,
        bias=first.node.parameters.get("bias") or "",
        note="unfolded" if hinders else "",
    )
    return site, f"{first.parameter} {hinders}: quantized once, unfolded" if hinders else ""


def _common(graph: Graph, name: str, first: WeightUse, uses: list[WeightUse]) -> dict[str, Any]:
    """What the sites of both kinds of weights have."""
    paths = dict.fromkeys(path for use in uses for path in use.node.paths)
    types = dict.fromkeys(t for use in uses for t in node_types(graph, use.node))
    names = {weight_quantizer(f"{path}.{attribute}") for use in uses for path, attribute in _owners(use) if path}
    early = uses[0].node.first
    return {
        "quantizer": name,
        "path": first.node.path,
        "paths": tuple(paths),
        "types": tuple(types),
        "pattern": pattern_name(first.node),
        "members": tuple(member.name for member in first.node.members),
        "function": first.node.function,
        "operation": first.node.operation,
        "anchor": CallSite(early.path, early.function, early.call),
        "shape": first.shape,
        "groups": int(first.node.options.get("groups", 1)),
        "aliases": tuple(sorted(names - {name})),
    }


def _norm_behind(uses: list[WeightUse]) -> tuple[str, str]:
    """The BatchNorm that is folded into a weight; or what hinders folding."""
    norms = {use.node.norm.path if use.node.norm else "" for use in uses}
    several_modules = len({use.node.path for use in uses}) > 1
    if len(norms) > 1 or (norms != {""} and several_modules):
        return "", "feeds several normalizations, or is used by several modules"
    return norms.pop(), ""


def _owners(use: WeightUse) -> list[tuple[str, str]]:
    """Each path of the module that owns a weight, as far as the call tells, with the weight's name there."""
    if use.node.kind == "module":
        return [(path, use.attribute) for path in use.node.paths]
    own = f"{use.node.path}."
    inside = use.parameter.startswith(own)
    return [(path, use.parameter.removeprefix(own)) for path in use.node.paths] if inside else []


def node_types(graph: Graph, node: Node) -> tuple[str, ...]:
    """Qualified names of the classes that rules may call a node by.

    They are those of the module called, or of a group's first, with its bases; and of the modules around it.
    """
    lead = node.first
    own = class_names(lead.type) if lead.kind == "module" and lead.type is not None else ()
    outer: dict[str, None] = {}
    for path in node.paths or ("",):
        parts = path.split(".")
        outer.update(dict.fromkeys(".".join(parts[:n]) for n in range(len(parts) - bool(own), 0, -1)))
    around = (graph.modules[path] for path in (*outer, "") if path in graph.modules)
    return tuple(dict.fromkeys((*own, *(name for cls in around for name in class_names(cls)))))


def pattern_name(node: Node) -> str:
    """Name of the pattern of a fused group; empty for other nodes."""
    return node.type.__name__ if node.members and node.type is not None else ""
