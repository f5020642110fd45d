"""Export for the compilers of sophgo's chips: a float ONNX file, and tables that say how to quantize it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.files import check_place, write_bytes, write_text
from sophq_func.core.public import public_as
from sophq_func.core.registry import Registry
from sophq_func.core.types import Given
from sophq_func.export._compiler import Compiler, Job
from sophq_func.export._names import check_unicode
from sophq_func.export._sophgo_mq import SOPHGO_MQ, WORK_MODES
from sophq_func.export._steps import with_room_for_biases
from sophq_func.export._tpu_text import TPU_MLIR
from sophq_func.model.finite import check_numbers
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand

COMPILERS: Registry[Compiler] = Registry("compiler")
COMPILERS.add("tpu-mlir", TPU_MLIR)
COMPILERS.add("sophgo-mq", SOPHGO_MQ)


class Tables(NamedTuple):
    """Paths of the files that :func:`tables` wrote.

    Attributes:
      calibration, q_table, clip_ranges: of the tables.
      model: of the float ONNX file; ``None`` without ``example_args``.
      readme: of the commands that compile these files; ``None`` for sophgo-mq.
    """

    calibration: Path
    q_table: Path
    clip_ranges: Path
    model: Path | None = None
    readme: Path | None = None


@public_as("export.tables")
def tables(
    q: Quantized,
    params: Given,
    qparams: Mapping[str, QParams],
    folder: str | os.PathLike[str],
    *,
    example_args: Any = None,
    name: str = "sophq_func",
    names: Mapping[str, str] = MappingProxyType({}),
    work_mode: str = "QAT_all_int8",
    compiler: str = "tpu-mlir",
    batches: Iterable[Any] = (),
    chip: str = "",
) -> Tables:
    """Write what a chip's compiler reads: a float ONNX file, tables that say how to quantize it, and the commands.

    With step ``s`` (float, unit of the tensor), zero point ``z`` and the outermost codes ``qmin`` and ``qmax``, for
    ``tpu-mlir``:

    * ``<name>_cali_table``: for each operation ``threshold min max``: ``127 s`` for signed codes, ``255 s`` for unsigned
      ones, ``s (qmin - z)`` and ``s (qmax - z)`` for affine ones, and what the example gave where the plan has no grid; for
      each weight a step for each output channel.
    * ``<name>_q_table``: the type of each operation: ``INT8``, ``F8E4M3``, ``F8E5M2``, ``BF16``, ``F16``, or ``F32`` where
      not all that it reads is on grids of one type.
    * ``<name>_clip_ranges.json``: the contents of both, and the quantizers that they come from.
    * ``<name>.onnx``: the model without quantizers, opset 17, for inputs of the example's shapes, with BatchNorms folded,
      and with quantized weights rounded to their grids.
    * ``<name>_README.txt``: the commands that compile these files, and what the chip does otherwise than the plan says.

    For ``sophgo-mq`` the tables are those of that library; see ``docs/tables.md``.

    Args:
      q: a quantized model, planned for a chip.
      params, qparams: see :meth:`Quantized.apply`.
      folder: an existing folder.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the ONNX file accepts
        inputs of these shapes only. Only ``sophgo-mq`` has tables without it, which have no ONNX file beside them.
      name: the beginning of all file names.
      names: for ``sophgo-mq``: by quantizer, its name in the tables, ``<tensor>_<op type>``: the tensor in the ONNX file,
        and the op type of the node that computes it. For an input of the model it is the input's name; for a weight the
        name of the layer's result, or, per channel, of the ReLU behind it. Quantizers that are not listed get the names of
        the ONNX file; without one they are named after the call: ``layer1.conv1_Conv``, and a fused group after its last
        call: ``layer1.relu_Relu``.
      work_mode: for ``sophgo-mq``: ``"QAT_all_int8"``, ``"int4_and_int8_mix"`` or ``"int4_and_int8_mix_no_fc"``.
      compiler: ``"tpu-mlir"`` (version 1.30.2) or ``"sophgo-mq"``.
      batches: for ``tpu-mlir``: further inputs, beside the example, from which values without a grid have their ranges.
      chip: for ``tpu-mlir``: name of the chip, where the plan does not say it.

    Returns:
      The paths. Each file is written under a temporary name and renamed, so that it is never incomplete.

    Raises:
      ConfigError: a table cannot hold a dynamic range, a granularity or the steps of a quantizer; the compiler has no such
        type, or none on this chip; a bias does not fit in int32; names are missing, unknown or used twice, or hold a space
        or ``#``; an unknown compiler or work mode; no example; no extra ``onnx``.
      StateError: there is no such folder; NaN in a scale, a weight or a bias; see :meth:`Quantized.apply`.

    Differs from sophgo-mq: in its format weights with 255 levels count as 8 bits wide, so that the q_table lists them;
    deconvolutions and table formats are listed; affine 4-bit activations count as 4-bit; an unknown work mode is an error.
    Quantizers of other widths than 4 and 8 are in the clip ranges and the calibration table, but not in the q_table, which
    has no type for them.

    Example:
      >>> import tempfile, torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(chip="BM1684X", strategy="CNN"), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     found = tables(q, params, q.calibrate(params, [x]), folder, name="net", example_args=x)
      ...     found.q_table.read_text().splitlines()[1:]
      ['output_Gemm INT8']
    """
    if work_mode not in WORK_MODES:
        raise ConfigError(unknown("tables", "work mode", work_mode, WORK_MODES))
    if not isinstance(name, str) or not name or Path(name).name != name or not name.isprintable():
        raise ConfigError(explain("tables", "file names cannot begin with this name", got=name, allowed="a file name"))
    start = Path(folder) / name
    check_place("tables", start)  # before the work, which takes minutes
    check_unicode("tables", q.engine.empty_params())
    q.engine.check(params, qparams, "tables", "qparams")
    for quantizer, (weight, scheme) in q.weights_seen(params).items():
        expand(qparams[quantizer].scale, weight, scheme.granularity)  # raises where the steps do not fit the weight
    check_numbers("tables", q.plan, q.engine.quantizers, params, qparams)
    with torch.no_grad():
        qparams = with_room_for_biases(q, params, qparams)
    job = Job(q, params, qparams, example_args, name, names, work_mode, batches, chip)
    written = COMPILERS.get(compiler)
    contents = written.contents(job)
    texts = {
        f"{start}{written.calibration}": contents.calibration,
        f"{start}{written.q_table}": contents.q_table,
        f"{start}{written.clip_ranges}": contents.clip_ranges,
    }
    # All texts exist before the first file does: an error in one of them leaves no file behind.
    paths = Tables(*(write_text("tables", path, text) for path, text in texts.items()))
    if contents.model is not None:
        paths = paths._replace(model=start.with_name(f"{name}.onnx"))
        write_bytes("tables", start.with_name(f"{name}.onnx"), contents.model)
    if contents.readme:
        paths = paths._replace(readme=write_text("tables", f"{start}_README.txt", contents.readme))
    return paths
