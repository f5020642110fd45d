"""The float ONNX file beside a chip's tables: BatchNorms folded, weights clipped to their range, and names for tensors.

Each call of the model is marked while it is captured, by the name that the plan has for it. In the file the marks go, and
tensors have these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sophq_func.capture.arguments import as_call
from sophq_func.capture.frame import unwatched
from sophq_func.core.pytree import has_floating, tensors
from sophq_func.export._capture import captured, output_names
from sophq_func.export._linear import LinearGrid
from sophq_func.export._names import FileNames
from sophq_func.export._program import program
from sophq_func.export.onnx import quiet, require, symbolic, translated
from sophq_func.model.quantized import Quantized
from sophq_func.model.runner import Runner
from sophq_func.model.schedule import Schedule
from sophq_func.model.settings import enabled
from sophq_func.model.weight_quantizer import arranged
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import bounds, positive

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
MARK = "sophq_func::Named"

Key = tuple[str, str, int]


def float_file(
    q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams], example_args: Any
) -> tuple[bytes, FileNames]:
    """The model without quantizers, as the compilers of chips take it: batches of the example's size, opset 18.

    Returns:
      The file, and what is called how in it.

    Raises:
      ConfigError, StateError: see :func:`sophq_func.export.onnx`.
    """
    require("export.tables")
    from sophq_func.export import _onnx_graph

    args, kwargs = as_call(example_args, "export.tables")
    made = program("export.tables", q, params, enabled(qparams, 0.0), _Nothing(), False)
    for name, weight in _clipped(q, params, qparams).items():
        made.get_buffer(made.names[name]).copy_(weight)
    graph = q.engine.retrace(params, args, kwargs)
    calls = {(node.path, node.function, node.call): node.name for node in graph if node.counted}
    made.watch = partial(_Marking, calls)
    with quiet():
        exported = captured("export.tables", made, args, kwargs, False).program
        written = translated("export.tables", exported, OPSET)
        names = {key: name for name, key in made.names.items()}
        ends = made.inputs(args, kwargs), output_names(exported)
        proto, marks = _onnx_graph.finished(written.model, names, frozenset(), *ends)
    values = {name: op_name(value) for name, value in marks.items()}
    layers = {name: layer_names(_onnx_graph.product_of(value)) for name, value in marks.items()}
    inputs = {node.name: node.argument for node in graph if node.kind == "input"}
    return proto.SerializeToString(), FileNames({**values, **inputs}, layers)


def op_name(value: ir.Value) -> str:
    """``<tensor>_<op type>``; empty where no node makes it."""
    node = value.producer()
    return f"{value.name}_{node.op_type}" if node is not None else ""


def layer_names(product: ir.Value) -> tuple[str, str]:
    """Of the node that takes a weight: its own, and that of a ReLU that is the first to take its result."""
    takers = [user for user, _ in product.uses()]
    first = takers[0].outputs[0] if takers and takers[0].op_type == "Relu" else product
    return op_name(product), op_name(first)


def _clipped(q: Quantized, params: Mapping[str, Tensor], qparams: Mapping[str, QParams]) -> dict[str, Tensor]:
    """Weights of integer grids, BatchNorm folded in, clipped to ``[s (qmin - z), s (qmax - z)]``, not rounded."""
    found = {}
    for weight in q.engine.acting:
        own = qparams[weight.site.quantizer]
        if weight.fake_quantize.integer and float(own.extras.get("enabled", torch.tensor(1.0))):
            seen = weight.seen(params)
            grid = weight.fake_quantize.grid(own, weight.scheme)
            zero = torch.zeros_like(grid.scale) if weight.scheme.symmetric else grid.zero_point
            ends = [(bound - zero) * positive(grid.scale) for bound in bounds(grid, weight.scheme)]
            low, high = (expand(end, seen, weight.scheme.granularity) for end in ends)
            found[weight.site.parameter] = arranged(seen.clamp(low, high), weight.site).detach()
    return found


class _Nothing:
    """The target of a program without quantizers."""

    stores_biases = False
    computes = False

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        return grid

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        return x

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        return codes


class _Marking(Runner):
    """Puts a node behind each call, which says what the call is named."""

    def __init__(self, names: Mapping[Key, str], schedule: Schedule) -> None:
        super().__init__(schedule, lambda name, x: x)
        self._names, self._calls = names, dict[tuple[str, str], int]()

    def after_module(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return self._marked((path, ""), args, kwargs, super().after_module(path, module, args, kwargs, output))

    def function(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return self._marked((self.scope, name), args, kwargs, super().function(name, func, args, kwargs))

    def _marked(self, pair: tuple[str, str], args: Any, kwargs: Any, output: Any) -> Any:
        if not tensors(output) or not has_floating(args, kwargs, output):
            return output
        call = self._calls.get(pair, 0)
        self._calls[pair] = call + 1
        name = self._names.get((*pair, call))
        if name is None or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        with self.aside(), unwatched():
            return symbolic(MARK, (output,), {"name": name}, output.dtype, output, version=1)
