"""Which axes of an operand a contraction sums over, from the function that is called and its arguments.

All other axes are kept: they are axes of the result (free ones and batches), so that a scale may vary along them and still
be factored out of each sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from sophq_func.capture.graph import Node, Operand
from sophq_func.core.operations import CONTRACTIONS

Summed: TypeAlias = Callable[[int], set[int]]
"""From an operand's number of axes to those that are summed over, counted from the front."""


def summed_axes(node: Node, operand: Operand) -> frozenset[int] | None:
    """The axes of an operand, counted from the front, that a call sums over.

    Args:
      node: the call of one of the functions of :data:`~sophq_func.core.operations.CONTRACTIONS`.
      operand: one of the operands that it multiplies.

    Returns:
      The axes; ``None`` where the arguments of the call do not tell.
    """
    call = node.first
    if call.function in BY_EQUATION:
        axes = BY_EQUATION[call.function](call, operand)
        return None if axes is None else frozenset(axes)
    index = operand_index(call, operand)
    if call.constants.get("reversed"):
        index = 1 - index
    return frozenset(SUMMED[call.function][index](len(operand.shape)))


def operand_index(node: Node, operand: Operand) -> int:
    """Which of the operands that a function multiplies this one is: 0 for the first."""
    roles = CONTRACTIONS[node.function]
    # The positions stand first, then the keywords of the same operands.
    return roles.index(operand.role) % (len(roles) // 2)


def _none(ndim: int) -> set[int]:
    return set()


def _all(ndim: int) -> set[int]:
    return set(range(ndim))


def _first(ndim: int) -> set[int]:
    return {0}


def _last(ndim: int) -> set[int]:
    return {ndim - 1} if ndim else set()


def _last_but_one(ndim: int) -> set[int]:
    """The rows of a matrix; a vector has the axis of its elements alone."""
    return {ndim - 2} if ndim > 1 else _last(ndim)


def _all_but_first(ndim: int) -> set[int]:
    return set(range(1, ndim))


def _all_but_second(ndim: int) -> set[int]:
    return set(range(ndim)) - {1}


def _batch_and_last(ndim: int) -> set[int]:
    return {0, ndim - 1}


def _batch_and_last_but_one(ndim: int) -> set[int]:
    return {0, ndim - 2}


def _taps_and_inputs(ndim: int) -> set[int]:
    """Of the weight ``(taps, in, out)`` of ``conv_tbc``."""
    return {0, 1}


ROWS_BY_COLUMNS = (_last, _last_but_one)
"""Of a product of matrices."""

CONVOLUTION = (_all, _all_but_first)
"""A window slides over the input's places, so that one sum reads several of them; and an input may have no batch axis."""

DECONVOLUTION = (_all, _all_but_second)

SUMMED: Mapping[str, tuple[Summed, ...]] = {
    "addbmm": (_batch_and_last, _batch_and_last_but_one),
    "addmm": ROWS_BY_COLUMNS,
    "addmv": ROWS_BY_COLUMNS,
    "addr": (_none, _none),
    "baddbmm": ROWS_BY_COLUMNS,
    "bilinear": (_last, _last, _all_but_first),
    "bmm": ROWS_BY_COLUMNS,
    "conv1d": CONVOLUTION,
    "conv2d": CONVOLUTION,
    "conv3d": CONVOLUTION,
    "conv_tbc": (_all, _taps_and_inputs),
    "conv_transpose1d": DECONVOLUTION,
    "conv_transpose2d": DECONVOLUTION,
    "conv_transpose3d": DECONVOLUTION,
    "dot": (_all, _all),
    "embedding": (_first,),
    "embedding_bag": (_first,),
    "flex_attention": (_last, _last, _last_but_one),
    "grouped_mm": ROWS_BY_COLUMNS,
    "hspmm": ROWS_BY_COLUMNS,
    "inner": (_last, _last),
    "linear": (_last, _last),
    "matmul": ROWS_BY_COLUMNS,
    "mm": ROWS_BY_COLUMNS,
    "mv": ROWS_BY_COLUMNS,
    "outer": (_none, _none),
    "scaled_dot_product_attention": (_last, _last, _last_but_one),
    "smm": ROWS_BY_COLUMNS,
    "sparse_addmm": ROWS_BY_COLUMNS,
    "sparse_mm": ROWS_BY_COLUMNS,
    "sspaddmm": ROWS_BY_COLUMNS,
    "vdot": (_all, _all),
}
"""By function whose arguments need not be read, for each operand that it multiplies, the axes that it sums over."""


def _of_convolution(call: Node, operand: Operand) -> set[int]:
    """Of ``torch.convolution``, whose seventh argument says whether it is transposed."""
    is_transposed = bool(call.constants.get("6", call.constants.get("transposed", False)))
    rules = DECONVOLUTION if is_transposed else CONVOLUTION
    return rules[operand_index(call, operand)](len(operand.shape))


def _of_vecdot(call: Node, operand: Operand) -> set[int]:
    """Of ``vecdot``, whose operands are broadcast: their axes are counted from the end."""
    dim, ndim = call.constants.get("dim", -1), len(operand.shape)
    if dim >= 0:
        dim -= max(len(other.shape) for other in call.operands[:2])
    return {ndim + dim} if ndim + dim >= 0 else set()


def _of_tensordot(call: Node, operand: Operand) -> set[int] | None:
    """Of ``tensordot``: the last axes of the first and the first of the second, or those that are listed for each."""
    dims, ndim = call.constants.get("dims", call.constants.get("2", 2)), len(operand.shape)
    index = operand_index(call, operand)
    if isinstance(dims, int):
        return set(range(ndim - dims, ndim)) if index == 0 else set(range(dims))
    if not isinstance(dims, Sequence) or len(dims) != 2:
        return None
    of_operand = dims[index]
    listed = (of_operand,) if isinstance(of_operand, int) else tuple(of_operand)
    return {axis % ndim for axis in listed}


def _of_chain(call: Node, operand: Operand) -> set[int]:
    """Of a product of several matrices: rows of the first and columns of the last are kept."""
    ndim = len(operand.shape)
    if operand.slot == 0:
        return _last(ndim)
    return _last_but_one(ndim) if operand.slot == len(call.operands) - 1 else _all(ndim)


def _of_einsum(call: Node, operand: Operand) -> set[int] | None:
    """Of ``einsum``: the axes whose letters the result does not have."""
    terms, result = _equation(call)
    if operand.slot >= len(terms):
        return None
    letters = _spread(terms[operand.slot], len(operand.shape))
    return {axis for axis, letter in enumerate(letters) if letter != DOTS and letter not in result}


DOTS = "..."
"""In the letters of an operand: an axis that an ellipsis stands for, which is never summed over."""


def _equation(call: Node) -> tuple[list[list[object]], set[object]]:
    """The letters of each operand of an ``einsum``, and those of its result."""
    text = call.constants.get("0", call.constants.get("equation"))
    if isinstance(text, str):
        return equation(text, len(call.operands))
    return equation([call.constants[role] for role in sorted(call.constants, key=int)], len(call.operands))


def equation(given: str | Sequence[Sequence[object]], operands: int) -> tuple[list[list[object]], set[object]]:
    """The letters of each operand of an ``einsum``, and those of its result; an ellipsis is one entry, :data:`DOTS`.

    Args:
      given: the text; or numbers instead of letters, those of each operand, and then maybe those of the result.
      operands: how many there are.

    Example:
      >>> terms, result = equation("...i, oi -> ...o", 2)
      >>> terms, sorted(result)
      ([['...', 'i'], ['o', 'i']], ['...', 'o'])
    """
    if isinstance(given, str):
        left, arrow, right = given.replace(" ", "").partition("->")
        terms, result = [_letters(term) for term in left.split(",")], _letters(right)
        is_implicit = not arrow
    else:
        terms = [list(map(_as_dots, numbers)) for numbers in given[:operands]]
        is_implicit = len(given) == operands
        result = [] if is_implicit else list(map(_as_dots, given[-1]))
    if is_implicit:
        counts = Counter(letter for term in terms for letter in term)
        result = [letter for letter, count in counts.items() if count == 1]
    return terms, set(result)


def _letters(term: str) -> list[object]:
    """The letters of a term, with one entry for an ellipsis."""
    before, dots, after = term.partition(DOTS)
    return [*before, *([DOTS] if dots else []), *after]


def _as_dots(number: object) -> object:
    return DOTS if number is Ellipsis else number


def _spread(letters: list[object], ndim: int) -> list[object]:
    """The letter of each axis: an ellipsis stands for as many axes as are left."""
    if DOTS not in letters:
        return letters
    at = letters.index(DOTS)
    return [*letters[:at], *([DOTS] * (ndim - len(letters) + 1)), *letters[at + 1 :]]


BY_EQUATION: Mapping[str, Callable[[Node, Operand], set[int] | None]] = {
    "chain_matmul": _of_chain,
    "convolution": _of_convolution,
    "einsum": _of_einsum,
    "multi_dot": _of_chain,
    "tensordot": _of_tensordot,
    "vecdot": _of_vecdot,
}
"""By function whose arguments must be read, what reads them."""
