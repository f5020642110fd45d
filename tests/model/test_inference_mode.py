"""What is made in ``torch.inference_mode`` is an ordinary tensor: it can be learned, and used in what is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.pytree import leaves
from tests.helpers import same

Made = tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams]]


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def planned_and_calibrated(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    q, params = sq.quantize(net, config, example_args=(x,)), sq.params_of(net)
    return q, params, q.calibrate(params, [x], progress=False)


def observed(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    q, params = sq.quantize(net, config, example_args=(x,)), sq.params_of(net)
    _, ostate = q.observe(params, q.init(params), x)
    return q, params, q.qparams(params, ostate)


def frozen(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    q, params, qparams = planned_and_calibrated(net, x, config)
    return (*q.freeze(params, qparams), qparams)


def masked(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    q, params, qparams = planned_and_calibrated(net, x, config)
    return q, params, sq.enabled(qparams, True)


def narrow(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    q, params, qparams = planned_and_calibrated(net, x, config)
    return q, params, sq.with_bits(qparams, q.plan, 4)


def batch_of_inference_tensors(net: nn.Module, x: Tensor, config: sq.QuantConfig) -> Made:
    return planned_and_calibrated(net, x.clone(), config)


WAYS = (planned_and_calibrated, observed, frozen, masked, narrow, batch_of_inference_tensors)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_and_scales_can_be_learned(way: Callable[..., Made]) -> None:
    net, x, config = model(), torch.randn(2, 3, 6, 6), sq.QuantConfig()
    with torch.inference_mode():
        q, params, qparams = way(net, x, config)
    expected = way(net, x, config)[2]
    same(qparams, expected)
    scales, rest = q.split(qparams)
    learned = {name: scale.requires_grad_() for name, scale in scales.items()}
    weights = {name: p.detach().requires_grad_() if p.is_floating_point() else p for name, p in params.items()}
    q.apply(weights, sq.merge(learned, rest), x).square().mean().backward()
    assert all(scale.grad is not None for name, scale in learned.items() if not (q.frozen and "weight" in name))


FAKE_QUANTIZERS: dict[str, Any] = {
    "fixed": sq.fake_quantize.fixed(),
    "lsq_plus": sq.fake_quantize.lsq_plus(),
    "pact": sq.fake_quantize.pact(),
    "adaround": sq.fake_quantize.adaround(),
    "tqt": sq.fake_quantize.tqt(),
    "mxfp4": sq.fake_quantize.mxfp4(),
}


@pytest.mark.parametrize("name", FAKE_QUANTIZERS)
def test_no_qparams_are_inference_tensors(name: str) -> None:
    net, x = model(), torch.randn(2, 3, 6, 6)
    override = sq.override(fake_quantize=FAKE_QUANTIZERS[name])
    with torch.inference_mode():
        _, _, qparams = planned_and_calibrated(net, x, sq.QuantConfig(weight=override, activation=override))
    assert not any(leaf.is_inference() for leaf in leaves(qparams))
