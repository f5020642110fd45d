"""The contents of a chip's tables as data: one record for each quantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophq_func.codes import Grid, Refusal, grid_of, integer_grid
from sophq_func.core.errors import ConfigError, explain, raise_all
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.formats import FLOAT8
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.ranges import positive
from sophq_func.numerics.scheme import QuantizerConfig
from sophq_func.planning.plan import Plan

WORDS: Mapping[str, str] = {
    "e4m3": "FP8",
    "e5m2": "FP8",
    "fp4": "FP4",
    "gptqfp4": "FP4",
    "mxfp4": "FP4",
    "nvfp4": "FP4",
    "bf16": "BF16",
}
"""Number formats as sophgo-mq's q_table writes them, by the name of the fake quantizer."""


@dataclass(frozen=True)
class Record:
    """What the tables hold about one quantizer.

    Attributes:
      quantizer: its name in the plan.
      op: its name in the tables, for an activation without ``_8`` or ``_4``, for a weight without ``_weight``.
      is_weight: whether it quantizes a weight.
      is_channelwise: whether it has a step for each channel.
      bits: width of the codes, ``ceil(log2(levels))``.
      signed: whether codes below 0 exist.
      quant_type: the number type in the q_table; ``"None"`` where the q_table has no type for it.
      steps, zero_points, lows, highs: for each scale the step, the code of 0.0, and the real numbers of the outermost codes.
      threshold: the largest ``step * max(-qmin, qmax)`` of all scales.
      ending: replaces ``_8`` or ``_4`` in the name of an activation; empty where the width decides.
    """

    quantizer: str
    op: str
    is_weight: bool
    is_channelwise: bool
    bits: int
    signed: bool
    quant_type: str
    steps: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()
    threshold: float = 0.0
    ending: str = ""

    @property
    def has_range(self) -> bool:
        """Whether there are steps; formats that compute their scale from each tensor have none."""
        return bool(self.steps)

    @property
    def entry(self) -> str:
        """Its name in the clip ranges."""
        return f"{self.op}_weight" if self.is_weight else f"{self.op}{self.suffix}"

    @property
    def suffix(self) -> str:
        """The end of an activation's name."""
        return self.ending or ("_4" if self.bits == 4 else "_8")


Word = Callable[[Plan, str, Grid | None], str]
"""From a quantizer, and its grid if it is an integer one, to the type that a compiler has for it; empty for none."""


def records(plan: Plan, qparams: Mapping[str, QParams], ops: Mapping[str, str], word: Word) -> list[Record]:
    """A record for each quantizer, in the order of the plan; without terms of sums, which are no tensors of the file.

    Args:
      plan, qparams: of the quantizers.
      ops: their names in the tables.
      word: the types of the compiler.

    Raises:
      ConfigError: the tables cannot hold some quantizers; one message lists all of them.
    """
    problems = [_problem(plan, name, config, qparams[name]) for name, config in plan.items()]
    raise_all([problem for problem in problems if problem])
    return [_record(plan, name, qparams[name], ops[name], word) for name in plan if not plan.site(name).is_term]


def _problem(plan: Plan, name: str, config: QuantizerConfig, qparams: QParams) -> str:
    """Why the tables cannot hold a quantizer, as an error sentence; empty where they can."""
    if config.scheme.dynamic:
        because, fix = "their ranges are constants", "dynamic=False"
        return explain(name, "the tables cannot hold a dynamic range", because=because, fix=fix)
    allowed = (PerTensor, PerChannel) if plan.site(name).role == "weight" else (PerTensor,)
    if not isinstance(config.scheme.granularity, allowed):
        words = " or ".join(f"{cls.__name__}()" for cls in allowed)
        return explain(name, "the tables cannot hold this granularity", got=config.scheme.granularity, allowed=words)
    if isinstance(config.scheme.granularity, PerChannel) and isinstance(config.scheme.granularity.axis, tuple):
        because = "they have one row of steps for each weight"
        fix = f'sq.Rule(name="{name}", weight=sq.override(granularity=sq.PerTensor()))'
        got = config.scheme.granularity
        return explain(name, "the tables cannot hold channels along several axes", got=got, because=because, fix=fix)
    fake = pieces.build(config.fake_quantize)
    grid = grid_of(fake, qparams, config.scheme) if fake.integer else None
    if isinstance(grid, Refusal) and not config.observe_only:
        fix = "sq.fake_quantize.fixed(), or sq.fake_quantize.learnable()"
        return explain(name, f"the tables cannot hold the steps of {config.fake_quantize!r}", because=grid.because, fix=fix)
    return ""


def _record(plan: Plan, name: str, qparams: QParams, op: str, word: Word) -> Record:
    config, is_weight = plan[name], plan.site(name).role == "weight"
    fake = pieces.build(config.fake_quantize)
    grid = integer_grid(fake, qparams, config.scheme) if fake.integer else None
    record = Record(
        quantizer=name,
        op=op,
        is_weight=is_weight,
        is_channelwise=isinstance(config.scheme.granularity, PerChannel),
        bits=8,
        signed=True,
        quant_type=("F32" if config.observe_only else word(plan, name, grid)) or "None",
    )
    if grid is not None:
        return _with_range(record, grid)
    if fake.element in FLOAT8:
        largest, steps = torch.finfo(fake.element).max, positive(qparams.scale).detach()
        return replace(
            record,
            steps=_floats(steps),
            zero_points=(0,) * steps.numel(),
            lows=_floats(-largest * steps),
            highs=_floats(largest * steps),
            threshold=float((steps * largest).amax()),
        )
    return record


def _with_range(record: Record, grid: Grid) -> Record:
    """The record with the width, steps and outermost values of its integer grid."""
    low, high = outermost(grid)
    steps, zero_points = grid.parts["scale"], grid.parts["zero_point"]
    lows, highs = grid.ends()
    return replace(
        record,
        bits=bits_of(low, high),
        signed=low < 0,
        steps=_floats(steps),
        zero_points=tuple(map(int, zero_points.reshape(-1).tolist())),
        lows=_floats(lows),
        highs=_floats(highs),
        threshold=float((steps * max(-low, high)).amax()),
    )


def outermost(grid: Grid) -> tuple[int, int]:
    """The smallest and the largest code of an integer grid."""
    assert grid.low is not None and grid.high is not None
    return int(grid.low.min()), int(grid.high.max())


def word_of_sophgo_mq(plan: Plan, name: str, grid: Grid | None) -> str:
    """The type of sophgo-mq's q_table."""
    if grid is None:
        return WORDS.get(plan[name].fake_quantize.name, "")
    low, high = outermost(grid)
    bits = bits_of(low, high)
    if bits == 4:
        return "INT4"  # signed or not: the q_table has no other 4-bit type
    if bits == 8:
        return "INT8" if low < 0 else "UINT8"
    return ""


def bits_of(low: int, high: int) -> int:
    """The smallest width, in bits, that has a code for each level.

    Example:
      >>> bits_of(-127, 127), bits_of(-8, 7), bits_of(0, 255)
      (8, 4, 8)
    """
    return (high - low).bit_length()


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(map(float, values.reshape(-1).tolist()))


def one_each(entries: list[Record]) -> list[Record]:
    """The records with one for each name; several quantizers of one tensor may have the same.

    Raises:
      ConfigError: records of the same name differ.
    """
    taken: dict[str, Record] = {}
    problems = []
    for record in entries:
        other = taken.setdefault(record.entry, record)
        if replace(other, quantizer=record.quantizer) != record:
            because, fix = f"{other.quantizer} has it, with other values", f"names={{{record.quantizer!r}: ...}}"
            problems.append(explain(record.quantizer, f"the name {record.entry!r} is taken", because=because, fix=fix))
    raise_all(problems, ConfigError)
    return list(taken.values())
