"""Transforms of ``torch.func`` that a model starts in its own forward: quantized like the model without them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import sophq_func as sq
from sophq_func.capture import transforms
from tests.helpers import DEFAULT, Ready, same

Forward = Callable[["Energy", Tensor], Tensor]
"""What an :class:`Energy` computes of its energy."""


class Energy(nn.Module):
    """A scalar for each row of its input, and what a forward makes of it."""

    def __init__(self, f: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.f = nn.Linear(8, 6), nn.Linear(6, 1), f

    def energy(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def detached(model: Energy, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(model.energy(leaf).sum(), leaf)[0]


def ambient(model: Energy, x: Tensor) -> Tensor:
    return torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)[0]


def itself(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return energy(x)


def slope(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return grad(lambda x: energy(x).sum())(x)


def along_ones(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return jvp(energy, (x,), (torch.ones_like(x),))[1]


# each with what it is as a function of the energy of all rows, without a transform inside
FORWARDS: dict[str, tuple[Forward, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]]] = {
    "vmap": (lambda m, x: vmap(m.energy)(x), itself),
    "vmap over the last axis": (lambda m, x: vmap(m.energy, in_dims=1)(x.t()), itself),
    "vmap in chunks of one axis": (lambda m, x: vmap(vmap(m.energy))(x.view(2, 2, 8)).flatten(), itself),
    "vmap over two swapped axes": (
        lambda m, x: vmap(vmap(m.energy, in_dims=1), in_dims=1, out_dims=1)(x.view(2, 2, 8).permute(2, 1, 0)).flatten(),
        itself,
    ),
    "grad": (lambda m, x: grad(lambda x: m.energy(x).sum())(x), slope),
    "vmap of grad": (lambda m, x: vmap(grad(m.energy))(x), slope),
    "vmap of jacrev": (lambda m, x: vmap(jacrev(m.energy))(x), slope),
    "vmap of jacfwd": (lambda m, x: vmap(jacfwd(m.energy))(x), slope),
    "jvp": (lambda m, x: jvp(m.energy, (x,), (torch.ones_like(x),))[1], along_ones),
    "autograd of a detached input": (detached, slope),
    "autograd of the caller's input": (ambient, slope),
}


def calibrated(model: nn.Module, x: Tensor, config: sq.QuantConfig = DEFAULT) -> Ready:
    q, params = sq.quantize(model, config, example_args=(x,)), sq.params_of(model)
    return Ready(q, params, q.calibrate(params, [x], progress=False))


def data(name: str = "") -> Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(name == "autograd of the caller's input")


@pytest.fixture(scope="module")
def plain() -> Energy:
    """The model without a transform."""
    return Energy(Energy.energy)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_transform_inside_is_quantized_like_the_model_without_it(name: str, plain: Energy) -> None:
    forward, right = FORWARDS[name]
    x = data(name)
    r, without = calibrated(Energy(forward), x), calibrated(plain, x.detach())
    assert list(r.q.plan) == list(without.q.plan)
    same(r.qparams, without.qparams)
    expected = right(without, x.detach())
    torch.testing.assert_close(r(x), expected)
    assert not torch.equal(right(plain.energy, x.detach()), expected)


DYNAMIC = {
    "a scale for each token": sq.QuantConfig(activation=sq.override(granularity=sq.PerToken(), dynamic=True)),
    "one scale": sq.QuantConfig(activation=sq.override(dynamic=True)),
}


@pytest.mark.parametrize("config", DYNAMIC)
@pytest.mark.parametrize("name", [name for name in FORWARDS if "vmap over" in name or "chunks" in name])
def test_dynamic_scales_under_vmap_are_those_of_the_whole_value(name: str, config: str, plain: Energy) -> None:
    x = data()
    r, without = calibrated(Energy(FORWARDS[name][0]), x, DYNAMIC[config]), calibrated(plain, x, DYNAMIC[config])
    torch.testing.assert_close(r(x), without(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["vmap", "vmap over two swapped axes", "grad", "vmap of grad", "vmap of jacrev", "jvp"])
def test_a_transform_inside_compiles_to_the_numbers_of_eager(name: str) -> None:
    x = data(name)
    r = calibrated(Energy(FORWARDS[name][0]), x)
    compiled = torch.compile(r.q.apply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(r.params, r.qparams, x), r(x))


def is_wrapped(tensor: Tensor) -> bool:
    return transforms.innermost(tensor) is not tensor


@pytest.mark.parametrize("name", FORWARDS)
def test_nothing_that_outlives_a_run_is_wrapped_and_all_of_it_is_whole(name: str) -> None:
    x = data(name)
    r = calibrated(Energy(FORWARDS[name][0]), x)
    _, states = r.q.observe(r.params, r.q.init(r.params), x)
    captured = r.q.capture(r.params, r.qparams, x)
    _, seen = r.q.tap("a")(r.params, r.qparams, x)
    kept = [leaf for state in states.values() for leaf in state]
    kept += [leaf for pair in captured.values() for leaf in pair]
    kept += [seen["a"][0].output, *seen["a"][0].args]
    assert not any(map(is_wrapped, kept))
    assert captured["tanh.post_act_fake_quantizer"][0].numel() == seen["a"][0].output.numel() == 4 * 6


def test_learned_scales_inside_a_transform_have_the_gradients_of_the_model_without_it(plain: Energy) -> None:
    config = sq.QuantConfig(activation=sq.override(fake_quantize=sq.fake_quantize.learnable()))
    x = data()
    r, without = calibrated(Energy(FORWARDS["vmap of grad"][0]), x, config), calibrated(plain, x, config)
    learned, rest = r.q.split(r.qparams)

    def gradient(f: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        return grad(lambda learned: f(learned).square().sum())(learned)

    def force(learned: dict[str, Tensor]) -> Tensor:
        return slope(lambda x: without.q.apply(without.params, sq.merge(learned, rest), x), x)

    actual = gradient(lambda learned: r.q.apply(r.params, sq.merge(learned, rest), x))
    torch.testing.assert_close(actual, gradient(force))
    assert actual["a.weight_fake_quant.scale"].abs().max() > 0


@pytest.mark.parametrize("name", ["vmap", "vmap of grad", "jvp"])
def test_a_transform_around_a_run_with_one_inside_is_the_loop(name: str) -> None:
    x = data()
    r = calibrated(Energy(FORWARDS[name][0]), x)
    several = torch.stack([x, 2 * x, -x])
    torch.testing.assert_close(vmap(r)(several), torch.stack([r(each) for each in several]))


def test_a_second_derivative_inside_runs_on_the_same_grids(plain: Energy) -> None:
    x = data()
    r = calibrated(Energy(lambda m, x: vmap(hessian(m.energy))(x)), x)
    same(r.qparams, calibrated(plain, x).qparams)
    assert r(x).shape == (4, 8, 8)


def test_calibration_keeps_no_graph_of_a_batch_that_requires_grad() -> None:
    x = data("autograd of the caller's input")
    r = calibrated(Energy(ambient), x)
    assert not any(leaf.requires_grad for entry in r.qparams.values() for leaf in entry[:2])


def test_a_gradient_of_parameters_that_are_detached_says_what_to_call() -> None:
    model = Energy(lambda m, x: torch.autograd.grad(m.energy(x).sum(), m.a.weight)[0])
    with pytest.raises(sq.PlanError, match=r"torch.autograd.grad in forward finds no gradient"):
        sq.quantize(model, DEFAULT, example_args=(data(),))


# Weights under a transform


def rows(model: Energy, x: Tensor) -> Tensor:
    return model.a(x) + vmap(lambda w: x @ w)(model.a.weight).t()


def adapted(model: Energy, x: Tensor) -> Tensor:
    weights = dict(model.a.named_parameters())
    slopes = grad(lambda w: functional_call(model.a, w, (x,)).square().mean())(weights)
    return F.linear(x, weights["weight"] - 0.1 * slopes["weight"], weights["bias"])


def along_its_input(model: Energy, x: Tensor) -> Tensor:
    return model.a(x) + jvp(lambda w: F.linear(x, w), (model.a.weight,), (model.a.weight,))[1]


@pytest.mark.parametrize("forward", [rows, adapted, along_its_input])
def test_a_weight_under_a_transform_is_the_one_that_was_quantized_before_the_run(forward: Forward) -> None:
    x = data()
    r = calibrated(Energy(forward), x, sq.QuantConfig(weight=sq.override(bits=3), activation=None))
    model = Energy(forward)
    with torch.no_grad():
        model.a.weight.copy_(r.q.capture(r.params, r.qparams, x)["a.weight_fake_quant"][1])
    values = [name for name in r.qparams if name != "a.weight_fake_quant"]
    assert not values
    torch.testing.assert_close(r(x), model(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_dynamic_scale_of_a_whole_value_is_not_taken_from_one_member_when_compiled() -> None:
    x = data()
    r = calibrated(Energy(FORWARDS["vmap"][0]), x, DYNAMIC["one scale"])
    with pytest.raises(Exception, match="lies under a vmap in the forward"):
        torch.compile(r.q.apply, backend="eager", fullgraph=True)(r.params, r.qparams, x)


# The functions themselves


def test_members_of_a_whole_tensor_and_back() -> None:
    x = torch.randn(2, 3, 4)
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        assert transforms.is_inside(x, 0)
        seen.append(transforms.whole(x, 0))
        seen.extend(transforms.members(x, 0))
        return transforms.on_whole(lambda whole: whole * whole.amax(), x, 0)

    result = vmap(vmap(look, in_dims=1), in_dims=0)(x)
    order = x.permute(0, 2, 1)
    assert torch.equal(seen[0], order)
    assert torch.equal(torch.stack(seen[1:]), order.flatten(0, 1))
    assert torch.equal(result, order * x.amax())
