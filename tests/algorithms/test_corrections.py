"""Corrections of biases and of BatchNorms: against their formulas, and on a network that needs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms import correct_biases, reestimate_norms
from sophq_func.testing.models import trained
from tests.helpers import same


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def quantized(bits: int = 3, strategy: str = "Layers", **weight: Any) -> tuple[Any, ...]:
    """A model, its quantized form, params, qparams, data, and the relative error of a setting."""
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    model = trained(network(), x)
    config = sq.QuantConfig(
        chip=None,
        strategy=strategy,
        weight=sq.override(bits=bits, fake_quantize="fixed", **weight),
        activation=sq.override(bits=8, symmetric=False, fake_quantize="fixed"),
    )
    q = sq.quantize(model, config, example_args=(x[:2],))
    params = sq.params_of(model)
    data = list(x.split(16))
    with torch.no_grad():
        target = model(x)

    def error(params: Any, qparams: Any) -> float:
        return float((q.apply(params, qparams, x) - target).square().mean() / target.square().mean())

    return model, q, params, q.calibrate(params, data, progress=False), data, error


@pytest.mark.parametrize("order", ["local", "sequential"])
@pytest.mark.parametrize("strategy", ["CNN", "Layers", "Dataflow"])
def test_corrected_biases_bring_outputs_closer(order: Any, strategy: str) -> None:
    _, q, params, qparams, data, error = quantized(strategy=strategy)
    new, same_qparams = correct_biases(q, params, qparams, data, order=order, progress=False)
    same(same_qparams, qparams)
    changed = {name for name in params if not torch.equal(params[name], new[name])}
    assert changed <= {"1.bias", "4.bias", "8.bias"} and changed
    assert error(new, qparams) < 0.5 * error(params, qparams)


def test_the_local_correction_of_a_linear_layer_is_the_weight_error_times_the_mean_input() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3).eval(), torch.rand(32, 6)
    q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2), activation=None), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    rounded = q.capture(params, qparams, x)["weight_fake_quant"][1]
    new, _ = correct_biases(q, params, qparams, list(x.split(8)), progress=False)
    expected = params["bias"] + (params["weight"] - rounded) @ x.mean(0)
    torch.testing.assert_close(new["bias"], expected)


def test_an_error_that_other_samples_do_not_have_is_not_corrected() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).eval()
    x = torch.randn(16, 6)
    x = torch.cat([x, -x])  # whatever one half shows, the other shows its opposite
    q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2), activation=None), example_args=(x,))
    params = sq.params_of(model)
    new, _ = correct_biases(q, params, q.calibrate(params, [x], progress=False), [x], progress=False)
    same(new, params)


def test_the_bias_of_a_function_is_corrected_too() -> None:
    torch.manual_seed(0)
    params, x = {"w": torch.randn(3, 6), "b": torch.randn(3)}, torch.rand(32, 6)

    def model(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, p["w"], p["b"])

    q = sq.quantize(model, sq.QuantConfig(weight=sq.override(bits=2), activation=None), params=params, example_args=(x,))
    qparams = q.calibrate(params, [x], progress=False)
    new, _ = correct_biases(q, params, qparams, [x], progress=False)
    torch.testing.assert_close(q.apply(new, qparams, x).mean(0), model(params, x).mean(0))


@pytest.mark.parametrize("momentum", [0.0, 0.1, None])
def test_norms_move_whatever_their_momentum(momentum: float | None) -> None:
    model, q, params, qparams, data, error = quantized(bits=2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    q = sq.quantize(model, q.plan.origin.config, example_args=(data[0][:2],))
    new, better = reestimate_norms(q, params, qparams, data, progress=False)
    assert error(new, better) < 0.8 * error(params, qparams)
    assert all(bool((new[name] >= 0).all()) for name in new if name.endswith("running_var"))


def test_codes_stay_where_scales_follow_the_fold() -> None:
    _, q, params, qparams, data, _ = quantized(bits=2)
    new, better = reestimate_norms(q, params, qparams, data, progress=False)
    before, after = q.weights_seen(params), q.weights_seen(new)
    for name in ("0.weight_fake_quant", "3.weight_fake_quant"):
        weight, _ = before[name]
        moved, _ = after[name]
        scales = (entry[name].scale.reshape(-1, 1, 1, 1) for entry in (qparams, better))
        old_scale, new_scale = scales
        assert not torch.equal(old_scale, new_scale)
        torch.testing.assert_close((moved / new_scale), (weight / old_scale), rtol=1e-5, atol=1e-5)


def test_with_one_scale_for_the_tensor_only_means_move() -> None:
    _, q, params, qparams, data, _ = quantized(granularity=sq.PerTensor(), bits=4)
    new, better = reestimate_norms(q, params, qparams, data, progress=False)
    changed = {name.rpartition(".")[2] for name in params if not torch.equal(params[name], new[name])}
    assert changed <= {"running_mean"}
    same(better, qparams)


def test_corrections_follow_one_another_with_the_float_params_as_reference() -> None:
    _, q, params, qparams, data, error = quantized(bits=2)
    new, better = reestimate_norms(q, params, qparams, data, progress=False)
    both, better = correct_biases(q, new, better, data, reference=params, progress=False)
    assert error(both, better) < error(new, better) < error(params, qparams)


def test_an_unknown_order_is_named() -> None:
    _, q, params, qparams, data, _ = quantized()
    with pytest.raises(sq.ConfigError, match="did you mean 'local'"):
        correct_biases(q, params, qparams, data, order="locl")  # type: ignore[arg-type]
