"""The float ONNX file beside a chip's tables: BatchNorms folded, weights clipped to their range, tensors named as planned.

While the model is captured, each call is followed by a marker node with the call's name in the plan. The markers are
removed from the file, and the tensors before them get these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sophq_func.capture.arguments import as_call
from sophq_func.codes import share_on
from sophq_func.core.types import Given
from sophq_func.export._calls import Watching
from sophq_func.export._capture import captured, output_names
from sophq_func.export._linear import LinearGrid
from sophq_func.export._names import FileNames
from sophq_func.export._program import program
from sophq_func.export.onnx import quiet, require, symbolic, translated
from sophq_func.model.derived import as_weight, derived, derived_names
from sophq_func.model.quantized import Quantized
from sophq_func.model.settings import enabled
from sophq_func.model.weight_quantizer import Params, WeightQuantizer, arranged
from sophq_func.numerics.affine import switched
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand
from sophq_func.numerics.ranges import bounds, positive

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET = 18
"""The opset of torch.onnx's own operators, so that the graph need not be converted to another one."""

MARK = "sophq_func::Named"
"""Domain and op type of marker nodes."""


class Form(NamedTuple):
    """What a compiler wants of the file.

    Attributes:
      finished: changes a file of opset 18, and returns the new names of tensors by the old ones.
      on_grids: whether weights are rounded to their grids; else they are clipped only.
      opens_attention: whether attention is written in steps with names.
    """

    finished: Callable[[str, onnx.ModelProto], Mapping[str, str]] = lambda where, proto: {}
    on_grids: bool = False
    opens_attention: bool = False


class FloatFile(NamedTuple):
    """A float ONNX file.

    Attributes:
      proto: the file.
      names: in it.
    """

    proto: onnx.ModelProto
    names: FileNames


def float_file(q: Quantized, params: Given, qparams: Mapping[str, QParams], example_args: Any, form: Form) -> FloatFile:
    """The model without quantizers as an ONNX file for inputs of the example's shapes.

    Raises:
      ConfigError, StateError: see :func:`sophq_func.export.onnx`.
    """
    require("export.tables")
    from sophq_func.export import _onnx_graph

    args, kwargs = as_call(example_args, "export.tables")
    params = q.engine.check(params, qparams, "export.tables", "qparams")
    module = program("export.tables", q, params, enabled(qparams, 0.0), _Nothing(), False, (args, kwargs))
    written_weight = partial(_rounded, q.frozen) if form.on_grids else _clipped
    for weight in q.engine.acting:
        if (inside := written_weight(weight, params, qparams)) is not None:
            module.get_buffer(module.names[weight.site.parameter]).copy_(inside)
    wanted = [name for name in derived_names(q.engine) if share_on(qparams[name]) and not q.plan[name].observe_only]
    for name, tensor in derived(q.engine, params, q.engine.effective(qparams), (args, kwargs), wanted).weights.items():
        weight, held = as_weight(q.engine.running[name], tensor, params.keys())
        inside = written_weight(weight, held, qparams)
        module.put(name, weight.site.parameter, tensor if inside is None else inside)
    graph = q.engine.retrace(params, args, kwargs)
    calls = {(node.path, node.function, node.call): node.name for node in graph if node.counted}
    module.watch = partial(Watching, calls, _marked, form.opens_attention)
    with quiet():
        exported = captured("export.tables", module, args, kwargs, False).program
        written = translated("export.tables", exported, OPSET)
        names = {buffer: name for name, buffer in module.names.items()}
        ends = module.inputs(args, kwargs), output_names(exported)
        proto, marked = _onnx_graph.finished(written.model, names, frozenset(), *ends)
    values = {name: op_name(value) for name, value in marked.items()}
    layers = {name: layer_names(_onnx_graph.product_of(value)) for name, value in marked.items()}
    inputs = {node.name: node.argument for node in graph if node.kind == "input"}
    products = {name: str(_onnx_graph.product_of(value).name) for name, value in marked.items()}
    tensors_of = {name: str(value.name) for name, value in marked.items()} | inputs
    renamed = form.finished("export.tables", proto)
    tensors_of, products = (
        {call: renamed.get(tensor, tensor) for call, tensor in found.items()} for found in (tensors_of, products)
    )
    return FloatFile(proto, FileNames({**values, **inputs}, layers, tensors_of, products))


def op_name(value: ir.Value) -> str:
    """``<tensor>_<op type>``; empty for a tensor that no node computes."""
    node = value.producer()
    return f"{value.name}_{node.op_type}" if node is not None else ""


def layer_names(product: ir.Value) -> tuple[str, str]:
    """Names of the node that takes a weight, and of a ReLU that is the first to take its result; else twice the same."""
    takers = [user for user, _ in product.uses()]
    first = takers[0].outputs[0] if takers and takers[0].op_type == "Relu" else product
    return op_name(product), op_name(first)


def _rounded(frozen: bool, weight: WeightQuantizer, params: Params, qparams: Mapping[str, QParams]) -> Tensor | None:
    """A weight on its grid, BatchNorm folded in; ``None`` for a weight whose quantizer is off.

    So the compiler, which divides by the steps of the table and rounds, finds the codes that :meth:`Quantized.apply` has,
    whatever the fake quantizer.
    """
    weight_qparams = qparams[weight.site.quantizer]
    if not share_on(weight_qparams):
        return None
    seen = weight.seen(params)
    on_grid = seen if frozen else weight.fake_quantize.apply(seen, weight_qparams, weight.scheme)
    return arranged(switched(seen, on_grid, weight_qparams), weight.site).detach()


def _clipped(weight: WeightQuantizer, params: Params, qparams: Mapping[str, QParams]) -> Tensor | None:
    """A weight on an integer grid, BatchNorm folded in, clipped to ``[s (qmin - z), s (qmax - z)]`` and not rounded.

    ``None`` for a weight that is on none.
    """
    weight_qparams = qparams[weight.site.quantizer]
    if not weight.fake_quantize.integer or not share_on(weight_qparams):
        return None
    seen = weight.seen(params)
    grid = weight.fake_quantize.grid(weight_qparams, weight.scheme)
    zero = torch.zeros_like(grid.scale) if weight.scheme.symmetric else grid.zero_point
    ends = [(bound - zero) * positive(grid.scale) for bound in bounds(grid, weight.scheme)]
    low, high = (expand(end, seen, weight.scheme.granularity) for end in ends)
    return arranged(seen.clamp(low, high), weight.site).detach()


class _Nothing:
    """The target for programs without quantizers: every grid passes, and no operator is made."""

    named = True
    stores_biases = False
    computes = False

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        return grid

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        return x

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        return codes


def _marked(name: str, x: Tensor) -> Tensor:
    """The value, behind a marker node with its name."""
    return symbolic(MARK, (x,), {"name": name}, x.dtype, x, version=1)
