"""``extra_qconfig_dict``: lists of operations, entries, and the types and names that they stand under."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.config.dicts.helpers import (
    BASE,
    BEFORE,
    BM1688,
    ENTRY,
    FIXED,
    HEAD_4,
    HEAD_4_CHANGED,
    LAYERS,
    MINMAX,
    MSE,
    PER_TENSOR,
    POST,
    ROLES,
    WEIGHT,
    Net,
    changes,
    conv,
    documented,
    each,
    image,
    missing,
    pieces,
    plan_of,
    refusal,
    told,
    two_linears,
    values,
    within,
)

# Lists of operations


OPS = {
    "int4_op": (4, "learnable", "minmax", "ema_minmax"),
    "int8_op": (8, "learnable", "minmax", "ema_minmax"),
    "f16_op": (16, "fp16", "minmax", "ema_minmax"),
}


@pytest.mark.parametrize("chip", ["CV183X", "MARS3"])
@pytest.mark.parametrize("key", OPS)
def test_a_list_of_operations_gives_both_halves_and_the_full_range(key: str, chip: str) -> None:
    bits, quantizer, weight, activation = OPS[key]
    plan = plan_of(*documented(), quant_dict={**BASE, "chip": chip}, extra_qconfig_dict={key: ["layer1.conv1"]})
    assert pieces(plan[f"layer1.conv1{WEIGHT}"]) == (bits, quantizer, weight, PER_TENSOR)
    assert pieces(plan[f"layer1.conv1{POST}"]) == (bits, quantizer, activation, PER_TENSOR)
    for name in (f"layer1.conv1{WEIGHT}", f"layer1.conv1{POST}"):
        assert (plan[name].scheme.symmetric, plan[name].scheme.symmetric_range) == (True, False)
        assert (plan[name].scheme.qmin, plan[name].scheme.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert plan[f"head{WEIGHT}"].scheme.symmetric_range


@pytest.mark.parametrize(
    ("lists", "bits"),
    [
        (("int4_op", "int8_op"), 8),
        (("int8_op", "int4_op"), 8),
        (("f16_op", "int4_op"), 16),
        (("f16_op", "int8_op", "int4_op"), 16),
    ],
    ids=told,
)
@pytest.mark.parametrize("spelling", ["layer1.conv1", "layer1_conv1"])
def test_of_several_lists_the_later_kind_wins_however_they_are_written(
    lists: tuple[str, ...], bits: int, spelling: str
) -> None:
    given = {key: [spelling if number else "layer1.conv1"] for number, key in enumerate(lists)}
    plan = plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict=given)
    assert (plan[f"layer1.conv1{WEIGHT}"].scheme.bits, plan[f"layer1.conv1{POST}"].scheme.bits) == (bits, bits)


@pytest.mark.parametrize("key", OPS)
def test_a_list_of_operations_replaces_an_entry_of_the_same_name(key: str) -> None:
    given = {"module_name": {"head": HEAD_4}, key: ["head"]}
    alone = {key: ["head"]}
    plans = [plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict=qconfig) for qconfig in (given, alone)]
    assert changes(*plans) == {}


def test_a_list_of_operations_is_held_to_the_bits_of_the_chip() -> None:
    text = refusal(within("extra_qconfig_dict", "int4_op", ["head"]))
    assert missing(text, f"head{POST}", "4 bits", "allowed 8", "BM1690") == []


@pytest.mark.parametrize("half", ["w", "a"])
@pytest.mark.parametrize(
    ("chip", "weight", "activation"),
    [
        ("BM1688", (4, 8), (4, 8)),
        ("BM1684X", None, (8,)),
        ("BM1690", None, (8,)),
        ("SG2260", None, (8,)),
        ("CV183X", None, None),
    ],
)
@pytest.mark.parametrize("bit", [4, 6, 8])
def test_a_chip_takes_the_bits_that_it_has(
    bit: int, chip: str, weight: tuple[int, ...] | None, activation: tuple[int, ...] | None, half: str
) -> None:
    given = {"quant_dict": {**BASE, "chip": chip}, "extra_qconfig_dict": {f"{half}_qscheme": {"bit": bit}}}
    allowed = weight if half == "w" else activation
    if allowed is None or bit in allowed:
        plan = plan_of(*documented(), **given)
        assert {plan[f"head{WEIGHT if half == 'w' else POST}"].scheme.bits} == {bit}
    else:
        text = refusal(given)
        assert missing(text, f"{bit} bits", f"allowed {' or '.join(map(str, allowed))}", f"config {ROLES[half]}") == [], text


# 4-bit layers have an input quantizer of their own


def test_a_4_bit_layer_reads_its_own_quantizer_which_has_4_bits_and_rounds_its_bias() -> None:
    plan = plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict={"int4_op": ["b"]})
    assert list(plan) == [f"x{POST}", f"a{WEIGHT}", f"a{POST}", f"exp{POST}", f"b{WEIGHT}", f"b{BEFORE}", f"b{POST}"]
    assert plan[f"b{BEFORE}"] == plan[f"b{POST}"]
    assert (plan[f"b{BEFORE}"].scheme.qmin, plan[f"b{BEFORE}"].scheme.qmax) == (-8, 7)
    assert plan[f"exp{POST}"].scheme.bits == 8
    assert plan.site(f"b{WEIGHT}").source == f"b{BEFORE}"


@pytest.mark.parametrize(
    "qconfig",
    [
        {"w_qscheme": {"bit": 4}, "a_qscheme": {"bit": 4}},
        {"module_name": {"b": HEAD_4}},
        {"object_type": {nn.Linear: HEAD_4}},
        {"int8_op": ["b"]},
        {"f16_op": ["b"]},
    ],
    ids=["global", "weight by name", "weight by type", "8 bits", "16 bits"],
)
def test_other_layers_have_no_input_quantizer_of_their_own(qconfig: dict[str, Any]) -> None:
    plan = plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict=qconfig)
    assert values(plan, BEFORE) == set()


def test_a_weight_entry_by_type_and_an_activation_entry_by_name_make_a_4_bit_layer() -> None:
    qconfig = {"object_type": {nn.Linear: HEAD_4}, "module_name": {"b": {**ENTRY, "bit": 4}}}
    assert values(plan_of(*two_linears(), quant_dict=BM1688, extra_qconfig_dict=qconfig), BEFORE) == {"b"}


def test_type_entries_for_both_halves_make_4_bit_layers_but_of_grouped_convolutions() -> None:
    model, x = grouped(plain=conv(), own=conv(4))
    entries = {nn.Conv2d: HEAD_4, "Conv2d_sophgo": {**ENTRY, "bit": 4}}
    assert values(plan_of(model, x, quant_dict=BM1688, extra_qconfig_dict={"object_type": entries}), BEFORE) == {"plain"}


def test_only_layers_whose_result_is_quantized_have_one() -> None:
    transformer = {**BM1688, "strategy": "Transformer"}
    plan = plan_of(*two_linears(), quant_dict=transformer, extra_qconfig_dict={"int4_op": ["a", "b"]})
    assert values(plan) == {"x", "exp"}
    assert values(plan, BEFORE) == set()


def test_two_calls_of_a_4_bit_layer_have_one_each_with_counted_names() -> None:
    model = Net(lambda m, x: m.a(torch.exp(m.a(x))), a=nn.Linear(4, 4))
    plan = plan_of(model, torch.randn(2, 4), quant_dict=BM1688, extra_qconfig_dict={"int4_op": ["a"]})
    assert values(plan, BEFORE) == {"a", "a_1"}


# Entries


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize("mode", ["weight", "activation"])
def test_an_entry_replaces_the_grid_of_its_half_and_leaves_the_other(section: str, mode: str) -> None:
    qscheme = {"bit": 8, "symmetry": False, "per_channel": True, "pot_scale": True}
    letter = mode[0]
    given = {"mode": mode, "bit": "8", f"{letter}fakequantize": "FixedFakeQuantize", f"{letter}observer": "MSEObserver"}
    qconfig = {"w_qscheme": qscheme, "a_qscheme": qscheme}
    key: Any = nn.Linear if section == "object_type" else "head"
    plan = plan_of(*documented(), extra_qconfig_dict={**qconfig, section: {key: given}})
    changed = {"symmetric": True, "pot_scale": False, "granularity": PER_TENSOR, "fake_quantize": FIXED, "observer": MSE}
    without = plan_of(*documented(), extra_qconfig_dict=qconfig)
    assert changes(without, plan) == {f"head{WEIGHT if mode == 'weight' else POST}": changed}


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize(("chip", "narrow"), [("CV186X", True), ("BM1688", False)])
def test_the_weight_range_of_an_entry_is_the_chips(section: str, chip: str, narrow: bool) -> None:
    key: Any = nn.Linear if section == "object_type" else "head"
    plan = plan_of(*documented(), quant_dict={**BASE, "chip": chip}, extra_qconfig_dict={section: {key: HEAD_4}})
    assert plan[f"head{WEIGHT}"].scheme.symmetric_range is narrow


@pytest.mark.parametrize(
    ("given", "narrow"), [({}, True), ({"symmetric_range": False}, False), ({"symmetric_range": True}, True)]
)
def test_the_range_of_a_global_scheme_is_the_chips_unless_it_says_otherwise(given: dict[str, Any], narrow: bool) -> None:
    quant_dict = {**BASE, "chip": "CV183X"}
    plan = plan_of(*documented(), quant_dict=quant_dict, extra_qconfig_dict={"w_qscheme": {"bit": 8, **given}})
    assert {plan[f"{layer}{WEIGHT}"].scheme.symmetric_range for layer in LAYERS} == {narrow}


@pytest.mark.parametrize("half", ["w", "a"])
@pytest.mark.parametrize("key", ["quant_min", "quant_max", "dtype"])
def test_bounds_of_codes_are_said_by_bits_and_symmetry_alone(half: str, key: str) -> None:
    text = refusal(within("extra_qconfig_dict", f"{half}_qscheme", {"bit": 8, key: 100}))
    assert missing(text, f"{half}_qscheme", repr(key), "symmetric_range") == [], text


@pytest.mark.parametrize("key", ["w_fakeq_params", "a_fakeq_params"])
@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_an_initial_value_that_calibration_replaces_is_said_to_have_no_effect(key: str, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{key}\['{name}'\] has no effect.*calibration"):
        config = sq.from_dicts(within("extra_qconfig_dict", key, {name: [1.0]}))
    assert config == sq.from_dicts({"quant_dict": BASE})


@pytest.mark.parametrize(("axis", "per_channel"), [(1, True), (0, True), (None, False), (None, True)])
def test_a_weight_per_channel_of_a_deconvolution_runs_over_output_channels(axis: int | None, per_channel: bool) -> None:
    given = {"mode": "weight", "bit": 8, "wfakequantize": "FixedFakeQuantize", "wobserver": "MinMaxObserver"}
    qconfig = {"object_type": {nn.ConvTranspose2d: {**given, "wperchannel": per_channel}}}
    if axis is not None:
        qconfig = {"w_qscheme": {"per_channel": per_channel, "ch_axis": axis}}
    model = Net(lambda m, x: m.up(x), up=nn.ConvTranspose2d(4, 6, 2))
    granularity = plan_of(model, image(), extra_qconfig_dict=qconfig)[f"up{WEIGHT}"].scheme.granularity
    assert granularity == (sq.PerChannel(1 if axis is None else axis) if per_channel else PER_TENSOR)


@pytest.mark.parametrize("section", ["object_type", "module_name"])
@pytest.mark.parametrize(
    ("mode", "field"),
    [
        ("weight", "bit"),
        ("weight", "wfakequantize"),
        ("weight", "wobserver"),
        ("activation", "bit"),
        ("activation", "afakequantize"),
        ("activation", "aobserver"),
    ],
)
def test_an_entry_that_leaves_a_field_out_keeps_what_the_broader_level_says(mode: str, field: str, section: str) -> None:
    whole = {"weight": HEAD_4, "activation": ENTRY}[mode]
    key: Any = nn.Linear if section == "object_type" else "head"
    given = {name: value for name, value in whole.items() if name != field}
    config = plan_of(*documented(), quant_dict=BM1688, extra_qconfig_dict={section: {key: given}})
    name, chip = f"head{WEIGHT if mode == 'weight' else POST}", sq.CHIPS.get("BM1688")
    broader = chip.weight if mode == "weight" else chip.activation
    own = field if field == "bit" else field.removeprefix(mode[0])
    kept = {"bit": "bits", "observer": "observer", "fakequantize": "fake_quantize"}[own]
    found = config[name].scheme.bits if kept == "bits" else getattr(config[name], kept)
    assert found == (8 if kept == "bits" else getattr(broader, kept))


@pytest.mark.parametrize(
    "sections", [{"preserve_attr": {"": ["a"]}}, {"extra_qconfig_dict": {"a_fakeq_params": {"scale": 1.0}}}], ids=told
)
def test_a_warning_points_at_the_line_that_called_the_library(sections: dict[str, Any]) -> None:
    model, x = two_linears()
    given = {"quant_dict": BASE, **sections}
    with pytest.warns(DeprecationWarning) as caught:
        sq.from_dicts(given)
        sq.prepare_by_platform(model, given, example_args=x)
    assert [warning.filename for warning in caught] == [__file__, __file__]


# Type keys


class Named(NamedTuple):
    """Keys that all mean one sort of layer, and the layers of the zoo that they reach."""

    keys: tuple[Any, ...]
    layers: set[str]


def zoo() -> tuple[nn.Module, Tensor]:
    """Each sort of layer, named for what fuses with it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.bn(m.conv_bn(m.conv(x)))
        x = F.relu(m.bn2(m.conv_bn_relu(x)))
        x = m.relu(m.conv_relu(x))
        x = m.relu3(m.bn3(m.up_bn_relu(x)))
        x = m.relu4(m.norm(torch.exp(x)))
        return m.linear(torch.relu(m.linear_relu(x)))

    layers: dict[str, nn.Module] = {name: conv() for name in ("conv", "conv_bn", "conv_bn_relu", "conv_relu")}
    layers |= {name: nn.BatchNorm2d(4) for name in ("bn", "bn2", "bn3", "norm")}
    layers |= {name: nn.ReLU() for name in ("relu", "relu3", "relu4")}
    layers |= {"linear": nn.Linear(8, 8), "linear_relu": nn.Linear(8, 8), "up_bn_relu": nn.ConvTranspose2d(4, 4, 1)}
    return Net(forward, **layers), image()


NAMED = {
    "Conv2d": Named(
        (nn.Conv2d, "Conv2d", "nn.Conv2d", "torch.nn.Conv2d", "Conv2d_sophgo", nnqat.Conv2d, F.conv2d, "conv2d"),
        {"conv", "conv_bn", "conv_bn_relu", "conv_relu"},
    ),
    "ConvBn2d": Named(
        (nni.ConvBn2d, nniqat.ConvBn2d, sq.patterns.ConvBn2d, sq.patterns.ConvBn2d_sophgo, "ConvBn2d", "ConvBn2d_sophgo"),
        {"conv_bn"},
    ),
    "ConvBnReLU2d": Named(
        (
            nni.ConvBnReLU2d,
            nniqat.ConvBnReLU2d,
            sq.patterns.ConvBnReLU2d,
            sq.patterns.ConvBnReLU2d_sophgo,
            "ConvBnReLU2d",
            "ConvBnReLU2d_sophgo",
            "torch.ao.nn.intrinsic.ConvBnReLU2d",
        ),
        {"conv_bn_relu"},
    ),
    "ConvReLU2d": Named(
        (nni.ConvReLU2d, nniqat.ConvReLU2d, sq.patterns.ConvReLU2d, "ConvReLU2d", "ConvReLU2d_sophgo"), {"conv_relu"}
    ),
    "Linear": Named((nn.Linear, nnqat.Linear, "Linear", "Linear_sophgo", F.linear), {"linear", "linear_relu"}),
    "LinearReLU": Named((nni.LinearReLU, nniqat.LinearReLU, sq.patterns.LinearReLU, "LinearReLU_sophgo"), {"linear_relu"}),
    "ConvTranspose2d": Named((nn.ConvTranspose2d, "ConvTranspose2d", "ConvTranspose2d_sophgo"), {"up_bn_relu"}),
    "ConvTransposeBnReLU2d": Named((sq.patterns.ConvTransposeBnReLU2d, "ConvTransposeBnReLU2d_sophgo"), {"up_bn_relu"}),
    "BnReLU2d": Named((nni.BNReLU2d, sq.patterns.BnReLU2d, "BnReLU2d_sophgo", "BNReLU2d"), {"norm"}),
}
EVERY_NAME = [
    pytest.param(key, named.layers, id=f"{sort}-{n}") for sort, named in NAMED.items() for n, key in enumerate(named.keys)
]


@pytest.mark.parametrize(("key", "layers"), EVERY_NAME)
def test_an_activation_entry_reaches_each_layer_that_its_type_key_means(key: Any, layers: set[str]) -> None:
    without = plan_of(*zoo())
    plan = plan_of(*zoo(), extra_qconfig_dict={"object_type": {key: ENTRY}})
    assert changes(without, plan) == each(layers, POST, {"fake_quantize": FIXED, "observer": MINMAX})


@pytest.mark.parametrize(("key", "layers"), EVERY_NAME)
def test_a_weight_entry_reaches_each_layer_that_its_type_key_means(key: Any, layers: set[str]) -> None:
    without = plan_of(*zoo())
    plan = plan_of(*zoo(), extra_qconfig_dict={"object_type": {key: HEAD_4}})
    assert changes(without, plan) == each(layers - {"norm"}, WEIGHT, HEAD_4_CHANGED)


def test_later_types_win_over_earlier_ones_and_names_over_types() -> None:
    both = {nn.Conv2d: {**HEAD_4, "bit": 6}, sq.patterns.ConvReLU2d: {**HEAD_4, "bit": 5}}
    named = {"conv_relu": {**HEAD_4, "bit": 7}}
    bits = [
        plan_of(*zoo(), extra_qconfig_dict=qconfig)[f"conv_relu{WEIGHT}"].scheme.bits
        for qconfig in ({"object_type": both}, {"object_type": both, "module_name": named})
    ]
    assert bits == [5, 7]


def grouped(**layers: nn.Module) -> tuple[nn.Module, Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        for layer in m.children():
            x = torch.exp(layer(x))
        return x

    return Net(forward, **layers), image()


@pytest.mark.parametrize(("half", "given"), [(WEIGHT, HEAD_4), (POST, {**ENTRY, "bit": 4})], ids=["weight", "activation"])
@pytest.mark.parametrize("groups", [2, 4])
def test_a_type_entry_leaves_grouped_convolutions_as_they_are(groups: int, half: str, given: dict[str, Any]) -> None:
    model, x = grouped(plain=conv(), own=conv(groups))
    plan = plan_of(model, x, quant_dict=BM1688, extra_qconfig_dict={"object_type": {nn.Conv2d: given}})
    assert (plan[f"plain{half}"].scheme.bits, plan[f"own{half}"].scheme.bits) == (4, 8)


def test_a_name_entry_reaches_grouped_convolutions() -> None:
    model, x = grouped(own=conv(4))
    assert plan_of(model, x, extra_qconfig_dict={"module_name": {"own": HEAD_4}})[f"own{WEIGHT}"].scheme.bits == 4


def test_a_type_entry_reaches_grouped_transposed_convolutions() -> None:
    model, x = grouped(up=nn.ConvTranspose2d(4, 4, 1, groups=2))
    assert (
        plan_of(model, x, extra_qconfig_dict={"object_type": {nn.ConvTranspose2d: HEAD_4}})[f"up{WEIGHT}"].scheme.bits == 4
    )


# Name keys


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("layer1.conv1", {"layer1.conv1"}),
        ("layer1_conv1", {"layer1.conv1"}),
        ("layer1", {"layer1.conv1"}),
        ("layer2", {"layer2.conv1", "layer2.conv2"}),
        ("features.0", {"features.0.0"}),
        ("features_0", {"features.0.0"}),
        ("features", {"features.0.0"}),
    ],
)
def test_a_name_may_be_dotted_or_underscored_or_that_of_a_container(name: str, reached: set[str]) -> None:
    without = plan_of(*documented())
    weight = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: HEAD_4}})
    assert changes(without, weight) == each(reached, WEIGHT, HEAD_4_CHANGED)
    activation = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: ENTRY}})
    assert changes(without, activation) == each(reached, POST, {"fake_quantize": FIXED, "observer": MINMAX})


@pytest.mark.parametrize("order", [1, -1], ids=["container first", "container last"])
def test_an_entry_for_a_layer_wins_over_that_of_its_container(order: int) -> None:
    entries = {"layer2": {**HEAD_4, "bit": 4}, "layer2.conv1": {**HEAD_4, "bit": 5}}
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": dict(list(entries.items())[::order])})
    assert [plan[f"layer2.{layer}{WEIGHT}"].scheme.bits for layer in ("conv1", "conv2")] == [5, 4]


@pytest.mark.parametrize("spellings", [("layer1.conv1", "layer1_conv1"), ("layer1_conv1", "layer1.conv1")], ids=told)
def test_a_weight_and_an_activation_entry_for_one_layer_stand_under_its_two_spellings(spellings: tuple[str, str]) -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": dict(zip(spellings, (HEAD_4, ENTRY), strict=True))})
    assert changes(plan_of(*documented()), plan) == {
        f"layer1.conv1{WEIGHT}": HEAD_4_CHANGED,
        f"layer1.conv1{POST}": {"fake_quantize": FIXED, "observer": MINMAX},
    }


def test_an_input_is_named_as_a_layer_is() -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": {"x": ENTRY}})
    assert changes(plan_of(*documented()), plan) == {f"x{POST}": {"fake_quantize": FIXED, "observer": MINMAX}}


class Shared(nn.Module):
    """A container with two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.container = nn.ModuleDict({"b": nn.Linear(8, 8)})
        self.x = self.container

    def forward(self, x: Tensor) -> Tensor:
        return self.container["b"](x)


@pytest.mark.parametrize("name", ["container.b", "x.b"])
def test_an_entry_for_a_layer_wins_over_that_of_its_container_by_each_of_its_paths(name: str) -> None:
    entries = {name: {**HEAD_4, "bit": 5}, "container": HEAD_4}
    assert plan_of(Shared(), image(), extra_qconfig_dict={"module_name": entries})[f"container.b{WEIGHT}"].scheme.bits == 5


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_post_act_fake_quantizer", "sigmoid.post_act_fake_quantizer"])
def test_a_function_is_named_as_a_layer_is(name: str) -> None:
    plan = plan_of(*documented(), extra_qconfig_dict={"module_name": {name: ENTRY}})
    assert changes(plan_of(*documented()), plan) == {f"sigmoid{POST}": {"fake_quantize": FIXED, "observer": MINMAX}}
