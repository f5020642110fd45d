"""The values that a float file computes: their range, by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Feed = Mapping[str, Any]
"""Arrays by name of an input of the file."""


class GatherElements(OpRun):
    """The operator of that name; that of onnx 1.2x fails on an axis of more than 64."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        others = tuple(slice(None) if i == axis % data.ndim else slice(n) for i, n in enumerate(indices.shape))
        return (np.take_along_axis(data[others], indices, axis),)


def evaluator(proto: onnx.ModelProto) -> ReferenceEvaluator:
    """The evaluator of onnx itself: slower than a runtime, and the same wherever onnx is."""
    return ReferenceEvaluator(proto, new_ops=[GatherElements])


def measured(proto: onnx.ModelProto, feeds: Iterable[Feed]) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of each floating tensor that a file computes.

    Args:
      proto: the file.
      feeds: inputs of each run.
    """
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    returned = {value.name for value in whole.graph.output}
    inside = [name for node in whole.graph.node for name in node.output if name and name not in returned]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
    runs = evaluator(whole)
    types = {value.name: value.type.tensor_type.elem_type for value in whole.graph.input}
    ranges: dict[str, tuple[float, float]] = {}
    for feed in feeds:
        typed = {name: np.asarray(x, onnx.helper.tensor_dtype_to_np_dtype(types[name])) for name, x in feed.items()}
        for name, array in zip(runs.output_names, runs.run(None, typed), strict=True):
            if np.issubdtype(array.dtype, np.floating) and array.size:
                low, high = ranges.get(name, (math.inf, -math.inf))
                ranges[name] = min(low, float(array.min())), max(high, float(array.max()))
    return ranges
