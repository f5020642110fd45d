"""The tables in the text formats of sophgo-mq, to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sophq_func.core.errors import ConfigError, explain
from sophq_func.export._chains import propagated
from sophq_func.export._compiler import Compiler, Contents, Job, check_words
from sophq_func.export._float import Form, float_file
from sophq_func.export._names import ops
from sophq_func.export._records import Record, one_each, records, word_of_sophgo_mq

WORK_MODES = ("QAT_all_int8", "int4_and_int8_mix", "int4_and_int8_mix_no_fc")
"""Modes that the first line of a calibration table may name."""

FORM = Form()
"""Weights clipped to their range and not rounded, opset 18."""


def contents(job: Job) -> Contents:
    """What the files hold.

    Raises:
      ConfigError, StateError: see :func:`sophq_func.export.tables`.
    """
    if job.chip or job.batches != ():
        what, fix = "chip= and batches= are for tpu-mlir", 'compiler="tpu-mlir", or leave them out'
        raise ConfigError(explain("tables", what, because="these tables hold what the plan says alone", fix=fix))
    q, qparams = job.q, job.qparams
    file = None if job.example_args is None else float_file(q, job.params, qparams, job.example_args, FORM)
    names = None if file is None else file.names
    entries = one_each(records(q.plan, qparams, ops(q.plan, job.names, names), word_of_sophgo_mq))
    entries += propagated(q.plan, entries, names)
    check_words((name for record in entries for name in (record.entry, record.op)), "names={quantizer: name} of tables")
    return Contents(
        calibration=calibration_table(entries, job.work_mode),
        q_table=q_table(entries),
        clip_ranges=clip_ranges(entries),
        model=None if file is None else file.proto.SerializeToString(deterministic=True),
    )


SOPHGO_MQ = Compiler(
    calibration="_cali_table_from_sophgo_mq_sophgo_tpu",
    q_table="_q_table_from_sophgo_mq_sophgo_tpu",
    clip_ranges="_clip_ranges.json",
    contents=contents,
)


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
