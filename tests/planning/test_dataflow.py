"""The strategies Dataflow and Layers: which operands are quantized, where, and once each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import ready

AFTER = ".post_act_fake_quantizer"


class Net(nn.Module):
    """A forward given as a function, and the layers that it uses."""

    def __init__(self, f: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.f(self, *inputs)


def plan(
    f: Callable[..., Tensor], *inputs: Tensor, chip: str | None = None, strategy: str = "Dataflow", **layers: nn.Module
) -> sq.Plan:
    config = sq.QuantConfig(chip=chip, strategy=strategy)
    return sq.plan(sq.trace(Net(f, **layers).eval(), inputs), config)


def quantized(found: sq.Plan) -> set[str]:
    """The values with a quantizer behind them, and the weights; collected inputs by their number."""
    return {name.removesuffix(AFTER).removeprefix("inputs.") for name in found}


A, B, C = (torch.rand(2, 3, 4, 4) for _ in range(3))
TWO: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "matmul": (lambda m, a, b: a @ b, {"0", "1"}),
    "bmm": (lambda m, a, b: torch.bmm(a.flatten(0, 1), b.flatten(0, 1)), {"0", "1"}),
    "baddbmm": (lambda m, a, b: torch.baddbmm(a[0], a[0], b[0]), {"0", "1"}),
    "einsum": (lambda m, a, b: torch.einsum("bcij,bcjk->bcik", a, b), {"0", "1"}),
    "sdpa": (lambda m, a, b: F.scaled_dot_product_attention(a, b, a + 1), {"0", "1", "add"}),
    "stack": (lambda m, a, b: torch.stack([a, b.relu()]), {"0", "relu"}),
    "cat behind views": (lambda m, a, b: torch.cat([a.flatten(1), b.transpose(1, 2).flatten(1)], 1), {"0", "1"}),
    "one tensor twice": (lambda m, a, b: (a @ b) @ b.mT, {"0", "1", "matmul"}),
    "sum of two": (lambda m, a, b: a + b, {"0", "1"}),
    "sum with a mask": (lambda m, a, b: a + b[:1, :1], set()),
    "scaled": (lambda m, a, b: a * 2.0 + 1.0, set()),
    "layer_norm": (lambda m, a, b: F.layer_norm(a, (4,)), {"0"}),
    "group_norm": (lambda m, a, b: F.group_norm(a, 3), {"0"}),
    "instance_norm": (lambda m, a, b: F.instance_norm(a), {"0"}),
    "rms_norm": (lambda m, a, b: F.rms_norm(a, (4,)), {"0"}),
    "max pooling moves data": (lambda m, a, b: F.max_pool2d(a, 2) @ F.max_pool2d(b, 2), {"0", "1"}),
    "average": (lambda m, a, b: F.avg_pool2d(a, 2), {"0"}),
}


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.replace(" ", "_"))
def test_operands_are_quantized_once_at_their_source(case: str) -> None:
    f, expected = TWO[case]
    assert quantized(plan(f, A, B)) == expected


NORMS = {
    "batch": nn.BatchNorm2d(3),
    "group": nn.GroupNorm(3, 3),
    "instance": nn.InstanceNorm2d(3),
    "layer": nn.LayerNorm(4),
    "rms": nn.RMSNorm(4),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norm_modules_count_as_their_functions(kind: str) -> None:
    assert quantized(plan(lambda m, a: m.norm(a), A, norm=NORMS[kind])) == {"0"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(3, 4, 3), (2, 3, 8)), (nn.Conv3d(3, 4, 3), (2, 3, 4, 4, 4)), (nn.ConvTranspose1d(3, 4, 3), (2, 3, 8))],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_of_every_dimension_have_quantized_weights(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert quantized(plan(lambda m, a: m.layer(a), torch.rand(shape), layer=layer)) == {"0", "layer.weight_fake_quant"}


def test_embeddings_are_quantized_as_weights() -> None:
    found = plan(lambda m, i: m.head(m.table(i)), torch.tensor([[1, 2]]), table=nn.Embedding(5, 4), head=nn.Linear(4, 2))
    assert quantized(found) == {"table.weight_fake_quant", "table", "head.weight_fake_quant"}


BOUNDED: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda m, a, b: torch.softmax(a, -1) @ b,
    "method": lambda m, a, b: a.softmax(-1) @ b,
    "behind dropout": lambda m, a, b: F.dropout(F.softmax(a, -1), 0.1, False) @ b,
    "sigmoid": lambda m, a, b: torch.sigmoid(a) * b,
    "module": lambda m, a, b: m.act(a) * b,
}


@pytest.mark.parametrize("case", BOUNDED, ids=lambda case: case.replace(" ", "_"))
def test_what_lies_between_0_and_1_needs_no_calibration(case: str) -> None:
    found = plan(BOUNDED[case], A, B, act=nn.Sigmoid())
    (name,) = (name for name in found if "softmax" in name or "sigmoid" in name or "act." in name)
    assert found[name].observer == sq.observers.fixed_range(lo=0.0, hi=1.0)
    assert not found[name].scheme.symmetric
    assert found.reasons(name)["observer"] == "strategy Dataflow: lies in [0, 1]"
    q = sq.build(Net(BOUNDED[case], act=nn.Sigmoid()).eval(), found)
    qparams = q.calibrate({}, [(A, B)], progress=False)[name]
    torch.testing.assert_close(qparams.scale, torch.tensor(1 / 255))
    assert int(qparams.zero_point) == 0


def test_a_chip_keeps_its_grid_for_what_lies_between_0_and_1() -> None:
    found = plan(BOUNDED["softmax"], A, B, chip="BM1690")
    assert found["softmax" + AFTER].scheme.symmetric
    assert found["softmax" + AFTER].observer == sq.observers.fixed_range(lo=0.0, hi=1.0)


@pytest.mark.parametrize("by", ["rule", "config"])
def test_what_the_user_says_is_stronger_than_a_known_range(by: str) -> None:
    change = sq.override(observer=sq.observers.mse(), symmetric=True)
    config = (
        sq.QuantConfig(activation=change)
        if by == "config"
        else sq.QuantConfig(rules=(sq.Rule(type=F.softmax, activation=change),))
    )
    found = sq.plan(sq.trace(Net(BOUNDED["softmax"]), (A, B)), config)["softmax" + AFTER]
    assert found.observer == sq.observers.mse()
    assert found.scheme.symmetric


READ: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "layers": (
        lambda m, x: m.fc(m.conv(x).relu().flatten(1)),
        {"x", "conv.weight_fake_quant", "flatten", "fc.weight_fake_quant"},
    ),
    "behind pooling": (
        lambda m, x: m.conv(F.max_pool2d(F.pad(x, (0, 4, 0, 4)), 2)),
        {"max_pool2d", "conv.weight_fake_quant"},
    ),
    "one tensor for two layers": (
        lambda m, x: m.conv(x) + m.conv2(x),
        {"x", "conv.weight_fake_quant", "conv2.weight_fake_quant"},
    ),
    "functions": (lambda m, x: F.linear(x, m.fc.weight[:, :4]), {"x", "fc.weight_fake_quant"}),
    "nothing else": (lambda m, x: torch.softmax(x @ x.mT, -1).cumsum(0) * x + x.mean(), set()),
}


@pytest.mark.parametrize("name", READ)
def test_layers_quantizes_what_layers_read(name: str) -> None:
    f, expected = READ[name]
    layers = {"conv": nn.Conv2d(3, 2, 1), "conv2": nn.Conv2d(3, 2, 1), "fc": nn.Linear(32, 2)}
    found = plan(lambda m, x: f(m, x), A, strategy="Layers", **layers)
    assert {n.removeprefix("inputs.0").replace(AFTER, "") or "x" for n in found} == expected


def test_layers_rounds_no_bias() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    q = sq.quantize(model, sq.QuantConfig(strategy="Layers"), example_args=(x,))
    assert q.plan.site("weight_fake_quant").source == ""


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "new_zeros": lambda x: x.new_zeros(x.shape),
    "new_ones": lambda x: x.new_ones(x.shape),
    "new_full": lambda x: x.new_full(x.shape, 2.0),
    "new_tensor": lambda x: x.new_tensor(1.0).expand(x.shape),
    "zeros_like": lambda x: torch.zeros_like(x),
    "ones_like": lambda x: torch.ones_like(x)[:],
    "full_like": lambda x: torch.full_like(x, 3.0) + 1,
    "empty_like": lambda x: torch.empty_like(x).fill_(1.0),
    "zeros": lambda x: torch.zeros(x.shape),
}


@pytest.mark.parametrize("case", CONSTANTS)
@pytest.mark.parametrize("strategy", ["Dataflow", "CNN"])
def test_constants_are_no_values(case: str, strategy: str) -> None:
    def f(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.cat([x, CONSTANTS[case](x)], 1))

    chip = "BM1690" if strategy == "CNN" else None
    found = plan(f, torch.rand(2, 4), head=nn.Linear(8, 3), chip=chip, strategy=strategy)
    if (strategy, case) != ("CNN", "zeros"):  # the reference's list has what no operand is known of
        assert not any(name.startswith(case) for name in found)
    assert "0" in quantized(found)


@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.head(torch.cat([x, x.new_zeros(2, 4)], 1)),
        lambda m, x: m.head(torch.cat([x, x.new_ones(2, 4).tanh()], 1)),
        lambda m, x: m.head(torch.cat([x.new_zeros(2, 4), x], 1)) + x.new_full((2, 3), 0.5),
    ],
    ids=["padding", "computed", "twice"],
)
def test_models_with_constants_are_compiled_and_exported(f: Callable[..., Tensor], fresh_dynamo: None) -> None:
    x = torch.rand(2, 4)
    made = ready(Net(f, head=nn.Linear(8, 3)).eval(), x)
    compiled = torch.compile(made.q.apply, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(made.params, made.qparams, x), made(x))
    program = sq.export.torch(made.q, made.params, made.qparams, x)
    torch.testing.assert_close(program.module()(x), made(x))
