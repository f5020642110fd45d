"""``torch.export`` of ``q.apply``: parameters and qparams are constants of the program, whatever reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.helpers import Ready, ready

pytestmark = pytest.mark.slow

NOISY = {"prob": 1.0}
"""Options with which a quantizer that drops rounding at random never does."""


def convolutional() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    return nn.Sequential(*layers).eval(), torch.randn(4, 3, 6, 6)


def linear(width: int = 32) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)).eval(), torch.randn(4, width)


FEW_COLUMNS = 8
"""For GPTQ, whose program has steps of its own for each column: four times 32 columns take four times as long."""


def shared() -> tuple[nn.Module, Tensor]:
    layer = nn.Linear(32, 32, bias=False)
    return nn.Sequential(layer, nn.Sigmoid(), layer).eval(), torch.randn(4, 32)


def with_unread_buffer() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)).eval()
    model.register_buffer("unread", torch.ones(()))
    return model, torch.randn(4, 32)


def exported(made: Ready, x: Tensor) -> Tensor:
    """What the program computes that torch.export makes of ``apply``."""

    class Applied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = made(x)
            return result

    output: Tensor = torch.export.export(Applied(), (x,), strict=False).module()(x)
    return output


@pytest.mark.parametrize(
    ("name", "symmetric"), [(name, number % 2 == 0) for number, name in enumerate(sorted(FAKE_QUANTIZERS))]
)
def test_every_fake_quantizer(name: str, symmetric: bool) -> None:
    model, x = linear(FEW_COLUMNS) if name.startswith("gptq") else linear()
    options = NOISY if name == "qdrop" else {}
    quantizer = sq.override(symmetric=symmetric, fake_quantize=getattr(sq.fake_quantize, name)(**options))
    made = ready(model, x, config=sq.QuantConfig(weight=quantizer, activation=quantizer))
    torch.testing.assert_close(exported(made, x), made(x))


@pytest.mark.parametrize("make", [convolutional, shared, with_unread_buffer])
@pytest.mark.parametrize("quantizer", [sq.fake_quantize.fixed(), sq.fake_quantize.tqt(), sq.fake_quantize.e4m3()])
def test_scales_that_are_not_learned_in_other_models(make: object, quantizer: object) -> None:
    model, x = make()  # type: ignore[operator]
    override = sq.override(fake_quantize=quantizer)
    made = ready(model, x, config=sq.QuantConfig(weight=override, activation=override))
    torch.testing.assert_close(exported(made, x), made(x))


def test_a_constant_scale_still_has_no_gradient() -> None:
    model, x = linear()
    fixed = sq.override(fake_quantize=sq.fake_quantize.fixed())
    q, params, qparams = ready(model, x, config=sq.QuantConfig(weight=fixed, activation=fixed))
    scales = {name: entry.scale.clone().requires_grad_() for name, entry in qparams.items()}
    learned = {name: entry._replace(scale=scales[name]) for name, entry in qparams.items()}
    q.apply({name: p.requires_grad_() for name, p in params.items()}, learned, x).square().mean().backward()
    assert all(scale.grad is None for scale in scales.values())
