"""The laws of what fake quantizers return."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sophq_func import fake_quantize
from sophq_func.core.pytree import leaves
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, QParams
from sophq_func.numerics.scheme import QScheme
from sophq_func.testing.fakes import (
    CONSTANT,
    SIZES,
    VARIANTS,
    claims,
    eighths,
    floating,
    is_integer,
    made,
    objective,
    prepares,
    put,
    ready,
    with_extras,
)
from sophq_func.testing.laws import Law, hold, law
from sophq_func.testing.pieces import Piece, named
from sophq_func.testing.subjects import (
    NARROW,
    SHAPE,
    STATIC_AFFINE,
    STATIC_SCHEMES,
    assert_same,
    calibrated,
    observed,
    sample,
    stack,
    unchanged,
)


@law(STATIC_SCHEMES)
def inputs_stay_as_they_are(piece: Piece, scheme: QScheme) -> None:
    """``init``, ``apply`` and its gradient write to nothing that they are given."""
    (fq, ready_made), x, found = ready(piece, scheme), sample(1), observed(sample(0), scheme)
    with unchanged(x, found):
        fq.init(found, x, scheme)
    qparams = with_extras(ready_made, **fq.init(found, x, scheme).extras)
    with unchanged(x, qparams):
        fq.apply(x, qparams, scheme)
        torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(x, floating(qparams))
    assert found.extras == {}


@law(STATIC_SCHEMES)
def learnable_names_are_floating_fields_and_extras_are_sorted(piece: Piece, scheme: QScheme) -> None:
    """What is learnable is a floating field or extra; extras are sorted; scale and zero point keep their shape."""
    fq, qparams = ready(piece, scheme)
    assert list(qparams.extras) == sorted(qparams.extras)
    for field in (name for name in fq.learnable if not (name == "n_alpha" and scheme.symmetric)):
        if not (field == "zero_point" and scheme.symmetric):
            leaf = getattr(qparams, field) if field in QParams._fields else qparams.extras[field]
            assert leaf.is_floating_point()
    assert qparams.scale.dtype == torch.float32
    assert qparams.scale.shape == qparams.zero_point.shape == observed(sample(0), scheme).scale.shape


@law(STATIC_SCHEMES, only=prepares)
def what_is_prepared_is_quantizing_between_a_factor_and_its_inverse(piece: Piece, scheme: QScheme) -> None:
    """``prepare`` computes ``apply(x * factor) / factor``, gradients included."""
    (fq, qparams), x, factor = ready(piece, scheme), sample(1), 2.0 ** torch.arange(-1, SHAPE[0] - 1).reshape(-1, 1, 1)
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


@law(STATIC_SCHEMES)
def shape_and_dtype_come_back(piece: Piece, scheme: QScheme) -> None:
    """``apply`` and its gradient have the shape and the dtype of ``x``."""
    fq, qparams = ready(piece, scheme)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = sample(1, dtype=dtype)
        y = fq.apply(x, qparams, scheme)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.func.grad(objective(fq, qparams, scheme))(x, {}).dtype == dtype


@law(STATIC_SCHEMES)
def nothing_is_made_on_another_device(piece: Piece, scheme: QScheme) -> None:
    """All tensors that are made lie on the device of ``x``: tried on ``meta``, which mixes with no other."""
    x = sample(1).to("meta")
    fq, here = made(piece), observed(sample(0), scheme)
    there = QParams(here.scale.to("meta"), here.zero_point.to("meta"), {})
    qparams = fq.init(there, x, scheme)
    noise = {"noise": x} if fq.noise else {}
    y = fq.apply(x, with_extras(qparams, **noise), scheme)
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert {leaf.device.type for leaf in leaves(fq.grid(qparams, scheme))} == {"meta"}


@law(STATIC_SCHEMES)
def half_types_are_computed_in_float32(piece: Piece, scheme: QScheme) -> None:
    """float16 and bfloat16 are quantized as float32, and cast back."""
    fq, qparams = ready(piece, scheme)
    for dtype in (torch.float16, torch.bfloat16):
        x = sample(1, dtype=dtype)
        assert_same(fq.apply(x, qparams, scheme), fq.apply(x.float(), qparams, scheme).to(dtype))


@law(STATIC_SCHEMES, only=claims("idempotent"))
def quantizing_twice_is_quantizing_once(piece: Piece, scheme: QScheme) -> None:
    """A quantized value is quantized to itself."""
    fq, qparams = ready(piece, scheme)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        once = fq.apply(sample(1, dtype=dtype), qparams, scheme)
        assert_same(fq.apply(once, qparams, scheme), once)


@law(STATIC_SCHEMES, only=claims("monotone"))
def order_is_kept(piece: Piece, scheme: QScheme) -> None:
    """A larger value never becomes the smaller one."""
    fq, qparams = ready(piece, scheme)
    x, more = sample(1), sample(2).abs() * 0.3
    assert bool((fq.apply(x, qparams, scheme) <= fq.apply(x + more, qparams, scheme)).all())


@law(STATIC_SCHEMES, only=claims("zero"))
def zero_stays_zero(piece: Piece, scheme: QScheme) -> None:
    """0 is quantized to 0."""
    fq, qparams = ready(piece, scheme)
    assert not fq.apply(torch.zeros(SHAPE), qparams, scheme).any()


@law(only=claims("local"))
def nan_stays_nan_and_the_rest_is_as_without_it(piece: Piece) -> None:
    """NaN stays NaN, infinities keep their sign, and the other elements are as without them."""

    def law(scheme: QScheme) -> None:
        fq, qparams = ready(piece, scheme)
        x = sample(1)
        y = fq.apply(x, qparams, scheme)
        spoiled = x.clone()
        spoiled[0, 0, 0], spoiled[1, 1, 1], spoiled[2, 2, 0] = torch.nan, torch.inf, -torch.inf
        z = fq.apply(spoiled, qparams, scheme)
        assert z[0, 0, 0].isnan()
        assert bool((z[spoiled.isinf()] * spoiled[spoiled.isinf()] >= 0).all())
        assert_same(z[spoiled.isfinite()], y[spoiled.isfinite()])

    hold(law, STATIC_SCHEMES)


@law()
def one_nan_or_infinity_makes_no_other(piece: Piece) -> None:
    """No element becomes NaN or infinite because of another."""

    def law(scheme: QScheme) -> None:
        fq, qparams = ready(piece, scheme)
        x = sample(1)
        x[0, 0, 0], x[1, 1, 1], x[2, 2, 0] = torch.nan, torch.inf, -torch.inf
        assert torch.equal(fq.apply(x, qparams, scheme).isnan(), x.isnan())
        assert torch.equal(fq.apply(x, qparams, scheme).isinf() & x.isfinite(), torch.zeros(SHAPE, dtype=torch.bool))

    hold(law, STATIC_SCHEMES)


@law(slow=True)
def tiny_and_huge_finite_tensors_have_finite_scales_and_no_nan(piece: Piece) -> None:
    """Values from 1e-44 to 1e38 give finite scales above 0, and neither NaN nor NaN gradients."""

    def law(scheme: QScheme, size: float) -> None:
        fq, ordinary = ready(piece, scheme)
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


@law(NARROW, only=claims("odd"))
def the_mirror_image_of_a_tensor_becomes_the_mirror_image(piece: Piece, scheme: QScheme) -> None:
    """On a grid that is symmetric about 0, ``-x`` becomes minus what ``x`` becomes."""
    fq, qparams = ready(piece, scheme)
    x = sample(1)
    assert_same(fq.apply(-x, qparams, scheme), -fq.apply(x, qparams, scheme))


@law(only=is_integer)
def infinite_and_huge_values_saturate_with_finite_gradients(piece: Piece) -> None:
    """On a grid of integers, infinities are quantized like large numbers, gradients included."""

    def law(scheme: QScheme, value: float) -> None:
        fq, qparams = ready(piece, scheme)
        ordinary, x = sample(1), sample(1)
        ordinary[1, 1, 1] = 1e4
        x[1, 1, 1] = value
        assert_same(fq.apply(x, qparams, scheme), fq.apply(ordinary, qparams, scheme))
        gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
        expected, actual = gradient(ordinary, floating(qparams)), gradient(x, floating(qparams))
        assert_same(actual, expected, rtol=1e-5, atol=1e-6)

    hold(law, STATIC_SCHEMES, {"huge": 3e38, "infinite": torch.inf})


@law()
def an_empty_tensor_comes_back_empty(piece: Piece) -> None:
    """A tensor without elements is quantized to one, also by a dynamic scheme, with a gradient."""
    scheme = QScheme()
    fq, qparams = ready(piece, scheme)
    qparams = with_extras(qparams, **{k: v.new_empty(0, 3) for k, v in qparams.extras.items() if v.shape == SHAPE})
    for dynamic in (False, True):
        assert fq.apply(torch.empty(0, 3), qparams, QScheme(dynamic=dynamic)).shape == (0, 3)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))(torch.empty(0, 3), floating(qparams))
    assert gradient[0].shape == (0, 3)
    assert not gradient[1]["scale"].any()


@law(STATIC_SCHEMES)
def a_dynamic_scheme_takes_the_range_of_the_tensor_at_hand(piece: Piece, scheme: QScheme) -> None:
    """With a dynamic scheme, the result is that of qparams of the tensor itself, under ``vmap``, too."""
    fq, elsewhere = ready(piece, scheme)
    dynamic = replace(scheme, dynamic=True)
    x = sample(1)
    kept = {name: leaf for name, leaf in elsewhere.extras.items() if name in CONSTANT}
    expected = fq.apply(x, with_extras(calibrated(fq, x, scheme), **kept), scheme)
    assert_same(fq.apply(x, elsewhere, dynamic), expected)
    mapped = torch.vmap(lambda x: fq.apply(x, elsewhere, dynamic))(torch.stack([x, 3 * x]))[0]
    # torch's sigmoid of an element may depend on where it stands
    assert_same(mapped, expected, **({"rtol": 3e-7, "atol": 0.0} if named(piece) == "adaround" else {}))


@law(STATIC_SCHEMES)
def bounds_as_tensors_equal_those_of_the_scheme(piece: Piece, scheme: QScheme) -> None:
    """``extras['qmin']`` and ``extras['qmax']`` replace the bounds of the scheme."""
    fq, qparams = ready(piece, scheme)
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


@law(STATIC_AFFINE)
def bit_widths_can_be_mapped_over(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` over bounds equals the loop over bit widths."""
    x, fq = sample(1), made(piece)
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


@law()
def every_alias_leads_to_one_spec(piece: Piece) -> None:
    """Every alias, the function of the name, and every other name of an option give one spec."""
    name, _ = VARIANTS.get(named(piece), (named(piece), {}))
    spec = FAKE_QUANTIZERS.spec(name)
    assert getattr(fake_quantize, name)() == spec
    assert {FAKE_QUANTIZERS.spec(alias) for alias in FAKE_QUANTIZERS.aliases(name)} == {spec}
    for foreign, own in FAKE_QUANTIZERS.get(name).renamed.items():
        assert FAKE_QUANTIZERS.spec(name, **{foreign: dict(spec.options)[own]}) == spec


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))
"""In the order in which they are tried."""
