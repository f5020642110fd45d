"""What laws are tried on: schemes of every granularity and kind, small tensors, and how results are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sophq_func.core.modes import writes_into
from sophq_func.core.pytree import leaves, tensors, tree_map
from sophq_func.core.types import Tree
from sophq_func.numerics.contracts import FakeQuantize, QParams
from sophq_func.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from sophq_func.numerics.scheme import QScheme
from sophq_func.observers import observer

SHAPE = (3, 4, 2)
"""Of the tensors: no two axes of one size, so that an axis is not mistaken for another."""

STATIC = (PerTensor(), PerChannel(0), PerChannel(1), PerGroup(0, 4), PerBlock(3, 2))
"""Granularities whose scales can be observed."""

GRANULARITIES = (*STATIC, PerToken())

KINDS: Mapping[str, Mapping[str, bool]] = {
    "symmetric": {},
    "affine": {"symmetric": False},
    "narrow": {"symmetric_range": True},
    "pot": {"pot_scale": True},
}
"""Kinds of schemes, by the fields that differ from the defaults."""

MIXED: Mapping[str, Mapping[str, bool]] = {
    "affine_pot": {"symmetric": False, "pot_scale": True},
    "narrow_pot": {"symmetric_range": True, "pot_scale": True},
}
"""Two kinds at once."""


def scheme_of(kind: str, granularity: Granularity, bits: int = 4) -> QScheme:
    """The scheme of one of ``KINDS`` or ``MIXED``; per token it is dynamic, as it must be."""
    fields = {**KINDS, **MIXED}[kind]
    return QScheme(bits=bits, granularity=granularity, dynamic=granularity == PerToken(), **fields)


def every_kind(granularities: Sequence[Granularity]) -> dict[str, QScheme]:
    """Every granularity with a zero point and without; each further kind, which changes numbers only, with one of them."""
    pairs = [(kind, granularity) for granularity in granularities for kind in ("symmetric", "affine")]
    pairs += zip(("narrow", "pot", *MIXED), granularities, strict=False)
    return {f"{kind}-{granularity}": scheme_of(kind, granularity) for kind, granularity in pairs}


SCHEMES, STATIC_SCHEMES = every_kind(GRANULARITIES), every_kind(STATIC)

AFFINE = {f"affine-{granularity}": scheme_of("affine", granularity) for granularity in GRANULARITIES}
"""One scheme of each granularity."""

STATIC_AFFINE = {f"affine-{granularity}": scheme_of("affine", granularity) for granularity in STATIC}

NARROW = {f"narrow-{granularity}": scheme_of("narrow", granularity) for granularity in GRANULARITIES}
"""One scheme of each granularity whose codes are symmetric about 0."""

COARSE = {f"{kind}-{PerTensor()}": scheme_of(kind, PerTensor(), bits=2) for kind in (*KINDS, *MIXED)}
"""Every kind of scheme, with the fewest bits."""


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, skewed so that an affine grid has a zero point of its own."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape or SHAPE, generator=generator, dtype=torch.float64) + 0.4).to(dtype)


def observed(x: Tensor, scheme: QScheme) -> QParams:
    """The qparams of the range of ``x``."""
    minmax = observer("minmax")
    return minmax.qparams(minmax.update(minmax.init(x, scheme), x, scheme), scheme)


def calibrated(fq: FakeQuantize, x: Tensor, scheme: QScheme) -> QParams:
    """The same, with what a fake quantizer adds to them."""
    return fq.init(observed(x, scheme), x, scheme)


def stack(trees: Sequence[Tree]) -> Tree:
    """One tree of stacked tensors."""
    first, *others = trees
    return tree_map(lambda *parts: torch.stack(parts), first, *others)


def pick(tree: Tree, index: int) -> Tree:
    """One member of a tree of stacked tensors."""
    return tree_map(lambda tensor: tensor[index], tree)


def assert_same(actual: Tree, expected: Tree, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal trees of tensors; bit for bit without a tolerance, NaN equal to NaN."""
    assert type(actual) is type(expected), f"{type(actual).__name__} instead of {type(expected).__name__}"
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=rtol, atol=atol)


@contextmanager
def unchanged(*trees: Tree) -> Iterator[None]:
    """No tensor of ``trees`` is written to inside the block."""
    watched = tensors(trees)
    before = [(tensor.detach().clone(), writes_into(tensor)) for tensor in watched]
    yield
    for tensor, (value, count) in zip(watched, before, strict=True):
        assert writes_into(tensor) == count, "a tensor that was given is written to"
        assert_same(tensor.detach(), value)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, compiled as one graph, by a backend that changes no arithmetic."""
    torch.compiler.reset()
    compile_: Callable[..., Callable[..., Any]] = torch.compile
    return compile_(f, fullgraph=True, backend="aot_eager")
