"""Fixed, Learnable, Fp16 and BF16 against recorded outputs and gradients."""

from __future__ import annotations

import pytest
import torch

import sophq_func as sq
from sophq_func.affine import expand
from tests.golden.cases import Case, assert_on_grid, params

DEFECTS = {
    "Fp16FakeQuantize_*_axis*": "defect 31: the reference cuts the gradient of Fp16 per channel",
}


def qparams_of(case: Case, fq: sq.FakeQuantize) -> sq.QParams:
    """The scale and zero point that the recorded forward used, as leaves that receive gradients."""
    scheme = case.scheme
    shape = [] if not case.config["per_channel"] else [-1]
    scale = case.get("calib_scale" if case.config["mode"] == "off_on" else "scale").reshape(shape)
    if case.config.get("set_scale") is not None:
        scale = torch.full_like(scale, case.config["set_scale"])
    zero_point = case.get("calib_zero_point" if case.config["mode"] == "off_on" else "zero_point")
    zero_point = zero_point.reshape(shape).to(torch.int32)
    return fq.init(sq.QParams(scale, zero_point, {}), case.get("test_input"), scheme)


@pytest.mark.parametrize("case", params("fake_quantizers", "FixedFakeQuantize", "LearnableFakeQuantize", defects=DEFECTS))
def test_integer_grids_follow_the_recording(case: Case) -> None:
    """Observe-only cases hold the input per tensor and the quantized value per channel; gradients are the quantizer's."""
    fq, scheme = sq.fake_quantizer(case.cls, **case.config["args"]), case.scheme
    scale, zero_point, _ = qparams_of(case, fq)
    x = case.get("test_input").requires_grad_()
    scale.requires_grad_()
    leaves = [scale] + ([zero_point.requires_grad_()] if zero_point.is_floating_point() else [])
    out = fq.apply(x, sq.QParams(scale, zero_point, {}), scheme)
    out.backward(case.get("upstream_grad"))
    step = expand(scale.detach().abs().clamp(min=2**-23), x, scheme.granularity)
    passes = bool(case.config.get("attributes")) and not case.config["per_channel"]
    assert_on_grid(x.detach() if passes else out.detach(), case.get("output"), step)
    torch.testing.assert_close(x.grad, case.get("grad_input"), rtol=1e-5, atol=1e-7)
    for name, leaf in zip(("scale", "zero_point"), leaves, strict=False):
        if case.has(f"grad_{name}"):
            sign = torch.where(leaf < 0, -1.0, 1.0) if name == "scale" else 1.0
            expected = case.get(f"grad_{name}").reshape(leaf.shape) * sign
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("case", params("fake_quantizers", "Fp16FakeQuantize", "BF16FakeQuantize", defects=DEFECTS))
def test_half_types_follow_the_recording(case: Case) -> None:
    fq = sq.fake_quantizer(case.cls)
    x = case.get("test_input").requires_grad_()
    out = fq.apply(x, sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {}), sq.QScheme())
    out.backward(case.get("upstream_grad"))
    assert torch.equal(out, case.get("output"))
    assert torch.equal(x.grad, case.get("grad_input"))


def test_defect_31_fp16_per_channel_passes_the_gradient() -> None:
    scheme = sq.QScheme(granularity=sq.PerChannel(0))
    x = torch.randn(3, 4, requires_grad=True)
    qparams = sq.QParams(torch.ones(3), torch.zeros(3, dtype=torch.int32), {})
    sq.fake_quantizer("fp16").apply(x, qparams, scheme).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4))


@pytest.mark.parametrize("granularity", [sq.PerTensor(), sq.PerChannel(1)], ids=str)
def test_defect_31_observe_only_passes_values_and_gradients_whatever_the_granularity(granularity: sq.PerChannel) -> None:
    model, x = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(4, 2)), torch.randn(3, 4)
    activation = sq.override(granularity=granularity, observe_only=True)
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=activation), example_args=(x,))
    assert list(q.plan) == ["0.post_act_fake_quantizer"]
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x])
    gradient = torch.func.grad(lambda x: q.apply(params, qparams, x).sum())(x)
    assert torch.equal(q.apply(params, qparams, x), model(x))
    assert torch.equal(gradient, torch.func.grad(lambda x: model(x).sum())(x))
    assert bool((qparams["0.post_act_fake_quantizer"].scale > 0).all())
