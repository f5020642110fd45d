"""Equalization: which layers it finds, that the float model stays, and that ranges become equal."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms import equalizable, equalize
from sophq_func.algorithms._equalize import _equalized
from sophq_func.algorithms.chains import chains_of
from sophq_func.testing.models import convolutions, trained
from tests.helpers import same

PER_TENSOR = sq.QuantConfig(
    chip=None,
    strategy="CNN",
    weight=sq.override(bits=6, granularity=sq.PerTensor(), fake_quantize="fixed"),
    activation=sq.override(bits=8, fake_quantize="fixed"),
)


class Ways(nn.Module):
    """Depthwise, grouped and transposed convolutions, two readers of one value, pooling, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.group = nn.Conv2d(4, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.one, self.other = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.head = nn.Linear(3 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.leaky_relu(self.group(self.depth(x)))
        x = F.max_pool2d(F.relu(self.up(x)), 4)
        return self.head((F.relu(self.one(x)) * torch.sigmoid(self.other(x))).flatten(1))


class Flat(nn.Module):
    """A convolution whose places a linear layer reads behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Linear(4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)).flatten(1))


def uneven(model: nn.Module) -> nn.Module:
    """The model with output channels of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            shape = [1] * module.weight.ndim
            shape[axis] = -1
            size = torch.exp(1.5 * torch.randn(module.weight.shape[axis], generator=generator))
            module.weight.data.mul_(size.reshape(shape))
    return model


def test_every_kind_of_layer_is_found_or_left_with_a_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 2, 4, 4)
    model = trained(uneven(Ways()), x)
    q = sq.quantize(model, PER_TENSOR, example_args=(x,))
    reasons = equalizable(q, sq.params_of(model), x)
    assert {name.removesuffix(".weight_fake_quant"): bool(reason) for name, reason in reasons.items()} == {
        "stem": False,
        "depth": False,
        "group": False,
        "up": False,
        "one": True,
        "other": True,
        "head": True,
    }
    assert "mul" in reasons["one.weight_fake_quant"]
    assert "sigmoid" in reasons["other.weight_fake_quant"]
    assert "returns" in reasons["head.weight_fake_quant"]


@pytest.mark.parametrize("make", [Ways, Flat])
def test_the_float_model_stays_when_factors_move(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 2, 4, 4)
    model = trained(uneven(make()), x)
    q = sq.quantize(model, PER_TENSOR, example_args=(x,))
    params = sq.params_of(model)
    weights = {weight.site.quantizer: weight for weight in q.engine.weights}
    chains, _ = chains_of(q.engine.retrace(params, (x,), {}), weights)
    assert chains
    new = dict(params)
    for chain in chains:
        new.update(_equalized(new, chain))
    with torch.no_grad():
        target, moved = model(x), torch.func.functional_call(model, new, (x,))
    assert any(not torch.equal(new[name], params[name]) for name in params)
    torch.testing.assert_close(moved, target, rtol=0, atol=1e-4 * float(target.abs().max()))


def between() -> tuple[nn.Module, Tensor]:
    """Two layers whose ranges between them differ by much, and only there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    factor = torch.exp(2 * torch.randn(8))
    with torch.no_grad():
        model[0].weight.mul_(factor[:, None])
        model[0].bias.mul_(factor)
        model[2].weight.div_(factor)
    return model, torch.randn(32, 4)


def test_ranges_of_channels_become_equal_in_both_layers_and_outputs_come_closer() -> None:
    model, x = between()
    q = sq.quantize(model, PER_TENSOR, example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    new, better = equalize(q, params, qparams, [x], progress=False)
    torch.testing.assert_close(new["0.weight"].abs().amax(1), new["2.weight"].abs().amax(0))
    with torch.no_grad():
        target = model(x)
    before, after = ((q.apply(p, qp, x) - target).square().mean() for p, qp in ((params, qparams), (new, better)))
    assert after < 0.5 * before


def test_relu6_and_batchnorms_that_are_not_folded_are_left(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3)).eval()
    x = torch.randn(16, 4)
    q = sq.quantize(model, PER_TENSOR, example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with caplog.at_level(logging.INFO, "sophq_func.algorithms"):
        result = equalize(q, params, qparams, [x], progress=False)
    same(result, (params, qparams))
    assert "relu6" in caplog.text


def test_padding_with_another_number_than_0_is_refused() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.pad(F.relu(self.first(x)), (1, 1, 1, 1), value=1.0))

    x = torch.randn(4, 2, 4, 4)
    q = sq.quantize(uneven(Padded()).eval(), PER_TENSOR, example_args=(x,))
    assert "pad" in equalizable(q, sq.params_of(Padded()), x)["first.weight_fake_quant"]


def test_only_qparams_of_what_changed_are_calibrated_anew() -> None:
    subject = convolutions()
    _, qparams = equalize(subject.q, subject.params, subject.qparams, subject.batches, progress=False)
    for name in ("x.post_act_fake_quantizer", "head.weight_fake_quant"):
        same(qparams[name], subject.qparams[name])
