"""Second step: which weights are quantized. One site a parameter, and one a weight that is computed in the forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from sophq_func.capture.graph import Graph, Node, Operand
from sophq_func.config.names import weight_quantizer
from sophq_func.config.site import Site, class_names
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.planning.strategies import Strategy, contracted, source_of

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
      operand: which tensor of a function's call it is; -1 for modules.
      shape: where it is computed in the forward, of the example's.
    """

    node: Node
    attribute: str
    parameter: str
    axis: int
    operand: int = -1
    shape: tuple[int, ...] = ()


def weight_uses(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Iterator[WeightUse]:
    """Each use of a weight of a strategy's layers or of further ``layers``, in execution order."""
    varying = input_dependent(graph)
    for node in graph:
        if node.is_module(*strategy.weights, *layers):
            axis = 1 if node.is_module(*OUTPUT_AXIS_1) else 0
            names = [attribute for attribute in node.parameters if attribute.startswith("weight")]
            for attribute in names or ["weight"] * ("weight_shape" in node.options):
                shape = () if attribute in node.parameters else node.options["weight_shape"]
                yield WeightUse(node, attribute, node.parameters.get(attribute, ""), axis, shape=shape)
        elif strategy.functions and node.function in CONTRACTIONS:
            for operand in node.operands:
                source = source_of(graph, operand)
                if not contracted(node, operand) or source.value in varying:
                    continue
                if source.parameter:
                    axis = _output_axis(graph, node, operand)
                    yield WeightUse(node, "weight", source.parameter, axis)
                elif source.value:
                    axis = _output_axis(graph, node, operand)
                    yield WeightUse(node, "weight", "", axis, operand.slot, graph.values[operand.value].shape)


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
    """One weight: its site, and the calls that multiply with it."""

    site: Site
    calls: tuple[Node, ...]


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
    places = [WeightPlace(found[name][0], tuple(use.node for use in uses)) for name, uses in by_name.items()]
    return Weights(tuple(places), tuple(note for _, note in found.values() if note))


def _site(graph: Graph, name: str, uses: list[WeightUse]) -> tuple[Site, str]:
    first = next((use for use in uses if not use.node.is_module(nn.Embedding)), uses[0])
    early = uses[0].node.members[0] if uses[0].node.members else uses[0].node
    names = {weight_quantizer(f"{path}.{attribute}") for use in uses for path, attribute in _owners(use) if path}
    norms = {use.node.norm.path if use.node.norm else "" for use in uses}
    paths = dict.fromkeys(path for use in uses for path in use.node.paths)
    types = dict.fromkeys(t for use in uses for t in node_types(graph, use.node))
    site = Site(
        quantizer=name,
        role="weight",
        path=first.node.path,
        paths=tuple(paths),
        types=tuple(types),
        pattern=pattern_name(first.node),
        members=tuple(m.name for m in first.node.members),
        function=first.node.function,
        operation=first.node.operation,
        anchor=(early.path, early.function, early.call),
        output=-1,
        operand=first.operand,
        shape=first.shape,
        aliases=tuple(sorted(names - {name})),
        parameter=first.parameter,
        axis=first.axis,
        groups=int(first.node.options.get("groups", 1)),
        bias=first.node.parameters.get("bias") or "",
    )
    if not first.parameter:
        return replace(site, note="computed in the forward, quantized at the call"), ""
    if len(norms) > 1 or (norms != {""} and len({use.node.path for use in uses}) > 1):
        note = f"{first.parameter} feeds several normalizations, or is used by several modules: quantized once, unfolded"
        return replace(site, note="unfolded"), note
    (norm,) = norms
    return replace(site, norm=norm), ""


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
