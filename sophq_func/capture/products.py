"""Products that are summed: which tensors a call multiplies, and how many multiplications it makes, from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from sophq_func.core.operations import ALL, CONTRACTIONS
from sophq_func.core.pytree import map_named, tensors
from sophq_func.core.types import Args, Kwargs, Output

RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
"""Functions that recurrent layers call: their weights and biases are the last list among the arguments."""

CELLS = frozenset(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"))
"""Functions that cells of recurrent layers call: the weight of the input, then that of the state, come third and fourth."""

WEIGHTS_OF_CELLS = ("2", "3", "w_ih", "w_hh")


def multiplied(function: str, args: Args, kwargs: Kwargs) -> Iterator[tuple[int, Tensor]]:
    """The tensors that a call multiplies and sums, each with its index among all tensors of the call.

    Of recurrent layers only the weights; of functions that do not multiply and sum, none.

    Args:
      function: canonical name.
      args, kwargs: of the call.
    """
    if function in RECURRENT:
        slots = {id(tensor): slot for slot, tensor in enumerate(tensors((args, kwargs)))}
        yield from ((slots[id(weight)], weight) for weight in _weights(args))
        return
    roles = _roles(function)
    if not roles:
        return
    for slot, (role, tensor) in enumerate(_named(args, kwargs)):
        if roles == ALL or role in roles:
            yield slot, tensor


def _roles(function: str) -> tuple[str, ...]:
    """The roles of the operands that a function multiplies; empty for one that is unknown."""
    if function in CELLS:
        return WEIGHTS_OF_CELLS
    return CONTRACTIONS.get(function, ())


def _named(args: Args, kwargs: Kwargs) -> list[tuple[str, Tensor]]:
    """Each tensor among the arguments of a call, with its role (see :class:`sophq_func.capture.graph.Operand`)."""
    named: list[tuple[str, Tensor]] = []

    def add(role: str, tensor: Tensor) -> Tensor:
        named.append((role, tensor))
        return tensor

    for i, arg in enumerate(args):
        map_named(str(i), arg, add)
    for name, arg in kwargs.items():
        map_named(name, arg, add)
    return named


def _weights(args: Args) -> list[Tensor]:
    """The weights of a recurrent layer: the matrices in the last list among the arguments, where biases are vectors."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and all(isinstance(x, Tensor) for x in arg)]
    return [weight for weight in lists[-1] if weight.ndim == 2] if lists else []


def multiplications(function: str, args: Args, kwargs: Kwargs, output: Output) -> int:
    """How many multiplications a call makes in products that are summed; 0 for functions that multiply and sum nothing.

    Only products of floating or complex tensors count. An embedding looks rows up, and multiplies nothing.

    Args:
      function: canonical name.
      args, kwargs: of the call.
      output: its result.

    Example:
      >>> import torch
      >>> a, b = torch.ones(5, 2, 3), torch.ones(3, 4)
      >>> multiplications("matmul", (a, b), {}, a @ b) == 5 * 2 * 3 * 4
      True
    """
    count = COUNTS.get(function)
    if count is None:
        return 0
    given = tensors((args, kwargs))
    made = tensors(output)
    if not made or not any(tensor.is_floating_point() or tensor.is_complex() for tensor in given):
        return 0
    return count(Products(args, kwargs, given, made[0]))


class Products:
    """One call that multiplies and sums.

    Attributes:
      args, kwargs: of the call.
      given: all tensors among them.
      made: its first result.
    """

    def __init__(self, args: Args, kwargs: Kwargs, given: Sequence[Tensor], made: Tensor) -> None:
        self.args, self.kwargs, self.given, self.made = args, kwargs, given, made


def _of_matrices(call: Products) -> int:
    """Each result sums over the last axis of the first factor."""
    return call.made.numel() * call.given[0].shape[-1]


def _of_matrices_added(call: Products) -> int:
    """The same behind a tensor that is added."""
    return call.made.numel() * call.given[1].shape[-1]


def _of_matrices_added_up(call: Products) -> int:
    """The same, summed over the batch, too."""
    return call.given[1].numel() * call.given[2].shape[-1]


def _of_all_pairs(call: Products) -> int:
    """One product for each result."""
    return call.made.numel()


def _of_all_terms(call: Products) -> int:
    """One product for each element, summed to fewer."""
    return max(tensor.numel() for tensor in call.given)


def _of_convolution(call: Products) -> int:
    """Each result sums over the input channels of its group and the kernel: a row of the weight."""
    return call.made.numel() * math.prod(call.given[1].shape[1:])


def _of_transposed_convolution(call: Products) -> int:
    """Each input is multiplied with a row of the weight."""
    return call.given[0].numel() * math.prod(call.given[1].shape[1:])


def _of_convolution_over_time(call: Products) -> int:
    """Weights of ``conv_tbc`` have the shape (kernel, in, out)."""
    return call.made.numel() * math.prod(call.given[1].shape[:-1])


def _of_bilinear(call: Products) -> int:
    """Each result multiplies both inputs with a matrix."""
    return call.made.numel() * math.prod(call.given[2].shape[1:])


def _of_attention(call: Products) -> int:
    """Queries with keys, then the weights of attention with values."""
    query, key, value = call.given[:3]
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _of_distances(call: Products) -> int:
    """A product for each pair of rows and each of their elements."""
    return call.made.numel() * call.given[0].shape[-1]


def _of_tensordot(call: Products) -> int:
    """With free sizes F and G and contracted size K: the operands have F K and K G elements, the result F G."""
    first, second = call.given[:2]
    if not call.made.numel():
        return 0
    return call.made.numel() * math.isqrt(first.numel() * second.numel() // call.made.numel())


def _of_chain(call: Products) -> int:
    """From left to right; torch may choose another order, with fewer multiplications."""
    first, *others = [tensor.shape for tensor in call.given]
    rows, total = first[0] if len(first) > 1 else 1, 0
    for shape in others:
        total += rows * math.prod(shape)
    return total


def _of_einsum(call: Products) -> int:
    """A product for each combination of all indices; one more for each operand beyond two."""
    sizes: dict[str, int] = {}
    for labels, tensor in zip(_labels(call), call.given, strict=False):
        for label, size in zip(labels, tensor.shape, strict=False):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) * max(1, len(call.given) - 1)


def _labels(call: Products) -> list[list[str]]:
    """For each operand of an ``einsum``, a label for each axis; those of an ellipsis are counted from the right."""
    if isinstance(call.args[0], str):
        subscripts = [re.findall(r"\.\.\.|\w", term) for term in call.args[0].partition("->")[0].split(",")]
    else:  # the other way to call it: each operand is followed by a list of numbers
        subscripts = [
            ["..." if label is Ellipsis else str(label) for label in sublist]
            for tensor, sublist in zip(call.args[::2], call.args[1::2], strict=False)
            if isinstance(tensor, Tensor)
        ]
    labels = []
    for names, tensor in zip(subscripts, call.given, strict=False):
        hidden = tensor.ndim - sum(name != "..." for name in names)
        ellipsis = [f"...{position}" for position in range(hidden, 0, -1)]
        labels.append([label for name in names for label in (ellipsis if name == "..." else [name])])
    return labels


def _of_recurrent_layer(call: Products) -> int:
    """At each step of each sequence all weights are multiplied, with inputs or with states."""
    steps = call.given[0].shape[:-1].numel()
    return steps * sum(weight.numel() for weight in _weights(call.args))


def _of_cell(call: Products) -> int:
    """All weights are multiplied once for each row of the batch."""
    roles = {role: tensor for role, tensor in _named(call.args, call.kwargs) if role in WEIGHTS_OF_CELLS}
    return call.given[0].shape[:-1].numel() * sum(weight.numel() for weight in roles.values())


COUNTS: Mapping[str, Callable[[Products], int]] = {
    **dict.fromkeys("dot grouped_mm inner linear matmul mm mv bmm hsmm hspmm smm spmm sparse_mm".split(), _of_matrices),
    **dict.fromkeys("addmm addmv baddbmm saddmm sspaddmm sparse_addmm".split(), _of_matrices_added),
    **dict.fromkeys("outer ger".split(), _of_all_pairs),
    **dict.fromkeys("vdot vecdot".split(), _of_all_terms),
    **dict.fromkeys("conv1d conv2d conv3d convolution".split(), _of_convolution),
    **dict.fromkeys("conv_transpose1d conv_transpose2d conv_transpose3d".split(), _of_transposed_convolution),
    **dict.fromkeys("multi_dot chain_matmul".split(), _of_chain),
    **dict.fromkeys(RECURRENT, _of_recurrent_layer),
    **dict.fromkeys(CELLS, _of_cell),
    "addbmm": _of_matrices_added_up,
    "addr": _of_all_pairs,
    "bilinear": _of_bilinear,
    "cdist": _of_distances,
    "conv_tbc": _of_convolution_over_time,
    "einsum": _of_einsum,
    **dict.fromkeys(("flex_attention", "scaled_dot_product_attention"), _of_attention),
    "tensordot": _of_tensordot,
}
"""By canonical name of a function that multiplies and sums: how many multiplications a call makes."""
