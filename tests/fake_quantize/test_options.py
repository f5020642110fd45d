"""What options of single fake quantizers do: noise, roundings, thresholds, scalings, and what they refuse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import sophq_func as sq
from sophq_func.fake_quantize import rectified_sigmoid
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.contracts import assert_same, calibrated, observed, over_static_schemes, sample, scheme_of
from tests.each import each

ZERO = torch.tensor(0, dtype=torch.int32)
SCHEME = sq.QScheme(bits=4)
over_symmetric = each("scheme", {str(g): scheme_of("symmetric", g) for g in (sq.PerTensor(), sq.PerChannel(1))})


def scaled(scale: float, **extras: torch.Tensor) -> sq.QParams:
    return sq.QParams(torch.tensor(scale), ZERO, extras)


# Noise


def test_dropping_needs_noise_and_says_who_provides_it() -> None:
    fq, x = sq.fake_quantizer("qdrop", prob=0.5), sample(0)
    assert fq.noise
    assert not sq.fake_quantizer("qdrop").noise
    with pytest.raises(sq.StateError, match=r"qdrop: quantizing at random needs noise.* Fix: qparams = q\.with_noise\("):
        fq.apply(x, scaled(0.3), SCHEME)


def test_dropping_takes_noise_from_its_argument_or_from_extras() -> None:
    fq, x, noise = sq.fake_quantizer("qdrop", prob=0.3), sample(0), torch.rand(3, 4, 2)
    y = fq.apply(x, scaled(0.3), SCHEME, noise=noise)
    assert_same(fq.apply(x, scaled(0.3, noise=noise), SCHEME), y)
    assert_same(fq.apply(x, scaled(0.3, noise=torch.zeros(3, 4, 2)), SCHEME, noise=noise), y)
    whole = sq.fake_quantizer("qdrop").apply(x, scaled(0.3), SCHEME)
    assert_same(y, torch.where(noise < 0.3, whole, x))
    assert_same(sq.fake_quantizer("qdrop", prob=0).apply(x, scaled(0.3), SCHEME, noise=noise), x)


@pytest.mark.parametrize("name", [name for name in sq.fake_quantize.__all__ if name not in ("qdrop",)])
def test_nothing_else_needs_noise(name: str) -> None:
    if name not in ("fake_quantizer", "hessian_update", "rectified_sigmoid"):
        assert not sq.fake_quantizer(name).noise


# AdaRound


@over_static_schemes
def test_rounding_without_alpha_is_fixed_and_with_a_fresh_one_changes_nothing(scheme: sq.QScheme) -> None:
    x, found = sample(0), observed(sample(0), scheme)
    soft, hard = (sq.fake_quantizer("adaround", rounding=rounding) for rounding in ("soft", "hard"))
    fixed = sq.fake_quantizer("fixed").apply(x, found, scheme)
    assert_same(soft.apply(x, found, scheme), fixed)
    qparams = soft.init(found, x, scheme)
    assert list(qparams.extras) == ["alpha"]
    low, high = ((b - found.zero_point) * found.scale for b in (scheme.qmin, scheme.qmax))
    extremes = x.clamp(float(low.min()), float(high.max()))
    if isinstance(scheme.granularity, sq.PerTensor):
        torch.testing.assert_close(soft.apply(x, qparams, scheme), extremes, rtol=0, atol=2e-6)
        torch.testing.assert_close(hard.apply(x, qparams, scheme), fixed, rtol=1e-6, atol=float(found.scale) * 1e-5)


def test_hard_rounding_goes_where_alpha_points() -> None:
    x = torch.tensor([1.2, 1.2, -1.2, -1.2])
    alpha = torch.tensor([-0.1, 0.0, 3.0, -3.0])
    hard = sq.fake_quantizer("adaround", rounding="hard")
    assert hard.apply(x, scaled(1.0, alpha=alpha), SCHEME).tolist() == [1.0, 2.0, -1.0, -2.0]
    soft = sq.fake_quantizer("adaround").apply(x, scaled(1.0, alpha=alpha), SCHEME)
    torch.testing.assert_close(soft, x.floor() + rectified_sigmoid(alpha))


def test_an_alpha_of_another_shape_is_named() -> None:
    with pytest.raises(sq.StateError, match=r"adaround: alpha of this shape .* got \(4,\), allowed .* \(3,\)"):
        sq.fake_quantizer("adaround").apply(torch.zeros(3), scaled(1.0, alpha=torch.zeros(4)), SCHEME)


# Learned ranges


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [{}, {"symmetric": False}, {"symmetric_range": True}])
def test_the_threshold_is_the_range_and_the_step_the_power_of_two_above(bits: int, kind: dict[str, bool]) -> None:
    scheme, fq = sq.QScheme(bits=bits, **kind), sq.fake_quantizer("tqt")
    for amax in (2.0**-40, 0.3, 0.5, 1.0, 1.001, 4.0, 6.0, 2.0**100):
        x = torch.tensor([0.0, amax])
        qparams = calibrated(fq, x, scheme)
        if amax > 1e-3:  # below, the observer's floor decides
            assert abs(float(qparams.extras["log2_t"]) - math.log2(amax)) < 1e-5
            divisor = 2 ** (bits - int(scheme.symmetric))
            assert qparams.scale == 2.0 ** math.ceil(math.log2(amax)) / divisor
        assert_same(fq.grid(qparams, scheme), qparams)
        error = (fq.apply(x, qparams, scheme) - x).abs().max()
        assert error <= qparams.scale * 1.0001


@over_static_schemes
def test_lsq_plus_with_a_whole_zero_point_is_lsq_in_expression_order(scheme: sq.QScheme) -> None:
    granularity = sq.PerGroup(0, 8) if isinstance(scheme.granularity, sq.PerTensor) else scheme.granularity
    scheme = sq.QScheme(bits=4, symmetric=scheme.symmetric, granularity=granularity)
    x = sample(0)
    plus, lsq = (sq.fake_quantizer(name, use_grad_scaling=False) for name in ("lsq_plus", "learnable"))
    qparams = calibrated(plus, 0.7 * x, scheme)
    assert_same(plus.apply(x, qparams, scheme), lsq.apply(x, qparams, scheme))


def test_lsq_plus_represents_a_range_that_does_not_hold_zero() -> None:
    scheme, x = sq.QScheme(bits=2, symmetric=False), torch.tensor([5.0, 6.0, 7.0, 8.0])
    qparams = sq.QParams(torch.tensor(1.0), torch.tensor(-5.0), {})
    assert sq.fake_quantizer("lsq_plus").apply(x, qparams, scheme).tolist() == x.tolist()


@over_symmetric
def test_factors_of_lsq_plus_are_those_of_lsq(scheme: sq.QScheme) -> None:
    x, found = sample(1), observed(0.7 * sample(0), scheme)
    gradients = []
    for scaling in (True, False):
        fq = sq.fake_quantizer("lsq_plus", use_grad_scaling=scaling)
        gradients.append(
            torch.func.grad(lambda s, fq=fq: fq.apply(x, found._replace(scale=s), scheme).square().sum())(found.scale)
        )
    factor = 1 / math.sqrt(x.numel() / found.scale.numel() * scheme.qmax)
    torch.testing.assert_close(gradients[0], gradients[1] * factor, rtol=1e-5, atol=1e-7)


def test_a_lower_bound_of_nothing_below_zero_is_zero() -> None:
    scheme, fq = sq.QScheme(symmetric=False), sq.fake_quantizer("pact", alpha=2.0)
    positive, both = (calibrated(fq, x, scheme) for x in (torch.rand(9), torch.linspace(-1, 1, 9)))
    assert (positive.extras["n_alpha"], positive.scale) == (0.0, torch.tensor(2.0 / 255))
    assert (both.extras["n_alpha"], both.scale) == (-2.0, torch.tensor(4.0 / 255))
    assert positive.zero_point == 0
    assert list(both.extras) == ["alpha", "n_alpha"]


# Other options


def test_the_quantile_of_a_table_shrinks_its_range() -> None:
    whole, part = (sq.fake_quantizer("fp4", quantile=quantile) for quantile in (1.0, 0.5))
    qparams = [fq.init(scaled(1.0), torch.zeros(1), SCHEME) for fq in (whole, part)]
    assert qparams[1].scale == 0.5 * qparams[0].scale
    assert part.apply(torch.tensor(9.0), qparams[1], SCHEME) == 0.5 * whole.apply(torch.tensor(9.0), qparams[0], SCHEME)


def test_groups_of_zero_or_less_are_the_whole_tensor() -> None:
    x = sample(0)
    expected = sq.fake_quantizer("fpxgroup", group_size=24).apply(x, scaled(1.0), SCHEME)
    for size in (0, -1):
        assert_same(sq.fake_quantizer("fpxgroup", group_size=size).apply(x, scaled(1.0), SCHEME), expected)


def test_dsq_approaches_a_staircase_and_a_line() -> None:
    x = torch.linspace(-3.4, 3.4, 35)
    for alpha, middle, edge in ((0.02, 0.1, 4.0), (0.98, 0.95, 0.95)):
        fq = sq.fake_quantizer("dsq", alpha=alpha)
        slope = torch.func.vmap(torch.func.grad(lambda x, fq=fq: fq.apply(x, scaled(1.0), SCHEME)))
        assert slope(torch.tensor([2.0])) <= max(middle, 1.0)
        assert slope(torch.tensor([2.5])) >= min(edge, 1.0)
        assert_same(fq.apply(x, scaled(1.0), SCHEME), x.round())


def test_the_mean_scaling_of_float8_puts_the_mean_on_the_smallest_subnormal() -> None:
    x = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    for name, smallest in (("e4m3", 2.0**-9), ("e5m2", 2.0**-16)):
        scheme = sq.QScheme(granularity=sq.PerChannel(0))
        found = sq.fake_quantizer(name, scaling="mean").init(observed(x, scheme), x, scheme)
        assert found.scale.tolist() == [2.0 / smallest, 0.5 / smallest]


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("pact", {"alpha": 0}, "pact: alpha must be a positive number: got 0, allowed a number above 0"),
        ("pact", {"alpha": math.inf}, "pact: alpha must be a positive number"),
        ("dsq", {"alpha": 1.0}, "dsq: alpha must lie between 0 and 1: got 1.0, allowed a number between 0 and 1"),
        ("dorefa", {"mapping": "linear"}, "dorefa: this mapping is not known: got 'linear', allowed 'paper' or 'tanh'"),
        ("qdrop", {"prob": 1.5}, r"qdrop: prob must lie in \[0, 1\]: got 1.5, allowed a number from 0 to 1"),
        ("qdrop", {"prob": True}, r"qdrop: prob must lie in \[0, 1\]"),
        ("lsq_plus", {"use_grad_scaling": 1}, "lsq_plus: use_grad_scaling must be a bool"),
        ("fp4", {"quantile": 0.0}, r"fp4: quantile must lie in \(0, 1\]: got 0.0, allowed a number above 0, at most 1"),
        ("fpxgroup", {"quantile": 2}, r"fpxgroup: quantile must lie in \(0, 1\]"),
        ("fpxgroup", {"group_size": 1.5}, "fpxgroup: group_size must be an int: got 1.5, allowed an int"),
        ("fpxgroup", {"double_quant": 1}, "fpxgroup: double_quant must be a bool"),
        ("gptq", {"quantile": "x"}, r"gptq: quantile must lie in \(0, 1\]"),
        ("gptq", {"quantile": math.nan}, r"gptq: quantile must lie in \(0, 1\]"),
        ("gptq", {"quantile": None}, r"gptq: quantile must lie in \(0, 1\]"),
        ("gptq", {"percdamp": math.nan}, "gptq: percdamp must not be negative"),
        ("gptqfp4", {"percdamp": math.inf}, "gptqfp4: percdamp must not be negative"),
        ("mxfp8", {"element": []}, "mxfp8"),
        ("tqt", {"alpha": 1}, "fake quantizer tqt: option 'alpha' is not known"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(sq.ConfigError, match=text):
        sq.fake_quantizer(name, **options)


NEVER_RIGHT = ("x", math.nan, [], {}, 1 + 1j, torch.tensor(1.0))


@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
def test_no_option_takes_what_is_never_right(name: str) -> None:
    for option, value in itertools.product(FAKE_QUANTIZERS.options(name), NEVER_RIGHT):
        with pytest.raises(sq.ConfigError):
            sq.fake_quantizer(name, **{option: value})


# Bounds


@pytest.mark.parametrize("bound", ["qmin", "qmax"])
@pytest.mark.parametrize("name", ["fixed", "learnable", "lsq_plus", "qdrop", "dsq"])
def test_one_bound_without_the_other_is_refused(name: str, bound: str) -> None:
    qparams = scaled(0.1, **{bound: torch.tensor(3.0)})
    with pytest.raises(sq.StateError, match=f"bounds of codes come in pairs: got 'only {bound}'"):
        sq.fake_quantizer(name).apply(sample(0), qparams, SCHEME)


def test_a_grid_without_codes_has_none_to_store() -> None:
    fq = sq.fake_quantizer("fixed")
    assert fq.uncoded(scaled(0.1, qmax=torch.tensor(-4.0), qmin=torch.tensor(4.0)), SCHEME).startswith("its smallest code")
    assert not fq.uncoded(scaled(0.1, qmax=torch.tensor(3.0), qmin=torch.tensor(-4.0)), SCHEME)
