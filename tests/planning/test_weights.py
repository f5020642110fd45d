"""Which tensors are weights: those that a layer multiplies, and nothing that they are computed from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import sophq_func as sq
from sophq_func.config.site import ComputedSite
from tests.helpers import ready, same
from tests.model.test_edges import Net

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch announces that the old hooks will go
FOUR = sq.QuantConfig(weight=sq.override(bits=4))
CHIP = sq.QuantConfig(chip="BM1690", strategy="CNN")


class OwnForward(nn.Conv2d):
    """A layer of which the calls inside its forward are seen."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Masked(nn.Module):
    """The parametrization that does what pruning does."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask.to(weight.dtype) * weight


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.7


class ScaledBefore:
    """The hook that does the same: equalized learning rates, as in generative networks."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        module.weight = module.weight_orig * 0.7  # type: ignore[operator,assignment]


def by_norm(layer: nn.Module) -> nn.Module:
    return utils.weight_norm(layer)


def by_norm_twin(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


def by_spectrum(layer: nn.Module) -> nn.Module:
    return utils.spectral_norm(layer)


def by_spectrum_twin(layer: nn.Module) -> nn.Module:
    hooked = utils.spectral_norm(copy.deepcopy(layer))
    parametrizations.spectral_norm(layer)
    (norm,) = layer.parametrizations.weight  # type: ignore[union-attr,misc]
    norm._u.copy_(hooked.weight_u)
    norm._v.copy_(hooked.weight_v)
    return layer


def by_pruning(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.ln_structured(layer, "weight", 0.3, n=2, dim=0)
    return layer


def by_pruning_twin(layer: nn.Module) -> nn.Module:
    mask = by_pruning(copy.deepcopy(layer)).weight_mask
    parametrize.register_parametrization(layer, "weight", Masked(mask))  # type: ignore[arg-type]
    return layer


def by_hook(layer: nn.Module) -> nn.Module:
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.register_forward_pre_hook(ScaledBefore())
    return layer


def by_hook_twin(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


TWINS = {
    "weight_norm": (by_norm, by_norm_twin),
    "spectral_norm": (by_spectrum, by_spectrum_twin),
    "pruning": (by_pruning, by_pruning_twin),
    "a hook of the user's": (by_hook, by_hook_twin),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv2d": (lambda: nn.Conv2d(2, 3, 2), (4, 2, 4, 4)),
    "Linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2), (4, 2, 5)),
    "a layer with a forward of its own": (lambda: OwnForward(2, 3, 2), (4, 2, 4, 4)),
}


def gradients(model: nn.Module, x: Tensor, config: sq.QuantConfig) -> tuple[list[str], Tensor, list[Tensor]]:
    """The quantizers, the output, and the gradients that are not zero, by size."""
    r = ready(model, x, config=config)
    grads = torch.func.grad(lambda params: r.q.apply(params, r.qparams, x).square().sum())(r.params)
    found = [grad for grad in grads.values() if grad.any()]
    return list(r.q.plan), r(x), sorted(found, key=lambda grad: (grad.numel(), float(grad.abs().sum())))


@pytest.mark.parametrize("config", [FOUR, CHIP], ids=["4 bits", "chip"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("hook", TWINS)
def test_a_hook_equals_its_parametrization(hook: str, kind: str, config: sq.QuantConfig) -> None:
    hooked, twin = TWINS[hook]
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    results = []
    for change in (hooked, twin):
        torch.manual_seed(1)  # the vectors of spectral_norm are random
        results.append(gradients(nn.Sequential(change(copy.deepcopy(layer))).eval(), x, config))
    (names, out, grads), (names_of_twin, out_of_twin, grads_of_twin) = results
    assert names == names_of_twin
    same(out, out_of_twin)
    torch.testing.assert_close(grads, grads_of_twin)  # sums in another order


@pytest.mark.parametrize("hook", TWINS)
def test_the_only_weight_of_a_hooked_layer_is_what_it_multiplies_with(hook: str) -> None:
    model, x = nn.Sequential(TWINS[hook][0](nn.Conv2d(2, 3, 2))).eval(), torch.randn(4, 2, 4, 4)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=4), activation=None))
    (name,) = r.q.plan
    assert name == "0.weight_fake_quant"
    model(x)  # the hook puts the weight of this run there
    weight: Tensor = model[0].weight.detach()
    expected = F.conv2d(x, r.q.quantize_value(name, weight, r.qparams[name]), r.params.get("0.bias"))
    same(r(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 6, 3), lambda: OwnForward(3, 6, 3)], ids=["leaf", "own forward"])
def test_a_training_step_moves_the_vector_of_spectral_norm_as_in_float(make: Callable[[], nn.Module]) -> None:
    model, x = nn.Sequential(utils.spectral_norm(make())).eval(), torch.randn(2, 3, 6, 6)
    for config in (FOUR, CHIP):
        r = ready(model, x, config=config)
        w, u = r.params["0.weight_orig"].flatten(1), r.params["0.weight_u"]
        v = F.normalize(w.T @ u, dim=0, eps=1e-12)
        right = F.normalize(w @ v, dim=0, eps=1e-12)
        _, params = r.q.train().apply_and_update(r.params, r.qparams, x)
        torch.testing.assert_close(params["0.weight_u"], right)  # a product of the same factors in another order
        same(r.q.apply_and_update(r.params, r.qparams, x)[1]["0.weight_u"], u)


def test_what_a_hook_does_to_the_arguments_is_the_models() -> None:
    layer = utils.weight_norm(nn.Linear(4, 4))
    layer.register_forward_pre_hook(lambda module, args: (args[0] + args[0] * 2,))
    plan = sq.quantize(nn.Sequential(layer), FOUR, example_args=torch.randn(2, 4)).plan
    assert {"mul.post_act_fake_quantizer", "add.post_act_fake_quantizer", "0.weight_fake_quant"} <= plan.keys()
    assert not any("norm" in name for name in plan)


def test_a_power_iteration_in_a_hook_without_a_class_is_no_contraction_of_the_model() -> None:
    layer = nn.Linear(4, 3)
    layer.register_parameter("raw", layer._parameters.pop("weight"))
    layer.register_buffer("u", torch.randn(3))

    def divide(module: Any, args: Any) -> None:
        v = F.normalize(module.raw.mT @ module.u, dim=0)
        module.weight = module.raw / torch.dot(module.u, torch.mv(module.raw, v))

    layer.register_forward_pre_hook(divide)
    graph = sq.trace(nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(2, 4))
    assert list(graph.nodes) == ["input", "0", "1"]
    assert list(sq.plan(graph, sq.QuantConfig())) == ["input.post_act_fake_quantizer", "0.weight_fake_quant"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Conv2d", "a layer with a forward of its own"])
@pytest.mark.parametrize("hook", TWINS)
def test_hooks_compile_and_map(hook: str, kind: str) -> None:
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(TWINS[hook][0](make()), nn.ReLU()).eval(), torch.randn(shape)
    r = ready(model, x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(r, fullgraph=True, backend="aot_eager")(x), r(x))
    torch.testing.assert_close(torch.vmap(lambda one: r(one[None])[0])(x), r(x))
    same(copy.deepcopy(r.q).apply(r.params, r.qparams, x), r(x))


# what only looks like a weight


def test_a_stored_scale_and_a_mask_are_no_weights() -> None:
    layer = nn.Linear(4, 3)
    layer.weight_scale = nn.Parameter(torch.ones(3))
    layer.register_buffer("weight_mask", torch.ones(3, 4))
    for config in (FOUR, CHIP):
        plan = sq.quantize(layer, config, example_args=torch.randn(2, 4)).plan
        assert [name for name in plan if plan.site(name).role == "weight"] == ["weight_fake_quant"]


class Own(nn.Module):
    """A layer of the user's, whose weight has another name."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.weight_g = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.rand(3, 1))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


OWN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "as it is": (lambda m, x: F.linear(x, m.kernel) * m.weight_g.T, "kernel_fake_quant"),
    "a view": (lambda m, x: (x @ m.kernel.mT) * m.weight_g.T, "kernel_fake_quant"),
    "computed": (lambda m, x: F.linear(x.relu(), m.kernel * m.weight_g), "weight_fake_quant"),
}


@pytest.mark.parametrize("how", OWN)
def test_the_weight_of_a_users_layer_is_what_it_multiplies_with(how: str) -> None:
    forward, expected = OWN[how]
    config = sq.QuantConfig(weight_layers=(Own,), activation=None)
    assert list(sq.quantize(Own(forward), config, example_args=torch.randn(2, 4)).plan) == [expected]


def test_a_layer_of_torch_that_computes_its_weight_is_quantized_on_the_result() -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight / weight.std(), bias)

    model, x = Standardized(2, 3, 2), torch.randn(4, 2, 4, 4)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=4), activation=None))
    (name,) = r.q.plan
    assert isinstance(r.q.plan.site(name), ComputedSite)
    weight = r.q.quantize_value(name, (model.weight / model.weight.std()).detach(), r.qparams[name])
    same(r(x), F.conv2d(x, weight, r.params["bias"]))


def test_a_parametrization_that_multiplies_is_not_the_layer() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(4, 1))

        def forward(self, weight: Tensor) -> Tensor:
            return weight + F.linear(self.a, self.b)

    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    parametrize.register_parametrization(layer, "weight", LowRank())
    r = ready(layer, x, config=sq.QuantConfig(weight=sq.override(bits=4), activation=None))
    (name,) = r.q.plan
    same(r(x), F.linear(x, r.q.quantize_value(name, layer.weight.detach(), r.qparams[name]), r.params["bias"]))


# weights that are computed and used several times


def weights_of(plan: sq.Plan) -> Iterator[str]:
    return (name for name in plan if plan.site(name).role == "weight")


def test_a_parametrized_layer_that_is_called_twice_is_quantized_twice() -> None:
    layer, x = parametrizations.weight_norm(nn.Linear(4, 4)), torch.randn(2, 4)
    model = Net(lambda m, x: m.layer(m.layer(x)), layer=layer)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=3), activation=None))
    assert list(r.q.plan) == ["layer.weight_fake_quant"]
    weight = r.q.quantize_value("layer.weight_fake_quant", layer.weight.detach(), r.qparams["layer.weight_fake_quant"])
    bias = r.params["layer.bias"]
    same(r(x), F.linear(F.linear(x, weight, bias), weight, bias))


def test_a_computed_weight_is_quantized_wherever_it_is_multiplied() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.fc.weight * 2
        return F.linear(F.linear(x, weight), weight)

    model, x = Net(forward, fc=nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=3), activation=None))
    (name,) = r.q.plan
    weight = r.q.quantize_value(name, r.params["fc.weight"] * 2, r.qparams[name])
    same(r(x), F.linear(F.linear(x, weight), weight))


def test_two_computed_weights_of_one_module_have_a_quantizer_each() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, m.a.weight * 2), m.b.weight * 3)

    model, x = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(2, 4)
    r = ready(model, x, config=sq.QuantConfig(weight=sq.override(bits=3), activation=None))
    assert list(r.q.plan) == ["weight_fake_quant", "weight_1_fake_quant"]
    first, second = (
        r.q.quantize_value(name, weight, r.qparams[name])
        for name, weight in zip(r.q.plan, (r.params["a.weight"] * 2, r.params["b.weight"] * 3), strict=True)
    )
    same(r(x), F.linear(F.linear(x, first), second))


def test_examples_that_use_a_computed_weight_differently_are_united() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    model = Net(lambda m, x, again=False: m.layer(m.layer(x)) if again else m.layer(x), layer=layer)
    x = torch.randn(2, 4)
    examples = [((x,), {"again": True}), ((x,), {})]
    q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=3), activation=None), examples=examples)
    params = sq.params_of(model)
    qparams = q.qparams(params, q.observe(params, q.init(params), x, again=True)[1])
    weight = q.quantize_value("layer.weight_fake_quant", layer.weight.detach(), qparams["layer.weight_fake_quant"])
    once = F.linear(x, weight, params["layer.bias"])
    same(q.apply(params, qparams, x), once)
    same(q.apply(params, qparams, x, again=True), F.linear(once, weight, params["layer.bias"]))


class Product(nn.Module):
    """A weight that is computed from two parameters, in several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.w, self.s = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.rand(4, 1) + 0.5)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "linear":
            return F.linear(x, self.w * self.s)
        if self.spelling == "matmul":
            return x @ (self.w * self.s).mT
        return torch.einsum("bi,oi->bo", x, (self.w * self.s).reshape(4, 6))


@pytest.mark.parametrize("spelling", ["linear", "matmul", "einsum"])
def test_a_computed_weight_is_rounded_once(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Product(spelling), torch.randn(5, 6)
    config = sq.QuantConfig(
        weight=sq.override(bits=4, fake_quantize=sq.fake_quantize.fixed()), activation=sq.override(bits=16)
    )
    r = ready(model, x, config=config)
    assert [name for name in r.q.plan if r.q.plan.site(name).role == "weight"] == ["weight_fake_quant"]
    assert list(r.q.plan) == ["x.post_act_fake_quantizer", "weight_fake_quant"]
    weight = model.w * model.s
    scale = r.qparams["weight_fake_quant"].scale.reshape(4, 1)
    read = r.q.quantize_value("x.post_act_fake_quantizer", x, r.qparams["x.post_act_fake_quantizer"])
    expected = read @ ((weight * (1 / scale)).round().clamp(-8, 7) * scale).mT
    torch.testing.assert_close(r(x), expected)


def rotary(angles: Callable[..., Tensor], frequencies: Tensor) -> nn.Module:
    """Turns the halves of a vector by angles: each position times each frequency, in one of the spellings."""

    def turned(m: Any, x: Tensor) -> Tensor:
        angle = m.angles(torch.arange(x.shape[1])[None].float())
        left, right = m.proj(x).chunk(2, -1)
        return torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), -1)

    return Net(turned, proj=nn.Linear(8, 8), angles=Net(angles, frequencies=frequencies)).eval()


FREQUENCIES = 10.0 ** -torch.arange(4.0)
ANGLES: dict[str, Callable[..., Tensor]] = {
    "matmul": lambda m, p: (m.frequencies[None, :, None].expand(len(p), -1, 1) @ p[:, None, :]).mT,
    "outer": lambda m, p: torch.outer(p[0], m.frequencies),
    "einsum": lambda m, p: torch.einsum("i,j->ij", p[0], m.frequencies),
    "mm": lambda m, p: p.T.mm(m.frequencies[None]),
}
"""Each equals ``positions[..., None] * frequencies``."""


@pytest.mark.parametrize("strategy", ["Dataflow", "Layers"])
@pytest.mark.parametrize("spelling", ANGLES)
def test_frequencies_that_positions_are_multiplied_with_are_no_weight(spelling: str, strategy: str) -> None:
    config = sq.QuantConfig(strategy=strategy, weight=sq.override(bits=4))
    product, multiplied = (
        sq.quantize(rotary(angles, nn.Buffer(FREQUENCIES)), config, example_args=torch.randn(2, 5, 8)).plan
        for angles in (ANGLES[spelling], lambda m, p: p[..., None] * m.frequencies)
    )
    assert list(product) == list(multiplied)
    assert "proj.weight_fake_quant" in product
    reasons = {left.name: left.reason for left in product.coverage.left}
    assert reasons == {f"angles.{spelling}": "it sums nothing: an outer product with a buffer"}


WEIGHTS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "a parameter": (ANGLES["matmul"], nn.Parameter(FREQUENCIES)),
    "a matrix with one input": (lambda m, p: p.mT @ m.frequencies, nn.Buffer(FREQUENCIES[None])),
    "a vector that is summed": (lambda m, p: (p.T.expand(-1, 4) @ m.frequencies)[:, None], nn.Buffer(FREQUENCIES)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_learned_or_a_matrix_or_summed_stays_a_weight(kind: str) -> None:
    q = sq.quantize(rotary(*WEIGHTS[kind]), FOUR, example_args=torch.randn(2, 5, 8))
    assert "angles.frequencies_fake_quant" in q.plan
