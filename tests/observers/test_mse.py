"""The search of the mse observers against the plain one: every candidate on the whole tensor, one after another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.affine import round_to_grid
from sophq_func.numerics.layout import rows
from sophq_func.numerics.ranges import min_max, range_to_qparams
from sophq_func.observers import _mse
from tests.contracts import assert_same, compiled

many = settings(derandomize=True, deadline=None, max_examples=150)

DISTRIBUTIONS = {
    "normal": lambda u, v: v,
    "shifted": lambda u, v: v + 3,
    "relu": lambda u, v: v.clamp(min=0),
    "heavy": lambda u, v: v * torch.where(u < 0.02, 25.0, 1.0),
    "cauchy": lambda u, v: torch.tan((u - 0.5) * 3.14),
    "uniform": lambda u, v: u - 0.3,
    "one sign": lambda u, v: -v.abs() - 0.1,
    "sparse": lambda u, v: torch.where(u < 0.01, v, 0.0),
    "lattice": lambda u, v: (v * 9).round() / 8,
    "few values": lambda u, v: torch.where(u < 0.3, 0.4, torch.where(u < 0.9, -1.0, 2.0)),
    "one outlier": lambda u, v: torch.where(u == u.max(), 60.0, v),
    "laplace": lambda u, v: -torch.log(1 - u) * v.sign(),
    "cubed": lambda u, v: v**3,
    "tiny": lambda u, v: v * 1e-5,
    "ties": lambda u, v: (v * 16).round() / 16 + 1 / 32,
}


def draw(kind: str, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)
    return DISTRIBUTIONS[kind](u, v)


def plain_scores(x: Tensor, scheme: sq.QScheme, p: float) -> Tensor:
    """Mean error of each candidate, ``(candidates, scales)``, by the formula of semantics.md 3.5."""
    lo, hi = min_max(x, scheme.granularity)
    flat = rows(x, scheme.granularity).reshape(max(1, lo.numel()), -1)
    found = []
    for i in range(95 if scheme.granularity == sq.PerTensor() else 80):
        shrink = 1.0 - 0.01 * i
        grid = range_to_qparams(lo.reshape(-1, 1) * shrink, hi.reshape(-1, 1) * shrink, scheme, pot_scale=False)
        found.append((round_to_grid(flat, grid.scale, grid.zero_point, scheme) - flat).abs().pow(p).mean(-1))
    return torch.stack(found)


def assert_best(x: Tensor, scheme: sq.QScheme, p: float = 2.0) -> None:
    """The candidate found is the first best, or its score differs from the best in the last digits of a float sum."""
    scores = plain_scores(x, scheme, p)
    lo, hi = (bound.reshape(-1) for bound in min_max(x, scheme.granularity))
    found = [bound.reshape(-1) for bound in _mse.search_range(x, scheme, p)]
    candidates = [1.0 - 0.01 * i for i in range(len(scores))]
    for row, column in enumerate(scores.T):
        chosen = [
            i
            for i, shrink in enumerate(candidates)
            if found[0][row] == lo[row] * shrink and found[1][row] == hi[row] * shrink
        ]
        assert chosen
        assert column[chosen].min() <= column.min() * (1 + 3e-6) + 1e-45


@pytest.mark.slow
@many
@given(
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 5),
    symmetric=st.booleans(),
    narrow=st.booleans(),
    p=st.sampled_from([2.0, 2.0, 1.0, 2.4]),
)
def test_a_long_tensor_gets_the_candidate_of_the_plain_search(
    kind: str, seed: int, bits: int, symmetric: bool, narrow: bool, p: float
) -> None:
    scheme = sq.QScheme(bits=bits, symmetric=symmetric, symmetric_range=narrow and symmetric)
    x = draw(kind, seed, 9000)
    assert _mse.bins_for(x.reshape(1, -1), scheme)
    assert_best(x, scheme, p)


@pytest.mark.slow
@many
@given(
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    narrow=st.booleans(),
    p=st.sampled_from([2.0, 2.0, 1.0, 2.4]),
    size=st.sampled_from([1024, 1500, 4608]),
)
def test_long_channels_get_the_candidates_of_the_plain_search(
    kind: str, seed: int, bits: int, narrow: bool, p: float, size: int
) -> None:
    scheme = sq.QScheme(bits=bits, symmetric_range=narrow, granularity=sq.PerChannel(0))
    x = draw(kind, seed, 6, size)
    assert _mse.bins_for(x, scheme)
    assert_best(x, scheme, p)


@pytest.mark.slow
@many
@given(
    kind=st.sampled_from(list(DISTRIBUTIONS)),
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 10),
    symmetric=st.booleans(),
    granularity=st.sampled_from([sq.PerTensor(), sq.PerChannel(0), sq.PerChannel(1), sq.PerGroup(0, 16)]),
)
def test_short_rows_get_the_candidates_of_the_plain_search(
    kind: str, seed: int, bits: int, symmetric: bool, granularity: sq.PerChannel
) -> None:
    assert_best(draw(kind, seed, 4, 64), sq.QScheme(bits=bits, symmetric=symmetric, granularity=granularity))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_large_activation_in_eight_bits(kind: str, symmetric: bool) -> None:
    scheme, x = sq.QScheme(symmetric=symmetric), draw(kind, 7, 8, 64, 14, 14)
    assert _mse.bins_for(x.reshape(1, -1), scheme)
    assert_best(x, scheme)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_many_channels_of_a_large_weight(kind: str) -> None:
    assert_best(draw(kind, 8, 64, 2304), sq.QScheme(granularity=sq.PerChannel(0)))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 2e-5, 1e-4, 1e18, 1e30])
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(0)], ids=str)
def test_where_scales_meet_their_floor_or_errors_overflow_the_first_of_equals_stays(
    size: float, granularity: sq.PerChannel
) -> None:
    x, scheme = draw("normal", 3, 4, 20000) * size, sq.QScheme(bits=4, granularity=granularity)
    if size in (1e-30, 1e18, 1e30):
        assert_same(_mse.search_range(x, scheme, 2.0), min_max(x, granularity))
    else:
        assert_best(x, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(0)], ids=str)
def test_cut_in_pieces_vmapped_and_compiled_it_is_the_same(
    granularity: sq.PerChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, xs = sq.QScheme(bits=3, granularity=granularity), draw("heavy", 5, 2, 3, 3000)
    expected = [_mse.search_range(x, scheme, 2.0) for x in xs]
    batched = torch.vmap(lambda x: torch.stack(_mse.search_range(x, scheme, 2.0)))(xs)
    assert_same(batched, torch.stack([torch.stack(e) for e in expected]))
    assert_same(compiled(lambda x: _mse.search_range(x, scheme, 2.0))(xs[0]), expected[0])
    monkeypatch.setattr(_mse, "CPU_ELEMENTS", 1000)
    assert_same([_mse.search_range(x, scheme, 2.0) for x in xs], expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_long_rows_with_values_that_are_not_finite_have_no_range_and_others_keep_theirs(value: float) -> None:
    scheme, x = sq.QScheme(bits=4, granularity=sq.PerChannel(0)), draw("normal", 1, 3, 3000)
    bad = x.clone()
    bad[1, 5] = value
    expected, found = (torch.stack(_mse.search_range(t, scheme, 2.0)) for t in (x, bad))
    assert_same(found[:, [0, 2]], expected[:, [0, 2]])
    assert not bool(found[:, 1].isfinite().all())
    observer = sq.observer("mse")
    one = sq.QScheme(bits=4)
    state = observer.update(observer.init(x, one), bad, one)
    with pytest.raises(sq.StateError, match="mse"):
        observer.qparams(state, one)
