"""``quant_dict``: where each ``strategy``, the chip Academic and ``bf16_mix_prec`` place quantizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.config.dicts.helpers import (
    BASE,
    BEFORE,
    BF16,
    E4M3,
    ENTRY,
    HEAD_4,
    LEARNABLE,
    PER_TENSOR,
    POST,
    TRANSFORMER,
    WEIGHT,
    Net,
    changes,
    conv,
    documented,
    image,
    pieces,
    plan_of,
    softmaxed,
    told,
    values,
    watched,
)


class Pixels(nn.Module):
    """The reference leaves an input of this name out."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return abs(pixel_values)


# Placement of CNN and Transformer


class Sets(NamedTuple):
    """A forward; what CNN quantizes, what Transformer quantizes or observes, and what of it is quantized."""

    forward: Callable[..., Any]
    cnn: str
    transformer: str
    quantized: str = ""
    layers: Callable[[], dict[str, nn.Module]] = dict
    further: tuple[Tensor, ...] = ()


def linear(*names: str) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {name: nn.Linear(8, 8) for name in names}


def worked_example(m: Any, x: Tensor) -> Tensor:
    y = m.relu(m.bn(m.conv1(x)))
    z = m.bn2(m.conv2(y))
    return m.fc(m.pool(F.relu(z + y)).flatten(1))


def worked_layers() -> dict[str, nn.Module]:
    norms = {"bn": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    return {"conv1": conv(), "conv2": conv(), **norms, "pool": nn.AdaptiveAvgPool2d(1), "fc": nn.Linear(4, 2)}


def merged(m: Any, x: Tensor) -> Tensor:
    y = torch.exp(x)
    return torch.exp(y * y + y)


def merged_behind_relu(m: Any, x: Tensor) -> Tensor:
    y = torch.exp(x)
    return torch.exp(torch.relu(y * y) + y)


def both_kinds(m: Any, x: Tensor) -> Tensor:
    y = abs(torch.exp(x))
    return torch.exp(torch.relu(y)), torch.exp(y)


def attention(m: Any, x: Tensor) -> Tensor:
    q, k = m.q(x), m.k(x)
    return m.out(torch.matmul(F.softmax(torch.matmul(q, k.transpose(-1, -2)) * 0.5, -1), x) + x)


PLACED = {
    "the worked example": Sets(
        worked_example, "x conv1 conv2 relu_1 flatten fc", "x conv1 conv2 relu_1 flatten", "flatten", worked_layers
    ),
    "an operation with a scalar": Sets(lambda m, x: torch.exp(x) * 2.0, "x exp mul", "x exp"),
    "a product that feeds a sum": Sets(merged, "x exp mul add", "x exp"),
    "a product that feeds a sum behind a relu": Sets(merged_behind_relu, "x exp relu add", "x exp relu"),
    "a product that feeds a difference": Sets(lambda m, x: x * x - x, "x mul sub", "x mul"),
    "a value of another's type": Sets(lambda m, x: abs(torch.exp(x).type_as(x)), "x abs", "x"),
    "a remainder": Sets(lambda m, x: abs(torch.exp(x) % 2.0), "x abs", "x"),
    "a floor division": Sets(lambda m, x: abs(torch.exp(x) // 2.0), "x abs", "x"),
    "an input with one axis": Sets(lambda m, x, v: torch.exp(x) * v, "x exp mul", "x exp", further=(torch.ones(8),)),
    "an input of integers": Sets(
        lambda m, x, v: abs(torch.exp(x)[:, v]), "x abs getitem", "x getitem", further=(torch.ones(2, 2).long(),)
    ),
    "sizes": Sets(lambda m, x: torch.exp(x).view(x.shape[0] * x.size(1), -1), "x", "x"),
    "a product with a size": Sets(lambda m, x: torch.exp(x) * x.shape[0], "x exp mul", "x exp"),
    "an input that nobody asks for": Sets(lambda m, x: torch.exp(x), "x", "x"),
    "a result that is returned": Sets(lambda m, x: abs(torch.exp(x)), "x exp abs", "x exp"),
    "a sum behind which is a relu": Sets(lambda m, x: torch.exp(F.relu(torch.exp(x) + x)), "x exp relu", "x exp"),
    "a relu and a flatten": Sets(
        lambda m, x: m.a(torch.flatten(F.relu(torch.exp(x) + x), 1)[:, :8]),
        "x exp relu getitem a",
        "x exp getitem",
        "getitem",
        linear("a"),
    ),
    "a relu, a flatten and a layer": Sets(
        lambda m, x: m.a(torch.flatten(F.relu(torch.exp(x) + x), 2)),
        "x exp relu flatten a",
        "x exp flatten",
        "flatten",
        lambda: {"a": nn.Linear(64, 2)},
    ),
    "a value with a passed user and another": Sets(both_kinds, "x exp relu abs", "x exp"),
    "a dropout between layers": Sets(
        lambda m, x: m.b(m.drop(m.a(x))),
        "x drop b",
        "x drop",
        "x drop",
        lambda: {**linear("a", "b")(), "drop": nn.Dropout()},
    ),
    "a dropout of channels": Sets(
        lambda m, x: torch.exp(m.drop(m.a(x))), "x a", "x", "x", lambda: {**linear("a")(), "drop": nn.Dropout2d()}
    ),
    "values called squeeze and qa_outputs": Sets(
        lambda m, x: (m.qa_outputs(x).squeeze(), m.qa_outputs(x).squeeze()),
        "x qa_outputs qa_outputs_1",
        "x",
        "x",
        linear("qa_outputs"),
    ),
    "layers and a product of matrices": Sets(
        attention,
        "x q k transpose matmul mul softmax matmul_1 add out",
        "x q transpose matmul softmax matmul_1 add",
        "x q transpose softmax add",
        linear("q", "k", "out"),
    ),
    "a fused linear layer": Sets(
        lambda m, x: torch.exp(torch.relu(m.a(torch.exp(x)))), "x exp a", "x exp", "exp", linear("a")
    ),
    "a fused convolution": Sets(
        lambda m, x: torch.exp(torch.relu(m.a(torch.exp(x)))), "x exp a", "x exp", "exp", lambda: {"a": conv()}
    ),
    "a deconvolution": Sets(
        lambda m, x: torch.exp(m.a(torch.exp(x))), "x exp a", "x exp", "", lambda: {"a": nn.ConvTranspose2d(4, 4, 1)}
    ),
    "a module called twice": Sets(lambda m, x: m.a(torch.exp(m.a(x))), "x a exp a_1", "x exp", "x exp", linear("a")),
    "a list of tensors": Sets(lambda m, x: torch.cat([torch.exp(x), x.exp(), x]), "x exp exp_1 cat", "x exp exp_1"),
    "a batchnorm that nothing is fused with": Sets(
        lambda m, x: torch.relu(m.a(torch.exp(x))), "x exp a", "x exp", "", lambda: {"a": nn.BatchNorm2d(4)}
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_cnn_quantizes_inputs_and_results_of_what_it_lists(name: str) -> None:
    case = PLACED[name]
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further))
    assert values(plan) == set(case.cnn.split())
    assert watched(plan) == set()


@pytest.mark.parametrize("name", PLACED)
def test_transformer_quantizes_inputs_of_contractions_and_observes_those_of_the_rest(name: str) -> None:
    case = PLACED[name]
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further), quant_dict=TRANSFORMER)
    assert values(plan) == set(case.transformer.split())
    assert values(plan) - watched(plan) == set(case.quantized.split())


@pytest.mark.parametrize("key", ["additional_function_type", "additional_module_type"])
def test_transformer_quantizes_inputs_of_an_additional_type_and_does_not_only_observe_them(key: str) -> None:
    plan = plan_of(*softmaxed(), quant_dict=TRANSFORMER, extra_quantizer_dict={key: (nn.Softmax,)})
    assert (values(plan), watched(plan)) == ({"x", "exp"}, {"x"})


class Inner(nn.Module):
    """Functions inside a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(torch.exp(x) + 1.0)


@pytest.mark.parametrize("name", ["inner.0.add", "inner_0_add"])
@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_a_function_inside_a_module_is_excluded_by_its_path(strategy: str, name: str) -> None:
    model, quant_dict = Net(lambda m, x: m.inner(x), inner=nn.Sequential(Inner())), {**BASE, "strategy": strategy}
    plans = [
        plan_of(model, image(), quant_dict=quant_dict, extra_quantizer_dict=g) for g in ({}, {"exclude_node_name": [name]})
    ]
    asked = {"CNN": {"inner.0.exp", "inner.0.add"}, "Transformer": {"inner.0.exp"}}[strategy]
    assert [values(plan) for plan in plans] == [{"x"} | asked, {"x"}]


@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_no_name_of_an_input_is_special(strategy: str) -> None:
    assert "pixel_values" in values(plan_of(Pixels(), image(), quant_dict={**BASE, "strategy": strategy}))


@pytest.mark.parametrize("name", PLACED)
def test_weight_only_quantizes_no_value(name: str) -> None:
    case = PLACED[name]
    quant_dict = {**TRANSFORMER, "quantmode": "weight_only"}
    plan = plan_of(Net(case.forward, **case.layers()), (image(), *case.further), quant_dict=quant_dict)
    assert all(name.endswith(WEIGHT) for name in plan)


# Placement of Academic


ACADEMIC = {**BASE, "chip": "Academic"}


def research(m: Any, x: Tensor) -> Tensor:
    y = torch.matmul(m.a(torch.exp(m.conv(x))), torch.exp(x))
    return m.b(torch.sigmoid(y) + y)


def academic(strategy: str = "CNN", **sections: Any) -> sq.Plan:
    model = Net(research, conv=conv(), **linear("a", "b")())
    return plan_of(model, image(), **{"quant_dict": {**ACADEMIC, "strategy": strategy}, **sections})


@pytest.mark.parametrize("strategy", ["CNN", "Transformer"])
def test_academic_quantizes_inputs_of_linear_layers_and_both_sides_of_products(strategy: str) -> None:
    plan = academic(strategy)
    assert values(plan) == {"exp", "a", "exp_1", "matmul", "add"}
    assert values(plan, WEIGHT) == {"conv", "a", "b"}
    assert {plan[f"{name}{WEIGHT}"].fake_quantize for name in ("conv", "a", "b")} == {E4M3}
    assert {plan[f"{name}{WEIGHT}"].scheme.granularity for name in ("conv", "a", "b")} == {sq.PerChannel(0)}
    assert watched(plan) == set()
    assert {plan.site(f"{name}{WEIGHT}").source for name in ("conv", "a", "b")} == {""}


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"exclude_function_type": [torch.matmul]}, {"exp", "matmul", "add"}),
        ({"exclude_node_name": ["matmul"]}, {"exp", "matmul", "add"}),
        ({"exclude_module_name": ["b"]}, {"exp", "a", "exp_1", "matmul"}),
        ({"exclude_node_name": ["b"]}, {"exp", "a", "exp_1", "matmul"}),
        ({"additional_function_type": [torch.sigmoid]}, {"exp", "a", "exp_1", "matmul", "add"}),
        ({"additional_function_type": [torch.add]}, {"exp", "a", "exp_1", "matmul", "sigmoid", "add"}),
        ({"additional_node_name": ["conv"]}, {"x", "exp", "a", "exp_1", "matmul", "add"}),
        ({"additional_module_type": (nn.Conv2d,)}, {"x", "exp", "a", "exp_1", "matmul", "add"}),
    ],
    ids=told,
)
def test_in_academic_exclusions_and_additions_speak_of_inputs(given: dict[str, Any], left: set[str]) -> None:
    assert values(academic(extra_quantizer_dict=given)) == left


@pytest.mark.parametrize("name", ["sigmoid_post_act_fake_quantizer", "sigmoid.post_act_fake_quantizer"])
def test_in_academic_an_entry_for_a_quantizer_adds_it(name: str) -> None:
    plan = academic(extra_qconfig_dict={"module_name": {name: {**ENTRY, "bit": 4}}})
    assert changes(academic(), plan) == {f"sigmoid{POST}": "new"}
    assert pieces(plan[f"sigmoid{POST}"]) == (4, "fixed", "minmax", PER_TENSOR)


@pytest.mark.parametrize("key", [nn.Linear, torch.matmul, "matmul"], ids=told)
def test_in_academic_a_type_entry_reaches_the_activations_that_are_quantized(key: Any) -> None:
    changed = changes(academic(), academic(extra_qconfig_dict={"object_type": {key: ENTRY}}))
    assert {name.endswith(POST) for name in changed} <= {True}
    assert changed


def test_in_academic_what_ought_to_be_observed_only_is() -> None:
    given = {"module_only_enable_observer": ["matmul_post_act_fake_quantizer"]}
    changed = changes(academic(), academic(extra_quantizer_dict=given))
    assert changed == {f"matmul{POST}": {"observe_only": True}}


LOW = {"w_fakequantize": "FixedFakeQuantize", "w_qscheme": {"bit": 4, "per_channel": True}, "a_qscheme": {"bit": 4}}


def bits(plan: sq.Plan) -> dict[str, int]:
    return {name: config.scheme.bits for name, config in plan.items()}


def test_in_academic_layers_that_read_an_input_or_make_the_result_have_8_bits() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(torch.exp(m.middle(torch.exp(m.first(x)))))

    model = Net(forward, **linear("first", "middle", "last")())
    assert bits(plan_of(model, image(), quant_dict=ACADEMIC, extra_qconfig_dict=LOW)) == {
        f"x{POST}": 8,
        f"first{WEIGHT}": 8,
        f"exp{POST}": 4,
        f"middle{WEIGHT}": 4,
        f"exp_1{POST}": 8,
        f"last{WEIGHT}": 8,
    }


def test_in_academic_a_first_convolution_has_8_bits_and_a_layer_behind_a_function_not() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.exp(m.b(torch.exp(m.conv(x)))) + m.a(torch.exp(x))

    plan = plan_of(Net(forward, conv=conv(), **linear("a", "b")()), image(), quant_dict=ACADEMIC, extra_qconfig_dict=LOW)
    assert bits(plan) == {f"conv{WEIGHT}": 8, f"exp{POST}": 4, f"b{WEIGHT}": 4, f"exp_2{POST}": 4, f"a{WEIGHT}": 4}


def test_in_academic_a_rule_for_a_first_layer_wins_over_its_8_bits() -> None:
    qconfig = {**LOW, "module_name": {"a": HEAD_4}}
    model = Net(lambda m, x: torch.exp(m.a(x)), **linear("a")())
    assert bits(plan_of(model, image(), quant_dict=ACADEMIC, extra_qconfig_dict=qconfig)) == {f"x{POST}": 8, f"a{WEIGHT}": 4}


# Placement of mixed bfloat16


MIXED = {**BASE, "bf16_mix_prec": True}


class Mixed(NamedTuple):
    """A forward with its layers, and what has integer and bfloat16 quantizers behind it (``y``) or before it (``>y``)."""

    forward: Callable[..., Any]
    integer: str
    bfloat: str
    layers: Callable[[], dict[str, nn.Module]]


def shared_inputs(m: Any, x: Tensor) -> Any:
    return m.a(x), m.b(x), torch.exp(x), torch.sigmoid(x)


def shared_results(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    return m.b(y), torch.exp(y), torch.sigmoid(y)


def shared_functions(m: Any, x: Tensor) -> Any:
    y = torch.exp(x)
    return m.a(y), m.b(y), torch.sigmoid(y)


def with_layers(*names: str, **further: Callable[[], nn.Module]) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {**linear(*names)(), **{name: make() for name, make in further.items()}}


MIXES = {
    "calls of a kind share a quantizer on an input": Mixed(shared_inputs, ">a a b", ">exp exp sigmoid", linear("a", "b")),
    "calls of a kind share a quantizer on a result of a layer": Mixed(
        shared_results, ">a a b", ">exp exp sigmoid", linear("a", "b")
    ),
    "calls of a kind share a quantizer on a result of a function": Mixed(
        shared_functions, ">a a b", ">exp exp sigmoid", linear("a", "b")
    ),
    "between layers there is one": Mixed(lambda m, x: m.b(m.a(x)), ">a a b", "", linear("a", "b")),
    "between functions there is one": Mixed(lambda m, x: torch.exp(torch.sigmoid(x)), "", ">sigmoid sigmoid exp", dict),
    "a relu that is fused has none before it": Mixed(
        lambda m, x: torch.exp(m.relu(m.a(x))), ">a a", ">exp exp", with_layers("a", relu=nn.ReLU)
    ),
    "a relu behind what it cannot be fused with has one before it": Mixed(
        lambda m, x: m.relu(m.pool(x)), "", ">pool pool relu", with_layers(pool=lambda: nn.MaxPool2d(2), relu=nn.ReLU)
    ),
    "a relu on an input has one before it": Mixed(lambda m, x: m.relu(x), "", ">relu relu", with_layers(relu=nn.ReLU)),
    "a dropout is looked through": Mixed(
        lambda m, x: m.b(m.drop(m.a(m.drop(x)))), ">a a b", "", with_layers("a", "b", drop=nn.Dropout)
    ),
    "a dropout beside another call is looked through": Mixed(
        lambda m, x: (m.b(m.drop(torch.exp(x))), torch.sigmoid(m.drop(x))),
        ">b b",
        ">exp exp sigmoid",
        with_layers("b", drop=nn.Dropout),
    ),
    "a value that is returned alone has no further one": Mixed(lambda m, x: (m.a(x), x), ">a a", "", linear("a")),
}


def described(plan: sq.Plan, bfloat: bool) -> set[str]:
    chosen = [name for name, config in plan.items() if (config.fake_quantize == BF16) is bfloat]
    after = {name.removesuffix(POST) for name in chosen if name.endswith(POST)}
    return after | {f">{name.removesuffix(BEFORE)}" for name in chosen if name.endswith(BEFORE)}


@pytest.mark.parametrize("name", MIXES)
def test_mixed_bfloat16(name: str) -> None:
    case = MIXES[name]
    plan = plan_of(Net(case.forward, **case.layers()), image(), quant_dict=MIXED)
    assert described(plan, False) == set(case.integer.split())
    assert described(plan, True) == set(case.bfloat.split())
    assert {config.fake_quantize for key, config in plan.items() if key.endswith(WEIGHT)} <= {LEARNABLE}


def test_mixed_bfloat16_takes_no_notice_of_the_strategy() -> None:
    sections = [{"quant_dict": {**MIXED, "strategy": strategy}} for strategy in ("CNN", "Transformer")]
    assert changes(*(plan_of(*documented(), **given) for given in sections)) == {}


def test_a_shared_quantizer_is_configured_as_the_first_of_its_layers_and_sits_before_all() -> None:
    qconfig = {"module_name": {"a": ENTRY, "b": {**ENTRY, "aobserver": "MSEObserver"}}}
    model = Net(shared_inputs, **linear("a", "b")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert pieces(plan[f"a{BEFORE}"]) == (8, "fixed", "minmax", PER_TENSOR)
    assert [place[0] for place in plan.site(f"a{BEFORE}").places()] == ["a", "b"]
    assert {plan.site(f"{layer}{WEIGHT}").source for layer in ("a", "b")} == {f"a{BEFORE}"}


def test_a_layer_whose_own_result_is_bfloat16_is_followed_by_an_integer_quantizer_before_a_layer() -> None:
    qconfig = {"module_name": {"a": {**ENTRY, "afakequantize": "BF16FakeQuantize"}}}
    model = Net(lambda m, x: m.b(m.a(x)), **linear("a", "b")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert plan[f"a{POST}"].fake_quantize == BF16
    assert plan[f"b{BEFORE}"].fake_quantize == LEARNABLE


def test_a_layer_whose_own_result_is_bfloat16_needs_no_second_one_before_a_function() -> None:
    qconfig = {"module_name": {"a": {**ENTRY, "afakequantize": "BF16FakeQuantize"}}}
    model = Net(lambda m, x: torch.exp(m.a(x)), **linear("a")())
    plan = plan_of(model, image(), quant_dict=MIXED, extra_qconfig_dict=qconfig)
    assert values(plan) == {"a", "exp"}
    assert values(plan, BEFORE) == {"a"}
