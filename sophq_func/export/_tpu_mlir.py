"""What the compiler tpu-mlir is told about a plan: the type of each operation of the float file, and ranges.

The compiler computes an operation in the type that its word says, whatever its neighbours have, and casts between them. So
each operation gets a word: that of the plan's grids where all that it reads is on such grids, else ``F32``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sophq_func.config.chips import CHIPS
from sophq_func.core.errors import ConfigError, explain, raise_all
from sophq_func.export._calls import PROBABILITIES, SCORES
from sophq_func.export._names import FileNames
from sophq_func.export._nodes import PRODUCTS, Operation
from sophq_func.export._records import Record
from sophq_func.planning.plan import Plan

FLOAT = "F32"
"""The word of an operation that is not planned. A 16-bit type would overflow where masks hold the smallest float."""

INT8 = "INT8"

FLOAT8 = ("F8E4M3", "F8E5M2")
"""Words of the two types of FP8."""

WORDS: Mapping[str, str] = {"e4m3": "F8E4M3", "e5m2": "F8E5M2", "bf16": "BF16", "fp16": "F16"}
"""Words for fake quantizers that are no integer ones."""

BY_COMMAND = (*FLOAT8, INT8, "BF16", "F16")
"""Types, and which of several goes into the command: some operations are in FP8 only where the command says so, and linear
layers have a step for each channel only where it says ``INT8``."""

SCALED = frozenset((INT8, *FLOAT8))
"""Words of types whose operations need a range."""

MOVES = frozenset(
    (
        "Expand",
        "Flatten",
        "Gather",
        "MaxPool",
        "Relu",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    )
)
"""Op types whose results are values of their input, or zero, so that they are on its grid."""

RESHAPES = frozenset(("Flatten", "Reshape", "Squeeze", "Unsqueeze"))
"""Op types that the compiler computes in the type of their input, whatever their word."""

ARITHMETIC = frozenset(("Add", "AveragePool", "Concat", "GlobalAveragePool", "Mul", "Sub"))
"""Op types that the compiler computes on codes as well as on floats. What is a function of one value stays float."""

SIGNED, UNSIGNED = 127, 255
"""The largest code of the two integer types; the compiler's step is the threshold divided by it."""


class Processor(NamedTuple):
    """What the compiler can do for a chip.

    Attributes:
      word: its name in ``--processor``.
      symmetric: whether all 8-bit activations are symmetric and signed.
      float8: whether it has FP8.
      linear_channels: whether a linear layer may have a step for each channel.
      ending: of the compiled model.
    """

    word: str
    symmetric: bool
    float8: bool
    linear_channels: bool
    ending: str


def _processor(chip: str, word: str, *, float8: bool = False, ending: str = "bmodel") -> Processor:
    """What the compiler can do for one of the library's chips, whose arithmetic is known."""
    arithmetic = CHIPS.get(chip).arithmetic
    assert arithmetic is not None, chip
    return Processor(word, not arithmetic.unsigned, float8, arithmetic.linear_channels, ending)


PROCESSORS: Mapping[str, Processor] = {
    "BM1684X": _processor("BM1684X", "bm1684x"),
    "BM1688": _processor("BM1688", "bm1688"),
    "BM1690": _processor("BM1690", "bm1690", float8=True),
    "MARS3": _processor("MARS3", "cv184x"),
    "CV186X": _processor("CV186X", "cv186x"),
    **{f"CV18{n}X": _processor(f"CV18{n}X", f"cv18{n}x", ending="cvimodel") for n in (0, 1, 2, 3)},
}
"""By name of the chip."""


@dataclass(frozen=True)
class Range:
    """The grid of a tensor, as the compiler is told of it.

    Attributes:
      word: its type; empty for a tensor that is on none, whose range was measured.
      threshold, low, high: of its line; 0 for a type that needs none.
      affine: whether its zero point is not 0.
      quantizers: that have it.
      readers: the calls that alone read the tensor on this grid; empty for all.
      tabled: whether the plan says that the chip computes it as a table of a result for each code.
    """

    word: str
    threshold: float = 0.0
    low: float = 0.0
    high: float = 0.0
    affine: bool = False
    quantizers: tuple[str, ...] = ()
    readers: frozenset[str] = frozenset()
    tabled: bool = False


UNIT = Range(INT8, 1.0, 0.0, 1.0)
"""The grid of probabilities: the compiler gives it to each softmax."""


@dataclass(frozen=True)
class Typed:
    """An operation with its type.

    Attributes:
      operation: see :class:`Operation`.
      word: in which it computes.
      range: of its result; ``None`` for integers.
      weight: quantizer of the weight that it multiplies; empty without one that acts in this type.
    """

    operation: Operation
    word: str
    range: Range | None = None
    weight: str = ""


class Tabled(NamedTuple):
    """All that the tables say.

    Attributes:
      operations: in order of computation.
      inputs: ranges of inputs of the model, by name.
      records: of the quantizers, by name.
      affine: whether some activations are affine.
      channels: linear layers with a step for each channel.
      joined: those of them to which the chip gives one step.
    """

    operations: tuple[Typed, ...]
    inputs: Mapping[str, Range]
    records: Mapping[str, Record]
    affine: bool
    channels: tuple[Typed, ...]
    joined: tuple[Typed, ...]

    @property
    def words(self) -> list[str]:
        """The types in use, that of the command first."""
        found = {typed.word for typed in self.operations if typed.word != FLOAT}
        return sorted(found, key=BY_COMMAND.index)


def ranges_of(plan: Plan, records: Iterable[Record], names: FileNames) -> dict[str, Range]:
    """The grid of each tensor that has one.

    Raises:
      ConfigError: two quantizers give one tensor different grids.
    """
    found: dict[str, Range] = {}
    problems = []
    for record in records:
        tensor = _tensor(plan, record.quantizer, names)
        if record.is_weight or not tensor:
            continue
        is_tabled = any(requant.rule == "quotient" for requant in plan.site(record.quantizer).requant)
        readers = _readers(plan, record.quantizer)
        made = replace(_range(record), quantizers=(record.quantizer,), readers=readers, tabled=is_tabled)
        other = found.setdefault(tensor, made)
        if _grid(other) != _grid(made):
            because = f"{other.quantizers[0]} has another grid for the same tensor, and the compiler has one for each"
            fix = f'sq.Rule(name="{record.quantizer}", activation=None)'
            problems.append(explain(record.quantizer, "the tables have no place for this grid", because=because, fix=fix))
        elif other is not made:
            readers = other.readers | made.readers if other.readers and made.readers else frozenset()
            found[tensor] = replace(other, quantizers=(*other.quantizers, record.quantizer), readers=readers)
    raise_all(problems, ConfigError)
    return found


def _grid(given: Range) -> Range:
    """The grid alone, for comparison."""
    return replace(given, quantizers=(), readers=frozenset(), tabled=False)


def _tensor(plan: Plan, quantizer: str, names: FileNames) -> str:
    """The tensor of the file that a quantizer of a value rounds; empty for a constant."""
    site = plan.site(quantizer)
    if site.argument:
        return names.tensors.get(site.value, "")
    if site.operand >= 0:
        source = next((edge.source for edge in plan.edges if quantizer in edge.through), "")
        return names.tensors.get(source, "")
    return names.tensors.get(site.members[-1] if site.members else site.value, "")


def _readers(plan: Plan, quantizer: str) -> frozenset[str]:
    """The calls behind a quantizer that sits before some of the calls that take a value."""
    if plan.site(quantizer).operand < 0:
        return frozenset()
    return frozenset(edge.target for edge in plan.edges if quantizer in edge.through)


def _range(record: Record) -> Range:
    """The grid of a record."""
    if record.quant_type in FLOAT8:
        return Range(record.quant_type, record.threshold, -record.threshold, record.threshold)
    if record.quant_type != INT8:
        return Range(record.quant_type)
    step, zero = record.steps[0], record.zero_points[0]
    if zero == 0 and record.signed:
        # codes from -127 or -128: a range that reaches to -128 has the same step with --asymmetric
        return Range(INT8, SIGNED * step, -(SIGNED + 1) * step, SIGNED * step)
    if zero == 0:
        return Range(INT8, UNSIGNED * step, 0.0, UNSIGNED * step)
    low, high = record.lows[0], record.highs[0]
    return Range(INT8, max(-low, high), low, high, affine=True)


def typed(
    made: Sequence[Operation],
    ranges: Mapping[str, Range],
    weights: Mapping[str, Record],
    measured: Callable[[], Mapping[str, tuple[float, float]]],
    names: FileNames,
) -> list[Typed]:
    """The type of each operation.

    Args:
      made: the operations, in order of computation.
      ranges: grids of tensors.
      weights: records of the weights' quantizers, by the tensor of the product.
      measured: returns the smallest and largest value of each tensor; called where some have no grid.
      names: of the file.

    Raises:
      ConfigError: the plan asks for a product that the compiler does not compute.
    """
    calls: dict[str, list[str]] = {}
    for call, tensor in (*names.tensors.items(), *names.products.items()):
        calls.setdefault(tensor, []).append(call)
    grids = _before_moves(made, ranges)
    of_tensors: dict[str, str] = {}
    words: dict[str, str] = {}
    result: list[Typed] = []
    problems: list[str] = []
    for operation in made:
        computed = {call for tensor in operation.tensors for call in calls.get(tensor, ())}
        given = [_as_read(grids.get(tensor), computed) for tensor in operation.inputs]
        own = next((grids[tensor] for tensor in reversed(operation.tensors) if tensor in grids), None)
        weight = next((weights[tensor] for tensor in operation.tensors if tensor in weights), None)
        word = _word(operation, given, own, weight)
        if operation.kind in RESHAPES and operation.inputs[0] in of_tensors:
            word = of_tensors[operation.inputs[0]]
        of_tensors.update(dict.fromkeys(operation.tensors, word))
        words.update(dict.fromkeys(computed, word))
        problems.extend(_refused(operation, word, given))
        if own is None:
            own = _moved(operation, given) or _probabilities(computed, words)
            grids.update({} if own is None else dict.fromkeys(operation.tensors, own))
        own = own or _measured_range(measured().get(operation.tensors[-1]))
        acts = weight.quantizer if weight is not None and word != FLOAT else ""
        result.append(Typed(operation, word, None if _is_clipped_move(operation, own) else own, acts))
    raise_all(problems, ConfigError)
    return result


def _is_clipped_move(operation: Operation, own: Range | None) -> bool:
    """Whether a ReLU keeps the signed grid of its input, as behind max pooling.

    It has no line: the compiler takes the smallest value of a ReLU's line for 0, and would give what follows another grid.
    """
    is_clipped = operation.kind in MOVES and operation.nodes[-1].kind == "Relu"
    return is_clipped and own is not None and not own.quantizers and own.low < 0


def _moved(operation: Operation, given: Sequence[Range | None]) -> Range | None:
    """The grid of a result that consists of values of the input."""
    if operation.kind not in MOVES or not given or given[0] is None:
        return None
    return replace(given[0], quantizers=())


def _probabilities(computed: Iterable[str], words: Mapping[str, str]) -> Range | None:
    """The grid of an attention's softmax whose first product is in a planned type, so that the second one is, too."""
    attention = next((call.removesuffix(PROBABILITIES) for call in computed if call.endswith(PROBABILITIES)), "")
    word = words.get(f"{attention}{SCORES}", FLOAT)
    return None if word == FLOAT else replace(UNIT, word=word)


def _before_moves(made: Sequence[Operation], ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The grids, also of tensors that only a move with a grid behind it reads: rounding before it is the same."""
    uses = Counter(tensor for operation in made for tensor in operation.inputs)
    grids = dict(ranges)
    for operation in reversed(made):
        behind = grids.get(operation.tensors[-1])
        if operation.kind in MOVES and behind is not None and not behind.readers:
            source = operation.inputs[0] if operation.inputs else ""
            if source and uses[source] == 1:
                grids.setdefault(source, replace(behind, quantizers=()))
    return grids


def _as_read(given: Range | None, computed: Iterable[str]) -> Range | None:
    """The grid on which an operation reads a tensor."""
    if given is None or not given.readers:
        return given
    return given if any(call.startswith(tuple(given.readers)) for call in computed) else None


def _word(operation: Operation, given: Sequence[Range | None], own: Range | None, weight: Record | None) -> str:
    """The type in which an operation computes: that of all that it reads."""
    if own is not None and own.tabled:
        # what has no grid is inside the activation, such as the sigmoid of a SiLU
        return _common({own.word, *(grid.word for grid in given if grid is not None)})
    words = {FLOAT if grid is None else grid.word for grid in given}
    node = operation.nodes[0]
    if operation.kind in PRODUCTS:
        if node.weight:
            words.add(FLOAT if weight is None else weight.quant_type)
    elif operation.kind in ARITHMETIC:
        # a stored operand has no grid in the plan, and the compiler would choose one
        words.add(FLOAT if own is None or node.constants else own.word)
    elif operation.kind not in MOVES:
        return FLOAT
    return _common(words)


def _common(words: set[str]) -> str:
    """The type in which values of these types meet: a 16-bit one, which holds integers of 8 bits; else ``F32``."""
    wide = words - {INT8}  # the compiler has no cast between FP8 and 16 bits
    if len(words) > 1 and (len(wide) > 1 or wide & SCALED):
        return FLOAT
    return (wide or words).pop()


def _measured_range(found: tuple[float, float] | None) -> Range | None:
    """The range of a result without a grid, from the values that it had; ``None`` for integers."""
    if found is None:
        return None
    low, high = min(found[0], 0.0), max(found[1], 0.0)
    return Range("", max(-low, high, TINY), low, max(high, TINY))


TINY = 1e-6
"""The smallest threshold: the compiler ignores a line of zeros."""


def _refused(operation: Operation, word: str, given: Sequence[Range | None]) -> Iterator[str]:
    """Why the compiler does not compute a planned product in integers."""
    if word == INT8 and operation.kind == "MatMul" and len(given) == 2 and any(grid and grid.affine for grid in given):
        names = [name for grid in given if grid is not None and grid.affine for name in grid.quantizers]
        because = "it computes products of two affine values in floating point"
        fix = f'sq.Rule(name="{names[0] if names else "*"}", activation=sq.override(symmetric=True))'
        yield explain(operation.name, "the compiler cannot compute this product in integers", because=because, fix=fix)
