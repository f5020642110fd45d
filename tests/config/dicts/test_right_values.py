"""Every key of every dictionary: what a right value does to the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sophq_func as sq
from sophq_func.config.dicts import KEYS
from tests.config.dicts.helpers import (
    BASE,
    BEFORE,
    BF16,
    BM1688,
    E4M3,
    EMA,
    FIXED,
    FP16,
    HEAD_4,
    HEAD_4_CHANGED,
    LAYERS,
    LEARNABLE,
    LISTED,
    MINMAX,
    MSE,
    PER_TENSOR,
    POST,
    SECTIONS,
    TRANSFORMER,
    WEIGHT,
    QuantizedScale,
    Scale,
    changes,
    documented,
    each,
    fuse_nothing,
    ids,
    plan_of,
    scaled,
    softmaxed,
    within,
)
from tests.documented import Layer2

VALUES = ("x", *LAYERS[:4], "layer3.flip", "layer3.conv3", "sigmoid", "mean", "head")
"""What CNN quantizes in ``DocumentedNet``."""


def weights(**change: Any) -> dict[str, Any]:
    return each(LAYERS, WEIGHT, change)


def activations(**change: Any) -> dict[str, Any]:
    return each(VALUES, POST, change)


class Right(NamedTuple):
    """A right value of a key, and what it changes."""

    value: Any
    changed: dict[str, Any]
    base: Mapping[str, Any] = MappingProxyType({})
    model: Callable[[], tuple[nn.Module, Any]] = documented


FUSED_SIGMOID = each(["sigmoid"], POST, "gone")
OWN_LAYER = {f"scale{WEIGHT}": "new", f"scale{POST}": "new", f"scale.mul{POST}": "gone"}

RIGHT: dict[tuple[str, str], list[Right]] = {
    ("prepare_custom_config_dict", "quant_dict"): [Right({**BASE, "chip": "MARS3"}, weights(symmetric_range=True))],
    ("prepare_custom_config_dict", "extra_qconfig_dict"): [
        Right({"a_observer": "MinMaxObserver"}, activations(observer=MINMAX))
    ],
    ("prepare_custom_config_dict", "extra_quantizer_dict"): [
        Right({"exclude_module_name": ["head"]}, dict.fromkeys((f"head{WEIGHT}", f"head{POST}", f"mean{POST}"), "gone"))
    ],
    ("prepare_custom_config_dict", "extra_fuse_dict"): [
        Right({"additional_fuser_method_mapping": {(nn.Conv2d, F.sigmoid): fuse_nothing}}, FUSED_SIGMOID)
    ],
    ("prepare_custom_config_dict", "preserve_attr"): [Right({"": ["head"], "layer1": ["conv1"]}, {})],
    ("prepare_custom_config_dict", "concrete_args"): [Right({"mask": None}, {})],
    ("prepare_custom_config_dict", "leaf_module"): [
        Right(
            [Layer2],
            each(["layer2.conv1", "layer2.conv2"], WEIGHT, "gone") | each(["layer2.conv1", "layer2.conv2"], POST, "gone"),
        )
    ],
    ("quant_dict", "chip"): [
        Right("SG2260", {}),
        *(
            Right(chip, weights(symmetric_range=True))
            for chip in ("MARS3", "CV183X", "CV182X", "CV181X", "CV180X", "CV186X")
        ),
        *(Right(chip, {}) for chip in ("BM1688", "BM1684X", "BM1690")),
        Right("Academic", weights(fake_quantize=E4M3) | each({*VALUES} - {"mean"}, POST, "gone")),
    ],
    ("quant_dict", "quantmode"): [
        Right(
            "weight_only", each({*VALUES} - {"layer2.conv2", "sigmoid", "head"}, POST, "gone"), {"quant_dict": TRANSFORMER}
        )
    ],
    ("quant_dict", "strategy"): [
        Right(
            "Transformer",
            each(["layer2.conv2", "sigmoid", "head"], POST, "gone")
            | each(["layer3.conv3", "features.0.0", "x"], POST, {"observe_only": True}),
        )
    ],
    ("quant_dict", "bf16_mix_prec"): [
        Right(False, {}),
        Right(
            True,
            {f"x{POST}": "gone"}
            | each(["features.0.0", "layer3.flip", "layer3.conv3", "sigmoid", "head"], BEFORE, "new")
            | each(["layer3.flip", "sigmoid", "mean"], POST, {"fake_quantize": BF16}),
        ),
    ],
    ("quant_dict", "use_tpu_mlir_fwd"): [Right(False, {})],
    ("quant_dict", "not_dynamic_update_param"): [Right(True, {}), Right(False, {})],
    ("quant_dict", "model_name"): [Right("resnet", {})],
    ("extra_qconfig_dict", "w_observer"): [
        Right("MSEObserver", weights(observer=MSE)),
        Right("EMAMinMaxObserver", weights(observer=EMA)),
    ],
    ("extra_qconfig_dict", "a_observer"): [Right("MinMaxObserver", activations(observer=MINMAX))],
    ("extra_qconfig_dict", "w_fakequantize"): [
        Right("FixedFakeQuantize", weights(fake_quantize=FIXED)),
        Right("E4M3FakeQuantize", weights(fake_quantize=E4M3)),
    ],
    ("extra_qconfig_dict", "a_fakequantize"): [Right("BF16FakeQuantize", activations(fake_quantize=BF16))],
    ("extra_qconfig_dict", "w_fakeq_params"): [
        Right({"use_grad_scaling": False}, weights(fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False)))
    ],
    ("extra_qconfig_dict", "a_fakeq_params"): [
        Right({"use_grad_scaling": False}, activations(fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False)))
    ],
    ("extra_qconfig_dict", "w_qscheme"): [
        Right({"bit": 8, "symmetry": True, "per_channel": True, "pot_scale": False}, {}),
        Right({"bit": 4, "per_channel": True}, weights(bits=4)),
        Right({}, weights(granularity=PER_TENSOR)),
        Right(
            {"p": 1.0, "per_channel": True},
            weights(observer=sq.observers.mse(p=1.0)),
            {"extra_qconfig_dict": {"w_observer": "mse"}},
        ),
    ],
    ("extra_qconfig_dict", "a_qscheme"): [
        Right({"symmetry": False, "pot_scale": True}, activations(symmetric=False, pot_scale=True)),
        Right({"per_channel": True}, activations(granularity=sq.PerChannel(1))),
        Right({"ema_ratio": 0.5}, activations(observer=sq.observers.ema_minmax(decay=0.5))),
    ],
    ("extra_qconfig_dict", "w_observer_extra_args"): [
        Right({"p": 1.0}, weights(observer=sq.observers.mse(p=1.0)), {"extra_qconfig_dict": {"w_observer": "MSEObserver"}})
    ],
    ("extra_qconfig_dict", "a_observer_extra_args"): [
        Right({"ema_ratio": 0.5}, activations(observer=sq.observers.ema_minmax(decay=0.5))),
        Right(
            {"ema_ratio": 0.5},
            activations(observer=sq.observers.ema_minmax(decay=0.5)),
            {"extra_qconfig_dict": {"a_qscheme": {"ema_ratio": 0.7}}},
        ),
    ],
    ("extra_qconfig_dict", "object_type"): [Right({nn.Linear: HEAD_4}, {f"head{WEIGHT}": HEAD_4_CHANGED})],
    ("extra_qconfig_dict", "module_name"): [Right({"head": HEAD_4}, {f"head{WEIGHT}": HEAD_4_CHANGED})],
    ("extra_qconfig_dict", "int4_op"): [
        Right(
            ["head"],
            {f"head{WEIGHT}": {"bits": 4, "granularity": PER_TENSOR}, f"head{POST}": {"bits": 4}, f"head{BEFORE}": "new"},
            {"quant_dict": BM1688},
        )
    ],
    ("extra_qconfig_dict", "int8_op"): [
        Right(
            ["head"],
            {
                f"head{WEIGHT}": {"fake_quantize": LEARNABLE, "granularity": PER_TENSOR},
                f"head{POST}": {"observer": EMA},
            },
            {"extra_qconfig_dict": {"w_fakequantize": "FixedFakeQuantize", "a_observer": "MinMaxObserver"}},
        )
    ],
    ("extra_qconfig_dict", "f16_op"): [
        Right(
            ["head"],
            {
                f"head{WEIGHT}": {"fake_quantize": FP16, "bits": 16, "granularity": PER_TENSOR},
                f"head{POST}": {"fake_quantize": FP16, "bits": 16},
            },
        )
    ],
    ("extra_quantizer_dict", "exclude_module_name"): [
        Right(["layer3.conv3"], {f"layer3.conv3{WEIGHT}": "gone", f"layer3.flip{POST}": "gone"}),
        Right([nn.Linear], dict.fromkeys((f"head{WEIGHT}", f"head{POST}", f"mean{POST}"), "gone")),
    ],
    ("extra_quantizer_dict", "exclude_function_type"): [Right([F.sigmoid], {f"sigmoid{POST}": "gone"})],
    ("extra_quantizer_dict", "exclude_node_name"): [Right(["head"], {f"head{POST}": "gone", f"mean{POST}": "gone"})],
    ("extra_quantizer_dict", "additional_node_name"): [
        Right(["mean"], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER})
    ],
    ("extra_quantizer_dict", "additional_function_type"): [
        Right([torch.mean], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER}),
        Right(["mean"], {f"sigmoid{POST}": "new"}, {"quant_dict": TRANSFORMER}),
    ],
    ("extra_quantizer_dict", "additional_module_type"): [
        Right((nn.Softmax,), {f"exp{POST}": "new", f"soft{POST}": "new"}, model=softmaxed),
        Right([nn.Softmax], {f"exp{POST}": "new"}, {"quant_dict": TRANSFORMER}, model=softmaxed),
    ],
    ("extra_quantizer_dict", "module_only_enable_observer"): [
        Right(["x_post_act_fake_quantizer"], {f"x{POST}": {"observe_only": True}}),
        Right(["layer1.conv1.weight_fake_quant"], {f"layer1.conv1{WEIGHT}": {"observe_only": True}}),
    ],
    ("extra_fuse_dict", "additional_fuser_method_mapping"): [
        Right({(nn.Conv2d, F.sigmoid): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.Conv2d, nn.Sigmoid): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.Conv2d, nn.ReLU): fuse_nothing}, {}),
    ],
    ("extra_fuse_dict", "additional_fusion_pattern"): [
        Right({(F.sigmoid, nn.Conv2d): fuse_nothing}, FUSED_SIGMOID),
        Right({(nn.ReLU, (nn.BatchNorm2d, nn.Conv2d)): fuse_nothing}, {}),
    ],
    ("extra_fuse_dict", "additional_qat_module_mapping"): [Right({Scale: QuantizedScale}, OWN_LAYER, model=scaled)],
    ("extra_fuse_dict", "additional_qat_module_mappings"): [Right({Scale: QuantizedScale}, OWN_LAYER, model=scaled)],
    ("qscheme", "bit"): [
        Right(4, weights(bits=4, granularity=PER_TENSOR)),
        Right("4", weights(bits=4, granularity=PER_TENSOR)),
    ],
    ("qscheme", "symmetry"): [Right(False, weights(symmetric=False, granularity=PER_TENSOR))],
    ("qscheme", "per_channel"): [Right(True, {}), Right(False, weights(granularity=PER_TENSOR))],
    ("qscheme", "pot_scale"): [Right(True, weights(pot_scale=True, granularity=PER_TENSOR))],
    ("qscheme", "symmetric_range"): [Right(True, weights(symmetric_range=True, granularity=PER_TENSOR))],
    ("qscheme", "reduce_range"): [Right(False, weights(granularity=PER_TENSOR))],
    ("qscheme", "ch_axis"): [Right(1, weights(granularity=sq.PerChannel(1))), Right(-1, weights(granularity=PER_TENSOR))],
    ("entry with mode 'weight'", "mode"): [
        Right("weight", {f"head{WEIGHT}": {"fake_quantize": FIXED, "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "bit"): [
        Right(bit, {f"head{WEIGHT}": {"bits": 4, "fake_quantize": FIXED, "granularity": PER_TENSOR}}) for bit in (4, "4")
    ],
    ("entry with mode 'weight'", "wfakequantize"): [
        Right("E5M2FakeQuantize", {f"head{WEIGHT}": {"fake_quantize": sq.fake_quantize.e5m2(), "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "wobserver"): [
        Right("MSEObserver", {f"head{WEIGHT}": {"observer": MSE, "fake_quantize": FIXED, "granularity": PER_TENSOR}})
    ],
    ("entry with mode 'weight'", "wperchannel"): [
        Right(True, {f"head{WEIGHT}": {"fake_quantize": FIXED}}),
        Right(False, {f"head{WEIGHT}": {"fake_quantize": FIXED, "granularity": PER_TENSOR}}),
    ],
    ("entry with mode 'activation'", "mode"): [
        Right("activation", {f"head{POST}": {"fake_quantize": FIXED, "observer": MINMAX}})
    ],
    ("entry with mode 'activation'", "bit"): [
        Right(4, {f"head{POST}": {"bits": 4, "fake_quantize": FIXED, "observer": MINMAX}}, {"quant_dict": BM1688})
    ],
    ("entry with mode 'activation'", "afakequantize"): [
        Right("BF16FakeQuantize", {f"head{POST}": {"fake_quantize": BF16, "observer": MINMAX}})
    ],
    ("entry with mode 'activation'", "aobserver"): [
        Right("MSEObserver", {f"head{POST}": {"fake_quantize": FIXED, "observer": MSE}})
    ],
}
NEEDLESS = ("preserve_attr", "concrete_args")
"""Keys that are accepted without effect, with a warning that says why."""


def warned(key: str) -> AbstractContextManager[Any]:
    """That a key without effect says why it is not needed."""
    text = rf"^{key} has no effect and is not needed: \w.*Fix"
    return pytest.warns(DeprecationWarning, match=text) if key in NEEDLESS else nullcontext()


def test_the_keys_are_those_of_the_reference() -> None:
    assert {section: set(keys.split()) for section, keys in LISTED.items()} == {
        section: set(keys) for section, keys in KEYS.items()
    }


def test_every_key_has_a_right_value_here() -> None:
    assert RIGHT.keys() == {(section, key) for section, keys in LISTED.items() for key in keys.split()}


@pytest.mark.parametrize(("section", "key", "right"), ids(RIGHT))
def test_a_right_value_changes_what_it_says_and_nothing_else(section: str, key: str, right: Right) -> None:
    model, args = right.model()
    without = plan_of(model, args, **right.base)
    given = within(section, key, right.value, right.base)
    with warned(key):
        plan = sq.prepare_by_platform(model, given, example_args=args).plan
    assert changes(without, plan) == right.changed
    assert plan.unused == ()


@pytest.mark.parametrize(("section", "key", "right"), ids(RIGHT))
def test_a_right_value_is_not_changed(section: str, key: str, right: Right) -> None:
    given = within(section, key, right.value, right.base)
    before = repr(given)
    with warned(key):
        sq.from_dicts(given)
    assert repr(given) == before


@pytest.mark.parametrize(
    ("section", "key"),
    [
        (section, key)
        for section in ("prepare_custom_config_dict", *SECTIONS)
        for key in LISTED[section].split()
        if key not in ("chip", "quantmode", "strategy", *SECTIONS)
    ],
)
def test_none_under_an_optional_key_counts_as_left_out(section: str, key: str) -> None:
    assert sq.from_dicts(within(section, key, None)) == sq.from_dicts({"quant_dict": BASE})
