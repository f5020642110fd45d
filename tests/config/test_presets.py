"""Presets: what each plans, on a perceptron, a convolutional network and a transformer."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq

LEAST = {
    "fp8": 20.0,
    "mxfp4": 8.0,
    "nvfp4": 9.0,
    "w4a4_lsq": 6.0,
    "w4a16": 11.0,
    "w4a8": 11.0,
    "w8a8": 30.0,
    "w8a8_per_token": 30.0,
}
"""Decibels of signal to noise of the output. The networks have 2 to 5 more, since another order of sums moves some codes."""
OPTIONS = {"w4a16": {"group": 8}, "w4a8": {"group": 8}}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 32), nn.Linear(32, 11)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


@functools.cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU())
    model, x = {
        "perceptron": (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(16, 64)),
        "convolutions": (nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 8)), torch.randn(4, 8, 6, 6)),
        "transformer": (Tiny(), torch.randint(11, (4, 6))),
    }[name]
    return model.eval(), x


@pytest.mark.parametrize("net", ["perceptron", "convolutions", "transformer"])
@pytest.mark.parametrize("name", sq.presets.__all__)
def test_every_preset_quantizes_every_network(name: str, net: str) -> None:
    model, x = network(net)
    q = sq.quantize(model, getattr(sq.presets, name)(**OPTIONS.get(name, {})), example_args=(x,))
    params = sq.params_of(model)
    expected = model(x).detach()
    noise = q.apply(params, q.calibrate(params, [x], progress=False), x).detach() - expected
    ratio = 10 * math.log10(float(expected.square().sum() / noise.square().sum()))
    assert LEAST[name] < ratio < 60
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert {f"{path}.weight_fake_quant" for path in layers if "self_attn" not in path} <= set(q.plan)


def test_each_is_what_its_name_says() -> None:
    presets = {name: getattr(sq.presets, name)() for name in sq.presets.__all__}
    bits = {
        name: (config.weight.scheme.bits, config.activation and config.activation.scheme.bits)
        for name, config in presets.items()
    }
    assert (bits["w8a8"], bits["w8a8_per_token"], bits["w4a4_lsq"], bits["w4a16"]) == ((8, 8), (8, 8), (4, 4), (4, None))
    assert presets["w4a16"].weight.scheme.granularity == sq.PerGroup(128)
    assert presets["w4a8"].weight == presets["w4a16"].weight
    assert presets["w4a8"].activation == presets["w8a8_per_token"].activation
    assert presets["w4a4_lsq"].weight.fake_quantize == sq.fake_quantize.lsq()
    assert presets["fp8"].weight.fake_quantize == presets["fp8"].activation.fake_quantize == sq.fake_quantize.e4m3()
    for name in ("mxfp4", "nvfp4"):
        assert presets[name].weight.fake_quantize.name == presets[name].activation.fake_quantize.name == name


def test_options() -> None:
    assert sq.presets.w4a16(32, symmetric=False).weight.scheme == sq.QScheme(
        bits=4, symmetric=False, granularity=sq.PerGroup(32)
    )
    assert sq.presets.fp8(dynamic=True).activation.scheme.granularity == sq.PerToken()
    assert sq.presets.mxfp4(weight_only=True).activation is sq.presets.nvfp4(weight_only=True).activation is None


@pytest.mark.parametrize("name", sq.presets.__all__)
def test_rules_override_the_preset(name: str) -> None:
    model, x = network("perceptron")
    rules = [sq.Rule(name="2", weight=None, activation=None, requests=False)]
    config = getattr(sq.presets, name)(rules=rules, **OPTIONS.get(name, {}))
    assert config == getattr(sq.presets, name)(rules=tuple(rules), **OPTIONS.get(name, {}))
    assert "2.weight_fake_quant" not in sq.quantize(model, config, example_args=(x,)).plan


def test_a_group_that_does_not_divide_is_refused_by_the_name_of_the_weight() -> None:
    model, x = network("perceptron")
    with pytest.raises((sq.ConfigError, sq.PlanError), match=r"0\.weight"):
        sq.quantize(model, sq.presets.w4a16(), example_args=(x,))
