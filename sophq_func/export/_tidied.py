"""Rewrite a float file as tpu-mlir would: in opset 17, the newest that it reads without an error, and simplified.

Opset 18 made inputs of what were attributes, and added options. The compiler itself computes what depends on no input, drops
what adds zero, and splits a selection in two nodes; it is done here so that the tables name the nodes that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sophq_func.core.errors import ConfigError, explain
from sophq_func.export._measured import evaluator

OPSET = 17

IR_VERSION = 8
"""The version of the format that belongs to opset 17."""

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
"""What a reduction may compute, but for the sum, whose axes are an input in opset 17 as well."""

ADDED = frozenset(
    ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "Mish", "GroupNormalization")
)
"""Op types that opset 17 does not have."""


def tidied(where: str, proto: onnx.ModelProto) -> dict[str, str]:
    """Make it the same model in opset 17 and IR 8, simplified; checked.

    Args:
      where: the function that the user called, for errors.
      proto: of opset 18; it is changed.

    Returns:
      The new names of tensors, by the old ones.

    Raises:
      ConfigError: the model has an operation that opset 17 lacks.
    """
    _fold(proto)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    lacking = sorted({node.op_type for node in proto.graph.node} & ADDED)
    if lacking:
        because, fix = "it reads ONNX of opset 17", "write it with operations of that opset"
        raise ConfigError(explain(where, f"the compiler has no {' and no '.join(lacking)}", because=because, fix=fix))
    for node in proto.graph.node:
        rewrite = REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(node, stored)
    _replace(proto.graph, lambda node: _selected(node, stored))
    held = {tensor.name for tensor in proto.graph.initializer}
    proto.graph.initializer.extend(tensor for name, tensor in stored.items() if name not in held)
    renamed = _drop_idle(proto, stored)
    _without_unused(proto.graph)
    proto.ir_version = IR_VERSION
    for domain in proto.opset_import:
        domain.version = OPSET if not domain.domain else domain.version
    onnx.checker.check_model(proto, full_check=True)
    return renamed


def _fold(proto: onnx.ModelProto) -> None:
    """Store what depends on no input of the model."""
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer} | {""}
    constant = []
    for node in graph.node:
        if all(name in known for name in node.input):
            constant.append(node)
            known.update(node.output)
    if not constant:
        return
    names = [name for node in constant for name in node.output if name]
    part = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    part.graph.CopyFrom(helper.make_graph(constant, "constants", [], [], initializer=list(graph.initializer)))
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    for name, array in zip(names, evaluator(part).run(None, {}), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    made = set(names)
    _replace(graph, lambda node: [] if made.issuperset(node.output) else [node])


def _selected(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> list[onnx.NodeProto]:
    """The selection of one index of an axis as a slice and a squeeze; other nodes as they are."""
    if node.op_type != "Gather" or node.input[1] not in stored or len(stored[node.input[1]].dims):
        return [node]
    index = int(numpy_helper.to_array(stored[node.input[1]]))
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    sliced = f"{node.output[0]}.slice"
    bounds = {"start": index, "end": index + 1 if index != -1 else LAST, "axis": axis}
    names = [_stored(stored, f"{what}_{value}", [value]) for what, value in bounds.items()]
    slicing = helper.make_node("Slice", [node.input[0], *names], [sliced])
    return [slicing, helper.make_node("Squeeze", [sliced, names[-1]], [node.output[0]])]


LAST = np.iinfo(np.int64).max
"""The end of a slice that reaches to the end of its axis."""


def _stored(stored: dict[str, onnx.TensorProto], name: str, values: Sequence[int]) -> str:
    """The name of a stored tensor of integers, which is made where there is none."""
    stored.setdefault(name, numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def _drop_idle(proto: onnx.ModelProto, stored: Mapping[str, onnx.TensorProto]) -> dict[str, str]:
    """Remove nodes that return their input: additions of zeros, and changes to the shape that it has.

    Returns:
      The name of the result, which stays, by that of the input, which goes.
    """
    graph = proto.graph
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {value.name: value.type.tensor_type.shape for value in (*inferred.value_info, *inferred.output)}
    # the inputs and outputs of the file keep their names
    free = {name for node in graph.node for name in node.output} - {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    for node in graph.node:
        given, result = [name for name in node.input if name not in stored], node.output[0]
        may_go = len(given) == 1 and given[0] in free - renamed.keys() and shapes.get(given[0]) == shapes.get(result)
        if may_go and _is_idle(node, stored):
            renamed[given[0]] = result
    idle = set(renamed.values())
    _replace(graph, lambda node: [] if node.output[0] in idle else [node])
    final = {name: _last(name, renamed) for name in renamed}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [final.get(name, name) for name in names]
    return final


def _is_idle(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node returns its input, if that has the shape of the result."""
    if node.op_type == "Add":
        return not any(np.any(numpy_helper.to_array(stored[name])) for name in node.input if name in stored)
    return node.op_type in ("Expand", "Reshape")


def _last(name: str, renamed: Mapping[str, str]) -> str:
    """The name that stays, behind any number of removed nodes."""
    while name in renamed:
        name = renamed[name]
    return name


def _replace(graph: onnx.GraphProto, rewrite: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]]) -> None:
    """Put what ``rewrite`` makes of each node in its place."""
    nodes = [new for node in graph.node for new in rewrite(node)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _axes(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> None:
    """The axes of a reduction become an attribute."""
    if len(node.input) > 1 and node.input[1]:
        axes = numpy_helper.to_array(stored[node.input[1]])
        node.attribute.append(helper.make_attribute("axes", [int(axis) for axis in axes]))
    del node.input[1:]
    _drop(node, ("noop_with_empty_axes",))


def _parts(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> None:
    """A split in equal parts needs no number of parts; it is that of the results."""
    _drop(node, ("num_outputs",))


def _resized(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> None:
    """A resize has no antialias, no axes and no policy; torch.onnx writes the values that opset 17 has."""
    _drop(node, ("antialias", "axes", "keep_aspect_ratio_policy"))


def _drop(node: onnx.NodeProto, names: Sequence[str]) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _without_unused(graph: onnx.GraphProto) -> None:
    """Remove stored tensors that no node reads."""
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


REWRITES: Mapping[str, Callable[[onnx.NodeProto, Mapping[str, onnx.TensorProto]], None]] = {
    **{f"Reduce{what}": _axes for what in REDUCTIONS},
    "Split": _parts,
    "Resize": _resized,
}
"""By op type."""
