"""The right behaviour for each reason that keeps a recorded model from being compared in full."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.golden import models, test_defects
from tests.golden.test_end_to_end import COUNTS
from tests.helpers import with_hessians

PER_TENSOR = {"bit": 8, "symmetry": True, "per_channel": False, "pot_scale": False}
FP8 = {"w_fakequantize": "E4M3FakeQuantize", "a_fakequantize": "E4M3FakeQuantize", "w_qscheme": PER_TENSOR}


def prepared(
    model: str = "PoolClassifier",
    chip: str = "BM1690",
    strategy: str = "CNN",
    quantmode: str = "weight_activation",
    quantizer: dict[str, Any] | None = None,
    **qconfig: Any,
) -> tuple[sq.Quantized, dict[str, Tensor], Tensor]:
    """A model of the recordings, prepared by dictionaries."""
    net = models.build(model, 0).eval()
    dictionaries = {
        "quant_dict": {"chip": chip, "quantmode": quantmode, "strategy": strategy},
        "extra_qconfig_dict": qconfig,
        "extra_quantizer_dict": quantizer or {},
    }
    x = torch.randn(models.INPUT_SHAPES[model], generator=torch.Generator().manual_seed(1))
    return sq.prepare_by_platform(net, dictionaries, example_args=(x,)), sq.params_of(net), x


def runs(close: float = 0.2, **settings: Any) -> Callable[[], None]:
    """Prepares, calibrates and quantizes, to within a share of the float output."""

    def check() -> None:
        q, params, x = prepared(**settings)
        out = q.apply(params, q.calibrate(params, [x], progress=False), x)
        expected = models.build(settings.get("model", "PoolClassifier"), 0).eval()(x)
        assert (out - expected).norm() <= close * expected.norm()

    return check


def refuses(*words: str, **settings: Any) -> Callable[[], None]:
    """Refuses with a message that holds these words."""

    def check() -> None:
        with pytest.raises(sq.ConfigError) as caught:
            prepared(**settings)
        assert [word for word in words if word not in str(caught.value)] == []

    return check


def missing(key: str) -> Callable[[], None]:
    """Refuses a first dictionary without a key."""

    def check() -> None:
        given = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
        del given[key]
        with pytest.raises(sq.ConfigError, match=f"{key}' is missing"):
            sq.from_dicts({"quant_dict": given})

    return check


ENTRY = {"mode": "weight", "bit": 4, "wfakequantize": "FixedFakeQuantize", "wobserver": "MinMaxObserver"}
FOUR = {"mode": "activation", "bit": 4, "afakequantize": "FixedFakeQuantize", "aobserver": "MinMaxObserver"}


def halves_are_apart() -> None:
    """Each entry changes the half that its mode names, by fused and by replaced type alike."""
    for key in (sq.patterns.ConvReLU2d, "ConvReLU2d_sophgo"):
        for mode, entry in (("weight", ENTRY), ("activation", FOUR)):
            q, _, _ = prepared(chip="BM1688", object_type={key: entry})
            bits = {half: q.plan[f"conv2.{half}"].scheme.bits for half in ("weight_fake_quant", "post_act_fake_quantizer")}
            changed = "weight_fake_quant" if mode == "weight" else "post_act_fake_quantizer"
            assert {half for half, width in bits.items() if width == 4} == {changed}
            assert not any("input_act" in name for name in q.plan)


def a_weight_entry_keeps_the_activation() -> None:
    q, _, _ = prepared(module_name={"fc1": {**ENTRY, "wperchannel": True}})
    assert q.plan["fc1.weight_fake_quant"].scheme.bits == 4
    assert q.plan["fc1.post_act_fake_quantizer"] == sq.CHIPS.get("BM1690").activation
    runs(module_name={"fc1": {**ENTRY, "wperchannel": True}})()


def an_activation_entry_keeps_the_weight() -> None:
    q, _, _ = prepared(chip="BM1688", module_name={"conv2": FOUR})
    assert q.plan["conv2.post_act_fake_quantizer"].scheme.bits == 4
    assert q.plan["conv2.weight_fake_quant"].scheme.bits == 8
    q, _, _ = prepared(model="GateConcatNet", chip="BM1688", module_name={"gate": FOUR})
    assert q.plan["gate.post_act_fake_quantizer"].scheme.bits == 4


def an_entry_without_quantizers_keeps_those_of_the_chip() -> None:
    q, _, _ = prepared(module_name={"conv2": {"mode": "weight", "bit": 8}})
    assert q.plan["conv2.weight_fake_quant"].fake_quantize == sq.fake_quantize.learnable()


def bits_may_be_text() -> None:
    given = [prepared(module_name={"conv2": {**ENTRY, "bit": bit}})[0].plan for bit in (4, "4")]
    assert given[0] == given[1]


def roles_are_known() -> None:
    q, _, _ = prepared(w_observer="MinMaxFloorObserver", a_observer="PoTModeObserver")
    kinds = {name: dict(config.observer.options)["quant_type"] for name, config in q.plan.items()}
    assert kinds["conv1.weight_fake_quant"] == "param"
    assert kinds["x.post_act_fake_quantizer"] == "input"
    assert kinds["conv1.post_act_fake_quantizer"] == "tensor"
    runs(w_observer="MinMaxFloorObserver", a_observer="PoTModeObserver")()


def lists_and_tuples_are_alike() -> None:
    plans = [
        prepared("TransformerBlock", quantizer={"additional_module_type": kind([nn.LayerNorm])})[0].plan
        for kind in (list, tuple)
    ]
    assert plans[0] == plans[1]


def rounds_no_bias(name: str, layer: str, close: float = 0.2, **settings: Any) -> Callable[[], None]:
    """The layer behind a quantizer without an integer scale keeps its bias."""

    def check() -> None:
        q, _, _ = prepared(**settings)
        assert name in q.plan
        assert q.plan.site(f"{layer}.weight_fake_quant").source == ""
        runs(close, **settings)()

    return check


def fp8_follows_the_standard() -> None:
    """Each channel has its own scale, which reaches the largest value; small values lie on the grid; gradients pass."""
    scheme = sq.QScheme(granularity=sq.PerChannel(0), dynamic=True)
    fq = sq.fake_quantizer("E4M3FakeQuantize")
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-3], [1.0], [30.0], [1e4]])
    observer = sq.observer("minmax")
    state = observer.update(observer.init(weight, scheme), weight, scheme)
    qparams = fq.init(observer.qparams(state, scheme), weight, scheme)
    torch.testing.assert_close(qparams.scale, weight.abs().amax(1) / 448)
    codes = fq.apply(weight, qparams, scheme) / qparams.scale[:, None]
    on_grid = codes.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(codes, on_grid, rtol=1e-5, atol=1e-7)
    gradient = torch.func.grad(lambda w: fq.apply(w, qparams, scheme).sum())(weight)
    assert torch.equal(gradient, torch.ones_like(weight))


def small_fp8_values_lie_on_the_grid() -> None:
    step = 2.0**-9
    qparams = sq.QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), {})
    x = torch.linspace(-(2.0**-6), 2.0**-6, 1001)
    out = sq.fake_quantizer("E4M3FakeQuantize", scaling="none").apply(x, qparams, sq.QScheme())
    assert torch.equal(out / step, (x / step).round())


def first_and_last_layers_have_8_bits() -> None:
    four = {**PER_TENSOR, "bit": 4}
    q, _, _ = prepared(chip="Academic", a_qscheme=four, w_fakequantize="FixedFakeQuantize", w_qscheme=four)
    bits = {name: config.scheme.bits for name, config in q.plan.items()}
    assert bits == {
        "conv1.weight_fake_quant": 8,
        "conv2.weight_fake_quant": 4,
        "flatten.post_act_fake_quantizer": 4,
        "fc1.weight_fake_quant": 4,
        "fc1.post_act_fake_quantizer": 8,
        "fc2.weight_fake_quant": 8,
    }


def test_a_moving_average_of_a_constant_is_the_constant() -> None:
    scales = []
    for name in ("MinMaxObserver", "EMAMinMaxObserver"):
        q, params, x = prepared(w_observer=name)
        scales.append(q.calibrate(params, [x, x, x], progress=False)["fc1.weight_fake_quant"].scale)
    assert torch.equal(*scales)


def adaround_starts_from_the_weight() -> None:
    q, params, x = prepared(w_fakequantize="AdaRoundFakeQuantize")
    qparams = q.calibrate(params, [x], progress=False)
    learnable, _ = q.split(qparams)
    assert learnable["fc1.weight_fake_quant.alpha"].shape == params["fc1.weight"].shape
    before, after = q.capture(params, qparams, x)["fc1.weight_fake_quant"]
    torch.testing.assert_close(after, before, rtol=0, atol=float(qparams["fc1.weight_fake_quant"].scale.max()))


def clipping_clips() -> None:
    q, params, x = prepared(a_observer="ClipStdObserver", a_observer_extra_args={"std_scale": 1.0})
    scale = q.calibrate(params, [x], progress=False)["x.post_act_fake_quantizer"].scale
    mean, std = x.mean(), x.std()
    torch.testing.assert_close(scale, torch.maximum((mean - std).abs(), (mean + std).abs()) / 127.5)


def fp4_is_an_fp4() -> None:
    q, params, x = prepared(w_fakequantize="FP4FakeQuantize", w_qscheme=PER_TENSOR)
    qparams = q.calibrate(params, [x], progress=False)
    weight, rounded = q.capture(params, qparams, x)["fc1.weight_fake_quant"]
    values = {round(float(value), 3) for value in (rounded / weight.abs().max() * 6).abs().unique()}
    assert values <= {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0}


def deconvolutions_are_fused() -> None:
    test_defects.test_defect_36_deconvolution_fuses_with_batchnorm_and_relu()
    test_defects.test_defect_36_folded_deconvolution_rounds_the_product_of_weight_and_factor()


def tables_round_no_bias_and_gptq_wants_its_hessian() -> None:
    """Without a Hessian the reference rounds to integers, whatever the table."""
    settings = {"model": "GateConcatNet", "w_qscheme": PER_TENSOR}
    rounds_no_bias("x.post_act_fake_quantizer", "conv1", a_fakequantize="FP4FakeQuantize", close=0.5, **settings)()
    q, params, x = prepared(w_fakequantize="GPTQFP4FakeQuantize", **settings)
    qparams = q.calibrate(params, [x], progress=False)
    with pytest.raises(sq.StateError, match=r"conv1\.weight_fake_quant: gptqfp4 cannot quantize without"):
        q.apply(params, qparams, x)
    expected = models.build("GateConcatNet", 0).eval()(x)
    assert (q.apply(params, with_hessians(q, params, qparams), x) - expected).norm() <= 0.5 * expected.norm()


RIGHT: dict[str, Callable[[], None]] = {
    "decision: AdaRound": adaround_starts_from_the_weight,
    "decision: a bias is not rounded behind a table": tables_round_no_bias_and_gptq_wants_its_hessian,
    "decision: a bias is not rounded behind an input": rounds_no_bias(
        "conv1.post_act_fake_quantizer",
        "conv2",
        model="ResidualConvNet",
        quantizer={"module_only_enable_observer": ["conv1_post_act_fake_quantizer"]},
    ),
    "decision: an entry": halves_are_apart,
    "decision: an unknown name": refuses("'nope'", quantizer={"module_only_enable_observer": ["nope"]}),
    "defect 10: the reference accepts an unknown quantmode": refuses("weight_activation", quantmode="weights"),
    "defect 10: the reference accepts an unknown strategy": refuses("Transformer", strategy="RNN"),
    "defect 13:": clipping_clips,
    "defect 21:": fp4_is_an_fp4,
    "defect 23:": small_fp8_values_lie_on_the_grid,
    "defect 24:": fp8_follows_the_standard,
    "defect 26:": rounds_no_bias("x.post_act_fake_quantizer", "conv1", **FP8),
    "defect 30:": runs(w_fakequantize="DSQFakeQuantize", w_qscheme=PER_TENSOR),
    "defect 36:": deconvolutions_are_fused,
    "defect 44:": first_and_last_layers_have_8_bits,
    "defect 6:": halves_are_apart,
    "error: 'BF16FakeQuantize'": rounds_no_bias("x.post_act_fake_quantizer", "conv1", a_fakequantize="BF16FakeQuantize"),
    "error: 'Identity'": a_weight_entry_keeps_the_activation,
    "error: 'NoneType' object": an_activation_entry_keeps_the_weight,
    "error: 'quantmode'": missing("quantmode"),
    "error: 'strategy'": missing("strategy"),
    "error: Do not support fakequantize name: NNIE": refuses(
        "nnie", "BM1690", "fpxgroup", w_fakequantize="NNIEFakeQuantize"
    ),
    "error: Do not support fakequantize name: NoSuch": refuses("'NoSuchQuantizer'", w_fakequantize="NoSuchQuantizer"),
    "error: Do not support observer name: LSQPlus": runs(a_observer="LSQPlusObserver"),
    "error: Do not support observer name: NoSuch": refuses("'NoSuchObserver'", w_observer="NoSuchObserver"),
    "error: HistogramObserver's": runs(w_observer="KLDObserver", close=0.5),
    "error: Invalid method": runs(w_fakequantize="TqtFakeQuantize", a_fakequantize="TqtFakeQuantize", w_qscheme=PER_TENSOR),
    "error: None": an_entry_without_quantizers_keeps_those_of_the_chip,
    "error: Quantile": runs(w_observer="EMAQuantileObserver"),
    "error: You should set": roles_are_known,
    "error: Zero-point": runs(w_observer="EMAMSEObserver"),
    "error: a Tensor with": runs(w_fakequantize="PACTFakeQuantize"),
    "error: can only concatenate": lists_and_tuples_are_alike,
    "error: shape": runs(w_fakequantize="DSQFakeQuantize", w_fakeq_params={"alpha": 0.3}),
    "error: unsupport this": refuses("weight_only", "CNN", quantmode="weight_only"),
    "error: unsupported data": refuses("BM1684X", "4 bits", chip="BM1684X", a_qscheme={**PER_TENSOR, "bit": 4}),
    "error: unsupported operand": bits_may_be_text,
    "error: ": runs(w_fakequantize="E5M2FakeQuantize"),
}
"""By the beginning of the reason, the longest that fits: a check of the right behaviour."""


@pytest.mark.parametrize(
    "reason", [reason for reason in COUNTS if reason != "compared"], ids=lambda text: re.sub(r"\W+", "_", text)
)
def test_right_behaviour(reason: str) -> None:
    RIGHT[max((start for start in RIGHT if reason.startswith(start)), key=len)]()


def test_every_check_belongs_to_a_reason() -> None:
    assert [start for start in RIGHT if not any(reason.startswith(start) for reason in COUNTS)] == []
