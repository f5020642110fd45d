"""Laws over everything registered, and the grid they run over: each granularity with each kind of scheme."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.core.pytree import leaves
from sophq_func.numerics.scheme import Granularity

SHAPE = (3, 4, 2)
STATIC = (sq.PerTensor(), sq.PerChannel(0), sq.PerChannel(1), sq.PerGroup(0, 4), sq.PerBlock(3, 2))
GRANULARITIES = (*STATIC, sq.PerToken())
KINDS: dict[str, dict[str, bool]] = {
    "symmetric": {},
    "affine": {"symmetric": False},
    "narrow": {"symmetric_range": True},
    "pot": {"pot_scale": True},
}
MIXED: dict[str, dict[str, bool]] = {
    "affine_pot": {"symmetric": False, "pot_scale": True},
    "narrow_pot": {"symmetric_range": True, "pot_scale": True},
}


def scheme_param(name: str, granularity: Granularity, bits: int = 4) -> Any:
    return pytest.param(scheme_of(name, granularity, bits), id=f"{name}-{granularity}")


def scheme_of(name: str, granularity: Granularity, bits: int = 4) -> sq.QScheme:
    dynamic = granularity == sq.PerToken()
    return sq.QScheme(bits=bits, granularity=granularity, dynamic=dynamic, **(KINDS | MIXED)[name])


def every_kind(granularities: tuple[Granularity, ...]) -> dict[str, sq.QScheme]:
    """Every granularity with a zero point and without; each further kind, which changes numbers only, with one of them."""
    pairs = [(name, g) for g in granularities for name in ("symmetric", "affine")]
    pairs += zip(("narrow", "pot", *MIXED), granularities, strict=False)
    return {f"{name}-{g}": scheme_of(name, g) for name, g in pairs}


SCHEMES, STATIC_SCHEMES = every_kind(GRANULARITIES), every_kind(STATIC)
COARSE = {f"{name}-{sq.PerTensor()}": scheme_of(name, sq.PerTensor(), bits=2) for name in KINDS | MIXED}
"""Every kind of scheme, with the fewest bits."""


def over(schemes: Mapping[str, sq.QScheme]) -> Any:
    return pytest.mark.parametrize("scheme", schemes.values(), ids=schemes.keys())


over_schemes, over_static_schemes = over(SCHEMES), over(STATIC_SCHEMES)
over_granularities = pytest.mark.parametrize("scheme", [scheme_param("affine", g) for g in GRANULARITIES])
over_static_granularities = pytest.mark.parametrize("scheme", [scheme_param("affine", g) for g in STATIC])


def hold(law: Callable[..., None], *tables: Mapping[str, Any]) -> None:
    """Hold every combination of one entry of each table to a law; those that break it are reported together, by name.

    One test instead of thousands, where a subject is tried on many small tensors.
    """
    broken = []
    for chosen in itertools.product(*(table.items() for table in tables)):
        names, values = zip(*chosen, strict=True)
        try:
            law(*values)
        except (Exception, pytest.fail.Exception) as error:
            broken.append(f"{', '.join(names)}: {type(error).__name__}: {error}")
    assert not broken, "\n".join([f"{len(broken)} of {math.prod(map(len, tables))} cases:", *broken])


def sample(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, skewed so that an affine grid has a zero point of its own."""
    return (torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.4).to(dtype)


def observed(x: Tensor, scheme: sq.QScheme) -> sq.QParams:
    observer = sq.observer("minmax")
    return observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme)


def calibrated(fq: sq.FakeQuantize, x: Tensor, scheme: sq.QScheme) -> sq.QParams:
    return fq.init(observed(x, scheme), x, scheme)


def stack(trees: list[Any]) -> Any:
    return torch.utils._pytree.tree_map(lambda *ts: torch.stack(ts), *trees)


def pick(tree: Any, i: int) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t[i], tree)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Equal trees of tensors; bit for bit without a tolerance, NaN equal to NaN."""
    assert type(actual) is type(expected)
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    for a, e in zip(leaves(actual), leaves(expected), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)


@contextmanager
def unchanged(*trees: Any) -> Iterator[None]:
    """No tensor of ``trees`` is written to inside the block."""
    tensors = [t for t in leaves(trees) if isinstance(t, Tensor)]
    before = [(t.detach().clone(), t._version) for t in tensors]
    yield
    for t, (value, version) in zip(tensors, before, strict=True):
        assert t._version == version
        assert_same(t.detach(), value)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")
