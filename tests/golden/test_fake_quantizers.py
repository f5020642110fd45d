"""Every fake quantizer against recorded outputs and gradients.

A case is skipped only by its name, for a defect of the reference or because the reference failed; ``COUNTS`` at the end
says how many. Beside each defect stands a test of the right behaviour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sophq_func as sq
from sophq_func.affine import expand, rows
from sophq_func.fake_quantize import hessian_update, rectified_sigmoid
from sophq_func.fake_quantize._codebooks import CODEBOOKS
from sophq_func.formats import E4M3, E5M2
from tests.golden.cases import Case, assert_on_grid, params

DEFECTS = {
    "Fp16FakeQuantize_*_axis*": "defect 31: the reference cuts the gradient of Fp16 per channel",
}
SECTION = "fake_quantizers"


def over(*classes: str, **kwargs: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", params(SECTION, *(f"{c}FakeQuantize" for c in classes), defects=DEFECTS, **kwargs))


def recorded(case: Case) -> sq.QParams:
    """The scale and zero point that the recorded forward used."""
    shape = [] if not case.config["per_channel"] else [-1]
    before = "calib_" if case.config.get("mode") == "off_on" else ""
    scale = case.get(f"{before}scale").reshape(shape)
    if case.config.get("set_scale") is not None:
        scale = torch.full_like(scale, case.config["set_scale"])
    return sq.QParams(scale, case.get(f"{before}zero_point").reshape(shape).to(torch.int32), {})


def run(
    case: Case, fq: sq.FakeQuantize, qparams: sq.QParams, scheme: sq.QScheme, noise: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The output, and the gradients of the input and of each floating leaf."""
    leaves = {"input": case.get("test_input"), "scale": qparams.scale, "zero_point": qparams.zero_point} | qparams.extras
    leaves = {name: leaf.clone().requires_grad_() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}
    extras = {name: leaves[name] for name in qparams.extras}
    out = fq.apply(leaves["input"], sq.QParams(leaves["scale"], leaves["zero_point"], extras), scheme, noise)
    if out.requires_grad:
        out.backward(case.get("upstream_grad"))
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_gradients(case: Case, found: Mapping[str, Tensor | None], scale: Tensor) -> None:
    """Those recorded equal these, and where none was recorded there is none."""
    passed = found["input"] if found["input"] is not None else torch.zeros_like(case.get("grad_input"))
    torch.testing.assert_close(passed, case.get("grad_input"), rtol=1e-5, atol=1e-7)
    for name, gradient in found.items():
        if name != "input" and case.has(f"grad_{name}"):
            sign = torch.where(scale < 0, -1.0, 1.0) if name == "scale" else 1.0
            expected = case.get(f"grad_{name}").reshape(gradient.shape) * sign
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        elif name != "input":
            assert gradient is None or not gradient.any(), name


OPTIONS: dict[str, dict[str, Any]] = {"DoReFaFakeQuantize": {"mapping": "tanh"}}


@over("Fixed", "Learnable", "DoReFa", "DSQ", "QDrop")
def test_integer_grids_follow_the_recording(case: Case) -> None:
    """Observe-only cases hold the input per tensor and the quantized value per channel; gradients are the quantizer's."""
    options = OPTIONS.get(case.cls, {}) | case.config["args"]
    if "prob" in case.config:
        options["prob"] = case.config["prob"]
    fq, scheme, qparams = sq.fake_quantizer(case.cls, **options), case.scheme, recorded(case)
    x = case.get("test_input")
    if case.cls != "DoReFaFakeQuantize":
        qparams = fq.init(qparams, x, scheme)
    out, gradients = run(case, fq, qparams, scheme, case.get("uniform") if case.has("uniform") else None)
    step = expand(qparams.scale.abs().clamp(min=2**-23), x, scheme.granularity)
    passes = case.cls == "LearnableFakeQuantize" and bool(case.config.get("attributes")) and not case.config["per_channel"]
    assert_on_grid(x if passes else out, case.get("output"), step)
    assert_gradients(case, gradients, qparams.scale)


@over("PACT")
def test_pact_follows_the_recording(case: Case) -> None:
    fq, scheme = sq.fake_quantizer(case.cls, **case.config["args"]), case.scheme
    qparams = fq.init(recorded(case), case.get("test_input"), scheme)
    torch.testing.assert_close(qparams.scale, recorded(case).scale)
    out, gradients = run(case, fq, qparams, scheme)
    assert_on_grid(out, case.get("output"), qparams.scale)
    assert_gradients(case, gradients, qparams.scale)


@over("Tqt")
def test_tqt_follows_the_recording(case: Case) -> None:
    fq, scheme, found = sq.fake_quantizer(case.cls), case.scheme, recorded(case)
    threshold = torch.log2(found.scale) + scheme.bits - scheme.symmetric
    qparams = fq.grid(found._replace(extras={"log2_t": threshold}), scheme)
    out, gradients = run(case, fq, qparams, scheme)
    assert_on_grid(out, case.get("output"), qparams.scale)
    torch.testing.assert_close(gradients["input"], case.get("grad_input"), rtol=1e-5, atol=1e-7)


@over("AdaRound")
def test_adaround_follows_the_recording(case: Case) -> None:
    scheme, x, qparams = case.scheme, case.get("test_input"), recorded(case)
    soft, hard = (sq.fake_quantizer(case.cls, rounding=rounding) for rounding in ("soft", "hard"))
    step = expand(qparams.scale, x, scheme.granularity)
    if case.config["variant"] == "soft":
        alpha = soft.init(qparams, x, scheme).extras["alpha"]
        torch.testing.assert_close(rectified_sigmoid(alpha), rectified_sigmoid(case.get("initial_alpha")), rtol=0, atol=1e-4)
    if case.config["variant"] != "plain":
        qparams = qparams._replace(extras={"alpha": case.get("initial_alpha")})
        torch.testing.assert_close(rectified_sigmoid(case.get("initial_alpha")), case.get("rectified"), rtol=1e-5, atol=1e-6)
        assert_on_grid(hard.apply(x, qparams, scheme), case.get("hard_output"), step)
    out, gradients = run(case, soft, qparams, scheme)
    assert_on_grid(out, case.get("output"), step)
    assert_gradients(case, gradients, qparams.scale)


@over("NNIE")
def test_nnie_follows_the_recording(case: Case) -> None:
    fq = sq.fake_quantizer(case.cls)
    qparams = sq.QParams(case.get("calib_data_max"), torch.tensor(0, dtype=torch.int32), {})
    out, gradients = run(case, fq, qparams, sq.QScheme())
    torch.testing.assert_close(out, case.get("output"), rtol=2e-5, atol=1e-12)
    assert torch.equal(gradients["input"], case.get("grad_input"))


def dynamic(case: Case, granularity: sq.PerTensor | sq.PerChannel = sq.PerTensor()) -> tuple[sq.QScheme, sq.QParams]:
    """What recomputes its scale in each forward, as the reference does for table and FP8 formats."""
    nothing = torch.zeros(case.get("test_input").shape[0] if granularity != sq.PerTensor() else ())
    return sq.QScheme(dynamic=True, granularity=granularity), sq.QParams(nothing, nothing.int(), {})


@over("E4M3", "E5M2", outputs=True)
def test_float8_follows_the_recording_above_the_subnormals(case: Case) -> None:
    """Below the smallest normal the reference leaves the grid of E4M3 (defect 23); those elements are not compared."""
    form = {"E4M3FakeQuantize": E4M3, "E5M2FakeQuantize": E5M2}[case.cls]
    granularity = sq.PerChannel(case.config["ch_axis"]) if case.config["per_channel"] else sq.PerTensor()
    fq = sq.fake_quantizer(case.cls, scaling_method=case.config["attributes"]["scaling_method"])
    scheme, qparams = dynamic(case, granularity)
    x = case.get("test_input")
    out, gradients = run(case, fq, qparams, scheme)
    unit = expand(1 / case.get("scale"), x, granularity)
    normal = (x / unit).abs() >= 2.0**form.smallest_exponent if form is E4M3 else torch.ones_like(x, dtype=torch.bool)
    assert normal.any() or not x.any()
    step = (case.get("output").abs() + 2.0**form.smallest_exponent * unit) * 2.0**-form.mantissa_bits
    assert_on_grid(out[normal], case.get("output")[normal], step[normal])
    if case.has("grad_input"):
        torch.testing.assert_close(gradients["input"], case.get("grad_input"))


@over("FP4", "FPXGROUP")
def test_tables_follow_the_recording(case: Case) -> None:
    """Gradients are not compared: in the recording only the largest element of a group has one (defect 22)."""
    options, x = dict(case.config.get("attributes", {})), case.get("test_input")
    per_row = options.pop("per_chan", False)
    if case.cls == "FP4FakeQuantize":
        scheme, qparams = dynamic(case, sq.PerChannel(0) if per_row else sq.PerTensor())
        options.pop("return_int", None)
    else:
        scheme, qparams = dynamic(case)
        options["group_size"] = x.shape[1] if per_row else options.get("group_size", 128)
    out, _ = run(case, sq.fake_quantizer(case.cls, **options), qparams, scheme)
    table = torch.tensor(CODEBOOKS[options.get("data_type", "fp6_e3m2")].entries)
    assert_on_grid(out, case.get("output").reshape(x.shape), table.diff().max() * x.abs().max() / table.max())


@over("GPTQ", "GPTQFP4")
def test_gptq_follows_the_recording(case: Case) -> None:
    c, weight = case.config, case.get("weight")
    scheme = sq.QScheme(bits=c["bit"], symmetric=c["symmetric"])
    hessian, count = torch.zeros(c["in_features"], c["in_features"]), 0
    for x in case.all("layer_input"):
        inputs = F.unfold(x, 3, padding=1).transpose(1, 2) if c["layer"] != "linear" else x
        hessian, count = hessian_update(hessian, count, inputs)
    torch.testing.assert_close(hessian, case.get("hessian"), rtol=1e-4, atol=1e-4)
    options = {name: c[name] for name in ("data_type", "group_size", "act_order") if c[name] is not None}
    found = recorded(case)._replace(extras={"hessian": case.get("hessian")} if c["compensate"] else {})
    out = sq.fake_quantizer(case.cls, **options).apply(weight, found, scheme)
    assert_on_grid(out, case.get("output"), weight.abs().max() / 2)


@over("Fp16", "BF16")
def test_half_types_follow_the_recording(case: Case) -> None:
    fq = sq.fake_quantizer(case.cls)
    out, gradients = run(case, fq, sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {}), sq.QScheme())
    assert torch.equal(out, case.get("output"))
    assert torch.equal(gradients["input"], case.get("grad_input"))
