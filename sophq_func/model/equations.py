"""The rows that a weight multiplies in a product that is written with letters: ``einsum``, and what can be written so.

In ``y[result] = sum W[...] * A[...] * B[...]``, a letter of the weight that the result does not have is summed over: it
counts the elements of a row. A letter that the weight, another operand and the result have tells parts of the weight apart,
which read rows of their own. All other letters of the result count rows. So the rows are a product of the other operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sophq_func.core.pytree import tensors
from sophq_func.core.types import Args, Kwargs
from sophq_func.planning.contractions import DOTS, equation

Letter: TypeAlias = object
"""Of an axis: what the equation has; for an axis of an ellipsis its place from the end, as a tuple."""


class Product(NamedTuple):
    """A product that is summed.

    Attributes:
      operands: all tensors of the call, in order.
      letters: of each operand, one for each of its axes.
      result: letters of the result.
    """

    operands: Sequence[Tensor]
    letters: Sequence[Sequence[Letter]]
    result: Collection[Letter]


Make: TypeAlias = Callable[[Args, Kwargs], Product | None]
"""From the arguments of a call to the product; ``None`` where they do not tell."""


def product_of(function: str, args: Args, kwargs: Kwargs) -> Product | None:
    """A call as a product with letters; ``None`` where it is none.

    Args:
      function: canonical name.
      args, kwargs: of the call.
    """
    make = PRODUCTS.get(function)
    return None if make is None else make(args, kwargs)


def rows_of(product: Product, slot: int) -> Tensor | None:
    """The rows that an operand multiplies: ``(T, n)``, or ``(G, T, n)`` for ``G`` parts; in the order of its memory.

    ``None`` where the operand is a diagonal, or its parts do not lie one behind the other.

    Args:
      product: the whole.
      slot: of the operand.

    Example:
      >>> product = product_of("einsum", ("bi,oi->bo", torch.ones(2, 3), torch.ones(4, 3)), {})
      >>> rows_of(product, 1).shape
      torch.Size([2, 3])
    """
    weight, own = product.operands[slot], list(product.letters[slot])
    others = [pair for i, pair in enumerate(zip(product.operands, product.letters, strict=True)) if i != slot]
    if len(set(own)) < len(own):
        return None
    sizes = {
        letter: size for other, letters in others for letter, size in zip(letters, other.shape, strict=True) if size > 1
    }
    # an axis of one element stands for all that the others have there: the weight does not depend on that letter
    stored = sorted(zip(own, weight.shape, weight.stride(), strict=True), key=lambda axis: -axis[2])
    in_memory = [letter for letter, size, _ in stored if size > 1 or sizes.get(letter, 1) == 1]
    kept = [letter for letter in in_memory if letter in product.result]
    parts = [letter for letter in kept if letter in sizes]
    if kept[: len(parts)] != parts:
        return None
    summed = [letter for letter in in_memory if letter not in product.result]
    known = dict.fromkeys(letter for _, letters in others for letter in letters)
    counted = [letter for letter in known if letter in product.result and letter not in kept]
    made = _einsum(others, [*parts, *counted, *(letter for letter in summed if letter in known)])
    before = made.shape[: len(parts) + len(counted)]
    for i, letter in enumerate(summed):
        if letter not in known:  # each element that the weight has there meets the same number
            made = made.unsqueeze(len(before) + i)
    lengths = [weight.shape[own.index(letter)] for letter in summed]
    groups, times = math.prod(before[: len(parts)]), math.prod(before[len(parts) :])
    rows = made.expand(*before, *lengths).reshape(groups, times, math.prod(lengths))
    return rows if parts else rows[0]


def _einsum(operands: Iterable[tuple[Tensor, Sequence[Letter]]], result: Sequence[Letter]) -> Tensor:
    """``torch.einsum`` with letters of any kind."""
    numbers: dict[Letter, int] = {}
    given: list[Any] = []
    for tensor, letters in operands:
        given += [tensor, [numbers.setdefault(letter, len(numbers)) for letter in letters]]
    made: Tensor = torch.einsum(*given, [numbers[letter] for letter in result])
    return made


def _of_einsum(args: Args, kwargs: Kwargs) -> Product:
    """Of ``einsum(text, *operands)``, ``einsum(text, operands)``, and ``einsum(operand, numbers, ..., numbers)``."""
    operands = tensors(args)
    given = args[0] if isinstance(args[0], str) else [one for one in args if not isinstance(one, Tensor)]
    terms, result = equation(given, len(operands))
    letters = [_spread(term, operand.ndim) for term, operand in zip(terms, operands, strict=True)]
    if DOTS in result:
        result |= {letter for term in letters for letter in term if isinstance(letter, tuple)}
    return Product(operands, letters, result)


def _spread(term: Sequence[Letter], ndim: int) -> list[Letter]:
    """A letter for each axis: those that an ellipsis stands for are counted from its end, as they are broadcast."""
    if DOTS not in term:
        return list(term)
    at, count = term.index(DOTS), ndim - len(term) + 1
    return [*term[:at], *((DOTS, i - count) for i in range(count)), *term[at + 1 :]]


def _of_tensordot(args: Args, kwargs: Kwargs) -> Product | None:
    """Of ``tensordot``: pairs of axes are summed over, the last of the first and the first of the second, or as listed."""
    given = named(args, kwargs, ("a", "b", "dims"))
    a, b, dims = given["a"], given["b"], given.get("dims", 2)
    if isinstance(dims, int):
        dims = range(a.ndim - dims, a.ndim), range(dims)
    if not isinstance(dims, Sequence) or len(dims) != 2:
        return None
    of_a: list[Letter] = [("a", i) for i in range(a.ndim)]
    of_b: list[Letter] = [("b", i) for i in range(b.ndim)]
    for i, j in zip(*([axes] if isinstance(axes, int) else axes for axes in dims), strict=True):
        of_b[j] = of_a[i]
    return Product((a, b), (of_a, of_b), set(of_a) ^ set(of_b))


def _of_vector(args: Args, kwargs: Kwargs) -> Product:
    """Of ``mv``, a matrix and a vector."""
    given = named(args, kwargs, ("input", "vec"))
    return Product((given["input"], given["vec"]), ("oi", "i"), {"o"})


def _of_inner(args: Args, kwargs: Kwargs) -> Product:
    """Of ``inner``, which sums over the last axes."""
    given = named(args, kwargs, ("input", "other"))
    operands = given["input"], given["other"]
    letters = [[*((side, axis) for axis in range(x.ndim - 1)), DOTS] for side, x in enumerate(operands)]
    return Product(operands, letters, {letter for term in letters for letter in term} - {DOTS})


PRODUCTS: Mapping[str, Make] = {
    "einsum": _of_einsum,
    "inner": _of_inner,
    "mv": _of_vector,
    "tensordot": _of_tensordot,
}
"""By canonical name of a function, how its calls are written with letters."""


def named(args: Args, kwargs: Kwargs, names: Sequence[str]) -> dict[str, Any]:
    """Arguments of a call by name.

    Args:
      args, kwargs: of the call.
      names: of its positional arguments, in order.
    """
    return {**dict(zip(names, args, strict=False)), **kwargs}
