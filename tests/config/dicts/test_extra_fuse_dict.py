"""``extra_fuse_dict`` and ``leaf_module``: mapped layers, fused groups, and modules that are one value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.config.dicts.helpers import (
    ENTRY,
    FIXED,
    HEAD_4,
    POST,
    WEIGHT,
    Net,
    QuantizedScale,
    Scale,
    conv,
    documented,
    fuse_nothing,
    image,
    plan_of,
    scaled,
    values,
)
from tests.documented import Layer2


def test_a_leaf_module_is_one_value_and_its_inside_none() -> None:
    sections = {"leaf_module": [Layer2], "extra_quantizer_dict": {"additional_module_type": (Layer2,)}}
    plan = plan_of(*documented(), **sections)
    assert {name for name in plan if name.startswith("layer2")} == {f"layer2{POST}"}


@pytest.mark.parametrize("key", ["additional_qat_module_mapping", "additional_qat_module_mappings"])
def test_a_mapped_layer_has_its_weight_quantized_and_answers_to_both_of_its_classes(key: str) -> None:
    for name in (Scale, QuantizedScale):
        sections = {"extra_fuse_dict": {key: {Scale: QuantizedScale}}, "extra_qconfig_dict": {"object_type": {name: HEAD_4}}}
        assert plan_of(*scaled(), **sections)[f"scale{WEIGHT}"].scheme.bits == 4


@pytest.mark.parametrize("key", ["additional_qat_module_mapping", "additional_qat_module_mappings"])
def test_a_layer_of_torch_that_the_chip_does_not_quantize_is_quantized_when_it_is_mapped(key: str) -> None:
    model = Net(lambda m, x: m.conv(x), conv=nn.Conv1d(4, 4, 1))
    plans = [
        plan_of(model, torch.randn(2, 4, 8), extra_fuse_dict=given) for given in ({}, {key: {nn.Conv1d: QuantizedScale}})
    ]
    assert [values(plan, WEIGHT) for plan in plans] == [set(), {"conv"}]


@pytest.mark.parametrize("table", ["additional_fuser_method_mapping", "additional_fusion_pattern"])
def test_a_fused_group_is_one_value_behind_its_last_member(table: str) -> None:
    parts: tuple[Any, ...] = (nn.Conv2d, nn.BatchNorm2d, nn.Sigmoid)
    key = parts if table == "additional_fuser_method_mapping" else (nn.Sigmoid, (nn.BatchNorm2d, nn.Conv2d))
    model = Net(lambda m, x: torch.exp(torch.sigmoid(m.bn(m.conv(x)))), conv=conv(), bn=nn.BatchNorm2d(4))
    plan = plan_of(model, image(), extra_fuse_dict={table: {key: fuse_nothing}})
    assert values(plan) == {"x", "conv"}
    assert plan.site(f"conv{POST}").members == ("conv", "bn", "sigmoid")
    assert plan.site(f"conv{WEIGHT}").norm == "bn"


def test_a_fused_group_answers_to_the_class_that_it_is_fused_to() -> None:
    sections = {
        "extra_fuse_dict": {"additional_fuser_method_mapping": {(nn.Conv2d, nn.Sigmoid): QuantizedScale}},
        "extra_qconfig_dict": {"object_type": {QuantizedScale: ENTRY}},
    }
    assert plan_of(*documented(), **sections)[f"layer3.conv3{POST}"].fake_quantize == FIXED
