"""A quantized model inside another model, inside itself, and models that yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import RELEASE, Ready, ready, same

Middle = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def inner() -> Ready:
    torch.manual_seed(0)
    return ready(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(8, 4))


class Around(nn.Module):
    """Layers before and behind a function that is no part of the model."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 4), nn.Linear(4, 2), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)).relu() + 1)


def by_hand(made: Ready, middle: Middle, x: Tensor) -> Tensor:
    """What a quantized :class:`Around` computes, from its quantizers one by one."""
    weights = made.q.freeze(made.params, made.qparams)[1]

    def rounded(name: str, value: Tensor) -> Tensor:
        name = f"{name}.post_act_fake_quantizer"
        return made.q.quantize_value(name, value, made.qparams[name])

    first = nn.functional.linear(rounded("x", x), weights["first.weight"], weights["first.bias"])
    return nn.functional.linear(rounded("add", middle(first).relu() + 1), weights["last.weight"], weights["last.bias"])


def apply(inner: Ready) -> Middle:
    return inner


def observe(inner: Ready) -> Middle:
    return lambda h: inner.q.observe(inner.params, inner.q.init(inner.params), h)[0]


def calibrate(inner: Ready) -> Middle:
    return lambda h: inner.q.apply(inner.params, inner.q.calibrate(inner.params, [h], progress=False), h)


def tap(inner: Ready) -> Middle:
    return lambda h: inner.q.tap("0")(inner.params, inner.qparams, h)[0]


def mapped(inner: Ready) -> Middle:
    return torch.vmap(inner)


def gradient(inner: Ready) -> Middle:
    return torch.func.grad(lambda h: inner(h).square().sum())


def bound(inner: Ready) -> Middle:
    module = inner.q.bind(inner.params, inner.qparams, learn="all")
    return lambda h: module(h)


def frozen(inner: Ready) -> Middle:
    module = inner.q.bind(inner.params, inner.qparams)
    return lambda h: module(h)


def freeze(inner: Ready) -> Middle:
    def middle(h: Tensor) -> Tensor:
        q, weights = inner.q.freeze(inner.params, inner.qparams)
        return q.apply(weights, inner.qparams, h)

    return middle


def with_noise(inner: Ready) -> Middle:
    draws = torch.Generator()
    return lambda h: inner.q.apply(inner.params, inner.q.with_noise(inner.params, inner.qparams, draws, h), h)


MIDDLES = (apply, observe, calibrate, tap, mapped, gradient, bound, frozen, freeze, with_noise)


@pytest.mark.parametrize("make", MIDDLES)
def test_a_quantized_model_inside_another_computes_as_alone(make: Callable[[Ready], Middle], inner: Ready) -> None:
    x, middle = torch.randn(3, 4), make(inner)
    model = Around(middle).eval()
    made = ready(model, x)
    assert set(made.qparams) == {
        "x.post_act_fake_quantizer",
        "first.weight_fake_quant",
        "add.post_act_fake_quantizer",
        "last.weight_fake_quant",
    }
    same(made.q.observe(made.params, made.q.init(made.params), x)[0], model(x))
    torch.testing.assert_close(made(x), by_hand(made, middle, x), rtol=1e-6, atol=1e-6)
    rows = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.vmap(made)(rows), torch.stack([made(x), made(x + 1)]), rtol=1e-6, atol=1e-6)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in made.params.items()}
    made.q.apply(leaves, made.qparams, x).sum().backward()
    found = torch.func.grad(lambda p: made.q.apply(p, made.qparams, x).sum())(made.params)
    torch.testing.assert_close(found["first.weight"], leaves["first.weight"].grad)
    assert found["first.weight"].count_nonzero()


@pytest.mark.slow
@pytest.mark.skipif(RELEASE < (2, 11), reason="Dynamo of torch 2.9 takes no function that holds a quantized model")
def test_a_quantized_model_inside_another_compiles(inner: Ready) -> None:
    x = torch.randn(3, 4)
    made = ready(Around(inner).eval(), x)
    compiled = torch.compile(lambda x: made(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))


def test_it_is_one_call_of_the_other_model(inner: Ready) -> None:
    graph = sq.trace(Around(inner).eval(), (torch.randn(3, 4),))
    assert [node for node in graph.nodes if node != "x"] == ["first", "quantized_apply", "relu", "add", "last"]


def test_a_sweep_is_one_call_too_and_passes_no_gradient(inner: Ready) -> None:
    middle = lambda h: inner.q.sweep(inner.params, [inner.qparams], h, how="loop", progress=False)[0]  # noqa: E731
    graph = sq.trace(Around(middle).eval(), (torch.randn(3, 4),))
    assert [node for node in graph.nodes if node != "x"] == ["first", "sweep", "getitem", "relu", "add", "last"]


def test_a_bound_model_inside_a_model_is_refused_by_its_path(inner: Ready) -> None:
    model = Around(nn.Identity()).eval()
    model.first = inner.q.bind(inner.params, inner.qparams, learn="all")
    with pytest.raises(sq.PlanError, match="first is quantized already"):
        sq.quantize(model, sq.QuantConfig(), example_args=(torch.randn(3, 4),))


class Again(nn.Module):
    """A model that calls itself, quantized, as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, times: int = 0) -> Tensor:
        y = self.linear(x)
        return y.relu() if not times else SELF[0](y, times - 1)


SELF: list[Callable[[Tensor, int], Tensor]] = []


@pytest.mark.parametrize("bind", (False, True))
def test_a_quantized_model_may_call_itself(bind: bool) -> None:
    x = torch.randn(3, 4)
    made = ready(Again().eval(), x)
    q, params, qparams = made
    SELF[:] = [q.bind(params, qparams, learn="all") if bind else made]
    scale = "x.post_act_fake_quantizer"
    weights = q.freeze(params, qparams)[1]
    expected = x
    for _ in range(3):
        value = q.quantize_value(scale, expected, qparams[scale])
        expected = nn.functional.linear(value, weights["linear.weight"], weights["linear.bias"])
    once = SELF[0](x, 0)
    torch.testing.assert_close(SELF[0](x, 2), expected.relu(), rtol=1e-6, atol=1e-6)
    same(SELF[0](x, 0), once)
    if not bind:
        torch.testing.assert_close(torch.vmap(lambda row: made(row, 2))(x), made(x, 2), rtol=1e-6, atol=1e-6)


class Stages(nn.Module):
    """Layers behind a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.a(x)
        yield x
        yield self.b(x.relu())

    def forward(self, x: Tensor) -> object:
        first, second = self.stages(x)
        return first + second


class First(Stages):
    """Leaves the generator where it is."""

    def forward(self, x: Tensor) -> object:
        return next(self.stages(x))


class Listed(Stages):
    def forward(self, x: Tensor) -> object:
        a = self.a(x)
        return a + self.b(a.relu())


def test_a_generator_that_forward_runs_is_right() -> None:
    x = torch.randn(3, 4)
    made, first = ready(Stages().eval(), x), ready(First().eval(), x)
    plain = Listed().eval()
    plain.load_state_dict(made.params)
    expected = ready(plain, x)
    torch.testing.assert_close(made(x), expected(x), rtol=1e-6, atol=1e-6)
    assert list(first.q.plan) == ["x.post_act_fake_quantizer", "a.weight_fake_quant"]
    same(first(x), first(x))


class Yields(Stages):
    def forward(self, x: Tensor) -> object:
        yield from self.stages(x)


class Hands(Stages):
    def forward(self, x: Tensor) -> object:
        return {"now": self.a(x), "later": self.stages(x)}


class Maps(Stages):
    def forward(self, x: Tensor) -> object:
        return map(self.a, [x, x])


class Awaits(Stages):
    async def forward(self, x: Tensor) -> object:
        return self.a(x)


@pytest.mark.parametrize("kind, name", [(Yields, "generator"), (Hands, "generator"), (Maps, "map"), (Awaits, "coroutine")])
def test_what_computes_after_the_run_is_refused(kind: type[nn.Module], name: str) -> None:
    with pytest.raises(sq.PlanError, match=f"has not computed yet: got '{name}'.*Fix"):
        sq.quantize(kind().eval(), sq.QuantConfig(), example_args=(torch.randn(3, 4),))
