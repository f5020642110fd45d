"""Export to ONNX: QuantizeLinear and DequantizeLinear around float operations, which runtimes fuse into integer kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sophq_func.capture import LOGGER_OF_ONNX
from sophq_func.capture.arguments import as_call
from sophq_func.core.errors import ConfigError, check_flags, explain
from sophq_func.core.files import check_place, write_bytes
from sophq_func.core.public import public_as
from sophq_func.core.types import Given
from sophq_func.export._capture import Axes, captured, not_in_float32, output_names
from sophq_func.export._linear import LinearGrid
from sophq_func.export._names import check_unicode
from sophq_func.export._program import program
from sophq_func.model.quantized import Quantized, refuse_multipliers
from sophq_func.numerics.contracts import QParams

if TYPE_CHECKING:
    from torch.export import ExportedProgram

OPSET = 21
"""The first opset with INT4 and with scales for blocks of an axis."""

NEEDED = ("onnx", "onnx_ir", "onnxscript")
"""The packages of the extra ``onnx``."""


@public_as("export.onnx")
def onnx(
    q: Quantized,
    params: Given,
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

    Each quantizer becomes ``QuantizeLinear`` and ``DequantizeLinear``; weights are stored as codes: int8 or uint8, INT4 up
    to four bits, FP8. BatchNorms are folded into the weights before them. A bias that the plan rounds is int32 with the
    scale ``s_weight * s_input``. Runtimes that fuse this pattern compute in integers. The file is checked by
    ``onnx.checker``, written under a temporary name, and renamed when it is complete.

    Args:
      q: in eval mode; its weights may be frozen.
      params, qparams: see :meth:`Quantized.apply`.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
      path: of the file.
      signed: store activations of signed grids as int8, as TensorRT needs; otherwise they are uint8 with a zero point that
        is 128 higher, which gives the same values and is what ONNX Runtime's kernels for x86 take.
      pack: store codes of up to four bits as INT4 or UINT4; otherwise as bytes, with which ONNX Runtime computes in
        integers.
      simulate: compute a quantizer that the operators cannot express in floating point, as :meth:`Quantized.apply` does,
        instead of raising an error.
      dynamic_batch: every tensor whose first axis is as long as that of the first tensor may have any batch size.
      dynamic_axes: names for the sizes of axes that may have any length, by argument and axis:
        ``{"input_ids": {0: "batch", 1: "length"}}``. Equal names are equal sizes. It replaces ``dynamic_batch``. If the
        model accepts only a range of a size (a number of positions, for instance), the file's metadata hold the range
        under the name of the size. A tensor in a container has the name of its input in the file: ``args.0``,
        ``state.hidden``.

    Raises:
      ConfigError: quantizers cannot be expressed (the message gives the reason for each); the extra ``onnx`` is not
        installed; an option has the wrong type; the model returns what no file can hold; the model does not accept all
        sizes of a dynamic axis; there is no such argument or axis; torch.onnx cannot translate an operation; the file
        would exceed 2 GiB.
      StateError: the model is in training mode; params or qparams are missing or unknown; NaN in a scale, a weight or a
        bias; the folder of ``path`` does not exist, or something else than a file is there.

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
    flags = {"signed": signed, "pack": pack, "simulate": simulate, "dynamic_batch": dynamic_batch}
    check_flags("export.onnx", flags)
    require("export.onnx")
    check_place("export.onnx", path)  # before the work, which takes minutes
    from sophq_func.export import _onnx_graph

    args, kwargs = as_call(example_args, "export.onnx")
    refuse_multipliers("export.onnx", q)
    check_unicode("export.onnx", q.engine.empty_params())
    module = program("export.onnx", q, params, qparams, _Onnx(signed), simulate, (args, kwargs))
    with quiet():
        capture = captured("export.onnx", module, args, kwargs, dynamic_batch, dynamic_axes)
        written = translated("export.onnx", capture.program, OPSET)
        names = {buffer: name for name, buffer in module.names.items()}
        narrow = frozenset(module.names[f"{name}_quantized"] for name in module.narrow()) if pack else frozenset()
        inputs, outputs = module.inputs(args, kwargs), output_names(capture.program)
        try:
            proto, _ = _onnx_graph.finished(written.model, names, narrow, inputs, outputs, capture.sizes)
        except _onnx_graph.INVALID as error:
            if not module.dtypes:
                raise
            raise ConfigError(not_in_float32("export.onnx", module, str(error))) from error
    for name, limits in capture.ranges().items():
        proto.metadata_props.add(key=name, value=limits)
    for name, value in module.beside.items():
        proto.metadata_props.add(key=f"output.{name}", value=str(value))
    write_bytes("export.onnx", path, proto.SerializeToString(deterministic=True))


def translated(where: str, exported: ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
    """The ONNX model of a captured program, from torch.onnx.

    Raises:
      ConfigError: torch.onnx cannot translate an operation.
    """
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
    """Raise a :class:`ConfigError` unless the packages of the extra ``onnx`` are installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        # in quotes, since some shells take brackets for a pattern; pip keeps the package that runs this
        fix = 'pip install "sophq-func[onnx]"'
        raise ConfigError(explain(where, f"{' and '.join(missing)} must be installed to write ONNX", fix=fix))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and warnings of torch.onnx: its own progress, and packages that are not needed."""
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
    """The target ONNX: grids as QuantizeLinear and DequantizeLinear."""

    named = True
    stores_biases = True  # runtimes add int32 biases to their integer sums
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
    """An operator of ONNX for torch.export to record; its result has this dtype and the shape of ``like``."""
    return torch.onnx.ops.symbolic(name, inputs, attrs, dtype=dtype, shape=like.shape, version=version)
