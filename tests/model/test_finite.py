"""NaN and infinity in weights, biases and scales never leave: each of what stores or reports them names the tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


Made = tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]


@functools.cache
def made() -> Made:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 1, 3, 3)
    q = sq.quantize(model, sq.QuantConfig(chip="BM1690", strategy="CNN"), example_args=(x,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False), x


LEAVES: dict[str, Callable[[Made, Path], Any]] = {
    "convert": lambda made, folder: sq.convert(*made[:3]),
    "onnx": lambda made, folder: sq.export.onnx(*made, folder / "a.onnx"),
    "torch": lambda made, folder: sq.export.torch(*made[:3], (made[3],)),
    "tables": lambda made, folder: sq.export.tables(*made[:3], folder),
    "report": lambda made, folder: sq.report(*made[:3], [made[3]], progress=False),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["conv.weight", "conv.bias", "bn.weight", "bn.running_var", "head.weight", "head.bias"])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(
    name: str, number: float, leave: Callable[[Made, Path], Any], tmp_path: Path
) -> None:
    q, params, qparams, x = made()
    bad = params[name].clone()
    bad.view(-1)[0] = number
    with pytest.raises(sq.StateError, match=f"{name}: the numbers hold NaN or infinity"):
        leave((q, {**params, name: bad}, qparams, x), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["conv.weight_fake_quant", "x.post_act_fake_quantizer"])
def test_a_scale_that_is_not_finite_is_refused_with_its_quantizer(
    name: str, number: float, leave: Callable[[Made, Path], Any], tmp_path: Path
) -> None:
    q, params, qparams, x = made()
    bad = qparams[name]._replace(scale=torch.full_like(qparams[name].scale, number))
    with pytest.raises(sq.StateError, match=f"{name}.*the scale is not finite"):
        leave((q, params, {**qparams, name: bad}, x), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_runs_refuse_scales_that_are_not_finite_and_carry_data_that_is_not() -> None:
    q, params, qparams, x = made()
    name = "x.post_act_fake_quantizer"
    for scale in (math.nan, math.inf):
        bad = {**qparams, name: qparams[name]._replace(scale=torch.tensor(scale))}
        for run in (q.apply, q.apply_and_update, q.capture, q.tap("conv"), q.bind, q.freeze, q.with_noise):
            given = {"bind": (), "freeze": (), "with_noise": (torch.Generator(), x)}.get(getattr(run, "__name__", ""), (x,))
            with pytest.raises(sq.StateError, match=name):
                run(params, bad, *given)
    assert bool(q.apply({**params, "head.bias": params["head.bias"] * math.nan}, qparams, x).isnan().all())
