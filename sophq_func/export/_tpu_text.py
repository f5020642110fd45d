"""The files that the compiler tpu-mlir reads, and the commands that make it read them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sophq_func.capture.arguments import as_call, map_inputs
from sophq_func.codes import Grid, share_on
from sophq_func.config.chips import CHIPS
from sophq_func.core.errors import ConfigError, explain, raise_all, warn
from sophq_func.export._compiler import Compiler, Contents, Job, check_words
from sophq_func.export._float import FloatFile, Form, float_file
from sophq_func.export._nodes import nodes_of, operations
from sophq_func.export._records import Record, bits_of, outermost, records
from sophq_func.export._sophgo_mq import WORK_MODES
from sophq_func.export._tpu_mlir import (
    FLOAT,
    FLOAT8,
    INT8,
    PROCESSORS,
    SCALED,
    WORDS,
    Processor,
    Range,
    Tabled,
    Typed,
    ranges_of,
    typed,
)
from sophq_func.numerics.granularity import PerChannel
from sophq_func.planning.plan import Plan

if TYPE_CHECKING:
    import onnx


def contents(job: Job) -> Contents:
    """What the files hold.

    Raises:
      ConfigError, StateError: see :func:`sophq_func.export.tables`.
    """
    _check(job)
    processor = _processor(job)
    acting = _acting(job, processor)
    file = float_file(job.q, job.params, job.qparams, job.example_args, FORM)
    tabled = _tabled(job, acting, file, processor)
    check_words((*tabled.inputs, *(made.operation.name for made in tabled.operations)), "rename the module or the argument")
    if tabled.joined:
        names = ", ".join(made.operation.name for made in tabled.joined)
        what = "linear layers have one step for all channels, and these weights are rounded to their largest one"
        fix = "sq.Rule(type=nn.Linear, weight=sq.override(granularity=sq.PerTensor()))"
        warn(explain("export.tables", f"on this chip {what}: {names}", fix=fix))
    return Contents(
        calibration=calibration_table(tabled),
        q_table=q_table(tabled),
        clip_ranges=clip_ranges(tabled),
        model=file.proto.SerializeToString(deterministic=True),
        readme=readme(job.name, tabled, processor, file.proto),
    )


def _tidied(where: str, proto: onnx.ModelProto) -> Mapping[str, str]:
    from sophq_func.export._tidied import tidied  # needs the extra onnx

    return tidied(where, proto)


FORM = Form(finished=_tidied, on_grids=True, opens_attention=True)

TPU_MLIR = Compiler(
    calibration="_cali_table",
    q_table="_q_table",
    clip_ranges="_clip_ranges.json",
    contents=contents,
    needs_example=True,
)


def _check(job: Job) -> None:
    """Refuse what the compiler's tables cannot be made of."""
    if job.example_args is None:
        because, fix = "they name each operation of the ONNX file", 'example_args=x, or compiler="sophgo-mq"'
        raise ConfigError(explain("tables", "the tables of tpu-mlir need an example", because=because, fix=fix))
    if job.work_mode != WORK_MODES[0]:
        because, fix = "its q_table says the type of each operation", 'leave it out, or compiler="sophgo-mq"'
        raise ConfigError(explain("tables", "tpu-mlir has no work mode", got=job.work_mode, because=because, fix=fix))
    if job.names:
        because, fix = "they name the operations of the file beside them", 'leave names out, or compiler="sophgo-mq"'
        raise ConfigError(explain("tables", "the tables of tpu-mlir take no names", because=because, fix=fix))


def _processor(job: Job) -> Processor | None:
    """The chip that the plan is for; ``None`` where neither plan nor user say."""
    origin = job.q.plan.origin
    chip = job.chip or ("" if origin is None else origin.config.chip or "")
    if not chip:
        return None
    name = CHIPS.canonical(chip)
    if name not in PROCESSORS and job.chip:
        allowed = ", ".join(PROCESSORS)
        raise ConfigError(explain("tables", "the compiler does not know this chip", got=job.chip, allowed=allowed))
    return PROCESSORS.get(name)


def _acting(job: Job, processor: Processor | None) -> list[Record]:
    """The quantizers that are on.

    Raises:
      ConfigError: the compiler cannot do what one of them asks.
    """
    plan, qparams = job.q.plan, job.qparams
    found = records(plan, qparams, {name: name for name in plan}, _type)
    acting = [record for record in found if record.quant_type != FLOAT and share_on(qparams[record.quantizer])]
    raise_all([problem for record in acting for problem in _problems(plan, record, processor)], ConfigError)
    return acting


def _tabled(job: Job, acting: Sequence[Record], file: FloatFile, processor: Processor | None) -> Tabled:
    """All that the tables say."""
    plan, proto, names = job.q.plan, file.proto, file.names
    ranges = ranges_of(plan, acting, names)
    weights = {
        names.products[call.name]: record
        for record in acting
        if record.is_weight
        for call in plan.calls
        if record.quantizer in call.weights and call.name in names.products
    }
    for record in acting:
        members = plan.site(record.quantizer).members
        if record.is_weight and members and members[0] in names.products:
            weights[names.products[members[0]]] = record
    made = operations(nodes_of(proto), [value.name for value in proto.graph.output])
    types = typed(made, ranges, weights, cache(partial(_measured, job, proto)), names)
    inputs = {value.name: ranges[value.name] for value in proto.graph.input if value.name in ranges}
    affine = any(grid.affine for grid in ranges.values()) and not (processor is not None and processor.symmetric)
    by_name = {record.quantizer: record for record in acting}
    channels = [made for made in types if _has_linear_channels(made, by_name)]
    joined = channels if processor is not None and not processor.linear_channels else []
    return Tabled(tuple(types), inputs, by_name, affine, tuple(channels), tuple(joined))


def _has_linear_channels(made: Typed, records: Mapping[str, Record]) -> bool:
    """Whether it is a linear layer, in a planned type, with a step for each channel."""
    return bool(made.weight) and made.operation.kind in ("Gemm", "MatMul") and records[made.weight].is_channelwise


def _measured(job: Job, proto: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """The range of each tensor that the float file computes, on the example and on batches."""
    from sophq_func.export._measured import measured  # needs the extra onnx

    return measured(proto, [_feed(job, batch) for batch in (job.example_args, *job.batches)])


def _feed(job: Job, batch: Any) -> dict[str, Any]:
    """The inputs of the file, for a batch."""
    args, kwargs = as_call(batch, "tables")
    feed: dict[str, Any] = {}

    def note(name: str, x: Tensor) -> Tensor:
        feed[name] = x.detach().cpu().numpy()
        return x

    map_inputs(job.q.engine.loop.arguments, args, kwargs, note)
    return feed


def _type(plan: Plan, name: str, grid: Grid | None) -> str:
    """The compiler's type for a quantizer; empty for none."""
    if grid is None:
        return WORDS.get(plan[name].fake_quantize.name, "")
    bits = bits_of(*outermost(grid))
    narrow_is_fine = plan.site(name).role == "weight"  # codes of fewer bits are codes of int8
    return INT8 if bits == 8 or (narrow_is_fine and bits < 8) else ""


def _problems(plan: Plan, record: Record, processor: Processor | None) -> Iterator[str]:
    """Why the compiler cannot do what a quantizer asks."""
    name, what = record.quantizer, "weight" if record.is_weight else "activation"
    fix = f'sq.Rule(name="{name}", {what}=sq.override(%s))'
    if record.quant_type == "None":
        allowed = f"integers of {'up to ' if record.is_weight else ''}8 bits, {', '.join(WORDS)}"
        got = f"{record.bits} bits" if record.has_range else plan[name].fake_quantize.name
        change = "bits=8" if record.has_range else "fake_quantize=sq.fake_quantize.learnable()"
        because = OF_FOUR_BITS if record.has_range and record.bits == 4 else ""
        sentence = f"the compiler has no such type for this {what}"
        yield explain(name, sentence, got=got, allowed=allowed, because=because, fix=fix % change)
    elif record.is_weight and _has_other_channels(plan, name):
        because, change = "it has steps for output channels alone", "granularity=sq.PerChannel()"
        yield explain(name, "the compiler has no such channels of weights", because=because, fix=fix % change)
    elif record.is_weight and record.quant_type == INT8 and any(record.zero_points):
        because = "it reads no zero points of weights"
        yield explain(name, "the compiler has no affine weights", because=because, fix=fix % "symmetric=True")
    elif record.quant_type in FLOAT8 and processor is not None and not processor.float8:
        because, other = f"{processor.word} has no such type", fix % "fake_quantize=sq.fake_quantize.bf16()"
        yield explain(name, "the compiler has no FP8 for this chip", because=because, fix=f"chip BM1690, or {other}")


def _has_other_channels(plan: Plan, name: str) -> bool:
    """Whether a weight has a step for each entry of another axis than that of the output channels."""
    granularity, site = plan[name].scheme.granularity, plan.site(name)
    if not isinstance(granularity, PerChannel) or granularity.axis is None or not site.shape:
        return False
    if isinstance(granularity.axis, int):
        return granularity.axis % len(site.shape) != site.axis
    return granularity.axis != site.axis


OF_FOUR_BITS = "its INT4 convolutions give other numbers than the plan; weights alone may have 4 bits, in INT8"
"""Why activations of 4 bits are refused: with the two ranges that it asks for, the digits of the examples fall to 25 %."""


def number(value: float) -> str:
    """A number as the compiler's pattern for lines takes it: without a plus sign.

    Example:
      >>> number(0.1), number(1e-7), number(2.5e20)
      ('0.1', '1e-07', '2.5e20')
    """
    return f"{value:.12g}".replace("+", "")


def calibration_table(tabled: Tabled) -> str:
    """The calibration table: ranges of inputs and operations, then steps of weights."""
    ranged = {**tabled.inputs, **{made.operation.name: made.range for made in tabled.operations if made.range is not None}}
    ranged = {name: grid for name, grid in ranged.items() if grid.threshold}
    weights = [made for made in tabled.operations if made.weight and made.word in SCALED]
    return "\n".join(
        [
            "# op_name    threshold    min    max",
            *(_line(name, grid) for name, grid in ranged.items()),
            "#weight_scale",
            *(_weight_line(made, tabled) for made in weights),
            "",
        ]
    )


def _line(name: str, grid: Range) -> str:
    return f"{name} {number(grid.threshold)} {number(grid.low)} {number(grid.high)}"


def _weight_line(made: Typed, tabled: Tabled) -> str:
    """Steps for each output channel, which the compiler wants of a weight with one step, too.

    Of a linear layer it reads the first alone on most chips: there all are the largest, with which no weight is cut off.
    """
    record = tabled.records[made.weight]
    node = made.operation.nodes[0]
    steps = record.steps
    if not record.is_channelwise or made in tabled.joined:
        steps = (max(steps),) * node.channels
    zeros = " ".join("0" for _ in steps)
    return f"{made.operation.name}_weight {len(steps)} {' '.join(map(number, steps))} {len(steps)} {zeros}"


def q_table(tabled: Tabled) -> str:
    """The q_table: the type of each operation."""
    lines = [f"{made.operation.name} {made.word}" for made in tabled.operations if made.operation.kind != "Cast"]
    return "\n".join(["# op_name  quantize_mode", *lines, ""])


def clip_ranges(tabled: Tabled) -> str:
    """What the tables say, and of which quantizers, as JSON."""
    ranges = {name: _entry("Input", FLOAT, grid, "") for name, grid in tabled.inputs.items()}
    for made in tabled.operations:
        ranges[made.operation.name] = _entry(made.operation.kind, made.word, made.range, made.weight)
    weights = {made.weight: tabled.records[made.weight] for made in tabled.operations if made.weight}
    steps = {name: {"steps": list(record.steps), "type": record.quant_type} for name, record in weights.items()}
    return json.dumps({"tpu-mlir": {"operations": ranges, "weights": steps}}, indent=4) + "\n"


def _entry(kind: str, word: str, grid: Range | None, weight: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"op_type": kind, "type": word, "weight": weight}
    if grid is not None:
        entry |= {"threshold": grid.threshold, "min": grid.low, "max": grid.high, "result": grid.word}
        entry["quantizers"] = list(grid.quantizers)
    return entry


def readme(name: str, tabled: Tabled, processor: Processor | None, proto: onnx.ModelProto) -> str:
    """The commands that compile the files of this plan."""
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in proto.graph.input]
    chip = PROCESSORS["BM1684X"] if processor is None else processor
    default = tabled.words[0] if tabled.words else FLOAT
    # a file name may hold what a shell reads as something else
    endings = ("", ".mlir", ".onnx", TPU_MLIR.q_table, TPU_MLIR.calibration)
    named = {ending: shlex.quote(f"{name}{ending}") for ending in endings}
    switches = [
        f"--mlir {named['.mlir']}",
        f"--quantize {default}",
        f"--processor {chip.word}",
        f"--quantize_table {named[TPU_MLIR.q_table]}",
    ]
    if set(tabled.words) & SCALED:
        switches.insert(3, f"--calibration_table {named[TPU_MLIR.calibration]}")
    if tabled.affine:
        switches.append("--asymmetric")
    if tabled.channels and chip.linear_channels:
        switches.append("--matmul_perchannel")
    if any(made.operation.kind == "Softmax" for made in tabled.operations):
        # else the compiler replaces attention by one float16 operation, whatever the words say; its results are wrong
        switches.append("--high_precision")
    switches.append(f"--model {shlex.quote(f'{name}_{chip.word}.{chip.ending}')}")
    shapes_text = json.dumps(shapes, separators=(",", ":"))
    lines = [
        "Commands of tpu-mlir for this plan, in this folder:",
        "",
        f"model_transform.py --model_name {named['']} --model_def {named['.onnx']} "
        f'--input_shapes "{shapes_text}" --mlir {named[".mlir"]}',
        "model_deploy.py " + " ".join(switches),
        "",
        *_notes(tabled, processor),
        "",
    ]
    return "\n".join(lines)


def _notes(tabled: Tabled, processor: Processor | None) -> Iterator[str]:
    """What the chip does otherwise than the plan says."""
    if processor is None:
        words = ", ".join(known.word for known in PROCESSORS.values())
        yield f"The plan names no chip that the compiler knows; --processor is one of {words}."
    elif processor.symmetric and any(grid.low == 0.0 or grid.affine for grid in _grids(tabled)):
        yield "This chip has symmetric codes only: affine and unsigned activations get steps of up to twice the size."
    if tabled.joined:
        names = ", ".join(made.operation.name for made in tabled.joined)
        yield f"This chip has one step for a linear layer: weights are rounded to their largest one in {names}."
    floats = [made.operation.name for made in tabled.operations if made.word == FLOAT]
    if floats:
        yield f"In {FLOAT}, as the plan does not round all that they read: {', '.join(floats)}."


def _grids(tabled: Tabled) -> Iterator[Range]:
    """The grids of 8-bit activations."""
    found = (*tabled.inputs.values(), *(made.range for made in tabled.operations))
    return (grid for grid in found if grid is not None and grid.word == INT8)
