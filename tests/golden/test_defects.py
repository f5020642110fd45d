"""The right behaviour where recorded cases show a defect; the other defects' tests stand beside their cases."""

from __future__ import annotations

import torch

import sophq_func as sq
from tests.golden.models import DeconvNet


def quantized_deconv() -> tuple[sq.Quantized, dict[str, torch.Tensor], torch.Tensor, DeconvNet]:
    torch.manual_seed(0)
    model, x = DeconvNet().eval(), torch.randn(2, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    q = sq.quantize(model, sq.QuantConfig(chip="BM1690"), example_args=(x,))
    return q, sq.params_of(model), x, model


def test_defect_36_deconvolution_fuses_with_batchnorm_and_relu() -> None:
    q, _, _, _ = quantized_deconv()
    assert q.plan.site("up1.post_act_fake_quantizer").pattern == "ConvTransposeBnReLU2d"
    assert q.plan.site("up1.post_act_fake_quantizer").members == ("up1", "bn2", "relu2")
    assert q.plan.site("up2.post_act_fake_quantizer").pattern == "ConvTransposeReLU2d"
    assert q.plan.site("up1.weight_fake_quant").norm == "bn2"
    assert "bn2.post_act_fake_quantizer" not in q.plan


def test_defect_36_folded_deconvolution_rounds_the_product_of_weight_and_factor() -> None:
    q, params, x, model = quantized_deconv()
    qparams = q.calibrate(params, [x])
    factor = params["bn2.weight"] / torch.sqrt(params["bn2.running_var"] + model.bn2.eps)
    folded = params["up1.weight"] * factor[:, None, None]
    scale = qparams["up1.weight_fake_quant"].scale
    torch.testing.assert_close(scale, folded.abs().amax((0, 2, 3)) / 127.5)
    assert q.plan.site("up1.weight_fake_quant").source == "conv1.post_act_fake_quantizer"
    torch.testing.assert_close(q.apply(params, qparams, x), model(x), atol=0.1, rtol=0.1)
