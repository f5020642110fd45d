"""Every transform of torch.func, and torch.compile, around whole models; each compared with a loop, eager or differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

import sophq_func as sq


class ConvNet(nn.Module):
    """A residual block and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(x + self.conv2(x)).mean((2, 3)))


class Subject(NamedTuple):
    """A quantized model, calibrated, and a batch for it."""

    model: nn.Module
    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]
    batch: dict[str, Tensor]
    read: Callable[[Any], Tensor]

    def loss(self, scales: dict[str, Tensor], rest: dict[str, Tensor], params: dict[str, Tensor]) -> Tensor:
        return self.read(self.q.apply(params, sq.merge(scales, rest), **self.batch)).square().mean()


def subject(model: nn.Module, config: sq.QuantConfig, read: Callable[[Any], Tensor], **batch: Tensor) -> Subject:
    model.eval()
    q, params = sq.quantize(model, config, example_kwargs=batch), sq.params_of(model)
    return Subject(model, q, params, q.calibrate(params, [batch]), batch, read)


def convnet() -> Subject:
    torch.manual_seed(0)
    model = ConvNet()
    config = sq.QuantConfig(strategy="CNN", activation=sq.override(symmetric=False))
    return subject(model, config, lambda out: out, x=torch.randn(4, 3, 6, 6))


def resnet() -> Subject:
    torch.manual_seed(0)
    shape = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = ResNetForImageClassification(shape)
    return subject(model, sq.QuantConfig(chip="BM1690"), lambda out: out.logits, pixel_values=torch.randn(2, 3, 32, 32))


def bert() -> Subject:
    torch.manual_seed(0)
    shape = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=16,
    )
    ids = torch.randint(0, 50, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    read = lambda out: out.last_hidden_state  # noqa: E731
    return subject(BertModel(shape), sq.QuantConfig(), read, input_ids=ids, attention_mask=mask)


@pytest.fixture(scope="module", params=[convnet, resnet, bert], ids=["convnet", "resnet", "bert"])
def any_model(request: pytest.FixtureRequest) -> Iterator[Subject]:
    yield request.param()


@pytest.fixture(scope="module")
def conv() -> Subject:
    return convnet()


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def test_quantized_output_is_close_to_the_float_model(any_model: Subject) -> None:
    s = any_model
    out = s.read(s.q.apply(s.params, s.qparams, **s.batch))
    expected = s.read(s.model(**s.batch))
    assert F.cosine_similarity(out.flatten(), expected.flatten(), dim=0) > 0.99
    assert not torch.equal(out, expected)


def test_compiled_forward_agrees_with_eager(any_model: Subject) -> None:
    s = any_model

    def forward(params: Any, qparams: Any, batch: Any) -> Tensor:
        return s.read(s.q.apply(params, qparams, **batch))

    actual = compiled(forward)(s.params, s.qparams, s.batch)
    torch.testing.assert_close(actual, forward(s.params, s.qparams, s.batch), rtol=1e-5, atol=1e-6)


def test_compiled_gradient_agrees_with_eager(any_model: Subject) -> None:
    s = any_model
    scales, rest = s.q.split(s.qparams)
    gradient = grad(s.loss)
    expected, actual = gradient(scales, rest, s.params), compiled(gradient)(scales, rest, s.params)
    assert any(bool(g.abs().sum() > 0) for g in expected.values())
    for name in scales:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_compiled_observe_agrees_with_eager(any_model: Subject) -> None:
    s = any_model
    ostate = s.q.init(s.params)

    def observe(params: Any, ostate: Any, batch: Any) -> Any:
        return s.q.observe(params, ostate, **batch)[1]

    torch.testing.assert_close(compiled(observe)(s.params, ostate, s.batch), observe(s.params, ostate, s.batch))


def test_gradient_of_weights_is_finite_and_reaches_every_quantized_weight(any_model: Subject) -> None:
    s = any_model
    scales, rest = s.q.split(s.qparams)
    floats = {n: p for n, p in s.params.items() if p.is_floating_point()}
    others = {n: p for n, p in s.params.items() if not p.is_floating_point()}
    gradient = grad(lambda floats: s.loss(scales, rest, floats | others))(floats)
    weights = {s.q.plan.site(n).parameter for n in s.q.plan if s.q.plan.site(n).role == "weight"} - {""}
    assert all(bool(g.isfinite().all()) for g in gradient.values())
    unread = {"pooler.dense.weight"}
    assert {n for n in weights if not bool(gradient[n].abs().sum() > 0)} == weights & unread


def test_jvp_agrees_with_vjp(any_model: Subject) -> None:
    s = any_model
    scales, rest = s.q.split(s.qparams)
    tangent = {name: torch.ones_like(value) * value for name, value in scales.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value, forward = jvp(lambda t: s.loss(t, rest, s.params), (scales,), (tangent,))
        _, pull = vjp(lambda t: s.loss(t, rest, s.params), scales)
        (backward,) = pull(torch.ones_like(value))
    total = torch.stack([(backward[n] * tangent[n]).sum() for n in scales]).sum()
    torch.testing.assert_close(forward, total, rtol=1e-3, atol=1e-6)


def test_vmap_over_examples_equals_the_loop(conv: Subject) -> None:
    images = conv.batch["x"]

    def one(image: Tensor) -> Tensor:
        return conv.q.apply(conv.params, conv.qparams, image[None])[0]

    torch.testing.assert_close(vmap(one)(images), torch.stack([one(i) for i in images]), rtol=1e-5, atol=1e-5)


def test_vmap_over_params_equals_the_loop(conv: Subject) -> None:
    many = {n: torch.stack([p, p * 1.25]) if p.is_floating_point() else torch.stack([p, p]) for n, p in conv.params.items()}

    def run(params: dict[str, Tensor]) -> Tensor:
        return conv.q.apply(params, conv.qparams, **conv.batch)

    expected = torch.stack([run({n: p[i] for n, p in many.items()}) for i in range(2)])
    torch.testing.assert_close(vmap(run)(many), expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_qparams_equals_the_loop(conv: Subject) -> None:
    scales, rest = conv.q.split(conv.qparams)
    many = {name: torch.stack([value, value * 1.5, value * 0.5]) for name, value in scales.items()}

    def run(scales: dict[str, Tensor]) -> Tensor:
        return conv.q.apply(conv.params, sq.merge(scales, rest), **conv.batch)

    expected = torch.stack([run({n: v[i] for n, v in many.items()}) for i in range(3)])
    torch.testing.assert_close(vmap(run)(many), expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_observe_equals_the_loop(conv: Subject) -> None:
    images = conv.batch["x"]
    ostate = conv.q.init(conv.params)

    def one(image: Tensor) -> Any:
        return conv.q.observe(conv.params, ostate, image[None])[1]["x.post_act_fake_quantizer"].hi

    assert torch.equal(vmap(one)(images), torch.stack([one(i) for i in images]))


def test_per_example_gradients_equal_the_loop(conv: Subject) -> None:
    scales, rest = conv.q.split(conv.qparams)

    def loss(scales: dict[str, Tensor], image: Tensor) -> Tensor:
        return conv.q.apply(conv.params, sq.merge(scales, rest), image[None]).square().sum()

    together = vmap(grad(loss), (None, 0))(scales, conv.batch["x"])
    one_by_one = [grad(loss)(scales, image) for image in conv.batch["x"]]
    for name in scales:
        expected = torch.stack([g[name] for g in one_by_one])
        torch.testing.assert_close(together[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_hessian_vector_product_equals_differences_of_the_gradient_in_the_head(conv: Subject) -> None:
    """The loss is smooth in the bias of the head when that layer is left float: there differences are exact."""
    config = sq.QuantConfig(strategy="CNN", rules=(sq.Rule(name="head", weight=None, requests=False),))
    q = sq.quantize(conv.model, config, example_kwargs=conv.batch)
    qparams = q.calibrate(conv.params, [conv.batch])

    def loss(bias: Tensor) -> Tensor:
        return q.apply({**conv.params, "head.bias": bias}, qparams, **conv.batch).square().mean().exp()

    bias = conv.params["head.bias"]
    direction = torch.linspace(-1, 1, bias.numel())
    product = jvp(grad(loss), (bias,), (direction,))[1]
    step = 1e-2
    expected = (grad(loss)(bias + step * direction) - grad(loss)(bias - step * direction)) / (2 * step)
    torch.testing.assert_close(product, expected, rtol=2e-3, atol=1e-4)


def test_hessian_vector_product_over_scales_is_finite_and_float32(conv: Subject) -> None:
    scales, rest = conv.q.split(conv.qparams)
    tangent = {name: torch.ones_like(value) for name, value in scales.items()}
    product = jvp(grad(lambda t: conv.loss(t, rest, conv.params)), (scales,), (tangent,))[1]
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in product.values())
    assert any(bool(p.abs().sum() > 0) for p in product.values())


def test_autocast_and_inference_mode(conv: Subject) -> None:
    expected = conv.q.apply(conv.params, conv.qparams, **conv.batch)
    with torch.inference_mode():
        assert torch.equal(conv.q.apply(conv.params, conv.qparams, **conv.batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = conv.q.apply(conv.params, conv.qparams, **conv.batch)
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


def test_checkpoint_around_apply_gives_the_same_gradient(conv: Subject) -> None:
    def gradient(wrap: Callable[..., Tensor]) -> Tensor:
        weight = conv.params["conv1.weight"].clone().requires_grad_()

        def run(w: Tensor) -> Tensor:
            return conv.q.apply({**conv.params, "conv1.weight": w}, conv.qparams, **conv.batch).square().sum()

        return torch.autograd.grad(wrap(run, weight), weight)[0]

    def checkpointed(run: Callable[..., Tensor], weight: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(run, weight, use_reentrant=False)

    assert torch.equal(gradient(lambda run, w: run(w)), gradient(checkpointed))


def test_torch_optim_trains_leaf_parameters(conv: Subject) -> None:
    params = {
        n: nn.Parameter(p.clone()) if p.is_floating_point() and "running" not in n else p for n, p in conv.params.items()
    }
    scales, rest = conv.q.split(conv.qparams)
    scales = {n: s.clone().requires_grad_() for n, s in scales.items()}
    leaves = [p for p in params.values() if p.requires_grad] + list(scales.values())
    optimizer = torch.optim.SGD(leaves, lr=1e-2)
    before = conv.loss(scales, rest, params).detach()
    for _ in range(5):
        optimizer.zero_grad()
        conv.loss(scales, rest, params).backward()
        optimizer.step()
    assert conv.loss(scales, rest, params).detach() < before
