"""Large tensors under ``vmap``: the bits of a loop, in the memory of a loop, under every other transform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sophq_func as sq
from sophq_func.core.pytree import sorted_dict
from sophq_func.numerics import eager, eager_forward, eager_gradients
from sophq_func.numerics.affine import fake_quantize
from tests.contracts import STATIC_SCHEMES, sample
from tests.each import each

MEMBERS = 3
ORDERS = ("kernel", "expression", "quotient")
over_orders = pytest.mark.parametrize("order", ORDERS)

Args = dict[str, Tensor]
"""What may be mapped over, by name: ``x``, ``scale``, ``zero``, ``low``, ``high``, ``factor``."""

MAPPED = {
    "weights": ("x",),
    "scales": ("scale",),
    "weights and scales": ("x", "scale", "zero"),
    "bounds": ("low", "high"),
    "scales and bounds": ("scale", "low", "high"),
    "factors": ("factor",),
    "everything": ("x", "scale", "zero", "low", "high", "factor"),
}
over_mapped = pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)


SOME = {
    name: scheme
    for name, scheme in STATIC_SCHEMES.items()
    if scheme.symmetric is isinstance(scheme.granularity, sq.PerTensor | sq.PerGroup)
}
"""Each granularity, and affine grids for half of them."""

over_some_schemes = each("scheme", SOME)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that leave a rest, and no tensor too small."""
    monkeypatch.setattr(eager, "LARGE", 0)
    monkeypatch.setattr(eager, "LARGE_IN_TRANSFORMS", 0)
    monkeypatch.setattr(eager, "LARGE_IN_FORWARD_MODE", 0)
    monkeypatch.setattr(eager_forward, "BLOCK", 10)
    monkeypatch.setattr(eager_gradients, "BACKWARD_BLOCK", 10)


def arguments(scheme: sq.QScheme, has_factor: bool = True) -> Args:
    """A tensor that goes beyond the grid on both sides, and its grid, bounds and factor as tensors."""
    x = 3 * sample(0)
    observer = sq.observer("minmax")
    qparams = observer.qparams(observer.update(observer.init(x, scheme), x / 2, scheme), scheme)
    low, high = (-8.0, 7.0) if scheme.symmetric else (0.0, 15.0)
    args = {"x": x, "scale": qparams.scale, "zero": qparams.zero_point.float()}
    args |= {"low": torch.tensor(low), "high": torch.tensor(high)}
    if has_factor:
        factor = 0.6 + 0.2 * torch.arange(x.shape[0], dtype=x.dtype)
        factor[1] = 0  # a channel that passes as it is
        args["factor"] = factor.reshape(-1, *[1] * (x.ndim - 1))
    return sorted_dict(args)


def stacked(args: Args, mapped: tuple[str, ...], axis: int = 0) -> Args:
    """The arguments with several members of those that are mapped."""
    change = {"low": lambda t, i: t + (i if t < 0 else 0), "high": lambda t, i: t - i}
    by_default = lambda t, i: t * (1 + 0.1 * i)  # noqa: E731
    return {
        name: torch.stack([change.get(name, by_default)(t, i) for i in range(MEMBERS)], min(axis, t.ndim))
        if name in mapped
        else t
        for name, t in args.items()
    }


def quantizer(scheme: sq.QScheme, order: Any) -> Callable[[Args], Tensor]:
    def f(args: Args) -> Tensor:
        bounds = {"qmin": args["low"], "qmax": args["high"]}
        qparams = sq.QParams(args["scale"], args["zero"], bounds)
        return fake_quantize(args["x"], qparams, scheme, order, factor=args.get("factor"))

    return f


def gradient(f: Callable[[Args], Tensor], names: tuple[str, ...] = ("x", "scale", "zero")) -> Callable[[Args], Args]:
    """The gradient to some of the arguments, of a sum that weighs each element differently."""

    def loss(some: Args, rest: Args) -> Tensor:
        y = f(sorted_dict({**rest, **some}))  # torch matches dicts by the order of their keys
        return (y * torch.arange(1.0, y.numel() + 1).reshape(y.shape)).square().sum()

    def of(args: Args) -> Args:
        some = {name: args[name] for name in names}
        return torch.func.grad(loss)(some, {name: t for name, t in args.items() if name not in names})

    return of


def dims(args: Args, mapped: tuple[str, ...], axis: int = 0) -> dict[str, int | None]:
    return {name: min(axis, t.ndim - 1) if name in mapped else None for name, t in args.items()}


def looped(f: Callable[[Args], Any], args: Args, mapped: tuple[str, ...], axis: int = 0) -> Any:
    """The results for all members, one after the other, stacked."""
    where = dims(args, mapped, axis)
    each = [
        f({name: t if where[name] is None else t.select(where[name], i) for name, t in args.items()}) for i in range(MEMBERS)
    ]
    return torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *each)


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True)
    return all(torch.equal(a, e) for a, e in pairs)


def close(actual: Any, expected: Any) -> None:
    # sums over 24 elements whose squares reach 1e6, in another order
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


def on(mapped: tuple[str, ...], args: Args) -> tuple[str, ...]:
    return tuple(name for name in mapped if name in args)


@over_some_schemes
@over_orders
@over_mapped
def test_has_the_bits_of_a_loop(mapped: tuple[str, ...], order: str, scheme: sq.QScheme) -> None:
    args = stacked(arguments(scheme), mapped)
    f = quantizer(scheme, order)
    assert same(torch.vmap(f, (dims(args, mapped),))(args), looped(f, args, mapped))


@over_some_schemes
@over_mapped
@pytest.mark.parametrize("has_factor", [True, False], ids=["folded", "plain"])
def test_its_gradient_has_the_bits_of_a_loop(has_factor: bool, mapped: tuple[str, ...], scheme: sq.QScheme) -> None:
    args = arguments(scheme, has_factor)
    if not (mapped := on(mapped, args)):
        return
    args, f = stacked(args, mapped), gradient(quantizer(scheme, "expression"))
    assert same(torch.vmap(f, (dims(args, mapped),))(args), looped(f, args, mapped))


@over_some_schemes
def test_members_may_lie_along_any_axis(scheme: sq.QScheme) -> None:
    mapped = ("x", "scale")
    args, f = stacked(arguments(scheme), mapped, axis=1), quantizer(scheme, "kernel")
    where = dims(args, mapped, 1)
    assert same(torch.vmap(f, (where,))(args), looped(f, args, mapped, 1))
    assert same(torch.vmap(gradient(f), (where,))(args), looped(gradient(f), args, mapped, 1))


@over_some_schemes
@pytest.mark.parametrize(
    ("outer", "inner"),
    [(("x",), ("scale", "zero")), (("scale",), ("x",)), (("low", "high"), ("x", "scale")), (("factor",), ("low", "high"))],
    ids=["weights, grids", "scales, weights", "bounds, weights", "factors, bounds"],
)
def test_a_map_of_maps_has_the_bits_of_a_loop_of_loops(
    outer: tuple[str, ...], inner: tuple[str, ...], scheme: sq.QScheme
) -> None:
    args = stacked(stacked(arguments(scheme), outer), inner)

    def mapped(f: Callable[[Args], Any]) -> Callable[[Args], Any]:
        # stacked last, so that the inner batch lies in front
        return torch.vmap(torch.vmap(f, (dims(args, outer),)), (dims(args, inner),))

    def in_loops(f: Callable[[Args], Any]) -> Any:
        return looped(lambda one: looped(f, one, outer), args, inner)

    f = quantizer(scheme, "expression")
    assert same(mapped(f)(args), in_loops(f))
    assert same(mapped(gradient(f))(args), in_loops(gradient(f)))


@over_some_schemes
@over_mapped
def test_a_gradient_through_a_map_sums_over_what_members_share(mapped: tuple[str, ...], scheme: sq.QScheme) -> None:
    args = stacked(arguments(scheme), mapped)
    f = quantizer(scheme, "kernel")
    names = ("x", "scale", "zero", "factor")
    found = gradient(torch.vmap(f, (dims(args, mapped),)), names)(args)
    expected = gradient(lambda own: looped(f, own, mapped), names)(args)
    close(found, expected)


@over_some_schemes
@over_mapped
@pytest.mark.parametrize("of", ["jvp of vmap", "vmap of jvp", "hvp of vmap", "vmap of hvp", "gradient of gradient"])
def test_other_transforms_go_through(of: str, mapped: tuple[str, ...], scheme: sq.QScheme) -> None:
    args = stacked(arguments(scheme), mapped)
    f, where = quantizer(scheme, "expression"), dims(args, mapped)
    moving = {"x", "scale", "zero"}

    def moved(f: Callable[[Args], Any]) -> Callable[[Args], Any]:
        """The derivative along a direction."""

        def along(own: Args) -> Any:
            some = {name: t for name, t in own.items() if name in moving}
            tangents = {name: torch.cos(torch.arange(1.0, t.numel() + 1)).reshape(t.shape) for name, t in some.items()}
            return torch.func.jvp(lambda some: f(sorted_dict({**own, **some})), (some,), (tangents,))[1]

        return along

    def steepness(f: Callable[[Args], Tensor]) -> Callable[[Args], Tensor]:
        return lambda own: torch.stack([g.square().sum() for g in gradient(f)(own).values()])

    over = lambda f: torch.vmap(f, (where,))  # noqa: E731
    loop = lambda f: lambda own: looped(f, own, mapped)  # noqa: E731
    compose: Callable[[Any], Callable[[Args], Any]] = {
        "jvp of vmap": lambda m: moved(m(f)),
        "vmap of jvp": lambda m: m(moved(f)),
        "hvp of vmap": lambda m: moved(gradient(m(f))),
        "vmap of hvp": lambda m: m(moved(gradient(f))),
        "gradient of gradient": lambda m: gradient(m(steepness(f))),
    }[of]
    found, expected = compose(over)(args), compose(loop)(args)
    scale = max(float(leaf.abs().max()) for leaf in torch.utils._pytree.tree_leaves(expected))
    # sums in another order: of some hundred terms, each of which float32 rounds at 6e-8 of the largest
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(scale, 1))


@over_some_schemes
@over_mapped
def test_whole_as_on_a_gpu_it_is_the_same(
    mapped: tuple[str, ...], scheme: sq.QScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = stacked(arguments(scheme), mapped)
    f, where = quantizer(scheme, "quotient"), dims(args, mapped)
    expected = looped(f, args, mapped), looped(gradient(f), args, mapped)
    for module in (eager_forward, eager_gradients):
        monkeypatch.setattr(module, "is_cut", lambda like: False)
    close(torch.vmap(f, (where,))(args), expected[0])
    close(torch.vmap(gradient(f), (where,))(args), expected[1])


class _Allocations(TorchDispatchMode):
    """Records the sizes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            if t.untyped_storage().data_ptr() not in before:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return out


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize("mapped", [("x", "scale"), ("scale",), ("low", "high")], ids=" and ".join)
def test_a_map_makes_one_tensor_of_the_size_of_its_result(mapped: tuple[str, ...]) -> None:
    scheme = sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    args = stacked(arguments(scheme, has_factor=False), mapped)
    f, size = quantizer(scheme, "expression"), 24
    with _Allocations() as made:
        torch.vmap(f, (dims(args, mapped),))(args)
    assert [n for n in made.sizes if n >= size] == [MEMBERS * size]


def test_the_gradient_to_what_members_share_takes_no_copy_for_each_member() -> None:
    scheme = sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    args = stacked(arguments(scheme, has_factor=False), ("scale",))
    f = torch.vmap(quantizer(scheme, "expression"), (dims(args, ("scale",)),))
    x = args["x"].clone().requires_grad_()
    y = f({**args, "x": x})
    g = torch.ones_like(y)
    with _Allocations() as made:
        y.backward(g)
    assert max(made.sizes) == x.numel() == 24


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learnable", "fixed", "qdrop", "tqt"])
def test_compiled_maps_are_those_of_eager(name: str) -> None:
    fq, scheme = sq.fake_quantizer(name), sq.QScheme(bits=4, granularity=sq.PerChannel(0))
    x = sample(0)
    qparams = fq.init(sq.QParams(torch.full((3,), 0.3), torch.zeros(3, dtype=torch.int32), {}), x, scheme)
    f = torch.vmap(lambda x: fq.apply(x, qparams, scheme))
    batch = torch.stack([x, 2 * x])
    torch.compiler.reset()
    assert same(torch.compile(f, fullgraph=True, backend="aot_eager")(batch), f(batch))
