"""ONNX: QuantizeLinear and DequantizeLinear around float operations, weights stored as integers; runtimes fuse the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sophq_func.capture import LOGGER_OF_ONNX
from sophq_func.capture.arguments import as_call
from sophq_func.core.errors import ConfigError, explain
from sophq_func.core.files import write_bytes
from sophq_func.export._capture import Axes, captured, output_names
from sophq_func.export._linear import LinearGrid
from sophq_func.export._program import program
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 21
NEEDED = ("onnx", "onnx_ir", "onnxscript")


def onnx(
    q: Quantized,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    example_args: Any,
    path: str | os.PathLike[str],
    *,
    signed: bool = False,
    pack: bool = True,
    simulate: bool = False,
    dynamic_batch: bool = True,
    dynamic_axes: Axes | None = None,
) -> None:
    """Write a quantized model as an ONNX file (opset 21) that computes what :meth:`Quantized.apply` computes.

    ``QuantizeLinear`` and ``DequantizeLinear`` stand where the plan has quantizers; weights are stored as codes: int8 or
    uint8, INT4 up to four bits, FP8. BatchNorms are folded into the weights before them, and a bias that the plan rounds
    is int32 with the scale ``s_weight * s_input``. A runtime that knows the pattern computes in integers. The file is
    checked by ``onnx.checker`` and appears under its name when it is whole.

    Args:
      q: in eval mode; its weights may be frozen.
      params, qparams: see :meth:`Quantized.apply`.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      path: of the file.
      signed: activations of signed grids are int8, as TensorRT wants them; otherwise uint8 with a zero point that is 128
        higher, which stands for the same values and which ONNX Runtime's kernels for x86 want.
      pack: codes of up to four bits are INT4 or UINT4; otherwise a byte each, with which ONNX Runtime computes in integers.
      simulate: a quantizer that the operators cannot express is computed in floating point, as :meth:`Quantized.apply`
        does, instead of refused.
      dynamic_batch: tensors whose first axis is as long as that of the first tensor may have any length there.
      dynamic_axes: names of sizes by argument and axis, as ``{"input_ids": {0: "batch", 1: "length"}}``: these may have any
        length and no others, whatever ``dynamic_batch`` is. Equal names are equal sizes. Where the model takes a range
        only (so many positions), the file says so in its metadata, under the name of the size. A tensor in a container
        has the name that its input has in the file: ``args.0``, ``state.hidden``.

    Raises:
      ConfigError: quantizers that cannot be expressed, each with the reason; the extra is not installed; the model has no
        dynamic batch, or takes one size only along a dynamic axis; arguments or axes that are not there.
      StateError: training mode, names that are missing or unknown.

    Example:
      >>> import os, tempfile, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> path = os.path.join(tempfile.mkdtemp(), "linear.onnx")
      >>> onnx(q, params, q.calibrate(params, [x]), x, path)
      >>> os.path.exists(path)
      True
    """
    require("export.onnx")
    from sophq_func.export import _onnx_graph

    args, kwargs = as_call(example_args, "export.onnx")
    made = program("export.onnx", q, params, qparams, _Onnx(signed), simulate)
    with quiet():
        found = captured("export.onnx", made, args, kwargs, dynamic_batch, dynamic_axes)
        written = translated("export.onnx", found.program, OPSET)
        names = {key: name for name, key in made.names.items()}
        narrow = frozenset(made.names[f"{name}_quantized"] for name in made.narrow() if pack)
        ends = made.inputs(args, kwargs), output_names(found.program)
        proto, _ = _onnx_graph.finished(written.model, names, narrow, *ends, found.sizes)
    for name, known in found.ranges().items():
        proto.metadata_props.add(key=name, value=known)
    write_bytes(Path(path), proto.SerializeToString())


def translated(where: str, exported: ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    """What torch.onnx makes of a captured program."""
    try:
        written = torch.onnx.export(exported, dynamo=True, opset_version=opset, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        because, fix = (
            f"torch.onnx says: {str(cause).splitlines()[0]}",
            "rewrite that operation with ones that torch.onnx supports",
        )
        raise ConfigError(
            explain(where, "an operation of this model cannot be written to ONNX", because=because, fix=fix)
        ) from error
    assert written is not None
    return written


def require(where: str) -> None:
    """Raise a :class:`ConfigError` unless the extra is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fix = "pip install sophq-func[onnx]"
        raise ConfigError(explain(where, f"{' and '.join(missing)} must be installed to write ONNX", fix=fix))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch.onnx tells about itself and about packages that are not needed stays unsaid."""
    logger = logging.getLogger(LOGGER_OF_ONNX)
    silent = lambda record: False  # noqa: E731
    logger.addFilter(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(silent)


class _Onnx:
    """Grids as QuantizeLinear and DequantizeLinear."""

    stores_biases = True
    computes = True

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def fitted(self, grid: LinearGrid, stored: bool) -> LinearGrid | str:
        if not (stored or grid.full or grid.ends):
            return "its codes do not fill their type, and it has several scales"
        return grid if stored or self.signed else grid.unsigned()

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        x = x if grid.ends is None else x.clamp(*grid.ends)
        attrs = {} if grid.axis is None else {"axis": grid.axis}
        codes = symbolic("QuantizeLinear", (x, scale, zero_point), attrs, grid.dtype, x)
        return symbolic("DequantizeLinear", (codes, scale, zero_point), attrs, x.dtype, x)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor, grid: LinearGrid) -> Tensor:
        attrs = {} if grid.axis is None else {"axis": grid.axis}
        if grid.size:
            attrs = {"axis": 1, "block_size": grid.size}
        return symbolic("DequantizeLinear", (codes, scale, zero_point), attrs, torch.float32, codes)


def symbolic(
    name: str, inputs: tuple[Tensor, ...], attrs: dict[str, Any], dtype: torch.dtype, like: Tensor, version: int = OPSET
) -> Tensor:
    """A node of the graph to be, whose result is shaped like ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attrs, dtype=dtype, shape=like.shape, version=version)
