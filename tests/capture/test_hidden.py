"""Calls that torch shows to no mode are one call each, and what a checkpoint computes again is what the run computed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import checkpoint

import sophq_func as sq
from sophq_func.capture import hidden
from tests.helpers import DEFAULT, ready, unchanged

LEARNED = sq.QuantConfig(activation=sq.override(fake_quantize=sq.fake_quantize.learnable()))


class Squares(torch.autograd.Function):
    """``x**2 @ w``: products inside, which a plan must not see."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.matmul(x * x, w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * x * (gradient @ w.t()), (x * x).t() @ gradient


class Relu(torch.autograd.Function):
    """The old style, and a name that means something to a plan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x > 0)


relu = type("relu", (Relu,), {})


class Rounded(torch.autograd.Function):
    """Computes where no function of torch is called."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().round(1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Net(nn.Module):
    """Two layers, and what a forward makes of them."""

    def __init__(self, f: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        # without biases, which are rounded
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.w, self.f = nn.Parameter(torch.randn(8, 8)), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self, self.a(x)))


OPAQUE: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "a Function with products": (lambda m, x: Squares.apply(x, m.w), "Squares"),
    "between products of the model": (lambda m, x: Squares.apply(x, m.w) * 1.0, "mul"),
    "a Function of the old style": (lambda m, x: Relu.apply(x), "Relu"),
    "a Function with the name of an operation": (lambda m, x: relu.apply(x), "relu_function"),
    "a Function that calls nothing of torch": (lambda m, x: Rounded.apply(x), "Rounded"),
    "a scripted function": (lambda m, x: swish(x), "swish"),
    "torch.cond": (lambda m, x: torch.cond(x.sum() > -1e9, lambda x: x @ m.w, lambda x: -x, (x,)), "cond"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_opaque_call_makes_one_value_and_nothing_inside_is_quantized(name: str) -> None:
    forward, value = OPAQUE[name]
    model, x = Net(forward).eval(), torch.randn(5, 8)
    r = ready(model, x)
    weights = ["a.weight_fake_quant", "b.weight_fake_quant"]
    assert sorted(r.q.plan) == sorted([*weights, "x.post_act_fake_quantizer", f"{value}.post_act_fake_quantizer"])
    quantized = r.q.capture(r.params, r.qparams, x)
    h = F.linear(quantized["x.post_act_fake_quantizer"][1], quantized[weights[0]][1])
    seen = quantized[f"{value}.post_act_fake_quantizer"]
    torch.testing.assert_close(seen[0], forward(model, h))
    torch.testing.assert_close(r(x), F.linear(seen[1], quantized[weights[1]][1]))


@pytest.mark.parametrize("name", [name for name in OPAQUE if name != "torch.cond"])
def test_learned_scales_around_an_opaque_call_have_gradients(name: str) -> None:
    r = ready(Net(OPAQUE[name][0]).eval(), x := torch.randn(5, 8), config=LEARNED)
    learned, rest = r.q.split(r.qparams)
    learned = {key: value.clone().requires_grad_() for key, value in learned.items()}
    r.q.apply(r.params, sq.merge(learned, rest), x).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in learned.values())


@pytest.mark.parametrize("name", ["a Function with products", "between products of the model", "a scripted function"])
def test_torch_func_sees_the_same_opaque_calls_as_autograd(name: str) -> None:
    r, x = ready(Net(OPAQUE[name][0]).eval(), torch.randn(5, 8)), torch.randn(5, 8)
    leaves = {key: value.clone().requires_grad_() for key, value in r.params.items()}
    r.q.apply(leaves, r.qparams, x).square().sum().backward()
    actual = grad(lambda params: r.q.apply(params, r.qparams, x).square().sum())(r.params)
    torch.testing.assert_close(
        actual,
        {key: value.grad for key, value in leaves.items() if value.grad is not None}
        | {key: torch.zeros_like(value) for key, value in leaves.items() if value.grad is None},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_function_that_a_compiler_looks_into_is_refused() -> None:
    r, x = ready(Net(OPAQUE["a Function of the old style"][0]).eval(), torch.randn(5, 8)), torch.randn(5, 8)
    with pytest.raises(Exception, match="shows no call of it"):
        torch.compile(r.q.apply, backend="eager", fullgraph=True)(r.params, r.qparams, x)


def attend(model: Net, x: Tensor) -> Tensor:
    heads = x.view(1, 2, -1, 4)
    return flex_attention(heads, heads, heads, score_mod=lambda s, b, h, q, k: s + (q - k)).reshape(-1, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_operands_of_flex_attention_are_quantized_like_those_of_the_plain_one() -> None:
    model, x = Net(attend).eval(), torch.randn(4, 8)
    r = ready(model, x)
    assert {"a.post_act_fake_quantizer", "flex_attention.0.post_act_fake_quantizer"} <= r.q.plan.keys()
    compiled = torch.compile(r.q.apply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(r.params, r.qparams, x), r(x))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_a_model_compiles_itself_is_quantized_as_it_is_written(fullgraph: bool) -> None:
    def inner(model: Net, x: Tensor) -> Tensor:
        return torch.tanh(x) @ model.w

    def outer(model: Net, x: Tensor) -> Tensor:
        return torch.compile(inner, backend="eager", fullgraph=fullgraph)(model, x)

    x = torch.randn(5, 8)
    r, plain = ready(Net(outer).eval(), x), ready(Net(inner).eval(), x)
    assert list(r.q.plan) == list(plain.q.plan)
    torch.testing.assert_close(r(x), plain(x))


# ScriptModules


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "several layers": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
    "a layer": lambda: nn.Linear(8, 8),
    "a layer without parameters": lambda: nn.ReLU(),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", [torch.jit.script, lambda module: torch.jit.trace(module, torch.randn(2, 8))])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_script_module_is_one_call_that_reads_the_params_it_is_given(how: Callable[..., nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    block, x = BLOCKS[kind]().eval(), torch.randn(5, 8)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), how(block), nn.Linear(8, 3, bias=False)).eval()
    with unchanged(model):
        r = ready(model, x)
    values = [f"{name}_fake_quantizer" for name in ("input.post_act", "1.post_act")]
    assert sorted(r.q.plan) == sorted(["0.weight_fake_quant", "2.weight_fake_quant", *values])
    assert all(parameter.is_meta for parameter in r.q.engine.skeleton.module.parameters())
    captured = r.q.capture(r.params, r.qparams, x)
    h = F.linear(captured[values[0]][1], captured["0.weight_fake_quant"][1])
    torch.testing.assert_close(captured[values[1]][0], block(h))
    zeros = {name: torch.zeros_like(value) for name, value in r.params.items()}
    assert r.q.apply(zeros, r.qparams, x).abs().max() == 0
    assert torch.equal(copy.deepcopy(r.q).apply(r.params, r.qparams, x), r(x))
    assert r.q.train().apply(r.params, r.qparams, x).shape == (5, 3)


def test_a_model_that_is_a_script_module_itself_is_refused() -> None:
    with pytest.raises(sq.PlanError, match="quantize the module from which it was scripted"):
        sq.quantize(torch.jit.script(nn.Linear(8, 8)), DEFAULT, example_args=(torch.randn(5, 8),))


# Checkpoints


class Deep(nn.Module):
    """Blocks, each in a checkpoint or not; with dropout, a shared layer, a Function, and a block inside a block."""

    def __init__(self, how: dict[str, Any] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU()) for _ in range(2)
        )
        self.head, self.how = nn.Linear(8, 8), how

    def run(self, f: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return f(*args) if self.how is None else checkpoint.checkpoint(f, *args, **self.how)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        return Relu.apply(self.head(x)) @ self.head.weight + self.run(self.blocks[1], y)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.run(self.blocks[0], x))
        return self.head(self.run(self.part, h, h))


KINDS = {
    "reentrant": {"use_reentrant": True},
    "not": {"use_reentrant": False},
    "late": {"use_reentrant": False, "early_stop": False},
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_inside_gives_the_gradients_of_the_model_without_it(kind: str, training: bool) -> None:
    x = torch.randn(6, 8)
    results = []
    for how in (None, KINDS[kind]):
        r = ready(Deep(how).train(training), x, config=LEARNED)
        learned, rest = r.q.split(r.qparams)
        leaves = {key: value.clone().requires_grad_() for key, value in learned.items()}
        params = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in r.params.items()}
        torch.manual_seed(3)
        output, after = r.q.apply_and_update(params, sq.merge(leaves, rest), x)
        buffers = {name: after[name].clone() for name in r.params if "running" in name}
        output.square().sum().backward()
        assert all(torch.equal(after[name], value) for name, value in buffers.items())
        gradients = {key: value.grad for key, value in {**params, **leaves}.items() if value.grad is not None}
        results.append((list(r.q.plan), output.detach(), buffers, gradients))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[1][1:], results[0][1:])
    assert len(results[0][3]) > 10


def test_two_runs_may_be_pending_before_their_checkpoints_run_again() -> None:
    x = torch.randn(6, 8)
    r = ready(Deep(KINDS["not"]).eval(), x)
    params = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in r.params.items()}
    halves = {key: value.detach() / 2 for key, value in params.items()}
    first = r.q.apply(params, r.qparams, x).sum()
    r.q.apply({**halves, "head.bias": params["head.bias"]}, r.qparams, x).sum()
    first.backward()
    alone = {**r.params, "head.weight": r.params["head.weight"].clone().requires_grad_()}
    ready(Deep(None).eval(), x).q.apply(alone, r.qparams, x).sum().backward()
    torch.testing.assert_close(params["head.weight"].grad, alone["head.weight"].grad)


# What is replaced


def originals() -> tuple[object, ...]:
    return (*checkpoint.__dict__["CheckpointFunction"].__mro__, torch.autograd.Function.__dict__["apply"])


def test_torch_is_as_before_after_a_run_and_after_an_error_in_one() -> None:
    before = originals()
    r = ready(Net(OPAQUE["a Function with products"][0]).eval(), torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="shapes"):
        r(torch.randn(5, 7))
    assert originals() == before
    assert not hidden.watching()


def test_other_threads_compute_as_before_while_a_run_is_in_progress() -> None:
    x, results = torch.randn(5, 8), []

    def elsewhere(model: Net, y: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: results.append((Relu.apply(x), swish(x))))
        thread.start()
        thread.join()
        return Relu.apply(y)

    r = ready(Net(elsewhere).eval(), x)
    assert [name for name in r.q.plan if "Relu" in name] == ["Relu.post_act_fake_quantizer"]
    for relu_of_x, swish_of_x in results:
        torch.testing.assert_close((relu_of_x, swish_of_x), (x.relu(), F.silu(x)))
