"""Rewrite a file of opset 18 as one of opset 17, the newest that tpu-mlir reads without an error.

Opset 18 made inputs of what were attributes, and added options. Each rewrite takes one node back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx import helper, numpy_helper

from sophq_func.core.errors import ConfigError, explain

OPSET = 17

IR_VERSION = 8
"""The version of the format that belongs to opset 17."""

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
"""What a reduction may compute, but for the sum, whose axes are an input in opset 17 as well."""

ADDED = frozenset(
    ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad", "Col2Im", "Mish", "GroupNormalization")
)
"""Op types that opset 17 does not have."""


def in_opset_17(where: str, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in opset 17 and IR 8; checked.

    Args:
      where: the function that the user called, for errors.
      proto: of opset 18; it is changed.

    Raises:
      ConfigError: the model has an operation that opset 17 lacks.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    lacking = sorted({node.op_type for node in proto.graph.node} & ADDED)
    if lacking:
        because, fix = "it reads ONNX of opset 17", "write it with operations of that opset"
        raise ConfigError(explain(where, f"the compiler has no {' and no '.join(lacking)}", because=because, fix=fix))
    for node in proto.graph.node:
        rewrite = REWRITES.get(node.op_type)
        if rewrite is not None:
            rewrite(node, stored)
    _without_unused(proto.graph)
    proto.ir_version = IR_VERSION
    for domain in proto.opset_import:
        domain.version = OPSET if not domain.domain else domain.version
    onnx.checker.check_model(proto, full_check=True)
    return proto


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
