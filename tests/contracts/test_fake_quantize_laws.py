"""What every registered fake quantizer obeys, and the documented forward and surrogate of each grid of integers."""

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
from sophq_func.core.pytree import leaves, sorted_dict
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.contracts import (
    GRANULARITIES,
    SHAPE,
    STATIC_SCHEMES,
    assert_same,
    calibrated,
    compiled,
    hold,
    observed,
    pick,
    sample,
    scheme_param,
    stack,
    unchanged,
)
from tests.contracts import over_static_granularities as over_granularities
from tests.contracts import over_static_schemes as over_schemes

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "adaround_hard": ("adaround", {"rounding": "hard"}),
    "dorefa_tanh": ("dorefa", {"mapping": "tanh"}),
    "e5m2_max": ("e5m2", {"scaling": "max"}),
    "fp4_nf4": ("fp4", {"data_type": "nf4"}),
    "fpxgroup_double": ("fpxgroup", {"group_size": 4, "double_quant": True}),
    "gptq_columns": ("gptq", {"group_size": 0}),
    "mxfp6_e2m3": ("mxfp6", {"element": "e2m3"}),
    "mxfp8_e5m2": ("mxfp8", {"element": "e5m2"}),
    "qdrop_half": ("qdrop", {"prob": 0.5}),
}
"""Options that lead to other arithmetic than the defaults."""


def made(name: str, **options: Any) -> sq.FakeQuantize:
    """A fake quantizer or one of ``VARIANTS``."""
    name, more = VARIANTS.get(name, (name, {}))
    return sq.fake_quantizer(name, **more, **options)


NAMES = FAKE_QUANTIZERS.names()
ALL = [*NAMES, *VARIANTS]
INTEGER = [name for name in ALL if made(name).integer]
TANH = dict.fromkeys(("dorefa", "dorefa_tanh"), "maps by tanh and the largest element of the tensor")
LEARNED = dict.fromkeys(("adaround", "adaround_hard"), "rounds as was learned, here for another tensor")
BLOCKS = dict.fromkeys(
    [name for name in ALL if name.startswith(("mx", "nvfp4", "fpxgroup"))], "a scale for each block of the tensor at hand"
)
EXCEPT: dict[str, dict[str, str]] = {
    "idempotent": TANH | LEARNED,
    "monotone": TANH | BLOCKS,
    "zero": {"dorefa": "0 lies between two values of a grid of an even number of values"} | LEARNED,
    "local": TANH | BLOCKS,
    "odd": LEARNED | {"fp4_nf4": "a lopsided table", "nnie": "one value less below 0"},
    "grid": TANH | {"adaround": "soft rounding leaves the grid", "qdrop_half": "lets elements pass"},
}
"""Which quantizers do not claim a property, and why; all others do."""


def over_all_but(claim: str, names: list[str]) -> Any:
    return pytest.mark.parametrize("name", [name for name in names if name not in EXCEPT.get(claim, {})])


over_quantizers = pytest.mark.parametrize("name", ALL)
over_integer = pytest.mark.parametrize("name", INTEGER)
over_granularities_of_narrow = pytest.mark.parametrize("scheme", [scheme_param("narrow", g) for g in GRANULARITIES])
over_documented = pytest.mark.parametrize("name", ["fixed", "learnable"])
NO_ZERO = torch.tensor(0, dtype=torch.int32)


def ready(name: str, scheme: sq.QScheme, seed: int = 0, **options: Any) -> tuple[sq.FakeQuantize, sq.QParams]:
    """A fake quantizer, and qparams that clip a part of ``sample(1)``."""
    fq = made(name, **options)
    qparams = calibrated(fq, sample(seed) * 0.7, scheme)
    noise = {"noise": torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))} if fq.noise else {}
    return fq, with_extras(qparams, **noise)


def with_extras(qparams: sq.QParams, **extras: Tensor) -> sq.QParams:
    return qparams._replace(extras=sorted_dict(qparams.extras | extras))


CONSTANT = ("noise", "qmin", "qmax")
SIZES = {f"values about {size}": size for size in (1e-44, 1e-38, 1e-20, 1e20, 1e38)}


def floating(qparams: sq.QParams) -> dict[str, Tensor]:
    """The leaves that torch can differentiate."""
    named = {"scale": qparams.scale, "zero_point": qparams.zero_point} | qparams.extras
    return {name: leaf for name, leaf in named.items() if leaf.is_floating_point() and name not in CONSTANT}


def put(qparams: sq.QParams, leaves: dict[str, Tensor]) -> sq.QParams:
    """``qparams`` with these leaves, which :func:`floating` named."""
    fields = {name: leaf for name, leaf in leaves.items() if name in ("scale", "zero_point")}
    return with_extras(qparams._replace(**fields), **{k: v for k, v in leaves.items() if k not in fields})


def objective(fq: sq.FakeQuantize, qparams: sq.QParams, scheme: sq.QScheme) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """A scalar of ``x`` and the floating leaves, curved so that no derivative is a constant."""

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        y = fq.apply(x, put(qparams, leaves), scheme)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) / y.numel()).sum()

    return f


def eighths(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


# Laws of all


@over_quantizers
@over_schemes
def test_inputs_stay_as_they_are(name: str, scheme: sq.QScheme) -> None:
    (fq, ready_made), x, found = ready(name, scheme), sample(1), observed(sample(0), scheme)
    with unchanged(x, found):
        fq.init(found, x, scheme)
    qparams = with_extras(ready_made, **fq.init(found, x, scheme).extras)
    with unchanged(x, qparams):
        fq.apply(x, qparams, scheme)
        torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(x, floating(qparams))
    assert found.extras == {}


@over_quantizers
@over_schemes
def test_learnable_names_are_floating_fields_and_extras_are_sorted(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    assert list(qparams.extras) == sorted(qparams.extras)
    for field in (name for name in fq.learnable if not (name == "n_alpha" and scheme.symmetric)):
        if not (field == "zero_point" and scheme.symmetric):
            leaf = getattr(qparams, field) if field in sq.QParams._fields else qparams.extras[field]
            assert leaf.is_floating_point()
    assert qparams.scale.dtype == torch.float32
    assert qparams.scale.shape == qparams.zero_point.shape == observed(sample(0), scheme).scale.shape


@pytest.mark.parametrize("name", [name for name in ALL if made(name).prepare is not None])
@over_schemes
def test_what_is_prepared_is_quantizing_between_a_factor_and_its_inverse(name: str, scheme: sq.QScheme) -> None:
    (fq, qparams), x, factor = ready(name, scheme), sample(1), 2.0 ** torch.arange(-1, SHAPE[0] - 1).reshape(-1, 1, 1)
    factor[0] = 0
    assert fq.prepare is not None

    def folded(x: Tensor, factor: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        divisor = torch.where(factor == 0, 1, factor)
        y = torch.where(factor == 0, x, fq.apply(x * divisor, put(qparams, leaves), scheme) / divisor)
        return (y.square() * eighths(sample(2))).sum()

    def prepared(x: Tensor, factor: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        assert fq.prepare is not None
        return (fq.prepare(x, factor, put(qparams, leaves), scheme)().square() * eighths(sample(2))).sum()

    assert_same(fq.prepare(x, None, qparams, scheme)(), fq.apply(x, qparams, scheme))
    arguments = (x, factor, floating(qparams))
    torch.testing.assert_close(prepared(*arguments), folded(*arguments))
    for found, expected in zip(
        leaves(torch.func.grad(prepared, argnums=(0, 1, 2))(*arguments)),
        leaves(torch.func.grad(folded, argnums=(0, 1, 2))(*arguments)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@over_quantizers
@over_schemes
def test_shape_and_dtype_come_back(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = sample(1, dtype=dtype)
        y = fq.apply(x, qparams, scheme)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.func.grad(objective(fq, qparams, scheme))(x, {}).dtype == dtype


@over_quantizers
@over_schemes
def test_nothing_is_made_on_another_device(name: str, scheme: sq.QScheme) -> None:
    """On ``meta``, which mixes with no other device."""
    x = sample(1).to("meta")
    fq, there = made(name), sq.QParams(*(t.to("meta") for t in observed(sample(0), scheme)[:2]), {})
    qparams = fq.init(there, x, scheme)
    noise = {"noise": x} if fq.noise else {}
    y = fq.apply(x, with_extras(qparams, **noise), scheme)
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert {leaf.device.type for leaf in leaves(fq.grid(qparams, scheme))} == {"meta"}


@over_quantizers
@over_schemes
def test_half_types_are_computed_in_float32(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    for dtype in (torch.float16, torch.bfloat16):
        x = sample(1, dtype=dtype)
        assert_same(fq.apply(x, qparams, scheme), fq.apply(x.float(), qparams, scheme).to(dtype))


@over_all_but("idempotent", ALL)
@over_schemes
def test_quantizing_twice_is_quantizing_once(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        once = fq.apply(sample(1, dtype=dtype), qparams, scheme)
        assert_same(fq.apply(once, qparams, scheme), once)


@over_all_but("monotone", ALL)
@over_schemes
def test_order_is_kept(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    x, more = sample(1), sample(2).abs() * 0.3
    assert bool((fq.apply(x, qparams, scheme) <= fq.apply(x + more, qparams, scheme)).all())


@over_all_but("zero", ALL)
@over_schemes
def test_zero_stays_zero(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    assert not fq.apply(torch.zeros(SHAPE), qparams, scheme).any()


@over_all_but("local", ALL)
def test_nan_stays_nan_and_the_rest_is_as_without_it(name: str) -> None:
    def law(scheme: sq.QScheme) -> None:
        fq, qparams = ready(name, scheme)
        x = sample(1)
        y = fq.apply(x, qparams, scheme)
        spoiled = x.clone()
        spoiled[0, 0, 0], spoiled[1, 1, 1], spoiled[2, 2, 0] = torch.nan, torch.inf, -torch.inf
        z = fq.apply(spoiled, qparams, scheme)
        assert z[0, 0, 0].isnan()
        assert bool((z[spoiled.isinf()] * spoiled[spoiled.isinf()] >= 0).all())
        assert_same(z[spoiled.isfinite()], y[spoiled.isfinite()])

    hold(law, STATIC_SCHEMES)


@over_quantizers
def test_one_nan_or_infinity_makes_no_other(name: str) -> None:
    def law(scheme: sq.QScheme) -> None:
        fq, qparams = ready(name, scheme)
        x = sample(1)
        x[0, 0, 0], x[1, 1, 1], x[2, 2, 0] = torch.nan, torch.inf, -torch.inf
        assert torch.equal(fq.apply(x, qparams, scheme).isnan(), x.isnan())
        assert torch.equal(fq.apply(x, qparams, scheme).isinf() & x.isfinite(), torch.zeros(SHAPE, dtype=torch.bool))

    hold(law, STATIC_SCHEMES)


@pytest.mark.slow
@over_quantizers
def test_tiny_and_huge_finite_tensors_have_finite_scales_and_no_nan(name: str) -> None:
    def law(scheme: sq.QScheme, size: float) -> None:
        fq, ordinary = ready(name, scheme)
        x = sample(1).clamp(-2, 2) * size
        noise = {k: v for k, v in ordinary.extras.items() if k == "noise"}
        own = with_extras(calibrated(fq, x, scheme), **noise)
        for qparams in (ordinary, own):
            assert all(leaf.isfinite().all() for leaf in floating(qparams).values())
            assert bool((qparams.scale > 0).all())
            y = fq.apply(x, qparams, scheme)
            assert not y.isnan().any()
            gradient = torch.func.grad(lambda x, v, q=qparams: fq.apply(x, put(q, v), scheme).sum(), argnums=(0, 1))
            assert not any(leaf.isnan().any() for leaf in leaves(gradient(x, floating(qparams))))

    hold(law, STATIC_SCHEMES, SIZES)


@over_all_but("odd", ALL)
@over_granularities_of_narrow
def test_the_mirror_image_of_a_tensor_becomes_the_mirror_image(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    x = sample(1)
    assert_same(fq.apply(-x, qparams, scheme), -fq.apply(x, qparams, scheme))


@pytest.mark.parametrize("name", TANH)
def test_order_is_kept_inside_one_tensor(name: str) -> None:
    fq, qparams = ready(name, sq.QScheme(bits=4))
    y = fq.apply(sample(1).reshape(-1).sort().values, qparams, sq.QScheme(bits=4))
    assert bool((y.diff() >= 0).all())


@over_integer
def test_infinite_and_huge_values_saturate_with_finite_gradients(name: str) -> None:
    def law(scheme: sq.QScheme, value: float) -> None:
        fq, qparams = ready(name, scheme)
        ordinary, x = sample(1), sample(1)
        ordinary[1, 1, 1] = 1e4
        x[1, 1, 1] = value
        assert_same(fq.apply(x, qparams, scheme), fq.apply(ordinary, qparams, scheme))
        gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
        expected, actual = gradient(ordinary, floating(qparams)), gradient(x, floating(qparams))
        assert_same(actual, expected, rtol=1e-5, atol=1e-6)

    hold(law, STATIC_SCHEMES, {"huge": 3e38, "infinite": torch.inf})


@over_quantizers
def test_an_empty_tensor_comes_back_empty(name: str) -> None:
    scheme = sq.QScheme()
    fq, qparams = ready(name, scheme)
    qparams = with_extras(qparams, **{k: v.new_empty(0, 3) for k, v in qparams.extras.items() if v.shape == SHAPE})
    for dynamic in (False, True):
        assert fq.apply(torch.empty(0, 3), qparams, sq.QScheme(dynamic=dynamic)).shape == (0, 3)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(torch.empty(0, 3), floating(qparams))
    assert gradient[0].shape == (0, 3)
    assert not gradient[1]["scale"].any()


@over_quantizers
@over_schemes
def test_a_dynamic_scheme_takes_the_range_of_the_tensor_at_hand(name: str, scheme: sq.QScheme) -> None:
    fq, elsewhere = ready(name, scheme)
    dynamic = replace(scheme, dynamic=True)
    x = sample(1)
    kept = {name: leaf for name, leaf in elsewhere.extras.items() if name in CONSTANT}
    expected = fq.apply(x, with_extras(calibrated(fq, x, scheme), **kept), scheme)
    assert_same(fq.apply(x, elsewhere, dynamic), expected)
    mapped = torch.vmap(lambda x: fq.apply(x, elsewhere, dynamic))(torch.stack([x, 3 * x]))[0]
    # torch's sigmoid of an element may depend on where it stands
    assert_same(mapped, expected, **({"rtol": 3e-7, "atol": 0.0} if name == "adaround" else {}))


@over_quantizers
@over_schemes
def test_bounds_as_tensors_equal_those_of_the_scheme(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    x = sample(1)
    wide = replace(scheme, bits=8)
    expected = fq.apply(x, qparams, scheme)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(x, floating(qparams))
    for dtype in (torch.int32, torch.float32):
        low, high = (torch.full_like(qparams.scale, b, dtype=dtype) for b in (scheme.qmin, scheme.qmax))
        given = with_extras(qparams, qmax=high, qmin=low)
        # the factor of the gradient is computed from a tensor then, which may move a scale by one unit in the last place
        assert_same(fq.apply(x, given, wide), expected, rtol=3e-7, atol=0.0)
        found = torch.func.grad(objective(fq, given, wide), argnums=(0, 1))(x, floating(qparams))
        assert_same(found, gradient, rtol=1e-5, atol=1e-5)


@over_quantizers
@over_granularities
def test_bit_widths_can_be_mapped_over(name: str, scheme: sq.QScheme) -> None:
    x, fq = sample(1), made(name)
    noise = {"noise": torch.full(SHAPE, 0.7)} if fq.noise else {}
    widths = [replace(scheme, bits=bits) for bits in range(2, 9)]
    tuned = [with_extras(calibrated(fq, x, each), **noise) for each in widths]
    given = [
        with_extras(qp, qmax=torch.full_like(qp.scale, each.qmax), qmin=torch.full_like(qp.scale, each.qmin))
        for qp, each in zip(tuned, widths, strict=True)
    ]
    batch = torch.vmap(lambda qp: fq.apply(x, qp, scheme))(stack(given))
    for y, qp, each in zip(batch, tuned, widths, strict=True):
        assert_same(y, fq.apply(x, qp, each), rtol=3e-7, atol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_alias_leads_to_one_spec(name: str) -> None:
    spec = FAKE_QUANTIZERS.spec(name)
    assert getattr(sq.fake_quantize, name)() == spec
    assert {FAKE_QUANTIZERS.spec(alias) for alias in FAKE_QUANTIZERS.aliases(name)} == {spec}
    for foreign, own in FAKE_QUANTIZERS.get(name).renamed.items():
        assert FAKE_QUANTIZERS.spec(name, **{foreign: dict(spec.options)[own]}) == spec


# Laws of transforms


@over_quantizers
@over_schemes
def test_vmap_over_tensors_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    xs = torch.stack([sample(1), sample(2)])
    batch = torch.vmap(lambda x: fq.apply(x, qparams, scheme))(xs)
    for x, y in zip(xs, batch, strict=True):
        assert_same(y, fq.apply(x, qparams, scheme))


@over_quantizers
@over_schemes
def test_vmap_over_qparams_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    x, (fq, a), (_, b) = sample(1), ready(name, scheme, 0), ready(name, scheme, 2)
    batch = torch.vmap(lambda qp: fq.apply(x, qp, scheme))(stack([a, b]))
    assert_same(batch[0], fq.apply(x, a, scheme))
    assert_same(batch[1], fq.apply(x, b, scheme))
    fresh = torch.vmap(lambda qp: fq.init(qp, x, scheme))(stack([observed(x, scheme), observed(2 * x, scheme)]))
    assert_same(pick(fresh, 1), fq.init(observed(2 * x, scheme), x, scheme))


@over_quantizers
@over_schemes
def test_vmap_of_a_gradient_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    xs = torch.stack([sample(1), sample(2)])
    over_x = torch.vmap(gradient, in_dims=(0, None))(xs, floating(qparams))
    leaves = stack([floating(qparams), floating(ready(name, scheme, 2)[1])])
    over_leaves = torch.vmap(gradient, in_dims=(None, 0))(xs[0], leaves)
    for i in range(2):  # sums may be taken in another order
        assert_same(pick(over_x, i), gradient(xs[i], floating(qparams)), rtol=1e-5, atol=1e-5)
        assert_same(pick(over_leaves, i), gradient(xs[0], pick(leaves, i)), rtol=1e-5, atol=1e-5)


@over_quantizers
@over_schemes
def test_forward_mode_agrees_with_reverse_mode(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    x, leaves = sample(1, dtype=torch.float64), {k: v.double() for k, v in floating(qparams).items()}
    # eighths: casts round derivatives to their format, and these they keep
    direction, cotangent = eighths(sample(2, dtype=torch.float64)), eighths(sample(4, dtype=torch.float64))
    tangents = (direction, {k: eighths(torch.sin(9 * v)) for k, v in leaves.items()})

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        return fq.apply(x, put(qparams, leaves), scheme)

    y, pushed = torch.func.jvp(f, (x, leaves), tangents)
    pulled = torch.func.vjp(f, x, leaves)[1](cotangent)
    assert_same(y, f(x, leaves))
    dot = (pulled[0] * tangents[0]).sum() + sum((pulled[1][k] * tangents[1][k]).sum() for k in leaves)
    torch.testing.assert_close((pushed * cotangent).sum(), dot, rtol=1e-10, atol=1e-10)


@over_quantizers
@over_schemes
def test_hessian_vector_products_keep_float32(name: str, scheme: sq.QScheme) -> None:
    fq, qparams = ready(name, scheme)
    primals = (sample(1), floating(qparams))
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    found, product = torch.func.jvp(gradient, primals, primals)
    for tree in (found, product):
        assert tree[0].dtype == torch.float32
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in (tree[0], *tree[1].values()))


@pytest.mark.slow
@over_quantizers
@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(1)], ids=str)
def test_compiled_forward_and_gradient_equal_the_eager_ones(name: str, granularity: Any) -> None:
    scheme = sq.QScheme(bits=4, symmetric=False, granularity=granularity)
    fq, qparams = ready(name, scheme)
    x, leaves = sample(1), floating(qparams)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))

    def both(x: Tensor, leaves: dict[str, Tensor]) -> Any:
        return fq.apply(x, put(qparams, leaves), scheme), gradient(x, leaves)

    (forward, backward), expected = compiled(both)(x, leaves), both(x, leaves)
    assert_same(forward, expected[0])
    assert_same(backward, expected[1], rtol=1e-5, atol=1e-5)


# Grids of integers: distance, forward and surrogate as documented


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


# Floating-point formats


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
