"""Second step: which weights are quantized.

A parameter has one site, however many calls use it; so has each weight that is computed in the forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import chain, count
from typing import Any, NamedTuple

from torch import nn

from sophq_func.capture.axes import Axes, same_axes
from sophq_func.capture.graph import REPARAMETRIZE, Factor, Graph, Node, Operand
from sophq_func.config.names import weight_quantizer
from sophq_func.config.site import CallSite, ComputedSite, OperandSite, WeightSite, class_names
from sophq_func.config.strategies import Strategy
from sophq_func.core.operations import CONTRACTIONS, LAYERS
from sophq_func.numerics.granularity import Axis
from sophq_func.planning.contractions import summed_axes
from sophq_func.planning.strategies import computed_weights, contracted, derived, source_of

OUTPUT_AXIS_1 = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding, nn.EmbeddingBag)
"""Modules whose weight has its output channels along axis 1."""

EMBEDDINGS = frozenset(("embedding", "embedding_bag"))
"""Operations that look up rows of their weight."""

COUNTED_FROM_THE_FRONT = frozenset(("bilinear", "linear", *EMBEDDINGS))
"""Functions of layers, beside convolutions: their one kept axis is counted from the front, that of products from the end.

Both name the same axis; stored plans have it so.
"""


class WeightUse(NamedTuple):
    """One call that multiplies with a weight.

    Attributes:
      node: the call, or the fused group that starts with it.
      attribute: name of the weight in its module.
      parameter: canonical name; empty where it is computed in the forward.
      axes: those that the call keeps, counted from the front, in ascending order; ``None`` where they cannot be told.
      shape: of the weight; of one that is computed in the forward, the shape in the example.
      operand: slot of a computed weight among the operands of a function; -1 elsewhere.
      read: the operand that is multiplied with the weight; ``None`` without.
      source: of a weight that is computed in the forward, outside leaves, the value that is moved to the operand.
    """

    node: Node
    attribute: str
    parameter: str
    axes: tuple[int, ...] | None
    shape: tuple[int, ...]
    operand: int = -1
    read: Operand | None = None
    source: str = ""

    @property
    def is_embedding(self) -> bool:
        """Whether the call looks up rows of the weight."""
        return self.node.operation in EMBEDDINGS


def weight_uses(graph: Graph, strategy: Strategy, layers: tuple[type, ...] = ()) -> Iterator[WeightUse]:
    """Each use of a weight in a strategy's layers or in further ``layers``, in execution order."""
    computed = derived(graph)
    for node in graph:
        if node.is_module(*strategy.weights, *layers):
            yield from _uses_of_module(graph, node)
        elif strategy.functions and node.function in CONTRACTIONS:
            yield from _uses_of_function(graph, node, computed)


def _uses_of_function(graph: Graph, node: Node, derived: Collection[str]) -> Iterator[WeightUse]:
    """The operands of a function that are parameters, and those of :func:`computed_weights`."""
    computed = computed_weights(graph, node, derived)
    for operand in node.operands:
        source = source_of(graph, operand)
        is_parameter = bool(source.parameter) and contracted(node, operand) and not operand.kind
        is_weight = is_parameter and not is_spread(graph, node, operand)
        if is_weight or operand in computed:
            yield _use_of_function(graph, node, operand, source)


def is_spread(graph: Graph, node: Node, operand: Operand) -> bool:
    """Whether a call makes an outer product with a buffer of one axis, such as rotary frequencies with positions.

    It is no weight: the call sums nothing, as ``positions[:, None] * frequencies`` does not, and nothing learns it.
    A parameter is one, and so is a matrix, which may have one input by chance.
    """
    name = source_of(graph, operand).parameter
    if name not in graph.buffers or len(graph.shapes[name]) != 1 or operand.axes is None:
        return False
    summed = summed_axes(node, operand)
    return summed is not None and all(operand.shape[axis] == 1 and not operand.axes[axis] for axis in summed)


def _uses_of_module(graph: Graph, node: Node) -> Iterator[WeightUse]:
    """The weights that a leaf module multiplies with: parameters, or one that it computes, as a parametrization does."""
    axes = (1,) if node.is_module(*OUTPUT_AXIS_1) else (0,)
    read = node.operands[0] if node.operands else None
    for attribute in weights_of_layer(node):
        parameter = node.parameters[attribute]
        if parameter not in graph.kinds:
            yield WeightUse(node, attribute, parameter, axes, graph.shapes.get(parameter, ()), read=read)
    for factor in node.factors:
        if is_computed_weight(factor):
            yield WeightUse(node, "weight", "", axes, factor.shape, read=read)


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
    others = [other for other in node.operands if other.slot != operand.slot]
    # Contracted operands first: an embedding contracts its weight alone, and still reads indices.
    others.sort(key=lambda other: not contracted(node, other))
    read = others[0] if others else None
    if source.parameter:
        shape = graph.shapes.get(source.parameter, ())
        axes = _kept_axes(node, operand, operand.axes, shape)
        return WeightUse(node, "weight", source.parameter, axes, shape, read=read)
    axes = _kept_axes(node, operand, same_axes(len(operand.shape)), operand.shape)
    if axes is not None and len(axes) > 1:
        # The size of an axis that comes from no parameter may be that of the batch, or of a sequence.
        owned = _owned_axes(graph, operand)
        axes = tuple(axis for axis in axes if axis in owned)
    attribute = str(graph.producer(source.value).options.get("attribute", "weight"))
    return WeightUse(node, attribute, "", axes, operand.shape, operand.slot, read, source.value)


def _kept_axes(node: Node, operand: Operand, along: Axes | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a weight that a call of a function does not sum over; ``None`` where they cannot be told.

    Args:
      node: the call.
      operand: the weight, or a tensor that was moved from it.
      along: for each axis of the operand, the axes of the weight that run along it; ``None`` if that is not known.
      shape: of the weight.
    """
    summed = summed_axes(node, operand)
    if summed is None or along is None:
        return None
    summed_of_weight = {axis for d in summed for axis in along[d]}
    return _longer((axis for axis in range(len(shape)) if axis not in summed_of_weight), shape)


def _owned_axes(graph: Graph, operand: Operand) -> frozenset[int]:
    """The axes of a computed tensor along which an axis of a parameter runs, as far as shapes tell.

    They are followed through calls that only move a parameter, and from there through calls whose result has the shape to
    which their operands are broadcast, such as products with scales, norms and masks.
    """
    found: dict[str, frozenset[int]] = {}  # by value, which may be reached on many ways

    def owned(tensor: Operand) -> frozenset[int]:
        if tensor.axes is not None:
            return frozenset(axis for axis, along in enumerate(tensor.axes) if along)
        if not tensor.value:
            return frozenset()
        if tensor.value not in found:
            found[tensor.value] = inherited(tensor)
        return found[tensor.value]

    def inherited(result: Operand) -> frozenset[int]:
        operands = graph.producer(result.value).operands
        if not all(_is_broadcast(taken.shape, result.shape) for taken in operands):
            return frozenset()
        from_end = {(axis - len(taken.shape), taken.shape[axis]) for taken in operands for axis in owned(taken)}
        ndim = len(result.shape)
        return frozenset(axis + ndim for axis, size in from_end if size == result.shape[axis])

    return owned(operand)


def _is_broadcast(shape: tuple[int, ...], result: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape is broadcast to that of a result, or has it."""
    ends = zip(reversed(shape), reversed(result), strict=False)
    return len(shape) <= len(result) and all(size in (1, whole) for size, whole in ends)


def _longer(axes: Iterable[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of more than one element; one of the others where there are none, since it gives one scale all the same."""
    found = tuple(axes)
    return tuple(axis for axis in found if shape[axis] != 1) or found[-1:]


class Kept(NamedTuple):
    """The axes of a weight that no use of it sums over, so that scales may vary along them.

    Attributes:
      axis: as granularities have it; ``()`` where there is none.
      note: a remark on axes that are left out; empty without.
      unknown: whether some use does not tell its axes.
    """

    axis: Axis
    note: str = ""
    unknown: bool = False


def _kept(first: WeightUse, uses: list[WeightUse]) -> Kept:
    """The axes that all uses of a weight keep.

    Args:
      first: the use that says what the weight is for.
      uses: all uses.
    """
    # Rows are looked up, not added up: the layer that shares a table with an embedding decides.
    deciding = [use for use in uses if use.is_embedding == first.is_embedding]
    for use in deciding:
        if use.axes is None:
            return Kept((), f"{use.node.name} does not tell which axes it sums over: one scale", unknown=True)
    kept = [axis for axis in first.axes or () if all(axis in (use.axes or ()) for use in deciding)]
    is_common = all(use.axes == first.axes for use in deciding)
    if len(kept) > 1:
        return Kept(tuple(kept), "" if is_common else f"its uses sum over different axes: scales along {tuple(kept)} alone")
    if kept:
        ndim, function = len(first.shape), first.node.function
        from_the_front = not function or function in COUNTED_FROM_THE_FRONT or function.startswith("conv")
        axis = kept[0] if from_the_front else kept[0] - ndim
        return Kept(axis, "" if is_common else f"its uses sum over different axes: scales along axis {kept[0]} alone")
    return Kept((), f"{'its uses sum over different axes' if first.axes else 'no axis is its own'}: one scale")


class WeightPlace(NamedTuple):
    """One weight.

    Attributes:
      site: of its quantizer.
      uses: each call that multiplies with it, in execution order; at least one.
      unknown: the use that does not tell which axes it sums over, if one is so; else empty.
    """

    site: WeightSite | ComputedSite
    uses: tuple[WeightUse, ...]
    unknown: str = ""

    @property
    def calls(self) -> list[Node]:
        """The calls that multiply with it."""
        return [use.node for use in self.uses]


class Weights(NamedTuple):
    """The weights of a model.

    Attributes:
      places: in the execution order of their first calls.
      notes: remarks on weights that a BatchNorm cannot be folded into, and on operands that stay float.
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
        place, note = _place(graph, name, uses)
        places.append(place)
        if note:
            notes.append(note)
    return Weights(tuple(places), (*notes, *_of_other_kinds(graph, strategy, layers)))


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
    return use.node.path, same, use.axes, use.shape


def _path_of(use: WeightUse) -> str:
    """The name of a computed weight, without a number."""
    return ".".join(filter(None, (use.node.path, use.attribute)))


def _free(name: str, taken: Collection[str]) -> str:
    """``name``, or the first of ``name_1``, ``name_2``, ... that is free."""
    numbered = (f"{name}_{number}" for number in count(1))
    return next(free for free in chain([name], numbered) if free not in taken)


def _place(graph: Graph, name: str, uses: list[WeightUse]) -> tuple[WeightPlace, str]:
    """The place of a weight, and a note on what keeps a BatchNorm from being folded into it; empty without."""
    # A weight that an embedding shares with a linear layer is quantized along the channels of the layer.
    first = next((use for use in uses if not use.is_embedding), uses[0])
    common, kept = _common(graph, name, first, uses), _kept(first, uses)
    unknown = first.node.name if kept.unknown else ""
    if not first.parameter:
        note = "; ".join(filter(None, ("computed in the forward, quantized at the call", kept.note)))
        earliest, *others = uses
        more = tuple(_operand_site(use) for use in others)
        computed = ComputedSite(**common, axis=kept.axis, operand=earliest.operand, more=more, note=note)
        return WeightPlace(computed, tuple(uses), unknown), ""
    norm, obstacle = _norm_behind(uses)
    site = WeightSite(
        **common,
        parameter=first.parameter,
        axis=kept.axis,
        norm=norm,
        bias=first.node.parameters.get("bias") or "",
        note="; ".join(filter(None, ("unfolded" if obstacle else "", kept.note))),
    )
    note = f"{first.parameter} {obstacle}: quantized once, unfolded" if obstacle else ""
    return WeightPlace(site, tuple(uses), unknown), note


def _of_other_kinds(graph: Graph, strategy: Strategy, layers: tuple[type, ...]) -> Iterator[str]:
    """A remark on each operand that would be quantized if its numbers were not complex or sparse."""
    for node in graph:
        if node.is_module(*strategy.weights, *layers):
            weights = [node.parameters[attribute] for attribute in weights_of_layer(node)]
            kinds = {name: graph.kinds[name] for name in weights if name in graph.kinds}
            kinds |= {_called(graph, operand): operand.kind for operand in node.operands[:1] if operand.kind}
        elif strategy.functions and node.function in CONTRACTIONS:
            found = [operand for operand in node.operands if operand.kind and contracted(node, operand)]
            kinds = {_called(graph, operand): operand.kind for operand in found}
        else:
            continue
        for name, kind in kinds.items():
            yield f"{name}, of which {node.name} makes products, is {kind}: it stays float"


def _called(graph: Graph, operand: Operand) -> str:
    """What an operand is called in a remark: the parameter or the value from which it was moved."""
    source = source_of(graph, operand)
    return source.parameter or source.value or "a constant"


def _operand_site(use: WeightUse) -> OperandSite:
    """The call of a use, and the operand that is the weight."""
    call = use.node.first
    return OperandSite(call.path, call.step, call.call, use.operand)


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
        "anchor": CallSite(earliest.path, earliest.step, earliest.call),
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
        # The path of a function is that of the module around it; the path of a module is its own.
        outer_paths.update(dict.fromkeys(_around(path, own=not names)))
    for path in (*outer_paths, ""):
        if path in graph.modules:
            names.update(dict.fromkeys(class_names(graph.modules[path])))
    return tuple(names)


def outer_types(graph: Graph, path: str) -> Iterator[str]:
    """Qualified names of the classes of the modules around the one at a path, and of their bases."""
    for outer in (*_around(path, own=False), ""):
        yield from class_names(graph.modules.get(outer, object))


def _around(path: str, own: bool) -> list[str]:
    """The paths of the modules around one, innermost first; the module's own is the first where it is asked for."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) if own else len(parts) - 1, 0, -1)]


def pattern_name(node: Node) -> str:
    """Name of the pattern of a fused group; empty for other nodes."""
    return node.type.__name__ if node.members and node.type is not None else ""
