"""The laws of fake quantizers, and the check that holds one to them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sophq_func import fake_quantize
from sophq_func.core.public import public_as
from sophq_func.core.pytree import leaves, sorted_dict
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize import fake_quantizer
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, FakeQuantize, QParams
from sophq_func.numerics.granularity import PerChannel, PerTensor
from sophq_func.numerics.scheme import QScheme
from sophq_func.testing.laws import Law, check_all, hold, law
from sophq_func.testing.pieces import Piece, named, piece_of
from sophq_func.testing.subjects import (
    KINDS,
    NARROW,
    SHAPE,
    STATIC_AFFINE,
    STATIC_SCHEMES,
    assert_same,
    calibrated,
    compiled,
    observed,
    pick,
    sample,
    scheme_of,
    stack,
    unchanged,
)

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


def made(piece: Piece, **options: Any) -> FakeQuantize:
    """A fake quantizer or one of ``VARIANTS``."""
    name, more = (piece.name, dict(piece.options)) if isinstance(piece, Spec) else VARIANTS.get(piece, (piece, {}))
    return fake_quantizer(name, **(more | options))


TANH = dict.fromkeys(("dorefa", "dorefa_tanh"), "maps by tanh and the largest element of the tensor")
LEARNED = dict.fromkeys(("adaround", "adaround_hard"), "rounds as was learned, here for another tensor")
BLOCKS = dict.fromkeys(
    [name for name in (*FAKE_QUANTIZERS.names(), *VARIANTS) if name.startswith(("mx", "nvfp4", "fpxgroup"))],
    "a scale for each block of the tensor at hand",
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


def ready(piece: Piece, scheme: QScheme, seed: int = 0, **options: Any) -> tuple[FakeQuantize, QParams]:
    """A fake quantizer, and qparams that clip a part of ``sample(1)``."""
    fq = made(piece, **options)
    qparams = calibrated(fq, sample(seed) * 0.7, scheme)
    noise = {"noise": torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))} if fq.noise else {}
    return fq, with_extras(qparams, **noise)


def with_extras(qparams: QParams, **extras: Tensor) -> QParams:
    """``qparams`` with further extras."""
    return qparams._replace(extras=sorted_dict(qparams.extras | extras))


CONSTANT = ("noise", "qmin", "qmax")
"""Extras that no gradient is taken of."""

SIZES = {f"values about {size}": size for size in (1e-44, 1e-38, 1e-20, 1e20, 1e38)}


def floating(qparams: QParams) -> dict[str, Tensor]:
    """The leaves that torch can differentiate."""
    named = {"scale": qparams.scale, "zero_point": qparams.zero_point} | qparams.extras
    return {name: leaf for name, leaf in named.items() if leaf.is_floating_point() and name not in CONSTANT}


def put(qparams: QParams, leaves: dict[str, Tensor]) -> QParams:
    """``qparams`` with these leaves, which :func:`floating` named."""
    extras = {name: leaf for name, leaf in leaves.items() if name not in ("scale", "zero_point")}
    scale, zero_point = leaves.get("scale", qparams.scale), leaves.get("zero_point", qparams.zero_point)
    return with_extras(QParams(scale, zero_point, qparams.extras), **extras)


def objective(fq: FakeQuantize, qparams: QParams, scheme: QScheme) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """A scalar of ``x`` and the floating leaves, curved so that no derivative is a constant."""

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        y = fq.apply(x, put(qparams, leaves), scheme)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) / y.numel()).sum()

    return f


def eighths(x: Tensor) -> Tensor:
    """``x``, rounded to numbers that every format of half precision and FP8 keeps."""
    return (8 * x).round() / 8


def claims(claim: str) -> Callable[[Piece], bool]:
    """Whether a fake quantizer claims a property: all do but those of ``EXCEPT``."""
    return lambda piece: named(piece) not in EXCEPT[claim]


def is_integer(piece: Piece) -> bool:
    """Whether values are integers times a scale."""
    return made(piece).integer


def prepares(piece: Piece) -> bool:
    """Whether a fake quantizer has a ``prepare`` of its own."""
    return made(piece).prepare is not None


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


@law(STATIC_SCHEMES)
def vmap_over_tensors_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` over tensors equals the loop."""
    fq, qparams = ready(piece, scheme)
    xs = torch.stack([sample(1), sample(2)])
    batch = torch.vmap(lambda x: fq.apply(x, qparams, scheme))(xs)
    for x, y in zip(xs, batch, strict=True):
        assert_same(y, fq.apply(x, qparams, scheme))


@law(STATIC_SCHEMES)
def vmap_over_qparams_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` over qparams equals the loop, in ``init``, too."""
    x, (fq, a), (_, b) = sample(1), ready(piece, scheme, 0), ready(piece, scheme, 2)
    batch = torch.vmap(lambda qp: fq.apply(x, qp, scheme))(stack([a, b]))
    assert_same(batch[0], fq.apply(x, a, scheme))
    assert_same(batch[1], fq.apply(x, b, scheme))
    fresh = torch.vmap(lambda qp: fq.init(qp, x, scheme))(stack([observed(x, scheme), observed(2 * x, scheme)]))
    assert_same(pick(fresh, 1), fq.init(observed(2 * x, scheme), x, scheme))


@law(STATIC_SCHEMES)
def vmap_of_a_gradient_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``vmap`` of the gradient equals the loop."""
    fq, qparams = ready(piece, scheme)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    xs = torch.stack([sample(1), sample(2)])
    over_x = torch.vmap(gradient, in_dims=(0, None))(xs, floating(qparams))
    leaves = stack([floating(qparams), floating(ready(piece, scheme, 2)[1])])
    over_leaves = torch.vmap(gradient, in_dims=(None, 0))(xs[0], leaves)
    for i in range(2):  # sums may be taken in another order
        assert_same(pick(over_x, i), gradient(xs[i], floating(qparams)), rtol=1e-5, atol=1e-5)
        assert_same(pick(over_leaves, i), gradient(xs[0], pick(leaves, i)), rtol=1e-5, atol=1e-5)


@law(STATIC_SCHEMES)
def forward_mode_agrees_with_reverse_mode(piece: Piece, scheme: QScheme) -> None:
    """``jvp`` and ``vjp`` are transposes of one another."""
    fq, qparams = ready(piece, scheme)
    x, leaves = sample(1, dtype=torch.float64), {k: v.double() for k, v in floating(qparams).items()}
    # eighths: casts round derivatives to their format, and these they keep
    direction, cotangent = eighths(sample(2, dtype=torch.float64)), eighths(sample(4, dtype=torch.float64))
    tangents = (direction, {k: eighths(torch.sin(9 * v)) for k, v in leaves.items()})

    def f(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        return fq.apply(x, put(qparams, leaves), scheme)

    y, pushed, *_ = torch.func.jvp(f, (x, leaves), tangents)
    pulled = torch.func.vjp(f, x, leaves)[1](cotangent)
    assert_same(y, f(x, leaves))
    dot = (pulled[0] * tangents[0]).sum() + sum((pulled[1][k] * tangents[1][k]).sum() for k in leaves)
    torch.testing.assert_close((pushed * cotangent).sum(), dot, rtol=1e-10, atol=1e-10)


@law(STATIC_SCHEMES)
def hessian_vector_products_keep_float32(piece: Piece, scheme: QScheme) -> None:
    """Products with the Hessian are finite, and float32 for float32."""
    fq, qparams = ready(piece, scheme)
    primals = (sample(1), floating(qparams))
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))
    found, product, *_ = torch.func.jvp(gradient, primals, primals)
    for tree in (found, product):
        assert tree[0].dtype == torch.float32
        assert all(leaf.dtype == torch.float32 and leaf.isfinite().all() for leaf in (tree[0], *tree[1].values()))


def is_rowwise(piece: Piece) -> bool:
    """Whether a fake quantizer claims ``rowwise``."""
    return made(piece).rowwise


def has_many(piece: Piece) -> bool:
    """Whether a fake quantizer has ``many``."""
    return made(piece).many is not None


Rounds = Callable[[list[Tensor], list[QParams]], Tensor]


@law({kind: scheme_of(kind, PerChannel(0)) for kind in KINDS}, only=is_rowwise)
def channels_of_several_weights_may_be_rounded_as_one(piece: Piece, scheme: QScheme) -> None:
    """The channels of two weights may be rounded as the rows of one matrix, with the same gradients."""
    fq = made(piece)

    def as_one(weights: list[Tensor], own: list[QParams]) -> Tensor:
        rows = torch.cat([x.reshape(len(x), -1) for x in weights])
        scale, zero_point = (torch.cat([getattr(one, field) for one in own]) for field in ("scale", "zero_point"))
        return fq.apply(rows, QParams(scale, zero_point, {}), scheme).reshape(2, *SHAPE)

    _agrees_with_apply(piece, scheme, as_one, [sample(1), sample(3)])


@law({kind: scheme_of(kind, PerTensor()) for kind in KINDS}, {"small": 1, "large": 1000}, only=has_many)
def many_tensors_may_be_prepared_together(piece: Piece, scheme: QScheme, copies: int) -> None:
    """``many`` gives for each tensor what ``apply`` gives, with the same gradients."""
    many = made(piece).many
    assert many is not None

    def together(values: list[Tensor], own: list[QParams]) -> Tensor:
        scales, zero_points = (torch.stack([getattr(one, field) for one in own]) for field in ("scale", "zero_point"))
        functions = many(QParams(scales, zero_points, {}), scheme)
        return torch.stack([function(x) for function, x in zip(functions, values, strict=True)])

    _agrees_with_apply(piece, scheme, together, [sample(1).repeat(copies, 1, 1), sample(3).repeat(copies, 1, 1)])


def _agrees_with_apply(piece: Piece, scheme: QScheme, f: Rounds, tensors: list[Tensor]) -> None:
    """A function that rounds two tensors gives what ``apply`` gives for each, and the gradients."""
    fq, first = ready(piece, scheme)
    own = [first, ready(piece, scheme, seed=2)[1]]

    def alone(tensors: list[Tensor], own: list[QParams]) -> Tensor:
        return torch.stack([fq.apply(x, one, scheme) for x, one in zip(tensors, own, strict=True)])

    def loss(rounds: Rounds) -> Callable[..., Tensor]:
        return lambda tensors, leaves: rounds(tensors, [put(*pair) for pair in zip(own, leaves, strict=True)]).square().sum()

    assert_same(f(tensors, own), alone(tensors, own))
    given = (tensors, [floating(one) for one in own])
    (to_x, to_leaves), (x_alone, leaves_alone) = (torch.func.grad(loss(g), (0, 1))(*given) for g in (f, alone))
    assert_same(to_x, x_alone)
    # the same terms in another order: their sum differs by their count times eps times the sum of their sizes
    bound = tensors[0].numel() * torch.finfo(torch.float32).eps
    for leaf, expected in zip(leaves(to_leaves), leaves(leaves_alone), strict=True):
        torch.testing.assert_close(leaf, expected, rtol=bound, atol=bound * float(expected.abs().max() + 1))


@law({str(item): item for item in (PerTensor(), PerChannel(1))}, slow=True)
def compiled_forward_and_gradient_equal_the_eager_ones(piece: Piece, granularity: Any) -> None:
    """``apply`` and its gradient compile as one graph and compute the same."""
    scheme = QScheme(bits=4, symmetric=False, granularity=granularity)
    fq, qparams = ready(piece, scheme)
    x, leaves = sample(1), floating(qparams)
    gradient = torch.func.grad(objective(fq, qparams, scheme), argnums=(0, 1))

    def both(x: Tensor, leaves: dict[str, Tensor]) -> Any:
        return fq.apply(x, put(qparams, leaves), scheme), gradient(x, leaves)

    (forward, backward), expected = compiled(both)(x, leaves), both(x, leaves)
    assert_same(forward, expected[0])
    assert_same(backward, expected[1], rtol=1e-5, atol=1e-5)


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))
"""All of them, in the order in which they are tried."""


@public_as("testing.check_fake_quantizer")
def check_fake_quantizer(
    name: str | Spec | Callable[[], Spec], *, without: Collection[str] = (), slow: bool = False
) -> None:
    """Hold a registered fake quantizer to the laws that the library's own obey.

    Args:
      name: of the fake quantizer; or the function that :func:`sophq_func.register.fake_quantizer` made, or what it returns,
        with options.
      without: names of laws that it does not claim, which its docstring should say, too: one with a scale for each block
        breaks ``order_is_kept``.
      slow: try the laws about compiling and about tiny and huge values, too, which takes a minute.

    Raises:
      ConfigError: an unknown fake quantizer or law, or a fake quantizer that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_fake_quantizer("fixed")
      >>> sq.testing.check_fake_quantizer(sq.fake_quantize.pact(alpha=3.0))
    """
    piece = piece_of(FAKE_QUANTIZERS, name, "testing.check_fake_quantizer")
    check_all("fake quantizer", _variant(piece), LAWS, without, slow)


def _variant(piece: Piece) -> Piece:
    """The name in ``VARIANTS`` of a piece with these options, as ``EXCEPT`` knows it; else the piece."""
    known = {FAKE_QUANTIZERS.spec(name, **options): variant for variant, (name, options) in VARIANTS.items()}
    return known.get(piece, piece) if isinstance(piece, Spec) else piece
