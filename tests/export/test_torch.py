"""``export.torch``: the operators of PT2E around float operations, with the values of ``q.apply``."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import ready, unchanged

AFFINE = sq.override(symmetric=False)
QUANTIZE, DEQUANTIZE = "quantize_per_tensor", "dequantize_per_tensor"


class Net(nn.Module):
    """Convolutions with a BatchNorm, a residual addition and pooling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.conv2, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.bn.running_mean.uniform_(-0.5, 0.5)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.bn(self.conv1(x)).relu())
        return self.head((self.conv2(y) + y).relu().mean((2, 3)))


def image(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    calls = (node.target for node in program.graph.nodes if node.op == "call_function")
    return Counter(target.overloadpacket.__name__ for target in calls if isinstance(target, torch._ops.OpOverload))


@pytest.mark.parametrize(
    "config",
    [
        sq.QuantConfig(),
        sq.QuantConfig(activation=AFFINE),
        sq.QuantConfig(chip="BM1690", strategy="CNN"),
        sq.QuantConfig(weight=sq.override(bits=4, granularity=sq.PerTensor()), activation=sq.override(bits=5)),
    ],
    ids=["symmetric", "affine", "cnn", "w4a5"],
)
def test_the_program_computes_what_apply_computes(config: sq.QuantConfig) -> None:
    model, x = Net().eval(), image()
    made = ready(model, x, config=config)
    with unchanged(model, made.params, {"x": x}):
        program = sq.export.torch(made.q, made.params, made.qparams, x)
    x = 1.5 * x  # codes clip
    expected, actual = made(x).detach(), program.module()(x)
    # the folded BatchNorm rounds otherwise: a code may fall on the other side of a tie, a step among 64 that are averaged
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(expected.abs().amax()) * 0.01)


def test_it_has_the_form_that_inductor_looks_for() -> None:
    made = ready(Net().eval(), image(), config=sq.QuantConfig(activation=AFFINE))
    program = sq.export.torch(made.q, made.params, made.qparams, image())
    found = operators(program)
    assert found["batch_norm"] == 0 and found["dequantize_per_channel"] == 3
    assert found[QUANTIZE] == found[DEQUANTIZE]
    products = [node for node in program.graph.nodes if str(node.target) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(products) == 3
    for node in products:
        assert DEQUANTIZE in str(node.args[0].target), "pooling and views have a grid behind them, too"
        assert "dequantize_per_channel" in str(node.args[1].target)
        assert node.args[2] is not None
    codes = [tensor for tensor in program.state_dict.values() if tensor.dtype == torch.int8 and tensor.ndim > 1]
    assert sorted(tensor.ndim for tensor in codes) == [2, 4, 4]


def test_batches_of_any_size_on_request() -> None:
    made = ready(Net().eval(), image(), config=sq.QuantConfig(activation=AFFINE))
    module = sq.export.torch(made.q, made.params, made.qparams, image(1), dynamic_batch=True).module()
    for size in (1, 3):
        x = image(size)
        torch.testing.assert_close(module(x), made(x).detach(), rtol=0, atol=0.01)


def test_what_it_cannot_spell_is_refused_or_simulated() -> None:
    config = sq.QuantConfig(weight=sq.override(fake_quantize=sq.fake_quantize.e4m3()), activation=sq.override(bits=12))
    made = ready(Net().eval(), image(), config=config)
    with pytest.raises(sq.ConfigError, match="problems") as error:
        sq.export.torch(made.q, made.params, made.qparams, image())
    for name in made.q.plan:
        assert f"{name}: export.torch cannot express this quantizer" in str(error.value)
    program, x = sq.export.torch(made.q, made.params, made.qparams, image(), simulate=True), image()
    assert not operators(program)[QUANTIZE]
    torch.testing.assert_close(program.module()(x), made(x).detach(), rtol=1e-4, atol=1e-3)
