"""The arithmetic of uniform grids against its formulas, written again in NumPy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sophq_func as sq
from sophq_func.numerics import affine, layout, ranges
from sophq_func.numerics.scheme import config_from_data, to_data
from tests.contracts import KINDS, MIXED, SHAPE, assert_same, over_granularities, sample

ALL_KINDS = KINDS | MIXED
EPS = np.float32(2.0**-23)
quick = settings(derandomize=True, deadline=None, max_examples=200)
ends = st.floats(-(2.0**40), 2.0**40, width=32)
kinds = st.sampled_from(list(ALL_KINDS.values()))
widths = st.integers(2, 16)
reversible = pytest.mark.parametrize("kind", ["symmetric", "affine", "narrow"])


def grid(lo: float, hi: float, scheme: sq.QScheme) -> tuple[Any, int]:
    """Scale and zero point of the documented formula, float32 throughout."""
    low, high = np.float32(min(lo, 0.0)), np.float32(max(hi, 0.0))
    steps = np.float32(scheme.qmax - scheme.qmin)
    scale = max(max(-low, high) / (steps / 2) if scheme.symmetric else (high - low) / steps, EPS)
    if scheme.pot_scale:
        scale = np.exp2(np.rint(np.log2(scale)))
    zero = 0 if scheme.symmetric else int(np.clip(scheme.qmin - np.rint(low / scale), scheme.qmin, scheme.qmax))
    return np.float32(scale), zero


@quick
@given(a=ends, b=ends, bits=widths, kind=kinds)
def test_scale_and_zero_point_follow_the_formula(a: float, b: float, bits: int, kind: dict[str, bool]) -> None:
    scheme, (lo, hi) = sq.QScheme(bits=bits, **kind), sorted((a, b))
    scale, zero_point, extras = ranges.range_to_qparams(torch.tensor(lo), torch.tensor(hi), scheme)
    expected, zero = grid(lo, hi, scheme)
    assert (scale.item(), zero_point.item(), extras) == (expected.item(), zero, {})
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)


@quick
@given(a=ends, b=ends, bits=widths, kind=kinds)
def test_the_grid_covers_the_range_to_half_a_step_and_holds_zero(
    a: float, b: float, bits: int, kind: dict[str, bool]
) -> None:
    scheme, (lo, hi) = sq.QScheme(bits=bits, **kind), sorted((a, b))
    scale, zero, _ = ranges.range_to_qparams(torch.tensor(lo), torch.tensor(hi), scheme)
    first, last = ((bound - zero.item()) * scale.double().item() for bound in (scheme.qmin, scheme.qmax))
    assert first <= 0.0 <= last
    if not scheme.pot_scale:  # a power of two may lie below the scale by sqrt(2), and clips then
        room = scale.item() * (0.5 + 1e-2)  # 2 ** 16 codes of float32: an error of 2 ** -8 steps
        assert first - room <= min(lo, 0.0)
        assert max(hi, 0.0) <= last + room


@quick
@given(a=ends, b=ends, bits=widths, symmetric=st.booleans())
def test_a_power_of_two_scale_is_the_nearest_in_its_exponent(a: float, b: float, bits: int, symmetric: bool) -> None:
    lo, hi = (torch.tensor(v) for v in sorted((a, b)))
    plain = ranges.range_to_qparams(lo, hi, sq.QScheme(bits=bits, symmetric=symmetric)).scale
    power = ranges.range_to_qparams(lo, hi, sq.QScheme(bits=bits, symmetric=symmetric, pot_scale=True)).scale
    mantissa, _ = torch.frexp(power)
    assert mantissa == 0.5
    assert 2**-0.5 - 1e-6 <= (power / plain).item() <= 2**0.5 + 1e-6


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(
    ("lo", "hi"),
    [(torch.nan, 1.0), (-1.0, torch.nan), (-torch.inf, 1.0), (-1.0, torch.inf), (torch.inf, 1.0), (torch.inf, -torch.inf)],
)
def test_a_range_that_is_not_finite_has_no_scale(kind: str, lo: float, hi: float) -> None:
    lows, highs = torch.tensor([lo, -1.0]), torch.tensor([hi, 1.0])
    scale = ranges.range_to_qparams(lows, highs, sq.QScheme(**ALL_KINDS[kind])).scale
    assert scale.isnan().tolist() == [True, False]


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3e38, 3.4e38])
def test_every_finite_range_has_a_finite_positive_scale(kind: str, bits: int, size: float) -> None:
    lo, hi = torch.tensor([-size, 0.0, -size, size]), torch.tensor([size, size, 0.0, size])
    scale = ranges.range_to_qparams(lo, hi, sq.QScheme(bits=bits, **ALL_KINDS[kind])).scale
    assert bool((scale.isfinite() & (scale >= ranges.EPS)).all())


@reversible
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_and_its_qparams_say_the_same(kind: str, bits: int) -> None:
    scheme = sq.QScheme(bits=bits, **ALL_KINDS[kind])
    qparams = ranges.range_to_qparams(torch.tensor([-0.7, -3.0, 0.2]), torch.tensor([2.0, -1.0, 0.9]), scheme)
    again = ranges.range_to_qparams(*ranges.qparams_to_range(qparams, scheme), scheme)
    assert_same(again, qparams, rtol=1e-6, atol=0.0)


@over_granularities
def test_rows_undo_what_expand_does(scheme: sq.QScheme) -> None:
    x = sample(0)
    cut = layout.rows(x, scheme.granularity)
    values = torch.arange(float(cut.shape[:-1].numel())).reshape(cut.shape[:-1])
    full = layout.expand(values, x, scheme.granularity).expand(SHAPE)
    assert_same(layout.rows(full, scheme.granularity), values.unsqueeze(-1).expand(cut.shape))
    assert sorted(cut.reshape(-1).tolist()) == sorted(x.reshape(-1).tolist())


@pytest.mark.parametrize(("axis", "size"), [(0, 2), (1, 3), (2, 6), (-1, 4)])
def test_groups_are_consecutive_elements_of_a_channel(axis: int, size: int) -> None:
    x, granularity = torch.arange(24.0).reshape(SHAPE), sq.PerGroup(axis, size)
    cut = layout.rows(x, granularity)
    for channel in range(SHAPE[axis]):
        assert_same(cut[channel].reshape(-1), x.select(axis, channel).reshape(-1))
    values = torch.arange(float(cut.shape[:-1].numel())).reshape(cut.shape[:-1])
    assert_same(layout.rows(layout.expand(values, x, granularity), granularity), values.unsqueeze(-1).expand(cut.shape))


@pytest.mark.parametrize(("high", "wide"), [(1, 1), (3, 8), (1, 4), (3, 2)])
def test_blocks_are_cut_from_the_matrix_of_the_first_axis_and_the_others(high: int, wide: int) -> None:
    x, granularity = torch.arange(24.0).reshape(SHAPE), sq.PerBlock(high, wide)
    cut, matrix = layout.rows(x, granularity), x.reshape(3, 8)
    assert cut.shape == (3 // high, 8 // wide, high * wide)
    for i, row in enumerate(matrix.split(high)):
        for j, block in enumerate(row.split(wide, dim=1)):
            assert_same(cut[i, j], block.reshape(-1))


def test_a_token_is_a_row_along_the_last_axis() -> None:
    x, scheme = sample(0), sq.QScheme(granularity=sq.PerToken(), dynamic=True)
    assert_same(layout.rows(x, sq.PerToken()), x)
    unused = sq.QParams(torch.ones(()), torch.zeros((), dtype=torch.int32), {})
    for shape in (SHAPE, (7, 2), (2,)):  # whatever was observed, other tokens have scales of their own
        y = torch.randn(shape)
        scale = y.abs().amax(-1, keepdim=True) / 127.5
        error = (sq.fake_quantizer("fixed").apply(y, unused, scheme) - y).abs()
        assert bool((error <= scale / 2 * 1.001).all())
        assert bool((error > 0).any())


def test_tokens_need_a_dynamic_scheme() -> None:
    with pytest.raises(sq.ConfigError, match=r"PerToken\(\) without dynamic is not possible .* Fix: dynamic=True"):
        sq.QScheme(granularity=sq.PerToken())


@pytest.mark.parametrize("granularity", [sq.PerBlock(3, 2), sq.PerToken()], ids=str)
def test_blocks_and_tokens_are_written_and_read(granularity: sq.PerBlock) -> None:
    scheme = sq.QScheme(granularity=granularity, dynamic=True)
    config = sq.QuantizerConfig(scheme=scheme, observer=sq.observers.minmax(), fake_quantize=sq.fake_quantize.fixed())
    assert config_from_data(json.loads(json.dumps(to_data(config)))) == config


def test_a_model_with_blocks_in_weights_and_tokens_in_activations_runs_on_any_batch() -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), sample(0, 5, 8)
    config = sq.QuantConfig(
        weight=sq.override(granularity=sq.PerBlock(2, 2)),
        activation=sq.override(granularity=sq.PerToken(), dynamic=True),
    )
    q = sq.quantize(model, config, example_args=(x,))
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x, sample(1, 3, 8)], progress=False)
    assert qparams["0.weight_fake_quant"].scale.shape == (3, 4)
    for batch in (1, 5, 7):
        y = sample(batch, batch, 8)
        torch.testing.assert_close(q.apply(params, qparams, y), model(y), rtol=0.0, atol=0.05)


def test_an_axis_may_be_counted_from_the_back() -> None:
    x = sample(0)
    for size in (None, 4):
        front, back = (sq.PerChannel(a) if size is None else sq.PerGroup(a, size) for a in (2, -1))
        assert_same(layout.rows(x, front), layout.rows(x, back))
        values = ranges.min_max(x, front)[1]
        assert_same(layout.expand(values, x, front), layout.expand(values, x, back))


@over_granularities
def test_minimum_and_maximum_are_those_of_each_row(scheme: sq.QScheme) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = sample(0, dtype=dtype)
        lo, hi = ranges.min_max(x, scheme.granularity)
        cut = layout.rows(x, scheme.granularity)
        assert_same((lo, hi), (cut.amin(-1).float(), cut.amax(-1).float()))


def test_what_does_not_fit_a_tensor_is_refused_with_its_shape() -> None:
    x = sample(0)
    with pytest.raises(sq.StateError, match=r"got 5, allowed a divisor of 8"):
        layout.rows(x, sq.PerGroup(0, 5))
    with pytest.raises(sq.StateError, match=r"channel axis: got 3, allowed -3\.\.2\. Fix: PerTensor\(\)"):
        layout.rows(x, sq.PerChannel(3))
    with pytest.raises(sq.StateError, match=r"got \(2, 2\), allowed divisors of 3 and 8"):
        layout.rows(x, sq.PerBlock(2, 2))
    with pytest.raises(sq.StateError, match=r"got \(3,\), allowed \(3, 4\)"):
        layout.expand(torch.ones(3), x, sq.PerToken())
    with pytest.raises(sq.StateError, match=r"got \(4,\), allowed \(3,\)"):
        layout.expand(torch.ones(4), x, sq.PerChannel(0))
    with pytest.raises(sq.StateError, match=r"got \(3, 4\), allowed \(3, 2\)"):
        layout.expand(torch.ones(3, 4), x, sq.PerGroup(0, 4))


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    x, y = sample(0), sample(1)
    value, pull = torch.func.vjp(affine.ste, x, y)
    assert_same(value, y)
    assert_same(pull(sample(2)), (sample(2), torch.zeros(SHAPE)))


@pytest.mark.parametrize(
    ("scale", "size", "slope"),
    [(2.0, 2.0, 1.0), (-2.0, 2.0, -1.0), (0.0, 2.0**-23, 1.0), (1e-12, 2.0**-23, 1.0), (-1e-12, 2.0**-23, -1.0)],
)
def test_the_scale_in_force_is_a_size_with_a_floor_that_gradients_pass(scale: float, size: float, slope: float) -> None:
    value, pull = torch.func.vjp(ranges.positive, torch.tensor(scale))
    assert value == size
    assert pull(torch.tensor(1.0))[0] == slope


def test_rounding_to_the_grid_is_in_kernel_order() -> None:
    scheme = sq.QScheme(bits=4, symmetric=False)
    x, one = torch.tensor([-2.0, 0.5, 1.5, 20.0]), torch.tensor(1.0)
    assert affine.round_to_grid(x, one, torch.tensor(1), scheme).tolist() == [-1.0, 0.0, 2.0, 14.0]


@pytest.mark.parametrize(("order", "expected"), [("kernel", [0.0, 2.0, 2.0]), ("expression", [1.0, 1.0, 3.0])])
def test_the_orders_differ_at_ties_where_the_zero_point_is_odd(order: Any, expected: list[float]) -> None:
    qparams = sq.QParams(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), {})
    y = affine.fake_quantize(torch.tensor([0.5, 1.5, 2.5]), qparams, sq.QScheme(symmetric=False), order)
    assert y.tolist() == expected


def test_a_learned_zero_point_is_clamped_and_then_rounded_half_to_even() -> None:
    scheme, x = sq.QScheme(bits=4, symmetric=False), torch.tensor([-100.0, 100.0])
    for zero, whole in ((2.5, 2.0), (3.5, 4.0), (-3.0, 0.0), (99.0, 15.0)):
        y = affine.fake_quantize(x, sq.QParams(torch.tensor(1.0), torch.tensor(zero), {}), scheme, "kernel")
        assert y.tolist() == [0.0 - whole, 15.0 - whole]
