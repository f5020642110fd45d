"""Every key of every dictionary: how a wrong value, and a misspelled key or name, is refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.config.dicts.helpers import (
    ENTRY,
    HEAD_4,
    LISTED,
    SECTIONS,
    QuantizedScale,
    Scale,
    documented,
    fuse_nothing,
    ids,
    missing,
    plan_of,
    refusal,
    within,
)
from tests.config.dicts.test_right_values import RIGHT


class Wrong(NamedTuple):
    """A wrong value of a key, and what the message holds beside the key."""

    value: Any
    words: tuple[str, ...] = ()


A_DICT = (Wrong(5, ("dict",)), Wrong(["head"], ("dict",)))
A_FLAG = (Wrong("yes", ("'yes'", "True or False")), Wrong(1, ("True or False",)))
A_NAME_LIST = (Wrong("head", ("'head'", "list")), Wrong([5], ("5", "list")), Wrong({"head": 1}, ("list",)))
AN_OBSERVER = (Wrong("MinMaxObservr", ("did you mean 'MinMaxObserver'", "EMAMinMaxObserver")), Wrong(5, ("MinMaxObserver",)))
A_QUANTIZER = (Wrong("FixdFakeQuantize", ("'FixedFakeQuantize'",)), Wrong(None.__class__, ("FixedFakeQuantize",)))
BITS = (Wrong(1, ("2..16",)), Wrong(8.0, ("8.0",)), Wrong("eight", ("'eight'",)), Wrong(True, ("True",)))
AN_ENTRY = (
    Wrong({nn.Linear: {**HEAD_4, "mode": "wieght"}}, ("'wieght'", "'weight' or 'activation'")),
    Wrong({nn.Linear: {**HEAD_4, "wobservr": "MSEObserver"}}, ("'wobservr'", "did you mean 'wobserver'")),
)
MAPPINGS = (*A_DICT, Wrong({"Scale": QuantizedScale}, ("class",)), Wrong({Scale: 5}, ("class",)))

WRONG: dict[tuple[str, str], list[Wrong]] = {
    **{("prepare_custom_config_dict", key): list(A_DICT) for key in SECTIONS},
    ("prepare_custom_config_dict", "preserve_attr"): [*A_DICT, Wrong({"": "head"}, ("[attribute names]",))],
    ("prepare_custom_config_dict", "concrete_args"): list(A_DICT),
    ("prepare_custom_config_dict", "leaf_module"): [
        Wrong(nn.Linear, ("list",)),
        Wrong(["Linear"], ("nn.Module classes",)),
        Wrong([nn.Linear(2, 2)], ("nn.Module classes",)),
    ],
    ("quant_dict", "chip"): [Wrong("BM169O", ("did you mean 'BM1690'",)), Wrong(5, ("BM1690",)), Wrong(None, ("BM1690",))],
    ("quant_dict", "quantmode"): [Wrong("weight_onyl", ("did you mean 'weight_only'",)), Wrong(5, ("weight_activation",))],
    ("quant_dict", "strategy"): [Wrong("CNM", ("did you mean 'CNN'",)), Wrong(None, ("Transformer",))],
    ("quant_dict", "bf16_mix_prec"): list(A_FLAG),
    ("quant_dict", "use_tpu_mlir_fwd"): [*A_FLAG, Wrong(True, ("compiler", "False"))],
    ("quant_dict", "not_dynamic_update_param"): list(A_FLAG),
    ("quant_dict", "model_name"): [Wrong(5, ("string",)), Wrong(["net"], ("string",))],
    **{("extra_qconfig_dict", key): list(AN_OBSERVER) for key in ("w_observer", "a_observer")},
    **{("extra_qconfig_dict", key): list(A_QUANTIZER) for key in ("w_fakequantize", "a_fakequantize")},
    **{
        ("extra_qconfig_dict", key): [*A_DICT, Wrong({"use_grad_scalin": True}, ("did you mean 'use_grad_scaling'",))]
        for key in ("w_fakeq_params", "a_fakeq_params")
    },
    **{
        ("extra_qconfig_dict", key): [*A_DICT, Wrong({"bits": 8}, ("did you mean 'bit'",))]
        for key in ("w_qscheme", "a_qscheme")
    },
    ("extra_qconfig_dict", "w_observer_extra_args"): [*A_DICT, Wrong({"p": 1.0}, ("'p'", "minmax", "no options"))],
    ("extra_qconfig_dict", "a_observer_extra_args"): [
        *A_DICT,
        Wrong({"ema_ration": 0.9}, ("did you mean 'ema_ratio'",)),
        Wrong({"ema_ratio": 1.5}, ("1.5",)),
        Wrong({"ema_ratio": "slow"}, ("'slow'",)),
    ],
    ("extra_qconfig_dict", "object_type"): [*A_DICT, Wrong({5: HEAD_4}, ("type",)), *AN_ENTRY],
    ("extra_qconfig_dict", "module_name"): [
        *A_DICT,
        Wrong({nn.Linear: HEAD_4}, ("name",)),
        *(Wrong({"head": w.value[nn.Linear]}, w.words) for w in AN_ENTRY),
    ],
    **{("extra_qconfig_dict", key): list(A_NAME_LIST) for key in ("int4_op", "int8_op", "f16_op")},
    **{
        ("extra_quantizer_dict", key): list(A_NAME_LIST)
        for key in ("exclude_module_name", "exclude_node_name", "additional_node_name", "module_only_enable_observer")
    },
    **{
        ("extra_quantizer_dict", key): [
            Wrong(torch.sigmoid, ("list",)),
            Wrong([5], ("5",)),
            Wrong([nn.Linear(2, 2)], ("Linear",)),
            Wrong("sigmoid", ("list",)),
        ]
        for key in ("exclude_function_type", "additional_function_type", "additional_module_type")
    },
    **{
        ("extra_fuse_dict", key): [
            *A_DICT,
            Wrong({nn.Conv2d: fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d,): fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d, 5): fuse_nothing}, ("(",)),
            Wrong({(nn.Conv2d, nn.Sigmoid): 5}, ("5",)),
        ]
        for key in ("additional_fuser_method_mapping", "additional_fusion_pattern")
    },
    ("extra_fuse_dict", "additional_qat_module_mapping"): list(MAPPINGS),
    ("extra_fuse_dict", "additional_qat_module_mappings"): list(MAPPINGS),
    ("qscheme", "bit"): list(BITS),
    ("qscheme", "reduce_range"): [Wrong(True, ("False", "bits and symmetry")), Wrong(0, ("False",))],
    **{("qscheme", key): list(A_FLAG) for key in ("symmetry", "per_channel", "pot_scale", "symmetric_range")},
    ("qscheme", "ch_axis"): [Wrong("0", ("'0'", "int")), Wrong(True, ("int",)), Wrong(0.5, ("0.5",))],
    **{
        (f"entry with mode {mode!r}", "mode"): [
            Wrong("both", ("'both'", "'weight' or 'activation'")),
            Wrong(None, ("None",)),
        ]
        for mode in ("weight", "activation")
    },
    **{(f"entry with mode {mode!r}", "bit"): list(BITS) for mode in ("weight", "activation")},
    ("entry with mode 'weight'", "wfakequantize"): list(A_QUANTIZER),
    ("entry with mode 'weight'", "wobserver"): list(AN_OBSERVER),
    ("entry with mode 'weight'", "wperchannel"): list(A_FLAG),
    ("entry with mode 'activation'", "afakequantize"): list(A_QUANTIZER),
    ("entry with mode 'activation'", "aobserver"): list(AN_OBSERVER),
}


def test_every_key_has_a_wrong_value_here() -> None:
    assert WRONG.keys() == {(section, key) for section, keys in LISTED.items() for key in keys.split()}


@pytest.mark.parametrize(("section", "key", "wrong"), ids(WRONG))
def test_a_wrong_value_is_refused_with_its_key_and_what_is_allowed(section: str, key: str, wrong: Wrong) -> None:
    text = refusal(within(section, key, wrong.value))
    assert missing(text, key, *wrong.words) == [], text


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in LISTED.items() for key in keys.split() if key != "mode"]
)
def test_a_key_misspelled_by_one_letter_is_refused_with_the_right_one(section: str, key: str) -> None:
    text = refusal(within(section, f"{key}e", RIGHT[section, key][0].value))
    assert missing(text, repr(f"{key}e"), "did you mean", repr(key)) == [], text


NEAR = [
    ("extra_qconfig_dict", "module_name", {"hea": ENTRY}, "'head'"),
    ("extra_qconfig_dict", "object_type", {"Conv2d_sofgo": ENTRY}, "'Conv2d"),
    ("extra_qconfig_dict", "int4_op", ["hea"], "'head'"),
    ("extra_qconfig_dict", "int8_op", ["layer1_conv"], "'layer1.conv1'"),
    ("extra_qconfig_dict", "f16_op", ["layer1.conv"], "'layer1.conv1'"),
    ("extra_quantizer_dict", "exclude_module_name", ["hea"], "'head'"),
    ("extra_quantizer_dict", "exclude_function_type", ["sigmod"], "'Sigmoid'"),
    ("extra_quantizer_dict", "exclude_node_name", ["sigmod"], "'sigmoid'"),
    ("extra_quantizer_dict", "additional_node_name", ["sigmod"], "'sigmoid'"),
    ("extra_quantizer_dict", "additional_function_type", ["sigmod"], "'Sigmoid'"),
    ("extra_quantizer_dict", "additional_module_type", ("Softmx",), "'Softmax'"),
    ("extra_quantizer_dict", "module_only_enable_observer", ["head.weight_fake_qant"], "'head.weight_fake_quant'"),
]


@pytest.mark.parametrize(("section", "key", "value", "near"), NEAR, ids=[case[1] for case in NEAR])
def test_a_near_miss_of_a_name_in_the_model_is_refused_with_the_name(section: str, key: str, value: Any, near: str) -> None:
    text = refusal(within(section, key, value))
    assert missing(text, near) == [], text


@pytest.mark.parametrize(("section", "key", "value", "near"), NEAR, ids=[case[1] for case in NEAR])
def test_a_near_miss_of_a_name_in_the_model_is_refused_with_the_key(section: str, key: str, value: Any, near: str) -> None:
    text = refusal(within(section, key, value))
    assert missing(text, key) == [], text


@pytest.mark.parametrize("name", ["layer3.weight_fake_quant", "layer1_weight_fake_quant", ".weight_fake_quant"])
def test_a_quantizer_that_no_module_could_have_is_refused(name: str) -> None:
    text = refusal(within("extra_quantizer_dict", "module_only_enable_observer", [name]))
    assert missing(text, repr(name), "did you mean", ".conv") == [], text


def test_only_names_that_the_model_has_are_suggested() -> None:
    text = refusal(within("extra_quantizer_dict", "module_only_enable_observer", ["head.weight_fake_qant"]))
    suggested = text.partition("did you mean ")[2].partition("?")[0].split(" or ")
    assert "'head.weight_fake_quant'" in suggested
    assert {name.strip("'") for name in suggested} <= {*plan_of(*documented())}
