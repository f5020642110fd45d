"""What every registered fake quantizer obeys, and the documented forward and surrogate of each grid of integers.

The laws of all are in ``sq.testing``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from sophq_func.testing import fake_derivatives, fake_values
from sophq_func.testing.fakes import EXCEPT, TANH, VARIANTS, floating, made, objective, put, ready
from tests.contracts import NARROW, SHAPE, assert_same, calibrated, sample
from tests.contracts import over_static_granularities as over_granularities
from tests.contracts import over_static_schemes as over_schemes
from tests.each import each

NAMES = FAKE_QUANTIZERS.names()
ALL = [*NAMES, *VARIANTS]
INTEGER = [name for name in ALL if made(name).integer]


def over_all_but(claim: str, names: list[str]) -> Any:
    return pytest.mark.parametrize("name", [name for name in names if name not in EXCEPT.get(claim, {})])


over_quantizers = pytest.mark.parametrize("name", ALL)
over_integer = pytest.mark.parametrize("name", INTEGER)
over_granularities_of_narrow = each("scheme", NARROW)
over_documented = pytest.mark.parametrize("name", ["fixed", "learnable"])
NO_ZERO = torch.tensor(0, dtype=torch.int32)


@over_quantizers
@over_schemes
def test_inputs_stay_as_they_are(name: str, scheme: sq.QScheme) -> None:
    fake_values.inputs_stay_as_they_are(name, scheme)


@over_quantizers
@over_schemes
def test_learnable_names_are_floating_fields_and_extras_are_sorted(name: str, scheme: sq.QScheme) -> None:
    fake_values.learnable_names_are_floating_fields_and_extras_are_sorted(name, scheme)


@pytest.mark.parametrize("name", [name for name in ALL if made(name).prepare is not None])
@over_schemes
def test_what_is_prepared_is_quantizing_between_a_factor_and_its_inverse(name: str, scheme: sq.QScheme) -> None:
    fake_values.what_is_prepared_is_quantizing_between_a_factor_and_its_inverse(name, scheme)


@over_quantizers
@over_schemes
def test_shape_and_dtype_come_back(name: str, scheme: sq.QScheme) -> None:
    fake_values.shape_and_dtype_come_back(name, scheme)


@over_quantizers
@over_schemes
def test_nothing_is_made_on_another_device(name: str, scheme: sq.QScheme) -> None:
    fake_values.nothing_is_made_on_another_device(name, scheme)


@over_quantizers
@over_schemes
def test_half_types_are_computed_in_float32(name: str, scheme: sq.QScheme) -> None:
    fake_values.half_types_are_computed_in_float32(name, scheme)


@over_all_but("idempotent", ALL)
@over_schemes
def test_quantizing_twice_is_quantizing_once(name: str, scheme: sq.QScheme) -> None:
    fake_values.quantizing_twice_is_quantizing_once(name, scheme)


@over_all_but("monotone", ALL)
@over_schemes
def test_order_is_kept(name: str, scheme: sq.QScheme) -> None:
    fake_values.order_is_kept(name, scheme)


@over_all_but("zero", ALL)
@over_schemes
def test_zero_stays_zero(name: str, scheme: sq.QScheme) -> None:
    fake_values.zero_stays_zero(name, scheme)


@over_all_but("local", ALL)
def test_nan_stays_nan_and_the_rest_is_as_without_it(name: str) -> None:
    fake_values.nan_stays_nan_and_the_rest_is_as_without_it(name)


@over_quantizers
def test_one_nan_or_infinity_makes_no_other(name: str) -> None:
    fake_values.one_nan_or_infinity_makes_no_other(name)


@pytest.mark.slow
@over_quantizers
def test_tiny_and_huge_finite_tensors_have_finite_scales_and_no_nan(name: str) -> None:
    fake_values.tiny_and_huge_finite_tensors_have_finite_scales_and_no_nan(name)


@over_all_but("odd", ALL)
@over_granularities_of_narrow
def test_the_mirror_image_of_a_tensor_becomes_the_mirror_image(name: str, scheme: sq.QScheme) -> None:
    fake_values.the_mirror_image_of_a_tensor_becomes_the_mirror_image(name, scheme)


@pytest.mark.parametrize("name", TANH)
def test_order_is_kept_inside_one_tensor(name: str) -> None:
    fq, qparams = ready(name, sq.QScheme(bits=4))
    y = fq.apply(sample(1).reshape(-1).sort().values, qparams, sq.QScheme(bits=4))
    assert bool((y.diff() >= 0).all())


@over_integer
def test_infinite_and_huge_values_saturate_with_finite_gradients(name: str) -> None:
    fake_values.infinite_and_huge_values_saturate_with_finite_gradients(name)


@over_quantizers
def test_an_empty_tensor_comes_back_empty(name: str) -> None:
    fake_values.an_empty_tensor_comes_back_empty(name)


@over_quantizers
@over_schemes
def test_a_dynamic_scheme_takes_the_range_of_the_tensor_at_hand(name: str, scheme: sq.QScheme) -> None:
    fake_values.a_dynamic_scheme_takes_the_range_of_the_tensor_at_hand(name, scheme)


@over_quantizers
@over_schemes
def test_bounds_as_tensors_equal_those_of_the_scheme(name: str, scheme: sq.QScheme) -> None:
    fake_values.bounds_as_tensors_equal_those_of_the_scheme(name, scheme)


@over_quantizers
@over_granularities
def test_bit_widths_can_be_mapped_over(name: str, scheme: sq.QScheme) -> None:
    fake_values.bit_widths_can_be_mapped_over(name, scheme)


@pytest.mark.parametrize("name", NAMES)
def test_every_alias_leads_to_one_spec(name: str) -> None:
    fake_values.every_alias_leads_to_one_spec(name)


@over_quantizers
@over_schemes
def test_vmap_over_tensors_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    fake_derivatives.vmap_over_tensors_equals_the_loop(name, scheme)


@over_quantizers
@over_schemes
def test_vmap_over_qparams_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    fake_derivatives.vmap_over_qparams_equals_the_loop(name, scheme)


@over_quantizers
@over_schemes
def test_vmap_of_a_gradient_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    fake_derivatives.vmap_of_a_gradient_equals_the_loop(name, scheme)


@over_quantizers
@over_schemes
def test_forward_mode_agrees_with_reverse_mode(name: str, scheme: sq.QScheme) -> None:
    fake_derivatives.forward_mode_agrees_with_reverse_mode(name, scheme)


@over_quantizers
@over_schemes
def test_hessian_vector_products_keep_float32(name: str, scheme: sq.QScheme) -> None:
    fake_derivatives.hessian_vector_products_keep_float32(name, scheme)


@pytest.mark.slow
@over_quantizers
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(1)], ids=str)
def test_compiled_forward_and_gradient_equal_the_eager_ones(name: str, granularity: Any) -> None:
    fake_derivatives.compiled_forward_and_gradient_equal_the_eager_ones(name, granularity)


SCALES: dict[Any, tuple[int, ...]] = {
    sq.PerTensor(): (),
    sq.PerChannel(0): (3,),
    sq.PerChannel(1): (4,),
    sq.PerGroup(0, 4): (3, 2),
    sq.PerBlock(3, 2): (1, 4),
}


def spread(values: Any, granularity: Any) -> Any:
    """A scale-shaped array as one of ``SHAPE``."""
    values = np.asarray(values)
    if isinstance(granularity, sq.PerChannel):
        return np.broadcast_to(values.reshape([-1 if i == granularity.axis else 1 for i in range(3)]), SHAPE)
    if isinstance(granularity, sq.PerGroup):
        return np.repeat(values, granularity.size, axis=1).reshape(SHAPE)
    if isinstance(granularity, sq.PerBlock):
        return np.repeat(np.repeat(values, granularity.rows, axis=0), granularity.columns, axis=1).reshape(SHAPE)
    return np.broadcast_to(values, SHAPE)


def kernel_order(name: str, scheme: sq.QScheme) -> bool:
    return name == "fixed" or isinstance(scheme.granularity, sq.PerTensor)


def code_of(x: Any, s: Any, z: Any, kernel: bool) -> Any:
    return np.rint(x * (1 / s)) + z if kernel else np.rint(x / s + z)


finite = st.floats(-1e4, 1e4, width=32)


@over_all_but("grid", INTEGER)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    values=st.lists(finite, min_size=1, max_size=12),
    bits=st.integers(2, 8),
    kind=st.sampled_from([{}, {"symmetric": False}, {"symmetric_range": True}]),
    scale=st.floats(2**-10, 100, width=32),
    zero=st.integers(0, 255),
)
def test_error_is_at_most_half_a_step_and_values_lie_on_the_grid(
    name: str, values: list[float], bits: int, kind: dict[str, bool], scale: float, zero: int
) -> None:
    scheme, x = sq.QScheme(bits=bits, **kind), torch.tensor(values)
    zero = 0 if scheme.symmetric else min(zero, scheme.qmax)
    fq = made(name)
    qparams = fq.init(sq.QParams(torch.tensor(scale), torch.tensor(zero, dtype=torch.int32), {}), x, scheme)
    y = fq.apply(x, qparams, scheme)
    scale, zero = float(fq.grid(qparams, scheme).scale), int(fq.grid(qparams, scheme).zero_point)
    level = torch.round(y.double() / scale)
    assert torch.equal((level * scale).float(), y)
    assert bool(((level + zero >= scheme.qmin) & (level + zero <= scheme.qmax)).all())
    nearest = x.double().clamp((scheme.qmin - zero) * scale, (scheme.qmax - zero) * scale)
    # 1e-4 of a step: three roundings of codes below 256, 256 * 3 * 2 ** -24 = 5e-5
    assert bool(((y.double() - nearest).abs() <= scale * (0.5 + 1e-4)).all())


@over_documented
@pytest.mark.parametrize("grad_scaling", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
@over_schemes
def test_forward_is_the_documented_formula_ties_included(
    name: str, grad_scaling: bool, bits: int, scheme: sq.QScheme
) -> None:
    if name == "fixed":
        fq, grad_scaling = sq.fake_quantizer(name), False
    else:
        fq = sq.fake_quantizer(name, use_grad_scaling=grad_scaling)
    scheme = replace(scheme, bits=bits)
    kernel = kernel_order(name, scheme)
    for seed in range(8):
        x = sample(seed)
        qparams = calibrated(fq, x, scheme)
        steps = torch.arange(-11.5, 12.5).reshape(SHAPE)
        ties = torch.from_numpy(spread(qparams.scale, scheme.granularity).copy()) * steps
        s, z = spread(qparams.scale, scheme.granularity), spread(qparams.zero_point, scheme.granularity)
        z = z.astype(np.float32)
        if grad_scaling and not kernel:  # there the scale is the sum of its two parts, each rounded to float32
            factor = np.float32(1 / np.sqrt(x.numel() / qparams.scale.numel() * scheme.qmax))
            s = (s - s * factor) + s * factor
        for case in (x, ties):
            code = np.clip(code_of(case.numpy(), s, z, kernel), scheme.qmin, scheme.qmax)
            expected = (code - z) * s
            assert np.array_equal(fq.apply(case, qparams, scheme).numpy(), expected)


def test_the_extreme_of_a_symmetric_range_is_an_exact_tie() -> None:
    x, scheme = torch.tensor([127.5, -127.5, 0.5, 1.5]), sq.QScheme()
    for name in ("fixed", "learnable"):
        fq = sq.fake_quantizer(name)
        qparams = calibrated(fq, x, scheme)
        assert qparams.scale == 1.0
        assert fq.apply(x, qparams, scheme).tolist() == [127.0, -128.0, 0.0, 2.0]


def test_the_two_orders_put_ties_on_different_sides_of_an_odd_zero_point() -> None:
    scheme = sq.QScheme(symmetric=False, granularity=sq.PerChannel(0))
    qparams = sq.QParams(torch.ones(1), torch.ones(1, dtype=torch.int32), {})
    x = torch.tensor([[0.5, 1.5, 2.5]])
    assert sq.fake_quantizer("fixed").apply(x, qparams, scheme).tolist() == [[0.0, 2.0, 2.0]]
    learnable = sq.fake_quantizer("learnable", use_grad_scaling=False)
    assert learnable.apply(x, qparams, scheme).tolist() == [[1.0, 1.0, 3.0]]


class Point(NamedTuple):
    """A place at which the surrogate is frozen, in float64: inputs as flat arrays, and which scale each element has."""

    x: Any
    s: Any
    z: Any
    owner: Any
    inside: Any
    constant: Any
    bound: Any
    shift: Any

    def surrogate(self, x: Any, s: Any, z: Any) -> Any:
        """``y = s * where(inside, x / s + c, bound - z)`` with its constants as they are at this place."""
        s, z = s[self.owner], z[self.owner] + self.shift[self.owner]
        return s * np.where(self.inside, x / s + self.constant, self.bound - z)


def frozen(name: str, scheme: sq.QScheme, seed: int) -> Point:
    rng = np.random.default_rng(seed)
    shape = SCALES[scheme.granularity]
    count = math.prod(shape)
    flat = np.arange(count).reshape(shape)
    owner = spread(flat, scheme.granularity).reshape(-1)
    s, x = rng.uniform(0.1, 0.3, count), rng.normal(0.3, 1.2, owner.size)
    z = np.zeros(count) if scheme.symmetric else rng.uniform(2.6, 9.4, count)
    whole = np.rint(z)
    code = code_of(x, s[owner], whole[owner], kernel_order(name, scheme))
    inside = (code >= scheme.qmin) & (code <= scheme.qmax)
    assert 0 < inside.sum() < inside.size
    constant = code - whole[owner] - x / s[owner]
    return Point(x, s, z, owner, inside, constant, np.clip(code, scheme.qmin, scheme.qmax), whole - z)


def applied(name: str, scheme: sq.QScheme, point: Point) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    fq = sq.fake_quantizer(name, **({"use_grad_scaling": False} if name == "learnable" else {}))
    shape = SCALES[scheme.granularity]

    def f(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        qparams = sq.QParams(s.reshape(shape), z.reshape(shape), {})
        return fq.apply(x.reshape(SHAPE), qparams, scheme).reshape(-1)

    return f


def tensors(point: Point) -> tuple[Tensor, Tensor, Tensor]:
    return torch.from_numpy(point.x), torch.from_numpy(point.s), torch.from_numpy(point.z)


def differences(f: Callable[..., Any], arguments: tuple[Any, ...], step: float) -> list[Any]:
    """Central differences of a vector-valued function: one Jacobian for each argument."""
    found = []
    for k, value in enumerate(arguments):
        columns = []
        for i in range(value.size):
            moved = [[a.copy() for a in arguments] for _ in range(2)]
            moved[0][k][i] += step
            moved[1][k][i] -= step
            columns.append((f(*moved[0]) - f(*moved[1])) / (2 * step))
        found.append(np.stack(columns, -1))
    return found


def learned(name: str, scheme: sq.QScheme) -> tuple[bool, bool]:
    """Whether scale and zero point receive a gradient."""
    return name == "learnable", name == "learnable" and not scheme.symmetric


@over_documented
@over_schemes
def test_gradients_equal_finite_differences_of_the_documented_surrogate(name: str, scheme: sq.QScheme) -> None:
    for seed in range(3):
        point = frozen(name, scheme, seed)
        f = applied(name, scheme, point)
        np.testing.assert_array_equal(f(*tensors(point)).shape, point.x.shape)
        np.testing.assert_allclose(f(*tensors(point)), point.surrogate(*point[:3]), rtol=1e-12, atol=1e-13)
        actual = torch.func.jacrev(f, argnums=(0, 1, 2))(*tensors(point))
        expected = differences(point.surrogate, point[:3], 1e-6)
        for jacobian, slope, flows in zip(actual, expected, (True, *learned(name, scheme)), strict=True):
            # central differences of a smooth function in float64: rounding 1e-16 / 1e-6
            np.testing.assert_allclose(jacobian, slope * flows, rtol=1e-6, atol=1e-8)


@over_documented
@over_schemes
def test_second_derivatives_equal_the_analytic_ones(name: str, scheme: sq.QScheme) -> None:
    point = frozen(name, scheme, 0)
    f, weights = applied(name, scheme, point), np.arange(1.0, point.x.size + 1)

    def loss(*arguments: Tensor) -> Tensor:
        return (torch.from_numpy(weights) * f(*arguments).square()).sum()

    n, count = point.x.size, point.s.size
    scale_flows, zero_flows = learned(name, scheme)
    jacobian, whole = np.zeros((n, n + 2 * count)), point.z + point.shift
    cross = np.zeros((count, count))
    y = point.surrogate(*point[:3])
    for i, (owner, inside) in enumerate(zip(point.owner, point.inside, strict=True)):
        jacobian[i, i] = inside
        jacobian[i, n + owner] = scale_flows * (point.constant[i] if inside else point.bound[i] - whole[owner])
        jacobian[i, n + count + owner] = zero_flows * (0.0 if inside else -point.s[owner])
        cross[owner, owner] += 0.0 if inside else -2 * weights[i] * y[i] * zero_flows
    expected = 2 * jacobian.T @ (weights[:, None] * jacobian)
    expected[n : n + count, n + count :] += cross
    expected[n + count :, n : n + count] += cross
    every = (0, 1, 2)
    forward_over_reverse = torch.func.hessian(loss, argnums=every)
    reverse_over_reverse = torch.func.jacrev(torch.func.grad(loss, argnums=every), argnums=every)
    for blocks in (forward_over_reverse, reverse_over_reverse):
        rows = blocks(*tensors(point))
        actual = np.block([[block.numpy() for block in row] for row in rows])
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@over_schemes
def test_lsq_multiplies_gradients_by_its_factor(scheme: sq.QScheme) -> None:
    x, gradients = sample(1), []
    for scaling in (True, False):
        fq, qparams = ready("learnable", scheme, use_grad_scaling=scaling)
        gradients.append(torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(x, floating(qparams)))
    (scaled_x, scaled), (plain_x, plain) = gradients
    factor = 1 / np.sqrt(x.numel() / plain["scale"].numel() * scheme.qmax)
    assert plain.keys() == ({"scale"} if scheme.symmetric else {"scale", "zero_point"})
    assert plain["scale"].any()
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name] * factor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scaled_x, plain_x, rtol=1e-5, atol=1e-6)


def test_a_learned_scale_works_by_its_size_and_never_below_its_floor() -> None:
    fq, scheme, x = sq.fake_quantizer("learnable", use_grad_scaling=False), sq.QScheme(bits=4), torch.tensor([0.26, 1.4])

    def f(scale: Tensor) -> Tensor:
        return fq.apply(x, sq.QParams(scale, NO_ZERO, {}), scheme).sum()

    gradient = torch.func.grad(f)
    assert f(torch.tensor(-0.1)) == f(torch.tensor(0.1))
    assert gradient(torch.tensor(-0.1)) == -gradient(torch.tensor(0.1))
    assert f(torch.tensor(0.0)) == f(torch.tensor(2.0**-23)) == 14 * 2.0**-23
    assert gradient(torch.tensor(0.0)) == 14.0


@pytest.mark.parametrize(("x", "y", "dx", "ds"), [(0.26, 0.3, 1.0, 0.4), (-1.3, -0.8, 0.0, -8.0), (1.4, 0.7, 0.0, 7.0)])
def test_recorded_anchors_of_lsq(x: float, y: float, dx: float, ds: float) -> None:
    fq, scheme = sq.fake_quantizer("learnable", use_grad_scaling=False), sq.QScheme(bits=4)

    def f(x: Tensor, scale: Tensor) -> Tensor:
        return fq.apply(x, sq.QParams(scale, NO_ZERO, {}), scheme)

    value, pull = torch.func.vjp(f, torch.tensor(x), torch.tensor(0.1))
    assert_same((value, *pull(torch.tensor(1.0))), tuple(map(torch.tensor, (y, dx, ds))), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16", "bf16"])
@over_granularities
def test_gradients_pass_straight_through_formats(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    x = sample(1) * 1e6
    dx, leaves = torch.func.grad(lambda x, v: fq.apply(x, put(qparams, v), scheme).sum(), argnums=(0, 1))(
        x, floating(qparams)
    )
    assert torch.equal(dx, torch.ones(SHAPE))
    assert not any(leaf.any() for leaf in leaves.values())


@pytest.mark.parametrize(("name", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
@over_schemes
def test_the_largest_value_of_a_float8_range_is_the_largest_of_the_format(
    name: str, largest: float, scheme: sq.QScheme
) -> None:
    fq, x = sq.fake_quantizer(name, scaling="max"), sample(1)
    qparams = calibrated(fq, x, scheme)
    steps = torch.from_numpy(spread(qparams.scale, scheme.granularity).copy())
    codes = fq.apply(x, qparams, scheme) / steps
    peak = float(codes.abs().max()) / largest
    if scheme.pot_scale:
        assert torch.equal(qparams.scale.log2(), qparams.scale.log2().round())
    if scheme.pot_scale or not scheme.symmetric:
        assert 0.25 < peak <= 1.0
    else:
        assert abs(peak - 1.0) < 1e-6


def test_without_scaling_a_float8_step_is_one() -> None:
    for name, granularity in itertools.product(("e4m3", "e5m2"), (sq.PerTensor(), sq.PerChannel(0))):
        scheme = sq.QScheme(granularity=granularity)
        assert calibrated(sq.fake_quantizer(name, scaling="none"), sample(0), scheme).scale.unique().tolist() == [1.0]
