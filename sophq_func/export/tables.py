"""Export for the compilers of sophgo's chips: calibration table, q_table and clip ranges, in sophgo-mq's text formats."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.files import write_bytes, write_text
from sophq_func.core.public import public_as
from sophq_func.core.types import Given
from sophq_func.export._chains import propagated
from sophq_func.export._float import float_file
from sophq_func.export._names import ops
from sophq_func.export._records import Record, one_each, records
from sophq_func.export._steps import with_room_for_biases
from sophq_func.model.finite import check_numbers
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand

WORK_MODES = ("QAT_all_int8", "int4_and_int8_mix", "int4_and_int8_mix_no_fc")
"""Modes that the first line of a calibration table may name."""


class Tables(NamedTuple):
    """Paths of the files that :func:`tables` wrote.

    Attributes:
      calibration, q_table, clip_ranges: of the tables.
      model: of the float ONNX file; ``None`` without ``example_args``.
    """

    calibration: Path
    q_table: Path
    clip_ranges: Path
    model: Path | None = None


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
) -> Tables:
    """Write the tables for a chip's compiler, and with ``example_args`` the float ONNX file that they refer to.

    With step ``s`` (float, unit of the tensor), zero point ``z`` and the outermost codes ``qmin`` and ``qmax``:

    * ``<name>_cali_table_from_sophgo_mq_sophgo_tpu``: for each activation ``threshold = s max(-qmin, qmax)``, ``min = s
      (qmin - z)`` and ``max = s (qmax - z)``; for each weight its steps and zero points.
    * ``<name>_q_table_from_sophgo_mq_sophgo_tpu``: the number type of each op.
    * ``<name>_clip_ranges.json``: the contents of both, as JSON.
    * ``<name>.onnx``: the model without quantizers, opset 18. BatchNorms are folded into quantized weights, which are
      clipped to their range but not rounded.

    Args:
      q: a quantized model, planned for a chip.
      params, qparams: see :meth:`Quantized.apply`.
      folder: an existing folder.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the ONNX file accepts
        inputs of these shapes only. Without it no ONNX file is written.
      name: the beginning of all file names.
      names: by quantizer, its name in the tables, ``<tensor>_<op type>``: the tensor in the ONNX file, and the op type of
        the node that computes it. For an input of the model it is the input's name; for a weight the name of the layer's
        result, or, per channel, of the ReLU behind it. Quantizers that are not listed get the names of the ONNX file;
        without one they are named after the call: ``layer1.conv1_Conv``, and a fused group after its last call:
        ``layer1.relu_Relu``.
      work_mode: ``"QAT_all_int8"``, ``"int4_and_int8_mix"`` or ``"int4_and_int8_mix_no_fc"``.

    Returns:
      The paths. Each file is written under a temporary name and renamed, so that it is never incomplete.

    Raises:
      ConfigError: a table cannot hold a dynamic range, a granularity or the steps of a quantizer; a bias does not fit in
        int32; names are missing,
        unknown or used twice; an unknown work mode; ``example_args`` without the extra ``onnx``.
      StateError: there is no such folder; NaN in a scale, a weight or a bias; see :meth:`Quantized.apply`.

    Differs from sophgo-mq: weights with 255 levels count as 8 bits wide, so that the q_table lists them; deconvolutions
    and table formats are listed; affine 4-bit activations count as 4-bit; an unknown work mode is an error. Quantizers of
    other widths than 4 and 8 are in the clip ranges and the calibration table, but not in the q_table, which has no type
    for them.

    Example:
      >>> import tempfile, torch, sophq_func as sq
      >>> model, x = torch.nn.Linear(2, 3).eval(), torch.randn(4, 2)
      >>> q = sq.quantize(model, sq.QuantConfig(chip="BM1690", strategy="CNN"), example_args=(x,))
      >>> params = sq.params_of(model)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     found = tables(q, params, q.calibrate(params, [x]), folder, names={"weight_fake_quant": "y_Gemm"})
      ...     found.q_table.read_text().splitlines()[2:]
      ['input INT8', 'y_Gemm_weight INT8', 'linear_Gemm INT8']
    """
    if work_mode not in WORK_MODES:
        raise ConfigError(unknown("tables", "work mode", work_mode, WORK_MODES))
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ConfigError(explain("tables", "file names cannot begin with this name", got=name, allowed="a file name"))
    q.plan.check(qparams, "qparams", dict.fromkeys(q.plan, QParams))
    for quantizer, (weight, scheme) in q.weights_seen(params).items():
        expand(qparams[quantizer].scale, weight, scheme.granularity)  # raises where the steps do not fit the weight
    check_numbers("tables", q.plan, q.engine.quantizers, params, qparams)
    with torch.no_grad():
        qparams = with_room_for_biases(q, params, qparams)
    data, file = (b"", None) if example_args is None else float_file(q, params, qparams, example_args)
    entries = one_each(records(q.plan, qparams, ops(q.plan, names, file)))
    entries += propagated(q.plan, entries, file)
    start = Path(folder) / name
    texts = {
        "_cali_table_from_sophgo_mq_sophgo_tpu": calibration_table(entries, work_mode),
        "_q_table_from_sophgo_mq_sophgo_tpu": q_table(entries),
        "_clip_ranges.json": clip_ranges(entries),
    }
    # All texts exist before the first file does: an error in one of them leaves no file behind.
    paths = Tables(*(write_text("tables", f"{start}{ending}", text) for ending, text in texts.items()))
    if file is None:
        return paths
    model = start.with_name(f"{name}.onnx")
    write_bytes(model, data)
    return paths._replace(model=model)


def calibration_table(entries: Iterable[Record], work_mode: str) -> str:
    """The calibration table: ranges of activations, 8-bit ones first, then steps and zero points of weights."""
    ranged = [record for record in entries if record.has_range]
    activations = [record for record in ranged if not record.is_weight]
    return "\n".join(
        [
            f"# work_mode:{work_mode} #Automatically generated, do not modify, work_mode choice:[{', '.join(WORK_MODES)}]",
            "# op_name    threshold    min    max",
            *(_activation_line(record) for record in activations if record.suffix == "_8"),
            "#int4_th",
            *(_activation_line(record) for record in activations if record.suffix == "_4"),
            "#weight_scale",
            *(_weight_line(record) for record in ranged if record.is_weight),
            "",
        ]
    )


def _activation_line(record: Record) -> str:
    return f"{record.op} {record.threshold:.7f} {record.lows[0]:.7f} {record.highs[0]:.7f}"


def _weight_line(record: Record) -> str:
    steps, zeros = " ".join(f"{step:.7f}" for step in record.steps), " ".join(map(str, record.zero_points))
    return f"{record.entry} {len(record.steps)} {steps} {len(record.zero_points)} {zeros}"


def q_table(entries: Iterable[Record]) -> str:
    """The q_table: the number type of each op."""
    typed = [record for record in entries if record.quant_type != "None"]
    lines = [f"{record.entry if record.is_weight else record.op} {record.quant_type}" for record in typed]
    return "\n".join(["# qtable from sophgo_mq", "# op_name  quantize_mode", *lines, ""])


def clip_ranges(entries: Iterable[Record]) -> str:
    """The clip ranges: all that is known about each quantizer with a range, as JSON."""
    ranges = {record.entry: _entry(record) for record in entries if record.has_range}
    return json.dumps({"sophgo_tpu": ranges, "w_qscheme": "", "a_qscheme": ""}, indent=4) + "\n"


def _entry(record: Record) -> dict[str, object]:
    """One quantizer in the clip ranges; keys, their order and the constant texts are those of sophgo-mq."""
    entry: dict[str, object] = {}
    if record.is_weight:
        entry["step"] = list(record.steps)
        entry["zero_point"] = list(record.zero_points)
        entry["min"] = list(record.lows)
        entry["max"] = list(record.highs)
    else:
        entry["threshold"] = record.threshold
        entry["min"] = record.lows[0]
        entry["max"] = record.highs[0]
    entry["bit"] = record.bits
    entry["type"] = "int" if record.signed else "uint"
    if not record.is_channelwise:
        entry["ori_name"] = "none"
    entry["quant_type"] = record.quant_type
    entry["param_id"] = {"step": "null", "zero_point": "null"}
    return entry
