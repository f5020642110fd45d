"""Weights that are quantized when their layer starts: the same numbers as all at once, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import sophq_func as sq
from sophq_func.capture import lazy
from tests.helpers import ready

ONE_SCALE = sq.QuantConfig(weight=sq.override(granularity=sq.PerTensor()))
"""With a scale for each channel, small weights are rounded together, and none waits for its layer."""


class Net(nn.Module):
    """Two layers of one shape, one further layer, and a forward given as a function."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f = f
        self.a, self.b, self.tied = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def bound(model: Net, x: Tensor, **tensors: Tensor) -> Tensor:
    """What layer ``b`` returns with other tensors than its own."""
    return functional_call(model.b, tensors, (x,))


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "each layer once": lambda m, x: m.b(m.a(x).relu()),
    "a layer twice": lambda m, x: m.a(m.a(x)),
    "a function reads it, too": lambda m, x: F.linear(m.a(x), m.a.weight),
    "a method reads it, too": lambda m, x: m.a(x) @ m.a.weight.t(),
    "inside a list": lambda m, x: m.a(x) + torch.stack([m.a.weight, m.b.weight]).sum() + m.b(x),
    "before its layer": lambda m, x: m.a(x + m.a.weight.mean()),
    "tied": lambda m, x: m.b(m.tied(m.a(x))),
    "bound to another layer": lambda m, x: bound(m, m.a(x), weight=m.a.weight),
    "bound to its own layer": lambda m, x: m.a(bound(m, x, weight=m.b.weight, bias=m.a.bias)),
    "read for what is bound": lambda m, x: m.a(bound(m, x, weight=torch.tanh(m.a.weight))),
    "another one is bound": lambda m, x: m.a(m.b(x)) + bound(m, x, weight=torch.eye(4)),
    "its shape and dtype": lambda m, x: m.a(x.to(m.a.weight.dtype)).reshape(-1, m.a.weight.shape[0]),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FORWARDS)
def test_values_and_gradients_are_those_of_weights_quantized_at_once(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(FORWARDS[name]).train(training), torch.randn(3, 4)
    q, params = sq.quantize(model, ONE_SCALE, example_args=(x,)), sq.params_of(model)
    assert q.engine.deferrable
    at_once = sq.quantize(model, ONE_SCALE, example_args=(x,))
    at_once.engine.deferrable = frozenset()
    qparams = sq.with_bits(q.calibrate(params, [x], progress=False), q.plan, 3)

    def gradient(q: sq.Quantized) -> dict[str, Tensor]:
        return torch.func.grad(lambda params: q.apply(params, qparams, x).square().sum())(params)

    assert torch.equal(q.apply(params, qparams, x), at_once.apply(params, qparams, x))
    torch.testing.assert_close(gradient(q), gradient(at_once))
    assert not torch.equal(q.apply(params, qparams, x), model(x))


def test_a_tied_weight_is_not_deferred() -> None:
    model, x = Net(FORWARDS["tied"]), torch.randn(3, 4)
    q = sq.quantize(model, ONE_SCALE, example_args=(x,))
    assert q.engine.deferrable == {"a.weight"}


def test_an_error_in_a_layer_leaves_the_skeleton_as_it_was() -> None:
    model, x = Net(FORWARDS["each layer once"]), torch.randn(3, 4)
    q, params = sq.quantize(model, ONE_SCALE, example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    expected = q.apply(params, qparams, x)
    with pytest.raises(RuntimeError, match="shapes"):
        q.apply(params, qparams, torch.randn(3, 5))
    assert all(parameter.is_meta for parameter in q.engine.skeleton.module.parameters())
    assert torch.equal(q.apply(params, qparams, x), expected)


def test_a_value_is_computed_once_while_somebody_holds_it_and_then_forgotten() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.ones(2)

    raw = {"w": torch.zeros(2)}
    values = lazy.Deferred({"w": compute}, raw)
    held, plain = values.filled([raw["w"], {"x": (raw["w"], 3)}]), torch.zeros(2)
    assert held[0] is held[1]["x"][0]
    assert values.filled(plain) is plain
    assert len(calls) == 1
    del held
    values.filled(raw["w"])
    assert len(calls) == 2


class Fragile(nn.Module):
    """Goes on where a layer, which is torch's own, refuses a shape."""

    def __init__(self, patient: bool) -> None:
        super().__init__()
        self.first, self.second, self.patient = nn.Linear(4, 4), nn.Linear(3, 4), patient

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.second(x)
        except RuntimeError:
            if not self.patient:
                raise
        return self.first(x) @ x.t()


class Seen(TorchFunctionMode):
    """Counts what it sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_where_the_model_catches_a_layer_s_error_what_follows_is_quantized() -> None:
    torch.manual_seed(0)
    model, x = Fragile(patient=True), torch.randn(3, 4)
    q, params = sq.quantize(model, ONE_SCALE, example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)

    def on_grid(name: str, value: Tensor) -> Tensor:
        return q.quantize_value(name, value, qparams[name])

    seen = on_grid("x.post_act_fake_quantizer", x)
    hidden = F.linear(seen, on_grid("first.weight_fake_quant", model.first.weight), model.first.bias)
    expected = on_grid("first.post_act_fake_quantizer", hidden) @ seen.t()
    torch.testing.assert_close(q.apply(params, qparams, x), expected)


def test_an_error_in_a_layer_leaves_the_modes_around_the_run_as_they_were() -> None:
    model, x = Fragile(patient=False), torch.randn(3, 4)
    q, params = sq.quantize(model, ONE_SCALE, example_args=(x[:, :3],)), sq.params_of(model)
    qparams = q.calibrate(params, [x[:, :3]], progress=False)
    with Seen() as seen:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            q.apply(params, qparams, x)
        assert torch.overrides._get_current_function_mode() is seen
        before = seen.count
        torch.ones(1).add(1)
        assert seen.count == before + 2


def test_a_mode_of_the_user_sees_the_calls_inside_layers() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    q, params = sq.quantize(model, ONE_SCALE, example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    names: list[str] = []

    class Named(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Named():
        q.apply(params, qparams, x)
    assert {"linear", "relu"} <= set(names)


def hyper(m: Net, x: Tensor) -> Tensor:
    return bound(m, x, weight=m.a(x)[:1].t() * torch.ones(4))


SUPPLIED: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor]]] = {
    # a model that binds a tensor to a layer, and the same with the function that the layer calls
    "made from an input": (hyper, lambda m, x: F.linear(x, m.a(x)[:1].t() * torch.ones(4), m.b.bias)),
    "made from a parameter": (
        lambda m, x: bound(m, x, weight=m.a.weight * 2),
        lambda m, x: F.linear(x, m.a.weight * 2, m.b.bias),
    ),
    "a constant": (lambda m, x: bound(m, x, weight=torch.eye(4)), lambda m, x: F.linear(x, torch.eye(4), m.b.bias)),
}


@pytest.mark.parametrize("name", SUPPLIED)
def test_a_layer_reads_the_weight_that_the_model_binds_to_it(name: str) -> None:
    torch.manual_seed(0)
    forward, right = SUPPLIED[name]
    model, x = Net(forward).eval(), torch.randn(3, 4)
    config = sq.QuantConfig(weight=sq.override(bits=16), activation=sq.override(bits=16))
    r = ready(model, x, config=config)
    assert "b.weight_fake_quant" in r.q.plan
    assert r.q.plan.site("b.weight_fake_quant").kind == "computed weight"
    # 16 bits: what is left of the range divided by 2**15, summed over 4 products
    torch.testing.assert_close(r(x), right(model, x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(r.q.apply({**r.params, "b.weight": r.params["b.weight"] * 9}, r.qparams, x), r(x))
