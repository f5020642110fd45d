"""What the tables of a chip say about each quantizer, as data (semantics.md 10.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sophq_func.core.errors import ConfigError, explain, raise_all
from sophq_func.numerics import pieces
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.ranges import bounds, positive
from sophq_func.numerics.scheme import PerChannel, PerTensor, QuantizerConfig
from sophq_func.planning.plan import Plan

FLOATS: Mapping[str, tuple[str, float | None]] = {
    "e4m3": ("FP8", 448.0),
    "e5m2": ("FP8", 57344.0),
    "fp4": ("FP4", None),
    "gptqfp4": ("FP4", None),
    "mxfp4": ("FP4", None),
    "nvfp4": ("FP4", None),
    "bf16": ("BF16", None),
}
"""For number formats, the type that a q_table calls them, and the largest value in steps where there is a range."""


@dataclass(frozen=True)
class Record:
    """One quantizer.

    Attributes:
      quantizer: its name in the plan.
      op: what the tables call it: of an activation the name without ``_8`` or ``_4``, of a weight without ``_weight``.
      is_weight: whether it quantizes a weight.
      is_channelwise: whether it has a step for each channel.
      bits: width of the codes, ``ceil(log2(levels))``.
      signed: whether codes below 0 exist.
      quant_type: as in the q_table; ``"None"`` where that has no word for it.
      steps, zero_points, lows, highs: for each scale, the step, the code of 0.0, and the values of the outermost codes.
      threshold: ``step * max(-qmin, qmax)``, the largest of all scales.
      ending: of the entry of an activation, where it is not that of its own width.
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
        """Whether there are steps; formats that scale each tensor have none."""
        return bool(self.steps)

    @property
    def entry(self) -> str:
        """Its name in the clip ranges."""
        return f"{self.op}_weight" if self.is_weight else f"{self.op}{self.suffix}"

    @property
    def suffix(self) -> str:
        """What ends the name of an activation."""
        return self.ending or ("_4" if self.bits == 4 else "_8")


def records(plan: Plan, qparams: Mapping[str, QParams], ops: Mapping[str, str]) -> list[Record]:
    """A record for each quantizer, in the order of the plan.

    Raises:
      ConfigError: what no table of a chip can hold, all of it in one message.
    """
    raise_all([problem for name, config in plan.items() if (problem := _problem(plan, name, config))])
    return [_record(plan, name, qparams[name], ops[name]) for name in plan]


def _problem(plan: Plan, name: str, config: QuantizerConfig) -> str:
    if config.scheme.dynamic:
        because, fix = "the table holds ranges that are known beforehand", "dynamic=False"
        return explain(name, "a dynamic range", because=because, fix=fix)
    allowed = (PerTensor, PerChannel) if plan.site(name).role == "weight" else (PerTensor,)
    if not isinstance(config.scheme.granularity, allowed):
        words = " or ".join(f"{cls.__name__}()" for cls in allowed)
        return explain(name, "this granularity", got=config.scheme.granularity, allowed=words)
    return ""


def _record(plan: Plan, name: str, qparams: QParams, op: str) -> Record:
    config, is_weight = plan[name], plan.site(name).role == "weight"
    made = pieces.build(config.fake_quantize)
    channelwise = isinstance(config.scheme.granularity, PerChannel)
    word, largest = FLOATS.get(config.fake_quantize.name, ("None", None))
    if config.observe_only:
        word = "F32"
    if not made.integer and largest is None:
        return Record(name, op, is_weight, channelwise, 8, True, word)
    grid = made.grid(qparams, config.scheme)
    low, high = bounds(grid, config.scheme) if largest is None else (-largest, largest)
    steps, zero = positive(grid.scale).detach(), grid.zero_point.detach()
    zero = zero * 0 if config.scheme.symmetric else zero.round()
    bits = _bits(low, high) if made.integer else 8
    known = {4: "INT4", 8: "INT8" if float(low) < 0 else "UINT8"}
    return Record(
        name,
        op,
        is_weight,
        channelwise,
        bits,
        float(low) < 0,
        known.get(bits, "None") if word == "None" else word,
        steps=_floats(steps),
        zero_points=tuple(map(int, _floats(zero))),
        lows=_floats((low - zero) * steps),
        highs=_floats((high - zero) * steps),
        threshold=float((steps * max(-float(low), float(high))).amax()),
    )


def _bits(low: Tensor | float, high: Tensor | float) -> int:
    """The least width that has a code for each level.

    Example:
      >>> _bits(-127, 127), _bits(-8, 7), _bits(0, 255)
      (8, 4, 8)
    """
    return int(float(high) - float(low)).bit_length()


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(map(float, values.reshape(-1).tolist()))


def one_each(found: list[Record]) -> list[Record]:
    """One record for each entry; several quantizers of one tensor may share it.

    Raises:
      ConfigError: they say different things.
    """
    taken: dict[str, Record] = {}
    problems = []
    for record in found:
        other = taken.setdefault(record.entry, record)
        if replace(other, quantizer=record.quantizer) != record:
            because, fix = f"{other.quantizer} has it, too", f"names={{{record.quantizer!r}: ...}}"
            problems.append(explain(record.quantizer, f"the name {record.entry!r}", because=because, fix=fix))
    raise_all(problems, ConfigError)
    return list(taken.values())
