"""Export to a ``torch.export`` program with the operators of PT2E, which inductor lowers to integer kernels on x86."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch as pytorch
from torch import Tensor
from torch.fx import Graph, Node

from sophq_func.capture import drop_unread, operator_name, quantized_operators
from sophq_func.capture.arguments import as_call
from sophq_func.core.errors import ConfigError, check_flags
from sophq_func.core.public import public_as
from sophq_func.core.types import Given
from sophq_func.export._capture import Axes, captured, not_in_float32
from sophq_func.export._linear import LinearGrid
from sophq_func.export._program import program
from sophq_func.model.quantized import Quantized, refuse_multipliers
from sophq_func.numerics.contracts import QParams

if TYPE_CHECKING:
    from torch.export import ExportedProgram

BYTES = (pytorch.int8, pytorch.uint8)
"""Dtypes of codes for which inductor has integer kernels."""

MOVES = frozenset("flatten max_pool2d permute reshape squeeze transpose unsqueeze view".split())
"""Operations behind which the grid of their input is repeated: their results are values of their input."""


@public_as("export.torch")
def torch(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    example_args: Any,
    *,
    simulate: bool = False,
    dynamic_batch: bool = False,
    dynamic_axes: Axes | None = None,
) -> ExportedProgram:
    """Export the quantized model as a program that ``torch.compile`` runs in integers.

    Each quantizer becomes ``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor``; weights are int8 or
    uint8 codes before a ``dequantize_per_channel``; BatchNorms are folded; biases are floats; activations are uint8. This
    is the form that PT2E's ``convert_pt2e`` makes and that inductor's passes for x86 match. In eager mode the program
    computes what :meth:`Quantized.apply` computes, in floating point.

    Args:
      q, params, qparams, example_args, simulate: see :func:`sophq_func.export.onnx`.
      dynamic_batch: see :func:`sophq_func.export.onnx`; by default the program accepts only the batch size of the example,
        for which inductor has faster kernels.
      dynamic_axes: see :func:`sophq_func.export.onnx`; ``program.range_constraints`` has the ranges of the sizes.

    Returns:
      The program; ``program.module()`` can be called and compiled.

    Raises:
      ConfigError: quantizers cannot be expressed (the message gives the reason for each); the model does not accept all
        sizes of a dynamic axis; there is no such argument or axis.
      StateError: the model is in training mode; params or qparams are missing or unknown; NaN in a scale, a weight or a
        bias.

    Example:
      >>> import torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> program = sq.export.torch(q, params, q.calibrate(params, [x]), x)
      >>> program.module()(x).shape
      torch.Size([4, 3])
    """
    check_flags("export.torch", {"simulate": simulate, "dynamic_batch": dynamic_batch})
    operators = quantized_operators()
    args, kwargs = as_call(example_args, "export.torch")
    refuse_multipliers("export.torch", q)
    module = program("export.torch", q, params, qparams, _Decomposed(operators), simulate, (args, kwargs))
    exported = captured("export.torch", module, args, kwargs, dynamic_batch, dynamic_axes).program
    exported.graph.eliminate_dead_code()
    _still_codes(exported.graph, operators)
    drop_unread(exported)
    exported.graph_module.recompile()
    if module.dtypes:  # fake tensors do not show every clash of dtypes
        try:
            exported.module()(*args, **kwargs)
        except RuntimeError as error:
            raise ConfigError(not_in_float32("export.torch", module, str(error))) from error
    return exported


def _still_codes(graph: Graph, operators: Any) -> None:
    """Repeat grids behind operations that only move data, because inductor's passes match a grid right before a product."""
    quantize: Callable[..., Any] = operators.quantize_per_tensor.default
    dequantize: Callable[..., Any] = operators.dequantize_per_tensor.default
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_function" and node.args else None
        if operator_name(node.target) not in MOVES or not isinstance(source, Node) or source.target is not dequantize:
            continue
        if any(user.op == "output" or user.target is quantize for user in node.users):
            continue
        with graph.inserting_after(node):
            codes = graph.call_function(quantize, (node, *source.args[1:]))
        with graph.inserting_after(codes):
            real = graph.call_function(dequantize, (codes, *source.args[1:]))
        # The new quantize operator itself keeps reading the node.
        node.replace_all_uses_with(real, delete_user_cb=lambda user, own=codes: user is not own)
        codes.meta = {**node.meta, "val": node.meta["val"].to(source.args[-1])}
        real.meta = dict(node.meta)


class _Decomposed:
    """The target torch: grids as the operators of PT2E."""

    named = False
    stores_biases = False
    computes = False  # inductor has integer kernels for codes that an operator reads

    def __init__(self, operators: Any) -> None:
        self.operators = operators

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        if grid.dtype not in BYTES:
            return f"PT2E has no operators for codes of {str(grid.dtype).removeprefix('torch.')}"
        if grid.size:
            return "PT2E has no operators with one scale for each group"
        if stored:
            return grid
        return grid.unsigned() if grid.axis is None else "inductor has no kernels for PerChannel on an activation"

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        operators = self.operators
        step, zero = grid.number
        codes = operators.quantize_per_tensor.default(x, step, zero, grid.low, grid.high, grid.dtype)
        real: Tensor = operators.dequantize_per_tensor.default(codes, step, zero, grid.low, grid.high, grid.dtype)
        return real

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        limits = grid.low, grid.high, grid.dtype
        real: Tensor
        if grid.axis is None:
            real = self.operators.dequantize_per_tensor.default(codes, *grid.number, *limits)
        else:
            real = self.operators.dequantize_per_channel.default(codes, scale, zero_point, grid.axis, *limits)
        return real
