"""The three dictionaries of sophgo-mq's document, as it writes them, and what each line does to the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sophq_func as sq
from tests.documented import DocumentedNet

OBJECT_TYPE = {
    "ConvBnReLU2d_sophgo": {
        "mode": "activation",
        "bit": "8",
        "afakequantize": "LearnableFakeQuantize",
        "aobserver": "MinMaxObserver",
    },
    "ConvReLU2d_sophgo": {
        "mode": "weight",
        "bit": "8",
        "wfakequantize": "FixedFakeQuantize",
        "wobserver": "MinMaxObserver",
    },
}
MODULE_NAME = {
    "layer1.conv1": {
        "mode": "activation",
        "bit": "8",
        "afakequantize": "LearnableFakeQuantize",
        "aobserver": "MinMaxObserver",
    },
    "layer2.conv2": {
        "mode": "weight",
        "bit": "8",
        "wfakequantize": "FixedFakeQuantize",
        "wobserver": "MinMaxObserver",
    },
}
DICTIONARIES: dict[str, Any] = {
    "quant_dict": {"chip": "SG2260", "quantmode": "weight_activation", "strategy": "CNN"},
    "extra_qconfig_dict": {
        "w_observer": "MinMaxObserver",
        "a_observer": "EMAMinMaxObserver",
        "w_fakequantize": "E4M3FakeQuantize",
        "a_fakequantize": "E4M3FakeQuantize",
        "w_qscheme": {"bit": 8, "symmetry": True, "per_channel": False, "pot_scale": False},
        "a_qscheme": {"bit": 8, "symmetry": True, "per_channel": False, "pot_scale": False},
        "object_type": OBJECT_TYPE,
        "module_name": MODULE_NAME,
    },
    "extra_quantizer_dict": {
        "module_only_enable_observer": ["features.0.0.weight_fake_quant"],
        "exclude_module_name": ["layer3.conv3"],
        "exclude_function_type": [torch.nn.functional.sigmoid],
    },
}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.fixture(scope="module")
def q() -> sq.Quantized:
    return sq.prepare_by_platform(DocumentedNet().eval(), DICTIONARIES, example_args=(IMAGE,))


def piece(config: sq.QuantizerConfig) -> tuple[str, str, int]:
    return config.fake_quantize.name, config.observer.name, config.scheme.bits


def test_the_plan_runs(q: sq.Quantized) -> None:
    model = DocumentedNet().eval()
    params = sq.params_of(model)
    out = q.apply(params, q.calibrate(params, [IMAGE]), IMAGE)
    torch.testing.assert_close(out, model(IMAGE), atol=0.05, rtol=0.05)


def test_global_config_reaches_what_no_entry_names(q: sq.Quantized) -> None:
    assert piece(q.plan["head.weight_fake_quant"]) == ("e4m3", "minmax", 8)
    assert piece(q.plan["x.post_act_fake_quantizer"]) == ("e4m3", "ema_minmax", 8)
    assert q.plan["head.weight_fake_quant"].scheme.granularity == sq.PerTensor()
    assert q.plan.reasons("head.weight_fake_quant")["fake_quantize"] == "config weight"


def test_object_type_reaches_activations_of_a_fused_type(q: sq.Quantized) -> None:
    name = "features.0.0.post_act_fake_quantizer"
    assert q.plan.site(name).pattern == "ConvBnReLU2d"
    assert piece(q.plan[name]) == ("learnable", "minmax", 8)
    assert "type='ConvBnReLU2d_sophgo'" in q.plan.reasons(name)["fake_quantize"]


def test_object_type_reaches_weights_of_a_fused_type_and_leaves_the_other_half(q: sq.Quantized) -> None:
    assert piece(q.plan["layer2.conv1.weight_fake_quant"]) == ("fixed", "minmax", 8)
    assert "type='ConvReLU2d_sophgo'" in q.plan.reasons("layer2.conv1.weight_fake_quant")["observer"]
    assert piece(q.plan["layer2.conv1.post_act_fake_quantizer"]) == ("e4m3", "ema_minmax", 8)


def test_module_name_reaches_the_half_that_its_mode_names(q: sq.Quantized) -> None:
    assert piece(q.plan["layer1.conv1.post_act_fake_quantizer"]) == ("learnable", "minmax", 8)
    assert "name='layer1.conv1'" in q.plan.reasons("layer1.conv1.post_act_fake_quantizer")["bits"]
    assert piece(q.plan["layer1.conv1.weight_fake_quant"]) == ("e4m3", "minmax", 8)
    assert piece(q.plan["layer2.conv2.weight_fake_quant"]) == ("fixed", "minmax", 8)
    assert "name='layer2.conv2'" in q.plan.reasons("layer2.conv2.weight_fake_quant")["fake_quantize"]


def test_module_only_enable_observer_observes_and_passes_values(q: sq.Quantized) -> None:
    name = "features.0.0.weight_fake_quant"
    assert q.plan[name].observe_only
    assert "observe_only=True" in q.plan.reasons(name)["observe_only"]
    assert [n for n, c in q.plan.items() if c.observe_only] == [name]


def test_exclude_module_name_leaves_weight_and_input_float(q: sq.Quantized) -> None:
    assert "layer3.conv3.weight_fake_quant" not in q.plan
    assert "layer3.flip.post_act_fake_quantizer" not in q.plan


def test_exclude_function_type_leaves_the_functions_input_and_output_float(q: sq.Quantized) -> None:
    assert "layer3.conv3.post_act_fake_quantizer" not in q.plan
    assert "sigmoid.post_act_fake_quantizer" not in q.plan
    without = {**DICTIONARIES, "extra_quantizer_dict": {}}
    all_of_it = sq.prepare_by_platform(DocumentedNet().eval(), without, example_args=(IMAGE,)).plan
    assert {"layer3.conv3.post_act_fake_quantizer", "sigmoid.post_act_fake_quantizer"} <= all_of_it.keys()


def test_every_line_of_the_dictionaries_was_used(q: sq.Quantized) -> None:
    assert q.plan.unused == ()
    assert all(q.plan.reasons(name)["placed"] for name in q.plan)


def test_classes_strings_and_underscored_names_mean_the_same() -> None:
    by_class = {
        **DICTIONARIES["extra_qconfig_dict"],
        "object_type": {
            sq.patterns.ConvBnReLU2d: OBJECT_TYPE["ConvBnReLU2d_sophgo"],
            "ConvReLU2d": OBJECT_TYPE["ConvReLU2d_sophgo"],
        },
        "module_name": {
            "layer1_conv1": MODULE_NAME["layer1.conv1"],
            "layer2.conv2.weight_fake_quant": MODULE_NAME["layer2.conv2"],
        },
    }
    quantizer = {**DICTIONARIES["extra_quantizer_dict"], "exclude_function_type": [torch.sigmoid]}
    same = {**DICTIONARIES, "extra_qconfig_dict": by_class, "extra_quantizer_dict": quantizer}
    plans = [
        sq.prepare_by_platform(DocumentedNet().eval(), given, example_args=(IMAGE,)).plan for given in (DICTIONARIES, same)
    ]
    assert plans[0] == plans[1]


def test_defect_8_symmetric_range_of_the_chip_survives_an_override() -> None:
    quant = {"chip": "CV183X", "quantmode": "weight_activation", "strategy": "CNN"}
    config = sq.from_dicts({"quant_dict": quant, "extra_qconfig_dict": {"w_qscheme": {"bit": 8}}})
    assert config.default("weight").scheme.symmetric_range
    assert config.default("weight").scheme.granularity == sq.PerTensor()


def test_defect_10_unknown_modes_and_strategies_are_refused() -> None:
    for key, value in (("quantmode", "activation_only"), ("strategy", "RNN"), ("chip", "BM9")):
        with pytest.raises(sq.ConfigError, match=f"{key} '{value}' is not known"):
            sq.from_dicts({"quant_dict": {**DICTIONARIES["quant_dict"], key: value}})


def test_grouped_convolutions_keep_the_global_config_when_matched_by_type() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 4, 3)).eval()
    quant = {"chip": "BM1688", "quantmode": "weight_activation", "strategy": "CNN"}
    entry = {"mode": "weight", "bit": 4, "wfakequantize": "FixedFakeQuantize", "wobserver": "MinMaxObserver"}
    given = {"quant_dict": quant, "extra_qconfig_dict": {"object_type": {torch.nn.Conv2d: entry}}}
    plan = sq.prepare_by_platform(model, given, example_args=(torch.randn(1, 4, 8, 8),)).plan
    assert (plan["0.weight_fake_quant"].scheme.bits, plan["1.weight_fake_quant"].scheme.bits) == (8, 4)
