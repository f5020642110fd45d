"""Text for the compilers of sophgo's chips: calibration table, q_table and clip ranges (semantics.md 10.2 to 10.4)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from sophq_func.core.errors import ConfigError, explain, unknown
from sophq_func.core.files import write_bytes, write_text
from sophq_func.export._chains import propagated
from sophq_func.export._float import float_file
from sophq_func.export._names import ops
from sophq_func.export._records import Record, one_each, records
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.layout import expand

WORK_MODES = ("QAT_all_int8", "int4_and_int8_mix", "int4_and_int8_mix_no_fc")


class Tables(NamedTuple):
    """Where :func:`tables` wrote.

    Attributes:
      calibration, q_table, clip_ranges: the tables.
      model: the float ONNX file, where there is one.
    """

    calibration: Path
    q_table: Path
    clip_ranges: Path
    model: Path | None = None


def tables(
    q: Quantized,
    params: Mapping[str, Tensor],
    qparams: Mapping[str, QParams],
    folder: str | os.PathLike[str],
    *,
    example_args: Any = None,
    name: str = "sophq_func",
    names: Mapping[str, str] = MappingProxyType({}),
    work_mode: str = "QAT_all_int8",
) -> Tables:
    """Write the files that a chip's compiler takes: tables, and with ``example_args`` the float ONNX file they refer to.

    ``<name>_cali_table_from_sophgo_mq_sophgo_tpu``: for each activation ``threshold = s max(-qmin, qmax)``, ``min = s
    (qmin - z)`` and ``max = s (qmax - z)``; for each weight its steps and zero points.
    ``<name>_q_table_from_sophgo_mq_sophgo_tpu``: the type of each op. ``<name>_clip_ranges.json``: both as data.
    ``<name>.onnx``: the model without quantizers, opset 18, BatchNorms folded into quantized weights, which are clipped to
    their range but not rounded.

    Args:
      q: a quantized model, planned for a chip.
      params, qparams: see :meth:`Quantized.apply`.
      folder: must be there.
      example_args: a tensor, a tuple of positional arguments, or a dict of keyword arguments; its size is the file's.
        Without it there is no ONNX file.
      name: what file names begin with.
      names: by quantizer, ``<tensor>_<op type>``: the name of the tensor in the ONNX file and the op type of the node
        that makes it; of inputs, the name alone; of weights that of the layer's result, or per channel of a ReLU behind
        it. What is missing is called as in the ONNX file; without one it is named after the value: ``layer1.conv1_Conv``, a
        fused group after its last call, as ``layer1.relu_Relu``.
      work_mode: ``"QAT_all_int8"``, ``"int4_and_int8_mix"`` or ``"int4_and_int8_mix_no_fc"``.

    Returns:
      :class:`Tables`, the paths. Each file is written to a temporary name first, so that it is never half there.

    Raises:
      ConfigError: dynamic ranges, granularities that a table cannot hold, names that are missing or collide; the extra
        ``onnx`` is not installed, where a file is to be written.
      StateError: no such folder; see :meth:`Quantized.apply`.

    Differs from sophgo-mq: weights of 255 levels are 8 bits wide, so that the q_table has them; deconvolutions and
    table formats are there; affine 4-bit activations are 4-bit ones; an unknown work mode is an error. Widths other than
    4 and 8 are in the clip ranges and the calibration table, but have no type, so that the q_table leaves them out.

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
    for own, (weight, scheme) in q.weights_seen(params).items():
        expand(qparams[own].scale, weight, scheme.granularity)
    data, file = (b"", None) if example_args is None else float_file(q, params, qparams, example_args)
    found = one_each(records(q.plan, qparams, ops(q.plan, names, file)))
    found += propagated(q.plan, found, file)
    start = Path(folder) / name
    texts = (calibration_table(found, work_mode), q_table(found), clip_ranges(found))
    endings = (
        "_cali_table_from_sophgo_mq_sophgo_tpu",
        "_q_table_from_sophgo_mq_sophgo_tpu",
        "_clip_ranges.json",
    )
    written = [write_text("tables", f"{start}{end}", text) for end, text in zip(endings, texts, strict=True)]
    if file is None:
        return Tables(*written)
    model = start.with_name(f"{name}.onnx")
    write_bytes(model, data)
    return Tables(written[0], written[1], written[2], model)


def calibration_table(found: Iterable[Record], work_mode: str) -> str:
    """Thresholds and ranges of activations, 8-bit ones first, and steps and zero points of weights, as text."""
    ranged = [record for record in found if record.has_range]
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


def q_table(found: Iterable[Record]) -> str:
    """The type of each op, as text."""
    lines = [f"{r.entry if r.is_weight else r.op} {r.quant_type}" for r in found if r.quant_type != "None"]
    return "\n".join(["# qtable from sophgo_mq", "# op_name  quantize_mode", *lines, ""])


def clip_ranges(found: Iterable[Record]) -> str:
    """Everything about each quantizer that has a range, as JSON."""
    entries = {record.entry: _entry(record) for record in found if record.has_range}
    return json.dumps({"sophgo_tpu": entries, "w_qscheme": "", "a_qscheme": ""}, indent=4) + "\n"


def _entry(record: Record) -> dict[str, Any]:
    told = {"bit": record.bits, "type": "int" if record.signed else "uint"}
    origin = {} if record.is_channelwise else {"ori_name": "none"}
    rest = {"quant_type": record.quant_type, "param_id": {"step": "null", "zero_point": "null"}}
    if record.is_weight:
        lists = {"step": record.steps, "zero_point": record.zero_points, "min": record.lows, "max": record.highs}
        return {**{key: list(values) for key, values in lists.items()}, **told, **origin, **rest}
    return {"threshold": record.threshold, "min": record.lows[0], "max": record.highs[0], **told, **origin, **rest}
