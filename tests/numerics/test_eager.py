"""The function for large tensors computes what the composition does: every derivative, under every transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sophq_func as sq
from sophq_func.core.registry import Spec
from sophq_func.numerics import eager, eager_forward, eager_gradients
from sophq_func.numerics.affine import fake_quantize
from tests.contracts import over_static_schemes, sample

ORDERS = ("kernel", "expression", "quotient")
over_orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def point(scheme: sq.QScheme, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A tensor that goes beyond the grid on both sides, scales, and zero points."""
    x = 3 * sample(seed, dtype=dtype)
    observer = sq.observer("minmax")
    qparams = observer.qparams(observer.update(observer.init(x, scheme), x / 2, scheme), scheme)
    return x, qparams.scale.to(dtype), qparams.zero_point.to(dtype)


def applied(scheme: sq.QScheme, order: Any) -> Callable[..., Tensor]:
    def f(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return fake_quantize(x, sq.QParams(scale, zero, {}), scheme, order)

    return f


def both(monkeypatch: pytest.MonkeyPatch, compute: Callable[[], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the function gives, in blocks that leave a rest, and what the composition does."""
    monkeypatch.setattr(eager_forward, "BLOCK", 10)
    monkeypatch.setattr(eager_gradients, "BACKWARD_BLOCK", 10)
    found = []
    for size in (0, 2**60):
        monkeypatch.setattr(eager, "LARGE", size)
        monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", size)
        monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", size)
        found.append(torch.utils._pytree.tree_leaves(compute()))
    return found[0], found[1]


def like(seed: int, x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def transforms(f: Callable[..., Tensor], args: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """Each transform of a weighted sum of the output, or of the output."""
    weight = like(5, args[0])
    every = tuple(range(len(args)))
    tangents = tuple(like(7 + i, a) for i, a in enumerate(args))

    def loss(*inputs: Tensor) -> Tensor:
        return (f(*inputs) * weight).square().sum()

    gradient = torch.func.grad(loss, argnums=every)

    def steepness(*inputs: Tensor) -> Any:
        return sum(g.square().sum() for g in gradient(*inputs))

    batched = tuple(torch.stack([a, 1.25 * a]) for a in args)
    scales = (args[0], *(torch.stack([a, a]) for a in args[1:]))
    dims = (None, *(0,) * (len(args) - 1))
    return {
        "forward": lambda: f(*args),
        "grad": lambda: gradient(*args),
        "jvp": lambda: torch.func.jvp(f, args, tangents),
        "jacrev": lambda: torch.func.jacrev(f, argnums=every)(*args),
        "jacfwd": lambda: torch.func.jacfwd(f, argnums=every)(*args),
        "vmap x": lambda: torch.func.vmap(lambda x: f(x, *args[1:]))(batched[0]),
        "vmap qparams": lambda: torch.func.vmap(f, in_dims=dims)(*scales),
        "vmap grad": lambda: torch.func.vmap(gradient)(*batched),
        "grad of grad": lambda: torch.func.grad(steepness, argnums=every)(*args),
        "hvp": lambda: torch.func.jvp(gradient, args, tangents),
        "vmap hvp": lambda: torch.func.vmap(lambda *t: torch.func.jvp(gradient, args, t))(
            *(torch.stack([t, -2 * t]) for t in tangents)
        ),
    }


NAMES = tuple(transforms(lambda x: x, (torch.ones(2),)))


@pytest.mark.parametrize("name", ["forward", "grad", "jacrev", "grad of grad", "hvp"])
def test_one_row_with_a_scale_for_each_group_of_it_equals_the_composition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = sq.QScheme(bits=4, granularity=sq.PerGroup(axis=0, size=5))
    x = 3 * torch.randn(1, 35, generator=torch.Generator().manual_seed(0))
    args = x, 0.2 + torch.rand(1, 7, generator=torch.Generator().manual_seed(1))
    blank = torch.zeros(1, 7, dtype=torch.int32)

    def f(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, sq.QParams(scale, blank, {}), scheme, "expression")

    found, expected = both(monkeypatch, lambda: transforms(f, args)[name]())
    torch.testing.assert_close(found, expected)


@over_static_schemes
@over_orders
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead"])
@pytest.mark.parametrize(
    "name", ["forward", "grad", "jvp", "jacrev", "vmap x", "vmap qparams", "vmap grad", "grad of grad", "hvp", "vmap hvp"]
)
def test_a_factor_folded_in_equals_the_composition(
    name: str, dead: bool, order: Any, scheme: sq.QScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = point(scheme, dtype)[: 2 if scheme.symmetric else 3]
    factor = 0.6 + 0.2 * torch.arange(args[0].shape[0], dtype=dtype).reshape(-1, *[1] * (args[0].ndim - 1))
    factor[1] = 0 if dead else -1.5
    blank = torch.zeros_like(args[1], dtype=torch.int32)

    def f(x: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        zero, factor = rest if len(rest) == 2 else (blank, *rest)
        return fake_quantize(x, sq.QParams(scale, zero, {}), scheme, order, factor=factor)

    compute = transforms(f, (*args, factor))[name]
    actual, expected = both(monkeypatch, compute)
    assert len(actual) == len(expected) > 0
    exact = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) if name == "forward" else True
        torch.testing.assert_close(a, e, **exact)


@over_static_schemes
@over_orders
@pytest.mark.parametrize("bits", [2, 3, 3.4])
def test_bounds_may_be_data(order: Any, bits: float, scheme: sq.QScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale, zero = point(scheme, torch.float32)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if scheme.symmetric else (0.0, 2**bits - 1)
    bounds = {"qmin": torch.tensor(low), "qmax": torch.tensor(high)}

    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, sq.QParams(scale, zero, bounds), scheme, order).square().sum()

    actual, expected = both(
        monkeypatch,
        lambda: [
            fake_quantize(x, sq.QParams(scale, zero, bounds), scheme, order),
            torch.func.grad(loss, argnums=(0, 1))(x, scale),
        ],
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_bounds_that_are_learned_take_the_composition_and_mapped_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    x, scale, bound = sample(0), torch.tensor(0.3), torch.tensor(7.0)
    assert eager.fits(x, scale, -bound, bound)
    assert not eager.fits(x, scale, -8, bound)
    assert not eager.fits(x, scale, -bound, bound.clone().requires_grad_())
    assert not eager.fits(x, scale, -bound.expand(3), bound.expand(3))
    seen = []
    torch.func.vmap(lambda b: seen.append(eager.fits(x, scale, -b, b)) or b)(torch.ones(2))
    assert seen == [True]


def bounds_seen(bound: Tensor, transform: Callable[..., Any]) -> list[bool]:
    """Whether each call of a transformed function finds bounds that are constants."""
    x, scale, seen = sample(0), torch.tensor(0.3), []

    def f(b: Tensor) -> Tensor:
        seen.append(eager.fits(x, scale, -b, b))
        return b.square().sum()

    transform(f)(bound)
    return seen


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        lambda f: lambda b: torch.func.jvp(f, (b,), (b,)),
        lambda f: torch.func.vmap(torch.func.grad(f)),
        lambda f: torch.func.grad(lambda b: torch.func.vmap(f)(b).sum()),
        lambda f: lambda b: torch.func.jvp(torch.func.vmap(f), (b,), (b,)),
    ],
    ids=["grad", "jvp", "vmap of grad", "grad of vmap", "jvp of vmap"],
)
def test_a_derivative_of_a_bound_at_any_level_is_seen(
    transform: Callable[..., Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    is_mapped = "vmap" in request.node.callspec.id
    bound = torch.tensor([7.0, 3.0]) if is_mapped else torch.tensor(7.0)
    assert bounds_seen(bound, transform) == [False]


def test_a_mapped_bound_may_have_been_made_inside_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bit widths are: the gradient's level wraps what is computed in it, whether it differentiates it or not."""
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    x, scale, seen = sample(0), torch.tensor(0.3), []

    def loss(x: Tensor, bits: Tensor) -> Tensor:
        high = torch.exp2(bits - 1)
        seen.append(eager.fits(x, scale, -high, high))
        return x.square().sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, torch.tensor([2.0, 4.0]))
    assert seen == [True]


@over_static_schemes
@over_orders
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_composition(
    name: str, order: str, scheme: sq.QScheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = point(scheme, dtype)[: 2 if scheme.symmetric else 3]
    blank = torch.zeros_like(args[1], dtype=torch.int32)
    f = applied(scheme, order)
    compute = transforms((lambda x, s: f(x, s, blank)) if scheme.symmetric else f, args)[name]
    actual, expected = both(monkeypatch, compute)
    assert len(actual) == len(expected) > 0
    exact = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **exact)


@over_orders
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("zero", [0, 1, 2, 7])
def test_exact_ties_at_the_bounds_are_on_the_same_side(
    zero: int, symmetric: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = sq.QScheme(bits=3, symmetric=symmetric)
    halves = torch.arange(-24, 24, dtype=torch.float32) / 2
    x = torch.cat([halves, torch.nextafter(halves, halves + 1), torch.nextafter(halves, halves - 1)]) * 0.25
    scale, zeros = torch.tensor(0.25), torch.tensor(float(zero))
    f = applied(scheme, order)
    actual, expected = both(
        monkeypatch, lambda: [f(x, scale, zeros), torch.func.grad(lambda x: f(x, scale, zeros).sum())(x)]
    )
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from(ORDERS))
def test_calibrated_extremes_keep_their_gradient(seed: int, bits: int, symmetric: bool, order: str) -> None:
    scheme = sq.QScheme(bits=bits, symmetric=symmetric, granularity=sq.PerChannel(0))
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
    observer = sq.observer("minmax")
    qparams = observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme)
    f, zero = applied(scheme, order), qparams.zero_point.float()
    slope = torch.func.grad(lambda x, s: f(x, s, zero).square().sum(), argnums=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        actual, expected = both(patch, lambda: slope(x, qparams.scale))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-2)  # an extreme on the wrong side changes a sum by 10 and more


SPECS = [sq.fake_quantize.fixed(), sq.fake_quantize.learnable(), sq.fake_quantize.qdrop(), sq.fake_quantize.tqt()]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32])
def test_quantizers_that_use_it_keep_the_dtype(spec: Spec, half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fq, scheme = sq.fake_quantizer(spec.name, **dict(spec.options)), sq.QScheme(bits=4)
    x = sample(3).to(half)
    qparams = fq.init(sq.QParams(torch.tensor(0.3), torch.tensor(0, dtype=torch.int32), {}), x, scheme)
    actual, expected = both(monkeypatch, lambda: fq.apply(x, qparams, scheme))
    assert actual[0].dtype == half
    assert torch.equal(actual[0], expected[0])


def test_what_is_not_finite_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    f, scale, zero = applied(sq.QScheme(bits=4), "kernel"), torch.tensor(0.5), torch.tensor(0.0)
    actual, expected = both(
        monkeypatch, lambda: [f(x, scale, zero), torch.func.grad(lambda x: f(x, scale, zero)[1:].sum())(x)]
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["forward", "grad"])
def test_compiled_it_gives_way_to_the_composition(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    f, scale, zero = applied(sq.QScheme(bits=4), "kernel"), torch.tensor(0.3), torch.tensor(0.0)
    call = {"forward": lambda x: f(x, scale, zero), "grad": torch.func.grad(lambda x: f(x, scale, zero).square().sum())}[of]
    x = sample(0)
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


def test_nothing_that_goes_in_is_changed_and_small_tensors_take_the_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = sample(0), torch.tensor(0.3)
    assert not eager.fits(x, scale, -8, 7)
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    assert eager.fits(x, scale, -8, 7)
    assert not eager.fits(x, scale.double(), -8, 7)
    before = (x.clone(), x._version, scale._version)
    applied(sq.QScheme(bits=4), "kernel")(x, scale, torch.tensor(0.0))
    assert torch.equal(x, before[0])
    assert (x._version, scale._version) == before[1:]


def test_a_model_may_write_into_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale, zero = sample(0), torch.tensor(0.3), torch.tensor(0.0)
    f = applied(sq.QScheme(bits=4), "kernel")

    def compute() -> Any:
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = f(*leaves, zero)
        out += 1
        return torch.autograd.grad(out.square().sum(), leaves)

    actual, expected = both(monkeypatch, compute)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
