"""``extra_quantizer_dict``: exclusions, additions, what is observed only, and what contradicts another key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.config.dicts.helpers import (
    BASE,
    ENTRY,
    FIXED,
    HEAD_4,
    POST,
    TRANSFORMER,
    WEIGHT,
    Net,
    changes,
    conv,
    documented,
    each,
    image,
    missing,
    plan_of,
    refusal,
    softmaxed,
    told,
    two_linears,
    values,
    watched,
)

# Exclusions and additions


def fork() -> tuple[nn.Module, Tensor]:
    """``exp`` is read by ``a`` and ``b``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.exp(x)
        return torch.exp(m.a(y)), torch.exp(m.b(y))

    return Net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)), image()


@pytest.mark.parametrize(
    ("given", "left", "layers"),
    [
        ({}, {"x", "exp", "a", "b"}, {"a", "b"}),
        ({"exclude_module_name": ["a"]}, {"x", "exp", "b"}, {"b"}),
        ({"exclude_node_name": ["a"]}, {"x", "exp", "b"}, {"a", "b"}),
        ({"exclude_function_type": [nn.Linear]}, {"x"}, {"a", "b"}),
        ({"exclude_module_name": ["a", "b"]}, {"x"}, set()),
        ({"exclude_node_name": ["a", "b"]}, {"x"}, {"a", "b"}),
        ({"exclude_node_name": ["a", "b", "x"]}, set(), {"a", "b"}),
        ({"exclude_node_name": ["exp"]}, {"x", "exp", "a", "b"}, {"a", "b"}),
    ],
    ids=told,
)
def test_an_exclusion_removes_what_that_call_asks_for_and_no_more(
    given: dict[str, Any], left: set[str], layers: set[str]
) -> None:
    plan = plan_of(*fork(), extra_quantizer_dict=given)
    assert (values(plan), values(plan, WEIGHT)) == (left, layers)


@pytest.mark.parametrize(
    "key", [sq.patterns.ConvBnReLU2d, nni.ConvBnReLU2d, nniqat.ConvBnReLU2d], ids=["pattern", "nni", "nniqat"]
)
def test_the_names_of_excluded_modules_may_be_fused_types(key: Any) -> None:
    plan = plan_of(*documented(), extra_quantizer_dict={"exclude_module_name": [key]})
    gone = each(["features.0.0", "layer1.conv1"], WEIGHT, "gone") | {f"features.0.0{POST}": "gone"}
    assert changes(plan_of(*documented()), plan) == gone


def test_an_input_that_a_convolution_reads_stays_quantized_though_it_is_excluded() -> None:
    model = Net(lambda m, x: m.conv(x), conv=conv())
    assert values(plan_of(model, image(), extra_quantizer_dict={"exclude_node_name": ["x"]})) == {"x", "conv"}


def test_an_excluded_container_keeps_its_subtree_float() -> None:
    plan = plan_of(*documented(), extra_quantizer_dict={"exclude_module_name": ["layer2"]})
    gone = each(["layer2.conv1", "layer2.conv2"], WEIGHT, "gone") | each(["layer2.conv1", "layer2.conv2"], POST, "gone")
    assert changes(plan_of(*documented()), plan) == gone


@pytest.mark.parametrize(
    "exclusion",
    [{"exclude_module_name": ["soft"]}, {"exclude_function_type": [nn.Softmax]}, {"exclude_node_name": ["soft"]}],
    ids=told,
)
@pytest.mark.parametrize(("strategy", "left"), [("CNN", {"x", "exp"}), ("Transformer", {"x", "exp"})])
def test_an_additional_node_asks_for_its_inputs_though_it_is_excluded(
    strategy: str, left: set[str], exclusion: dict[str, Any]
) -> None:
    given = {**exclusion, "additional_node_name": ["soft"]}
    plan = plan_of(*softmaxed(), quant_dict={**BASE, "strategy": strategy}, extra_quantizer_dict=given)
    assert values(plan) == left


@pytest.mark.parametrize(
    ("addition", "exclusion"),
    [
        ({"additional_module_type": (nn.Softmax,)}, {"exclude_module_name": ["soft"]}),
        ({"additional_module_type": (nn.Softmax,)}, {"exclude_node_name": ["soft"]}),
        ({"additional_function_type": [F.softmax]}, {"exclude_node_name": ["soft"]}),
    ],
    ids=told,
)
def test_an_excluded_node_of_an_additional_type_asks_for_nothing(
    addition: dict[str, Any], exclusion: dict[str, Any]
) -> None:
    assert values(plan_of(*softmaxed(), extra_quantizer_dict={**addition, **exclusion})) == {"x"}


def test_a_dropout_with_a_quantizer_of_its_own_gives_the_scale_that_rounds_the_bias() -> None:
    layers = {"table": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "drop": nn.Dropout(), "a": nn.Linear(4, 4)}
    model = Net(lambda m, x: m.a(m.drop(m.norm(m.table(x)))), **layers).eval()
    config = sq.QuantConfig(chip="BM1690", strategy="CNN")
    q = sq.quantize(model, config, example_args=(torch.arange(6)[None],))
    assert q.plan.site("a.weight_fake_quant").source == "drop.post_act_fake_quantizer"


def test_observing_a_weight_only_leaves_the_bias_unrounded() -> None:
    plan = plan_of(*two_linears(), extra_quantizer_dict={"module_only_enable_observer": ["b.weight_fake_quant"]})
    assert (plan.site(f"a{WEIGHT}").source, plan.site(f"b{WEIGHT}").source) == (f"x{POST}", "")
    assert watched(plan) == {"b.weight_fake_quant"}


def test_what_is_observed_only_passes_its_values() -> None:
    model, x = two_linears()
    everything = [f"{name}{POST}" for name in ("x", "a", "exp", "b")] + [f"{name}{WEIGHT}" for name in "ab"]
    given = {"quant_dict": BASE, "extra_quantizer_dict": {"module_only_enable_observer": everything}}
    q, params = sq.prepare_by_platform(model, given, example_args=x), sq.params_of(model)
    qparams = q.calibrate(params, [x])
    assert qparams.keys() == {*everything}
    torch.testing.assert_close(q.apply(params, qparams, x), model(x), rtol=0, atol=0)


def test_exclusions_and_observers_leave_the_callers_lists_alone() -> None:
    given = {"exclude_module_name": ["drop"]}
    plan_of(Net(lambda m, x: m.drop(m.conv(x)), drop=nn.Dropout(), conv=conv()), image(), extra_quantizer_dict=given)
    assert given == {"exclude_module_name": ["drop"]}


# Contradictions


def against(exclusion: Mapping[str, Any], **qconfig: Any) -> dict[str, Any]:
    return {"extra_qconfig_dict": qconfig, "extra_quantizer_dict": exclusion}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "weight_only with CNN": (
        {"quant_dict": {**BASE, "quantmode": "weight_only"}},
        ("quantmode", "weight_only", "CNN", "Transformer"),
    ),
    "weight_only with CNN on Academic": (
        {"quant_dict": {**BASE, "chip": "Academic", "quantmode": "weight_only"}},
        ("weight_only", "CNN"),
    ),
    "mixed bfloat16 on Academic": (
        {"quant_dict": {**BASE, "chip": "Academic", "bf16_mix_prec": True}},
        ("bf16_mix_prec", "Academic"),
    ),
    "mixed bfloat16 with weight_only": (
        {"quant_dict": {**TRANSFORMER, "quantmode": "weight_only", "bf16_mix_prec": True}},
        ("bf16_mix_prec", "weight_only"),
    ),
    "an operation that is excluded": (
        against({"exclude_module_name": ["head"]}, int8_op=["head"]),
        ("int8_op", "'head'", "exclude_module_name"),
    ),
    "an entry for weights that are excluded": (
        against({"exclude_module_name": ["head"]}, module_name={"head": HEAD_4}),
        ("module_name", "'head'", "exclude_module_name"),
    ),
    "an operation that is excluded in another spelling": (
        against({"exclude_module_name": ["layer1_conv1"]}, f16_op=["layer1.conv1"]),
        ("f16_op", "'layer1.conv1'", "exclude_module_name", "'layer1_conv1'"),
    ),
    "an operation that is excluded with its container": (
        against({"exclude_module_name": ["layer1"]}, f16_op=["layer1.conv1"]),
        ("f16_op", "'layer1.conv1'", "exclude_module_name", "'layer1'"),
    ),
    "observing a weight that is excluded": (
        against({"exclude_module_name": ["head"], "module_only_enable_observer": ["head.weight_fake_quant"]}),
        ("module_only_enable_observer", "exclude_module_name", "'head'"),
    ),
    "adding a function that is excluded": (
        against({"exclude_function_type": [F.sigmoid], "additional_function_type": [F.sigmoid]}),
        ("sigmoid", "excluded"),
    ),
    "adding a function that is excluded in another spelling": (
        against({"exclude_function_type": [F.sigmoid], "additional_function_type": [torch.sigmoid]}),
        ("sigmoid", "excluded"),
    ),
    "adding a class whose function is excluded": (
        against({"exclude_function_type": ["sigmoid"], "additional_module_type": (nn.Sigmoid,)}),
        ("Sigmoid", "excluded"),
    ),
    "adding a class that is excluded": (
        against({"exclude_module_name": [nn.Softmax], "additional_module_type": (nn.Softmax,)}),
        ("Softmax", "excluded"),
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_both_asked_for_and_forbidden_is_refused(name: str) -> None:
    sections, words = CONTRADICTIONS[name]
    text = refusal({"quant_dict": BASE, **sections})
    assert missing(text, *words) == [], text


def test_an_activation_entry_for_an_excluded_layer_is_no_contradiction() -> None:
    given = {"module_name": {"features.0.0": ENTRY}}
    plan = plan_of(*documented(), extra_qconfig_dict=given, extra_quantizer_dict={"exclude_module_name": ["features.0.0"]})
    assert f"features.0.0{WEIGHT}" not in plan
    assert plan[f"features.0.0{POST}"].fake_quantize == FIXED
