"""Searches and statistics of single observers against their definitions, written as plainly as they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sophq_func as sq
from sophq_func.observers import _counts, _floor, _histogram, _moments, _mse, _quantile
from tests.contracts import assert_same, sample

many = settings(derandomize=True, deadline=None, max_examples=100)
seeds = st.integers(0, 10**6)


def numbers(seed: int, *shape: int, power: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.abs().pow(power) * x.sign()


def after(observer: sq.Observer, scheme: sq.QScheme, *batches: Tensor) -> Any:
    state = observer.init(batches[0], scheme)
    for x in batches:
        state = observer.update(state, x, scheme)
    return state


def grid(name: str, scheme: sq.QScheme, *batches: Tensor, **options: Any) -> sq.QParams:
    observer = sq.observer(name, **options)
    return observer.qparams(after(observer, scheme, *batches), scheme)


@many
@given(
    seed=seeds,
    size=st.integers(1, 5000),
    bins=st.sampled_from([16, 100, 2048]),
    threshold=st.sampled_from([0.3, 0.9, 0.99, 0.999, 0.99999, 1.0]),
)
def test_the_quantile_lies_in_the_bin_of_a_plain_count(seed: int, size: int, bins: int, threshold: float) -> None:
    x = numbers(seed, size, power=2.0)
    reach = float(x.abs().max())
    counts, total, bin_ = torch.histc(x.abs(), bins, min=0, max=reach).tolist(), 0.0, 0
    while total + counts[bin_] < threshold * size:
        total, bin_ = total + counts[bin_], bin_ + 1
    clip = (bin_ + 0.5) * reach / bins
    lo, hi = _quantile.clipped_range(x, sq.QScheme(), threshold, bins)
    expected = torch.tensor([max(float(x.min()), -clip), min(float(x.max()), clip)])
    torch.testing.assert_close(torch.stack([lo, hi]), expected, rtol=1e-6, atol=0.0)


@many
@given(seed=seeds, size=st.integers(1, 3000), share=st.floats(0, 1))
def test_the_nth_largest_magnitude_is_that_of_a_sort(seed: int, size: int, share: float) -> None:
    x, rank = numbers(seed, 2, size), 1 + int(share * (size - 1))
    assert_same(_quantile.nth_largest_magnitude(x, rank), x.abs().sort(descending=True).values[:, rank - 1])


@many
@given(seed=seeds, spread=st.floats(0, 40), size=st.integers(1, 50))
def test_histograms_of_parts_merge_to_that_of_the_whole(seed: int, spread: float, size: int) -> None:
    observer, scheme = sq.observer("percentile", bins=64), sq.QScheme()
    factors = torch.exp2(spread * torch.randn(3, generator=torch.Generator().manual_seed(seed)))
    a, b, c = (after(observer, scheme, numbers(seed + i, size) * f) for i, f in enumerate(factors))
    whole = after(observer, scheme, torch.cat([numbers(seed + i, size) * f for i, f in enumerate(factors)]))
    merge = observer.merge
    for state in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))):
        assert_same(state, whole)
    assert whole.counts.sum() == 3 * size


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_holds_as_many_values_and_one_bin_less_does_not(percentile: float, symmetric: bool) -> None:
    x, scheme = sample(0, 20000), sq.QScheme(symmetric=symmetric)
    scale, zero_point, _ = grid("percentile", scheme, x[:9000], x[9000:], percentile=percentile)
    share, bin_ = percentile / 100, 2 * float(x.abs().max()) / 2048
    lo, hi = (-scale * 127.5, scale * 127.5) if symmetric else (-zero_point * scale, (255 - zero_point) * scale)
    slack = 1e-5 if symmetric else float(scale) / 2 + 1e-5  # a zero point is rounded

    def inside(more: float) -> float:
        return float(((x >= lo - more) & (x <= hi + more)).float().mean())

    assert inside(slack) >= share - 1e-4
    assert inside(-slack - bin_) < share


def plain_divergence(h: Tensor, levels: int) -> int:
    """Migacz's procedure, one candidate after another, with the names and the rules of the docstring of kld."""
    scores = {}
    for i in range(levels, len(h) + 1):
        if float(h[i:].sum()) * levels**2 > float(h.sum()):
            continue
        p, q = h[:i].clone(), torch.zeros(i, dtype=torch.float64)
        p[-1] += h[i:].sum()
        group = torch.tensor([(j * levels) // i for j in range(i)])
        for g in range(levels):
            members = (group == g) & (h[:i] > 0)
            q[members] = h[:i][group == g].sum() / max(1, int(members.sum()))
        q = torch.where((q == 0) & (p > 0), 1e-4, q)
        scores[i] = round(float(torch.xlogy(p, p / q.clamp(min=1e-300)).sum()), 9)
    return max(i for i in scores if scores[i] == min(scores.values()))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(seed=seeds, levels=st.sampled_from([2, 4, 8, 16]), size=st.integers(1, 2000), power=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_threshold_of_least_divergence_is_that_of_the_plain_procedure(
    seed: int, levels: int, size: int, power: float
) -> None:
    h = torch.histc(numbers(seed, size, power=power).abs(), 64, min=0).double()
    assert int(_counts.least_divergence(h, levels)) == plain_divergence(h, levels)


def test_kld_cuts_an_outlier_and_keeps_what_fits_the_levels() -> None:
    x = torch.cat([numbers(0, 100_000), torch.tensor([1000.0])])
    assert grid("kld", sq.QScheme(), x).scale * 127.5 < 100
    assert grid("kld", sq.QScheme(bits=16), x).scale * 32767.5 == 1000
    assert grid("minmax", sq.QScheme(), x).scale * 127.5 == 1000


def range_kept(name: str, scheme: sq.QScheme, *batches: Tensor) -> float:
    return float(grid(name, scheme, *batches).scale) * (scheme.qmax - scheme.qmin)


ONE_SIDED = {
    "softplus": torch.nn.functional.softplus(numbers(1, 20_000) + 8),
    "shifted": numbers(2, 20_000) + 20,
    "narrow": numbers(3, 20_000).clamp(-1, 1) / 2 + 5.5,
    "saturated": torch.sigmoid(2 * numbers(4, 20_000) + 6),
    "negative": -torch.nn.functional.softplus(numbers(5, 20_000) + 3),
    "few": numbers(6, 64) + 3,
}


@pytest.mark.parametrize("values", ONE_SIDED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_kld_does_not_clip_one_sided_values_to_the_smallest(values: str, symmetric: bool) -> None:
    x, scheme = ONE_SIDED[values], sq.QScheme(symmetric=symmetric)
    assert range_kept("kld", scheme, x) >= 0.95 * range_kept("minmax", scheme, x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("shift", [-1.5, 0.0, -6.0])
def test_zeros_of_a_relu_do_not_narrow_the_range_of_kld(symmetric: bool, parts: int, shift: float) -> None:
    """From a third to 98 % of the values are 0."""
    scheme, x = sq.QScheme(symmetric=symmetric), (3 * numbers(0, 100_000) + shift).clamp(0, 6)
    full = range_kept("minmax", scheme, x)
    assert 0.9 * full <= range_kept("kld", scheme, *x.tensor_split(parts)) <= full
    zeros = torch.cat([x, torch.zeros(400_000)])
    assert range_kept("kld", scheme, zeros) == range_kept("kld", scheme, x)


def test_kld_counts_the_levels_of_both_signs_where_one_has_all_values() -> None:
    x = numbers(0, 20_000).exp()
    affine, symmetric, wider = sq.QScheme(bits=6, symmetric=False), sq.QScheme(bits=6), sq.QScheme(bits=7)
    assert range_kept("kld", affine, x) == pytest.approx(range_kept("kld", wider, x) / 2, rel=1e-5)
    assert range_kept("kld", affine, x) != pytest.approx(range_kept("kld", symmetric, x) / 2)
    two_sided = torch.cat([x, torch.tensor([-1e-3])])
    assert range_kept("kld", affine, two_sided) == pytest.approx(range_kept("kld", symmetric, x) / 2, rel=1e-3)


def test_a_histogram_counts_beyond_what_float32_can() -> None:
    observer, scheme = sq.observer("histogram", bins=4), sq.QScheme()
    state = after(observer, scheme, torch.tensor([0.0, 1.0]))
    many_values = state._replace(counts=state.counts * 2**24)
    one_more = observer.update(many_values, torch.tensor([0.0, 1.0, 1.0]), scheme)
    assert ((one_more.counts - many_values.counts) / 2**20).tolist() == [1.0, 0.0, 0.0, 2.0]


@many
@given(seed=seeds, widths=st.lists(st.floats(0.1, 1000), min_size=2, max_size=12))
def test_no_value_is_lost_where_the_range_of_a_histogram_grows(seed: int, widths: list[float]) -> None:
    observer, scheme = sq.observer("histogram", bins=8), sq.QScheme()
    state = after(observer, scheme, *(numbers(seed + i, 5) * width for i, width in enumerate(widths)))
    assert int(state.counts.sum()) == 5 * len(widths) * 2**20


def test_values_are_counted_in_parts_where_a_row_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    x, factor = numbers(0, 2, 1000), torch.tensor([[8.0], [2.0]])
    whole = _mse.histogram(x, factor, 16)
    monkeypatch.setattr(_mse, "LARGEST_COUNT", 300)
    assert_same(_mse.histogram(x, factor, 16), whole)
    assert whole.sum() == x.numel()


def plain_walk(counts: Tensor) -> list[tuple[int, int]]:
    """Every range on the way in, step by step."""
    mass, first, last = counts.cumsum(0), 0, len(counts) - 1
    total, a, b, found = float(mass[-1]), 0, 0, [(0, len(counts) - 1)]
    while a + b < _histogram.STEPS:
        left, right = first, last
        while left < last and mass[left] < float(torch.tensor((a + 1) / _histogram.STEPS * total)):
            left += 1
        while right > first and mass[right] > float(torch.tensor((1 - (b + 1) / _histogram.STEPS) * total)):
            right -= 1
        if left - first > last - right:
            first, a = left, a + 1
        else:
            last, b = right, b + 1
        if (first, last) != found[-1]:
            found.append((first, last))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_walk_is_the_one_step_by_step(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_histogram, "STEPS", 300)
    counts = torch.histc(numbers(seed, 4000, power=1.0 + seed / 2), 64)
    first, last, exists = _histogram.narrowing(counts)
    ours = [
        pair for pair, real in zip(zip(first.tolist(), last.tolist(), strict=True), exists.tolist(), strict=True) if real
    ]
    plain = plain_walk(counts)
    half = len(plain) // 2  # where both ends meet, the step-by-step walk stops moving; the search has ended long before
    assert half > 4
    assert ours[:half] == plain[:half]


@pytest.mark.parametrize(("first", "last"), [(0, 63), (3, 50), (20, 21), (30, 30)])
@pytest.mark.parametrize("levels", [4, 16, 256])
def test_the_squared_error_of_cells_is_an_integral(first: int, last: int, levels: int) -> None:
    counts = torch.histc(numbers(0, 1000), 64)
    cell, fine = (last - first + 1) / levels, 2000
    point = (torch.arange(64 * fine, dtype=torch.float64) + 0.5) / fine
    code = ((point - first) / cell).floor().clamp(0, levels - 1)
    expected = (((code + 0.5) * cell + first - point).square().reshape(64, fine).mean(1) * counts).sum()
    found = _histogram.squared_error(counts, torch.tensor([first]), torch.tensor([last]), levels)
    torch.testing.assert_close(found.double(), expected.unsqueeze(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_follows_the_paper(bits: int) -> None:
    x = sample(0, 4, 500)
    symmetric = sq.QScheme(bits=bits, granularity=sq.PerChannel(0))
    mean, std = x.mean(1), x.std(1)
    expected = torch.maximum((mean - 3 * std).abs(), (mean + 3 * std).abs()) / 2 ** (bits - 1)
    torch.testing.assert_close(grid("lsq_plus", symmetric, x).scale, expected)
    affine = sq.QScheme(bits=bits, symmetric=False)
    assert_same(grid("lsq_plus", affine, x), grid("mse", affine, x))


def test_ranges_by_size() -> None:
    x, scheme = torch.tensor([-3.0, 1.0, 1.0, 1.0]), sq.QScheme(symmetric=False)
    root = math.sqrt(12 / 4)
    torch.testing.assert_close(grid("absmax", scheme, x, factor=0.5).scale, torch.tensor(3.0 / 255))
    torch.testing.assert_close(grid("rms", scheme, x, factor=2.0).scale, torch.tensor(4 * root / 255))
    torch.testing.assert_close(grid("rms", scheme, x[:1], x[1:], factor=2.0).scale, torch.tensor(4 * root / 255))
    fixed = grid("fixed_range", scheme, x, lo=0.0, hi=1.0)
    torch.testing.assert_close(fixed.scale, torch.tensor(1.0 / 255))
    assert fixed.zero_point == 0


@many
@given(st.floats(0, 2.0**127, width=32))
def test_exponents_are_exact(value: float) -> None:
    found = int(_moments.exponent(torch.tensor(value)))
    assert found == max(-126, math.frexp(value)[1] - 1 if value else -126)
    assert float(_moments.power(torch.tensor(found, dtype=torch.int32))) == 2.0**found


@pytest.mark.slow
def test_exponents_under_vmap_are_the_same_bits() -> None:
    """There they are computed, not read off the bits, which torch before 2.13 cannot do under ``vmap``."""
    exponents = torch.arange(-140, 140, dtype=torch.int32)
    powers = torch.vmap(_moments.power)(exponents)
    assert torch.equal(powers, _moments.power(exponents))
    around = torch.cat([powers, powers.nextafter(torch.tensor(0.0)), powers.nextafter(torch.tensor(torch.inf))])
    sizes = torch.cat([around, -around, torch.tensor([0.0, -0.0, 1e-45, 1e-39, 3.4e38])])
    found = torch.vmap(_moments.exponent)(sizes)
    assert found.dtype == torch.int32
    assert torch.equal(found, _moments.exponent(sizes))
    compiled = torch.compile(torch.vmap(_moments.exponent), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(sizes), found)


@many
@given(st.integers(-(10**6), 10**6))
def test_dpu_rounding_sends_negative_halves_up_and_others_to_even(quarters: int) -> None:
    value = quarters / 4
    expected = math.floor(value + 0.5) if value < 0 else round(value)
    assert float(_floor.round_dpu(torch.tensor(value))) == expected


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (sq.observers.ema_minmax, "decay", 1.0),
        (sq.observers.ema_quantile, "decay", -0.1),
        (sq.observers.ema_quantile, "threshold", 0.0),
        (sq.observers.ema_quantile, "bins", 0),
        (sq.observers.ema_quantile, "bins", True),
        (sq.observers.ema_mse, "decay", True),
        (sq.observers.ema_mse, "p", 0),
        (sq.observers.mse, "p", -1.0),
        (sq.observers.clip_std, "std_scale", 0.0),
        (sq.observers.lsq_plus, "rule", "other"),
        (sq.observers.histogram, "bins", 1),
        (sq.observers.histogram, "levels", 1),
        (sq.observers.kld, "bins", 1000),
        (sq.observers.percentile, "percentile", 101.0),
        (sq.observers.percentile, "bins", 0),
        (sq.observers.minmax_floor, "quant_type", "weight"),
        (sq.observers.pot_mode, "quant_type", 1),
        (sq.observers.absmax, "factor", 0.0),
        (sq.observers.rms, "factor", math.inf),
        (sq.observers.fixed_range, "lo", 2.0),
        (sq.observers.fixed_range, "hi", math.inf),
    ],
)
def test_an_option_out_of_its_bounds_is_a_config_error(make: Callable[..., sq.Spec], option: str, value: object) -> None:
    name = make.__name__
    for call in (make, lambda **options: sq.observer(name, **options)):
        with pytest.raises(sq.ConfigError, match=f"{name}: this .* is not possible: got .*, allowed"):
            call(**{option: value})
