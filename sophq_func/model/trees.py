"""Trees of params and qparams as a whole: in another dtype, and between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from sophq_func.core.errors import ConfigError, StateError, explain, raise_all
from sophq_func.core.modes import is_plain, outside_inference
from sophq_func.core.public import public
from sophq_func.core.pytree import named_leaves, refilled, sorted_dict, tree_map
from sophq_func.core.types import Tree
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.entries import check_entries

V = TypeVar("V")

PRECISIONS = (torch.float32, torch.float64)
"""What :func:`cast` casts to. A scale in half precision is another scale: bfloat16 rounds it by up to 0.4 %."""


@public
def cast(qparams: Mapping[str, QParams], dtype: torch.dtype) -> dict[str, QParams]:
    """The qparams with all floating fields in another dtype: float64 for ``gradcheck`` and references, float32 again.

    Scales and what else is learned have a gradient in their new dtype. Zero points and masks that are no floating numbers
    stay as they are. Scales are float32 otherwise, also for params and batches in half precision: outputs have the dtype
    of the params and the batch, not that of the qparams.

    Args:
      qparams: from ``q.calibrate``, ``q.qparams`` or :func:`sophq_func.merge`.
      dtype: ``torch.float64`` or ``torch.float32``.

    Returns:
      New qparams, sorted; a field that has the dtype already is the same tensor.

    Raises:
      ConfigError: another dtype.
      StateError: ``qparams`` is no dict of :class:`~sophq_func.numerics.contracts.QParams`.

    Example:
      >>> qparams = {"a": QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})}
      >>> cast(qparams, torch.float64)["a"].scale
      tensor(1., dtype=torch.float64)
    """
    if dtype not in PRECISIONS:
        allowed, because = "torch.float32 or torch.float64", "a scale in half precision is another scale"
        fix = "cast params and batches; the output has their dtype"
        raise ConfigError(
            explain("cast", "qparams cannot have this dtype", got=dtype, allowed=allowed, because=because, fix=fix)
        )
    check_entries("cast", qparams)
    new: dict[str, QParams] = tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, sorted_dict(qparams)
    )
    return new


@public
def lerp(a: V, b: Tree, weight: float | Tensor) -> V:
    """``a + weight (b - a)`` for each floating tensor of two trees of one structure: averages of params and of qparams.

    With ``average = lerp(average, params, 1 - decay)`` after each step it is an exponential moving average; with
    ``1 / (n + 1)`` after the ``n``-th it is the mean of all (stochastic weight averaging, arXiv:1803.05407). It is exact at
    both ends, and has gradients to ``a``, ``b`` and ``weight``: an average over training is taken of detached tensors, or
    under ``torch.no_grad()``.

    Args:
      a, b: trees of tensors: params, qparams, flat dicts of :meth:`Quantized.split`. Integers and booleans, such as zero
        points, have no average and must be equal; inside a transform they are those of ``a``, unread.
      weight: from 0 to 1; a tensor of shape ``()``, or one that broadcasts, is not read.

    Returns:
      A tree of the same structure, of the dtypes of ``a``.

    Raises:
      ConfigError: a weight that is no number from 0 to 1.
      StateError: trees of different structures, shapes or dtypes; integers that differ; all in one message.

    Example:
      >>> lerp({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([1.0, 2.0])}, 0.25)
      {'w': tensor([0.2500, 2.0000])}
    """
    _check_weight(weight)
    ours, theirs = _by_name(a), _by_name(b)
    raise_all([*_misfits(ours, theirs)], StateError)
    between: V = refilled(a, [_between(leaf, theirs[name], weight) for name, leaf in ours.items()])
    return between


def _by_name(tree: Tree) -> dict[str, Tree]:
    """The leaves of a tree by their dotted paths, in its order."""
    leaves = named_leaves(tree)
    by_name = dict(leaves)
    if len(by_name) < len(leaves):
        sentence, fix = "two leaves have one path", "keys without dots, or a flat dict"
        raise StateError(explain("lerp", sentence, got=sorted(name for name, _ in leaves), fix=fix))
    return by_name


def _check_weight(weight: object) -> None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1
    is_tensor = isinstance(weight, Tensor) and weight.is_floating_point()
    if not is_number and not is_tensor:
        allowed = "a number from 0 to 1, or a floating tensor"
        raise ConfigError(
            explain("lerp", "this is no weight", got=weight, allowed=allowed, fix="sq.lerp(average, params, 0.01)")
        )


def _misfits(ours: Mapping[str, Tree], theirs: Mapping[str, Tree]) -> Iterator[str]:
    """Why two trees have nothing between them, in a sentence each."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        which = "the second" if name in ours else "the first"
        yield explain("lerp", f"{which} tree has no leaf {name!r}", fix="average trees of one structure")
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            got, allowed = f"{type(one).__name__} and {type(other).__name__}", "tensors"
            yield explain(f"lerp: {name}", "only tensors have an average", got=got, allowed=allowed)
        elif one.layout != torch.strided or other.layout != torch.strided:
            got, fix = f"{one.layout} and {other.layout}", "to_dense() of both"
            yield explain(f"lerp: {name}", "only dense tensors have an average", got=got, allowed="torch.strided", fix=fix)
        elif one.is_meta != other.is_meta:
            got, allowed = f"{one.device} and {other.device}", "tensors with numbers, or none with any"
            yield explain(f"lerp: {name}", "one of the two tensors has no numbers", got=got, allowed=allowed)
        elif one.dtype != other.dtype or one.shape != other.shape:
            got = f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
            yield explain(f"lerp: {name}", "the tensors differ in dtype or shape", got=got, allowed="equal ones")
        elif _is_averaged(one):
            if one.dtype.itemsize == 1:
                fix = "average in float32, and round the result"
                yield explain(f"lerp: {name}", "floats of 8 bits have no average", got=one.dtype, fix=fix)
        elif is_plain([one, other]) and not torch.equal(one, other):
            fix = "average what is learned, sq.split_params(model)[0] or q.split(qparams)[0], and take the rest of one tree"
            yield explain(f"lerp: {name}", "integers differ, and have no average", got=one.dtype, fix=fix)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _between(one: Tensor, other: Tensor, weight: float | Tensor) -> Tensor:
    if not _is_averaged(one):
        return one
    if not isinstance(weight, Tensor):
        return outside_inference(torch.lerp(one, other, weight))
    # a weight of 0.001 keeps its digits, also between tensors in half precision
    wide = torch.promote_types(one.dtype, weight.dtype)
    between = torch.lerp(one.to(wide), other.to(wide), weight.to(one.device, wide))
    return outside_inference(between.to(one.dtype))
