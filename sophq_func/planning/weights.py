"""Second step: which weights are quantized.

A parameter has one site, however many calls use it; so has each weight that is computed in the forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain, count
from typing import Any, NamedTuple

from torch import nn

from sophq_func.capture.graph import REPARAMETRIZE, Factor, Graph, Node, Operand
from sophq_func.config.names import weight_quantizer
from sophq_func.config.site import CallSite, ComputedSite, OperandSite, WeightSite, class_names
from sophq_func.config.strategies import Strategy
from sophq_func.core.operations import CONTRACTIONS, LAYERS
from sophq_func.planning.strategies import contracted, source_of

OUTPUT_AXIS_1 = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight has its output channels along axis 1."""

RIGHT_OPERANDS = ("1", "2", "mat1", "mat2", "other", "batch1", "batch2", "vec")
"""Roles of operands whose output channels are counted along their last axis, as of the right factor of a product."""


class WeightUse(NamedTuple):
    """One call that multiplies with a weight.

    Attributes:
      node: the call, or the fused group that starts with it.
      attribute: name of the weight in its module.
      parameter: canonical name; empty where it is computed in the forward.
      axis: axis of its output channels.
      shape: of the weight; of one that is computed in the forward, the shape in the example.
      operand: slot of a computed weight among the operands of a function; -1 elsewhere.
      read: the operand that is multiplied with the weight; ``None`` without.
      source: of a weight that is computed in the forward, outside leaves, the value that is moved to the operand.
    """

    node: Node
    attribute: str
    parameter: str
    axis: int
    shape: tuple[int, ...]
    operand: int = -1
    read: Operand | None = None
    source: str = ""


def weight_uses(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Iterator[WeightUse]:
    """Each use of a weight in a strategy's layers or in further ``layers``, in execution order."""
    varying = input_dependent(graph)
    for node in graph:
        if node.is_module(*strategy.weights, *layers):
            yield from _uses_of_module(graph, node)
        elif strategy.functions and node.function in CONTRACTIONS:
            yield from _uses_of_function(graph, node, varying)


def _uses_of_function(graph: Graph, node: Node, varying: Collection[str]) -> Iterator[WeightUse]:
    """The operands of a function that are parameters, and the first one that is computed from parameters.

    A second computed one is a value, as in attention whose queries, keys and values are all learned; one that a module
    computes as its own parameter is a weight in any place.
    """
    has_computed = False
    for operand in node.operands:
        source = source_of(graph, operand)
        is_constant = not source.parameter and not source.value
        if not contracted(node, operand) or is_constant or source.value in varying:
            continue
        is_own = bool(source.value) and graph.producer(source.value).function == REPARAMETRIZE
        if source.value and not is_own and has_computed:
            continue
        has_computed = has_computed or bool(source.value)
        yield _use_of_function(graph, node, operand, source)


def _uses_of_module(graph: Graph, node: Node) -> Iterator[WeightUse]:
    """The weights that a leaf module multiplies with: parameters, or one that it computes, as a parametrization does."""
    axis = 1 if node.is_module(*OUTPUT_AXIS_1) else 0
    read = node.operands[0] if node.operands else None
    for attribute in weights_of_layer(node):
        parameter = node.parameters[attribute]
        yield WeightUse(node, attribute, parameter, axis, graph.shapes.get(parameter, ()), read=read)
    for factor in node.factors:
        if is_computed_weight(factor):
            yield WeightUse(node, "weight", "", axis, factor.shape, read=read)


def weights_of_layer(node: Node) -> list[str]:
    """The attributes of a leaf module that hold parameters with which it multiplies."""
    multiplied = {factor.parameter for factor in node.factors}
    names = [attribute for attribute, parameter in node.parameters.items() if parameter in multiplied]
    # A layer may multiply where no function of torch is seen, as in a kernel of its own.
    return names if node.factors or "weight" not in node.parameters else ["weight"]


def is_computed_weight(factor: Factor) -> bool:
    """Whether a leaf module computes what it multiplies, and calls a function in which a run finds the weight."""
    return not factor.parameter and LAYERS.get(factor.function) == factor.slot


def _use_of_function(graph: Graph, node: Node, operand: Operand, source: Operand) -> WeightUse:
    """The use of an operand of a function as a weight.

    Args:
      graph: fused.
      node: the call of the function.
      operand: the weight.
      source: the parameter, or the value computed from parameters, from which the operand was only moved.
    """
    axis = _output_axis(graph, node, operand)
    others = [other for other in node.operands if other.slot != operand.slot]
    # Contracted operands first: an embedding contracts its weight alone, and still reads indices.
    others.sort(key=lambda other: not contracted(node, other))
    read = others[0] if others else None
    if source.parameter:
        return WeightUse(node, "weight", source.parameter, axis, graph.shapes.get(source.parameter, ()), read=read)
    attribute = str(graph.producer(source.value).options.get("attribute", "weight"))
    shape = graph.values[operand.value].shape
    return WeightUse(node, attribute, "", axis, shape, operand.slot, read, source.value)


def input_dependent(graph: Graph) -> frozenset[str]:
    """Names of the values that depend on an input of the model; the others are functions of the parameters alone."""
    dependent: set[str] = set()
    for node in graph:
        if node.kind == "input" or any(operand.value in dependent for operand in node.operands):
            dependent.update(node.outputs)
    return frozenset(dependent)


def _output_axis(graph: Graph, node: Node, operand: Operand) -> int:
    """Axis of the output channels in the parameter of which an operand is a view, with transpositions undone."""
    if node.function.startswith("conv_transpose") or node.function == "embedding":
        axis = 1
    elif node.function in ("linear", "conv1d", "conv2d", "conv3d"):
        axis = 0
    else:
        axis = -1 if operand.role in RIGHT_OPERANDS else -2
    transpositions = 0
    while operand.value and graph.producer(operand.value).operands:
        producer = graph.producer(operand.value)
        # "get" is the reading of an attribute: ``T`` or ``mT``.
        if producer.function in ("t", "transpose", "get"):
            transpositions += 1
        operand = producer.operands[0]
    is_swapped = transpositions % 2 == 1 and axis < 0
    # -1 becomes -2, and -2 becomes -1.
    return -3 - axis if is_swapped else axis


class WeightPlace(NamedTuple):
    """One weight.

    Attributes:
      site: of its quantizer.
      uses: each call that multiplies with it, in execution order; at least one.
    """

    site: WeightSite | ComputedSite
    uses: tuple[WeightUse, ...]

    @property
    def calls(self) -> list[Node]:
        """The calls that multiply with it."""
        return [use.node for use in self.uses]


class Weights(NamedTuple):
    """The weights of a model.

    Attributes:
      places: in the execution order of their first calls.
      notes: remarks on weights that a BatchNorm cannot be folded into.
    """

    places: tuple[WeightPlace, ...]
    notes: tuple[str, ...]


def find_weights(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Weights:
    """Find the weights that are quantized, each with all calls that use it.

    Args:
      graph: fused.
      strategy: names the layers and functions whose weights are quantized.
      layers: module classes beside those of the strategy.
    """
    by_name = _by_quantizer(graph, weight_uses(graph, strategy, layers))
    places = []
    notes = []
    for name, uses in by_name.items():
        site, note = _site(graph, name, uses)
        places.append(WeightPlace(site, tuple(uses)))
        if note:
            notes.append(note)
    return Weights(tuple(places), tuple(notes))


def _by_quantizer(graph: Graph, uses: Iterator[WeightUse]) -> dict[str, list[WeightUse]]:
    """By name of its quantizer, each weight's uses, in execution order of the first ones.

    A weight that is computed in the forward is named after the module around it: a second one gets ``_1``.
    """
    found = list(uses)
    taken = {use.parameter for use in found}
    owners: dict[tuple[object, ...], str] = {}
    by_name: dict[str, list[WeightUse]] = {}
    for use in found:
        owner = use.parameter or owners.setdefault(_identity(graph, use), _free(_path_of(use), taken))
        taken.add(owner)
        by_name.setdefault(weight_quantizer(owner), []).append(use)
    return by_name


def _identity(graph: Graph, use: WeightUse) -> tuple[object, ...]:
    """What tells one computed weight, as it is quantized, from another."""
    node = graph.nodes.get(graph.values[use.source].node) if use.source else None
    # A module that is called twice computes its own weight twice, and that is one weight.
    same = use.attribute if node is None or node.function == REPARAMETRIZE else use.source
    return use.node.path, same, use.axis, use.shape


def _path_of(use: WeightUse) -> str:
    """The name of a computed weight, without a number."""
    return ".".join(filter(None, (use.node.path, use.attribute)))


def _free(name: str, taken: Collection[str]) -> str:
    """``name``, or the first of ``name_1``, ``name_2``, ... that is free."""
    numbered = (f"{name}_{number}" for number in count(1))
    return next(free for free in chain([name], numbered) if free not in taken)


def _site(graph: Graph, name: str, uses: list[WeightUse]) -> tuple[WeightSite | ComputedSite, str]:
    """The site of a weight, and a note on what keeps a BatchNorm from being folded into it; empty without."""
    # A weight that an embedding shares with a linear layer is quantized along the channels of the layer.
    first = next((use for use in uses if not use.node.is_module(nn.Embedding)), uses[0])
    common = _common(graph, name, first, uses)
    if not first.parameter:
        note = "computed in the forward, quantized at the call"
        earliest, *others = uses
        more = tuple(_operand_site(use) for use in others)
        return ComputedSite(**common, axis=first.axis, operand=earliest.operand, more=more, note=note), ""
    norm, obstacle = _norm_behind(uses)
    site = WeightSite(
        **common,
        parameter=first.parameter,
        axis=first.axis,
        norm=norm,
        bias=first.node.parameters.get("bias") or "",
        note="unfolded" if obstacle else "",
    )
    return site, f"{first.parameter} {obstacle}: quantized once, unfolded" if obstacle else ""


def _operand_site(use: WeightUse) -> OperandSite:
    """The call of a use, and the operand that is the weight."""
    call = use.node.first
    return OperandSite(call.path, call.function, call.call, use.operand)


def _common(graph: Graph, name: str, first: WeightUse, uses: list[WeightUse]) -> dict[str, Any]:
    """The fields that both kinds of sites of weights have.

    Args:
      graph: fused.
      name: of the quantizer.
      first: the use that says what the weight is for.
      uses: all uses.
    """
    paths = dict.fromkeys(path for use in uses for path in use.node.paths)
    types = dict.fromkeys(t for use in uses for t in node_types(graph, use.node))
    names = {weight_quantizer(f"{path}.{attribute}") for use in uses for path, attribute in _owners(use) if path}
    # The weight is needed from its very first use on.
    earliest = uses[0].node.first
    return {
        "quantizer": name,
        "path": first.node.path,
        "paths": tuple(paths),
        "types": tuple(types),
        "pattern": pattern_name(first.node),
        "members": tuple(member.name for member in first.node.members),
        "function": first.node.function,
        "operation": first.node.operation,
        "anchor": CallSite(earliest.path, earliest.function, earliest.call),
        "shape": first.shape,
        "groups": int(first.node.options.get("groups", 1)),
        "aliases": tuple(sorted(names - {name})),
    }


def _norm_behind(uses: list[WeightUse]) -> tuple[str, str]:
    """The path of the BatchNorm that is folded into a weight, empty without; and what keeps it from being folded, if any."""
    norms = {use.node.norm.path if use.node.norm else "" for use in uses}
    several_modules = len({use.node.path for use in uses}) > 1
    if len(norms) > 1 or (norms != {""} and several_modules):
        return "", "feeds several normalizations, or is used by several modules"
    return norms.pop(), ""


def _owners(use: WeightUse) -> list[tuple[str, str]]:
    """Each path of the module that owns a weight, as far as the call tells, with the weight's name there."""
    if use.node.kind == "module":
        return [(path, use.attribute) for path in use.node.paths]
    prefix = f"{use.node.path}."
    if not use.parameter.startswith(prefix):
        return []
    return [(path, use.parameter.removeprefix(prefix)) for path in use.node.paths]


def node_types(graph: Graph, node: Node) -> tuple[str, ...]:
    """Qualified names of the classes by which a type key matches a node.

    They are the class of the module that is called, or of a group's first, and its bases; and the same of all modules
    around it.
    """
    lead = node.first
    names: dict[str, None] = {}
    if lead.kind == "module" and lead.type is not None:
        names.update(dict.fromkeys(class_names(lead.type)))
    outer_paths: dict[str, None] = {}
    for path in node.paths or ("",):
        parts = path.split(".")
        # The path of a function is that of the module around it; the path of a module is its own.
        depth = len(parts) - 1 if names else len(parts)
        outer_paths.update(dict.fromkeys(".".join(parts[:n]) for n in range(depth, 0, -1)))
    for path in (*outer_paths, ""):
        if path in graph.modules:
            names.update(dict.fromkeys(class_names(graph.modules[path])))
    return tuple(names)


def pattern_name(node: Node) -> str:
    """Name of the pattern of a fused group; empty for other nodes."""
    return node.type.__name__ if node.members and node.type is not None else ""
