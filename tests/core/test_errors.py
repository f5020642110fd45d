"""Bad input ends in one of three errors, with the words that a user needs."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.planning.stored import VERSION
from tests.helpers import DEFAULT, Ready, ready

ERRORS = (sq.ConfigError, sq.PlanError, sq.StateError)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.head = nn.Sequential(Block(), Block()), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer1(x).mean((2, 3)))


def net() -> tuple[Net, Tensor]:
    return Net().eval(), torch.randn(2, 2, 4, 4)


def prepared(dictionaries: dict[str, Any]) -> sq.Quantized:
    model, x = net()
    return sq.prepare_by_platform(model, dictionaries, example_args=x)


def quantized(*rules: sq.Rule, **options: Any) -> sq.Quantized:
    model, x = net()
    return sq.quantize(model, sq.QuantConfig(rules=rules, **options), example_args=x)


def dictionaries(**more: Any) -> dict[str, Any]:
    return {"quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}, **more}


def message(error: type[ValueError], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def says(text: str, *words: str) -> None:
    assert [word for word in words if word not in text] == [], text


def test_the_three_errors_are_value_errors() -> None:
    assert all(issubclass(error, ValueError) for error in ERRORS)


# Names that do not exist


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sq.QuantConfig(chip="BM169O"), ("chip", "'BM169O'", "'BM1690'")),
        (lambda: sq.QuantConfig(strategy="CNM"), ("strategy", "'CNM'", "'CNN'")),
        (lambda: sq.QuantConfig(quantmode="weight_onyl"), ("quantmode", "'weight_onyl'", "'weight_only'")),
        (lambda: sq.observer("minmx"), ("observer", "'minmx'", "'minmax'")),
        (lambda: sq.observer("MinMaxObservr"), ("observer", "'MinMaxObservr'", "'MinMaxObserver'")),
        (lambda: sq.fake_quantizer("lernable"), ("fake quantizer", "'lernable'", "'learnable'")),
        (lambda: sq.fake_quantizer("LearnableFakeQuantise"), ("'LearnableFakeQuantise'", "'LearnableFakeQuantize'")),
        (lambda: sq.observer("ema_minmax", dekay=0.5), ("option", "'dekay'", "'decay'")),
        (lambda: sq.observer("minmax", decay=0.5), ("option", "'decay'", "no options")),
        (lambda: sq.fake_quantizer("learnable", use_grad_scale=True), ("option", "'use_grad_scale'", "'use_grad_scaling'")),
        (lambda: sq.override(bit=4), ("field", "'bit'", "'bits'")),
        (lambda: sq.override(granularty=sq.PerTensor()), ("field", "'granularity'")),
        (lambda: quantized(sq.Rule(type="Lineer", weight=None)), ("type", "'Lineer'", "'Linear'")),
        (lambda: quantized(sq.Rule(type="ConvBnRelu2d", weight=None)), ("'ConvBnRelu2d'", "'ConvBnReLU2d'")),
    ],
    ids=lambda value: value[-1].strip("'") if isinstance(value, tuple) else "",
)
def test_an_unknown_name_is_reported_with_what_looks_like_it(call: Callable[[], Any], words: tuple[str, ...]) -> None:
    says(message(sq.ConfigError, call), "Fix", *words)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("layer1.conv", "layer1.0.conv1"),
        ("layer1.0.conv", "layer1.0.conv1"),
        ("haed", "head"),
        ("layer1.0.conv1.weight_fake_qant", "layer1.0.conv1.weight_fake_quant"),
        ("layer1_0_conv", "layer1.0.conv1"),
    ],
)
def test_a_rule_for_a_name_that_the_model_has_not_suggests_one(name: str, near: str) -> None:
    text = message(sq.ConfigError, lambda: quantized(sq.Rule(name=name, weight=None)))
    says(text, "Rule(", repr(name), "did you mean", repr(near))


@pytest.mark.parametrize(
    "extra",
    [
        {"extra_quantizer_dict": {"exclude_module_name": ["layer1.conv"]}},
        {"extra_quantizer_dict": {"module_only_enable_observer": ["layer1.conv"]}},
        {"extra_qconfig_dict": {"module_name": {"layer1.conv": {"mode": "weight", "bit": 8}}}},
    ],
    ids=str,
)
def test_a_dictionary_that_names_what_the_model_has_not_suggests_a_name(extra: dict[str, Any]) -> None:
    says(message(sq.ConfigError, lambda: prepared(dictionaries(**extra))), "'layer1.conv'", "'layer1.0.conv1'")


class Ambiguous(nn.Module):
    """Two layers whose paths read alike with underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a_b, self.a = nn.ModuleDict({"c": nn.Linear(4, 4)}), nn.ModuleDict({"b_c": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.a["b_c"](self.a_b["c"](x))


@pytest.mark.parametrize("suffix", ["", "_weight_fake_quant"])
def test_an_underscored_name_that_fits_two_values_lists_both(suffix: str) -> None:
    config = sq.QuantConfig(rules=(sq.Rule(name=f"a_b_c{suffix}", weight=sq.override(bits=4)),))
    text = message(sq.ConfigError, lambda: sq.quantize(Ambiguous(), config, example_args=torch.randn(2, 4)))
    dotted = suffix.replace("_", ".", 1)
    says(text, f"'a_b_c{suffix}'", f"'a.b_c{dotted}'", f"'a_b.c{dotted}'", "Fix")


def test_a_dotted_name_chooses_among_values_that_read_alike() -> None:
    config = sq.QuantConfig(rules=(sq.Rule(name="a_b.c", weight=sq.override(bits=4)),))
    plan = sq.quantize(Ambiguous(), config, example_args=torch.randn(2, 4)).plan
    assert [plan[f"{name}.weight_fake_quant"].scheme.bits for name in ("a_b.c", "a.b_c")] == [4, 8]


def test_a_glob_that_matches_nothing_is_reported_as_unused() -> None:
    rule = sq.Rule(name="layer9.*", weight=None)
    assert quantized(rule, sq.Rule(name="head", weight=None)).plan.unused == (rule,)


def test_a_name_that_the_plan_has_not_is_a_key_error_with_near_names() -> None:
    plan = quantized().plan
    with pytest.raises(KeyError, match=r"head\.weight_fake_quant"):
        plan["haed.weight_fake_quant"]
    with pytest.raises(KeyError, match=r"head\.weight_fake_quant"):
        plan.site("haed.weight_fake_quant")
    assert "haed.weight_fake_quant" not in plan


# The three dictionaries


def within(section: str, key: str, value: Any) -> dict[str, Any]:
    if section == "prepare_custom_config_dict":
        return {**dictionaries(), key: value}
    base = dictionaries()
    return {**base, section: {**base.get(section, {}), key: value}}


@pytest.mark.parametrize(
    ("section", "key", "near"),
    [
        ("prepare_custom_config_dict", "quant_dcit", "quant_dict"),
        ("prepare_custom_config_dict", "extra_qconfig", "extra_qconfig_dict"),
        ("quant_dict", "chp", "chip"),
        ("extra_qconfig_dict", "w_obsever", "w_observer"),
        ("extra_qconfig_dict", "object_types", "object_type"),
        ("extra_quantizer_dict", "exclude_module_names", "exclude_module_name"),
    ],
)
def test_an_unknown_key_is_named_with_its_dictionary_and_a_near_one(section: str, key: str, near: str) -> None:
    text = message(sq.ConfigError, lambda: sq.from_dicts(within(section, key, {})))
    says(text, section, repr(key), f"did you mean {near!r}")


@pytest.mark.parametrize(
    ("qscheme", "words"),
    [
        ({"bits": 8}, ("a_qscheme", "'bits'", "'bit'")),
        ({"bit": 8.0}, ("a_qscheme", "8.0")),
        ({"bit": "eight"}, ("a_qscheme", "'eight'")),
        ({"bit": 1}, ("a_qscheme", "got 1")),
        ({"bit": 64}, ("a_qscheme", "64")),
        ({"bit": True}, ("a_qscheme", "True")),
        ({"symmetry": "yes"}, ("'yes'", "True or False")),
        ({"per_channel": "no"}, ("per_channel", "'no'")),
        ({"pot_scale": 1}, ("pot_scale", "got 1")),
        ({"symmetric_range": 0.5}, ("symmetric_range", "0.5")),
        ("int8", ("a_qscheme", "str", "dict")),
    ],
    ids=str,
)
def test_a_wrong_scheme_is_reported_with_its_key(qscheme: Any, words: tuple[str, ...]) -> None:
    given = dictionaries(extra_qconfig_dict={"a_qscheme": qscheme})
    says(message(sq.ConfigError, lambda: sq.from_dicts(given)), *words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"bit": 4}, ("mode", "'weight' or 'activation'")),
        ({"mode": "wieght"}, ("mode", "'wieght'", "'weight'")),
        ({"mode": "weight", "aobserver": "MinMaxObserver"}, ("'aobserver'", "'wobserver'")),
        ({"mode": "weight", "wobserver": "MinMaxObs"}, ("'MinMaxObs'", "'MinMaxObserver'")),
        ({"mode": "weight", "wfakequantize": "LSQQ"}, ("fake quantizer", "'LSQQ'")),
        ({"mode": "weight", "bit": 99}, ("99", "2..16")),
        ({"mode": "weight", "wperchannel": "no"}, ("wperchannel", "'no'")),
        ("weight", ("mode", "'weight' or 'activation'")),
        (None, ("mode", "'weight' or 'activation'")),
    ],
    ids=str,
)
@pytest.mark.parametrize("section", ["module_name", "object_type"])
def test_a_wrong_entry_is_reported_with_its_name(section: str, entry: Any, words: tuple[str, ...]) -> None:
    key: Any = "head" if section == "module_name" else nn.Linear
    given = dictionaries(extra_qconfig_dict={section: {key: entry}})
    says(message(sq.ConfigError, lambda: sq.from_dicts(given)), f"{section}[", *words)


@pytest.mark.parametrize("section", ["quant_dict", "extra_qconfig_dict", "extra_quantizer_dict"])
@pytest.mark.parametrize("value", [["chip"], "BM1690", 5, None], ids=repr)
def test_a_dictionary_that_is_none_is_named(section: str, value: Any) -> None:
    text = message(sq.ConfigError, lambda: sq.from_dicts({**dictionaries(), section: value}))
    says(text, section, "dict", type(value).__name__)


@pytest.mark.parametrize("key", ["exclude_module_name", "exclude_function_type", "module_only_enable_observer"])
@pytest.mark.parametrize("value", ["head", {"head": 1}, 5, [5]], ids=repr)
def test_a_list_of_the_third_dictionary_holds_names(key: str, value: Any) -> None:
    text = message(sq.ConfigError, lambda: sq.from_dicts(dictionaries(extra_quantizer_dict={key: value})))
    says(text, repr(value[0] if isinstance(value, list) else value))


@pytest.mark.parametrize("key", ["chip", "quantmode", "strategy"])
def test_a_missing_key_of_the_first_dictionary_is_named(key: str) -> None:
    given = dictionaries()
    del given["quant_dict"][key]
    says(message(sq.ConfigError, lambda: sq.from_dicts(given)), "quant_dict", repr(key), "missing", "Fix")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("chip", "BM168", ("'BM1688'",)),
        ("chip", ["BM1690"], ("chip", "BM1690")),
        ("quantmode", "weights", ("'weights'", "weight_only")),
        ("strategy", "cnn", ("'cnn'", "CNN", "Transformer")),
        ("strategy", None, ("strategy", "None", "CNN")),
        ("bf16_mix_prec", "yes", ("bf16_mix_prec", "True or False")),
        ("use_tpu_mlir_fwd", True, ("use_tpu_mlir_fwd", "compiler")),
    ],
)
def test_a_wrong_value_of_the_first_dictionary_is_reported(key: str, value: Any, words: tuple[str, ...]) -> None:
    says(message(sq.ConfigError, lambda: sq.from_dicts(within("quant_dict", key, value))), *words)


def test_weight_only_with_the_strategy_cnn_says_what_to_choose() -> None:
    text = message(sq.ConfigError, lambda: sq.from_dicts(within("quant_dict", "quantmode", "weight_only")))
    says(text, "weight_only", "CNN", "Transformer")


# Several problems at once


def test_all_problems_of_the_dictionaries_are_in_one_message() -> None:
    given = {
        "quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN", "chp": 1},
        "extra_qconfig_dict": {
            "w_observer": "MinMx",
            "a_qscheme": {"bit": 99},
            "module_name": {"head": {"mode": "weight", "bit": "x"}, "layer1": {"mode": "both"}},
            "int4_op": "head",
        },
        "extra_quantizer_dict": {"exclude_modul_name": []},
    }
    text = message(sq.ConfigError, lambda: sq.from_dicts(given))
    says(text, "7 problems", "'chp'", "'MinMx'", "99", "'x'", "'both'", "'int4_op'", "'exclude_modul_name'")


def test_problems_of_the_first_dictionary_come_together_with_the_others() -> None:
    given = {"quant_dict": {"chip": "BM169O", "strategy": "CNN"}, "extra_qconfig_dict": {"w_observer": "MinMx"}}
    says(message(sq.ConfigError, lambda: sq.from_dicts(given)), "'BM169O'", "'quantmode'", "'MinMx'")


def test_all_names_that_a_model_has_not_are_in_one_message() -> None:
    rules = sq.Rule(name="layer1.conv", weight=None), sq.Rule(name="haed", weight=None), sq.Rule(type="Lineer", weight=None)
    says(message(sq.ConfigError, lambda: quantized(*rules)), "3 problems", "'layer1.conv'", "'haed'", "'Lineer'")


def test_all_bits_beyond_the_chip_are_in_one_message() -> None:
    text = message(sq.ConfigError, lambda: quantized(chip="BM1690", activation=sq.override(bits=4)))
    says(text, "problems", "'x.post_act_fake_quantizer'".strip("'"), "head.post_act_fake_quantizer")


def test_all_wrong_fields_of_a_config_are_in_one_message() -> None:
    text = message(sq.ConfigError, lambda: sq.QuantConfig(chip="BM169O", strategy="CNM", quantmode="weights"))
    says(text, "'BM169O'", "'CNM'", "'weights'")


def test_all_wrong_parameters_are_in_one_message() -> None:
    model, x = net()
    r = ready(model, x)
    wrong = {n: p for n, p in r.params.items() if not n.startswith("head")} | {"tail.weight": x, "layer1.0.conv1.weight": 5}
    text = message(sq.StateError, lambda: r.q.apply(wrong, r.qparams, x))
    says(text, "4 problems", "'head.bias'", "'head.weight'", "'tail.weight'", "'layer1.0.conv1.weight'")


# Limits of chips


@pytest.mark.parametrize(
    ("chip", "half", "bits", "allowed"),
    [("BM1690", "activation", 4, "8"), ("BM1688", "activation", 6, "4 or 8"), ("BM1688", "weight", 2, "4 or 8")],
)
def test_bits_beyond_the_chip_name_the_quantizer_the_chip_and_what_it_allows(
    chip: str, half: str, bits: int, allowed: str
) -> None:
    rule = sq.Rule(name="head", **{half: sq.override(bits=bits)})
    text = message(sq.ConfigError, lambda: quantized(rule, chip=chip))
    site = "head.weight_fake_quant" if half == "weight" else "head.post_act_fake_quantizer"
    says(text, site, f"{bits} bits", f"allowed {allowed}", f"chip {chip}", "Rule(name='head'", "Fix: bits=8")


def test_bits_beyond_the_chip_in_the_dictionaries_are_refused() -> None:
    given = dictionaries(extra_qconfig_dict={"a_qscheme": {"bit": "4"}})
    says(message(sq.ConfigError, lambda: prepared(given)), "4 bits", "allowed 8", "BM1690")


def test_without_a_chip_all_bits_are_allowed() -> None:
    plan = quantized(activation=sq.override(bits=5), weight=sq.override(bits=3)).plan
    assert {plan[n].scheme.bits for n in plan} == {3, 5}


# Wrong types


WRONG_CONFIGS: dict[str, Callable[[], Any]] = {
    "QuantConfig chip": lambda: sq.QuantConfig(chip=5),
    "QuantConfig chip list": lambda: sq.QuantConfig(chip=["BM1690"]),
    "QuantConfig strategy": lambda: sq.QuantConfig(strategy=5),
    "QuantConfig strategy list": lambda: sq.QuantConfig(strategy=["CNN"]),
    "QuantConfig quantmode": lambda: sq.QuantConfig(quantmode=None),
    "QuantConfig weight": lambda: sq.QuantConfig(weight=8),
    "QuantConfig activation scheme": lambda: sq.QuantConfig(activation=sq.QScheme()),
    "QuantConfig weight spec": lambda: sq.QuantConfig(weight=sq.observers.minmax()),
    "QuantConfig rules, comma forgotten": lambda: sq.QuantConfig(rules=sq.Rule(name="*", weight=None)),
    "QuantConfig rules of strings": lambda: sq.QuantConfig(rules=("head",)),
    "QuantConfig rules number": lambda: sq.QuantConfig(rules=5),
    "QuantConfig leaf_module, comma forgotten": lambda: sq.QuantConfig(leaf_module=nn.Linear),
    "QuantConfig leaf_module of strings": lambda: sq.QuantConfig(leaf_module=("Linear",)),
    "Rule without a key": lambda: sq.Rule(weight=None),
    "Rule name": lambda: sq.Rule(name=5, weight=None),
    "Rule empty name": lambda: sq.Rule(name="", weight=None),
    "Rule name list": lambda: sq.Rule(name=["head"], weight=None),
    "Rule type": lambda: sq.Rule(type=5, weight=None),
    "Rule type instance": lambda: sq.Rule(type=nn.Linear(2, 2), weight=None),
    "Rule type function": lambda: sq.Rule(type=lambda x: x, weight=None),
    "Rule where": lambda: sq.Rule(where="head", weight=None),
    "Rule origin": lambda: sq.Rule(name="head", origin=5),
    "Rule where answers with a word": lambda: quantized(sq.Rule(where=lambda site: "no", weight=None)),
    "Rule where answers with a match": lambda: quantized(sq.Rule(where=lambda site: site.path, weight=None)),
    "Rule where does not answer": lambda: quantized(sq.Rule(where=lambda site: None, activation=None)),
    "Rule weight": lambda: sq.Rule(name="head", weight=4),
    "Rule activation dict": lambda: sq.Rule(name="head", activation={"bits": 4}),
    "Rule requests": lambda: sq.Rule(name="head", requests="no"),
    "Rule observe_only": lambda: sq.Rule(name="head", observe_only="yes"),
    "Rule optional": lambda: sq.Rule(name="head", optional=1),
    "override bits": lambda: sq.override(bits="many"),
    "override symmetric": lambda: sq.override(symmetric="yes"),
    "override granularity": lambda: sq.override(granularity="channel"),
    "override granularity class": lambda: sq.override(granularity=sq.PerChannel),
    "override observer": lambda: sq.override(observer="minimax"),
    "override observer of another kind": lambda: sq.override(observer=sq.fake_quantize.fixed()),
    "override fake_quantize of another kind": lambda: sq.override(fake_quantize=sq.observers.mse()),
    "override fake_quantize function": lambda: sq.override(fake_quantize=sq.fake_quantize.fixed),
    "override symmetric number": lambda: sq.override(symmetric=1),
    "override dynamic": lambda: sq.override(dynamic="no"),
    "override pot_scale": lambda: sq.override(pot_scale=None),
    "override optional": lambda: sq.override(optional="yes"),
    "override fake_quantize": lambda: sq.override(fake_quantize=5),
    "override scheme": lambda: sq.override(scheme={"bits": 4}),
    "override observe_only": lambda: sq.override(observe_only="yes"),
    "QScheme bits": lambda: sq.QScheme(bits=8.0),
    "QScheme too few bits": lambda: sq.QScheme(bits=1),
    "QScheme too many bits": lambda: sq.QScheme(bits=17),
    "QScheme symmetric": lambda: sq.QScheme(symmetric=1),
    "QScheme dynamic": lambda: sq.QScheme(dynamic=None),
    "QScheme granularity": lambda: sq.QScheme(granularity="tensor"),
    "PerGroup size that is a bool": lambda: sq.PerGroup(size=True),
    "PerGroup size": lambda: sq.PerGroup(size=0),
    "PerGroup fractional size": lambda: sq.PerGroup(size=1.5),
    "PerChannel axis": lambda: quantized(weight=sq.override(granularity=sq.PerChannel("0"))),
    "QuantizerConfig scheme": lambda: sq.QuantizerConfig(
        scheme=8, observer=sq.observers.minmax(), fake_quantize=sq.fake_quantize.fixed()
    ),
    "QuantizerConfig observer": lambda: sq.QuantizerConfig(
        scheme=sq.QScheme(), observer="minimax", fake_quantize=sq.fake_quantize.fixed()
    ),
    "QuantizerConfig made the wrong way round": lambda: quantized(
        weight=sq.QuantizerConfig(
            scheme=sq.QScheme(), observer=sq.fake_quantize.fixed(), fake_quantize=sq.observers.minmax()
        )
    ),
    "observer name": lambda: sq.observer(5),
    "fake quantizer name": lambda: sq.fake_quantizer(None),
    "observer option": lambda: sq.observer("ema_minmax", decay="slow"),
    "observer option out of range": lambda: sq.observer("ema_minmax", decay=1.5),
    "observers function option": lambda: quantized(activation=sq.override(observer=sq.observers.ema_minmax(decay=1.5))),
    "observers function unknown option": lambda: sq.observers.ema_minmax(dekay=0.5),
    "fake quantizer option": lambda: sq.fake_quantizer("learnable", use_grad_scaling="no"),
    "from_dicts": lambda: sq.from_dicts([("quant_dict", {})]),
    "from_dicts nothing": lambda: sq.from_dicts(None),
    "quantize config": lambda: sq.quantize(nn.Linear(2, 2), {"chip": "BM1690"}, example_args=torch.ones(1, 2)),
    "quantize no config": lambda: sq.quantize(nn.Linear(2, 2), None, example_args=torch.ones(1, 2)),
    "plan config": lambda: sq.plan(sq.trace(nn.Linear(2, 2), (torch.ones(1, 2),)), {"chip": "BM1690"}),
    "plan no graphs": lambda: sq.plan([], DEFAULT),
}


def test_all_wrong_fields_are_reported_where_they_are_given() -> None:
    wrong = {"bits": 99, "symmetric": "yes", "granularity": "chanel", "observer": "minmx"}
    says(message(sq.ConfigError, lambda: sq.override(**wrong)), "4 problems", "99", "'yes'", "per_channel", "'minmax'")
    says(message(sq.ConfigError, lambda: sq.override(bit=4, symetric=True)), "2 problems", "'bits'", "'symmetric'")
    says(message(sq.ConfigError, lambda: sq.QScheme(bits=0, dynamic=1)), "2 problems", "bits", "dynamic")


def test_names_stand_for_what_they_name() -> None:
    given = sq.override(granularity="per_channel", observer="EMAMinMaxObserver", fake_quantize="lsq", bits="4")
    meant = sq.override(
        granularity=sq.PerChannel(), observer=sq.observers.ema_minmax(), fake_quantize=sq.fake_quantize.learnable(), bits=4
    )
    assert given == meant
    assert sq.QScheme(granularity="PerGroup") == sq.QScheme(granularity=sq.PerGroup())
    assert sq.QScheme(granularity="per_token", dynamic=True).granularity == sq.PerToken()
    named = sq.QuantizerConfig(scheme=sq.QScheme(), observer="mse", fake_quantize="fixed")
    assert named == sq.QuantizerConfig(
        scheme=sq.QScheme(), observer=sq.observers.mse(), fake_quantize=sq.fake_quantize.fixed()
    )
    plans = [quantized(sq.Rule(name="*", activation=half), weight=half).plan for half in (given, meant)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_type_or_value_in_a_config_is_a_config_error(name: str) -> None:
    says(message(sq.ConfigError, WRONG_CONFIGS[name]), ":")


WRONG_MODELS: dict[str, Callable[[], Any]] = {
    "params_of": lambda: sq.params_of({"weight": 1.0}),
    "params_of a class": lambda: sq.params_of(nn.ReLU),
    "trace": lambda: sq.trace("model", (torch.ones(1, 2),)),
    "trace a class": lambda: sq.trace(nn.ReLU, (torch.ones(1, 2),)),
    "trace a function": lambda: sq.trace(torch.relu, (torch.ones(1, 2),)),
    "quantize": lambda: sq.quantize(None, DEFAULT, example_args=torch.ones(1, 2)),
    "quantize a Quantized": lambda: sq.quantize(quantized(), DEFAULT, example_args=torch.ones(1, 2)),
    "prepare_by_platform": lambda: sq.prepare_by_platform(None, dictionaries(), example_args=torch.ones(1, 2)),
    "build": lambda: sq.build("model", quantized().plan),
    "build plan": lambda: sq.build(nn.Linear(2, 2), {"weight_fake_quant": 8}),
    "build json": lambda: sq.build(Net(), quantized().plan.to_json()),
    "plan graph": lambda: sq.plan("graph", DEFAULT),
    "plan no graph": lambda: sq.plan(None, DEFAULT),
    "plan a model": lambda: sq.plan(nn.Linear(2, 2), DEFAULT),
    "trace args": lambda: sq.trace(nn.Linear(2, 2), 5),
    "trace kwargs": lambda: sq.trace(nn.Linear(2, 2), (), [torch.ones(1, 2)]),
    "examples": lambda: sq.quantize(nn.Linear(2, 2), DEFAULT, examples=[torch.ones(1, 2)]),
    "no example": lambda: sq.quantize(nn.Linear(2, 2), DEFAULT, examples=[]),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_model_plan_or_example_is_a_plan_error(name: str) -> None:
    with pytest.raises((sq.PlanError, sq.ConfigError)) as caught:
        WRONG_MODELS[name]()
    says(str(caught.value), ":", "allowed")


WRONG_STATES: dict[str, Callable[[Ready, Tensor], Any]] = {
    "init params": lambda r, x: r.q.init(list(r.params)),
    "init module": lambda r, x: r.q.init(Net()),
    "init ostate": lambda r, x: r.q.init(r.params, 5),
    "init number as parameter": lambda r, x: r.q.init({**r.params, "head.bias": 5}),
    "observe ostate": lambda r, x: r.q.observe(r.params, None, x),
    "observe ostate values": lambda r, x: r.q.observe(r.params, dict.fromkeys(r.q.plan, 5), x),
    "observe qparams for ostate": lambda r, x: r.q.observe(r.params, r.qparams, x),
    "observe_quantized qparams": lambda r, x: r.q.observe_quantized(r.params, r.q.init(r.params), None, x),
    "qparams ostate": lambda r, x: r.q.qparams(r.params, [1]),
    "qparams of qparams": lambda r, x: r.q.qparams(r.params, r.qparams),
    "apply params": lambda r, x: r.q.apply(None, r.qparams, x),
    "apply qparams": lambda r, x: r.q.apply(r.params, None, x),
    "apply forgotten qparams": lambda r, x: r.q.apply(r.params, x),
    "apply qparams values": lambda r, x: r.q.apply(r.params, dict.fromkeys(r.q.plan, 0.1), x),
    "apply scales alone": lambda r, x: r.q.apply(r.params, {n: qp.scale for n, qp in r.qparams.items()}, x),
    "apply ostate for qparams": lambda r, x: r.q.apply(r.params, r.q.init(r.params), x),
    "apply params and qparams exchanged": lambda r, x: r.q.apply(r.qparams, r.params, x),
    "apply_and_update qparams": lambda r, x: r.q.apply_and_update(r.params, 5, x),
    "capture params": lambda r, x: r.q.capture(None, r.qparams, x),
    "split": lambda r, x: r.q.split(5),
    "split ostate": lambda r, x: r.q.split(r.q.init(r.params)),
    "merge": lambda r, x: sq.merge(5, {}),
    "merge qparams": lambda r, x: sq.merge(r.qparams, {}),
    "merge twice": lambda r, x: sq.merge({"a.scale": x}, {"a.scale": x}),
    "merge without scale": lambda r, x: sq.merge({}, {"a.zero_point": x}),
    "merge without a dot": lambda r, x: sq.merge({"scale": x}, {"zero_point": x}),
    "calibrate params": lambda r, x: r.q.calibrate(None, [x]),
    "calibrate a tensor": lambda r, x: r.q.calibrate(r.params, x),
    "calibrate nothing": lambda r, x: r.q.calibrate(r.params, None),
    "calibrate numbers": lambda r, x: r.q.calibrate(r.params, [5]),
    "calibrate one dict": lambda r, x: r.q.calibrate(r.params, {"x": x}),
    "calibrate one string": lambda r, x: r.q.calibrate(r.params, "x"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_state_or_batch_is_a_state_error(name: str) -> None:
    model, x = net()
    r = ready(model, x)
    says(message(sq.StateError, lambda: WRONG_STATES[name](r, x)), ":")


# Data


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[3] = value
    return x


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", BAD)
def test_bad_numbers_in_any_batch_name_the_quantizer(kind: str, place: int) -> None:
    model, x = net()
    r = ready(model, x)
    batches = [x, x + 1, x - 1]
    batches[place] = spoiled(batches[place], BAD[kind])
    text = message(sq.StateError, lambda: r.q.calibrate(r.params, batches))
    says(text, "x.post_act_fake_quantizer", "NaN" if kind == "nan" else "infini", "Fix")


@pytest.mark.parametrize("observer", ["minmax", "ema_minmax", "mse"])
@pytest.mark.parametrize("kind", BAD)
def test_every_observer_reports_bad_numbers(kind: str, observer: str) -> None:
    spec = getattr(sq.observers, observer)()
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    config = sq.QuantConfig(activation=sq.override(observer=spec), weight=sq.override(observer=spec))
    q, params = sq.quantize(model, config, example_args=x), sq.params_of(model)
    says(message(sq.StateError, lambda: q.calibrate(params, [spoiled(x, BAD[kind])])), "input.post_act_fake_quantizer")
    bad = {**params, "weight": spoiled(params["weight"], BAD[kind])}
    says(message(sq.StateError, lambda: q.calibrate(bad, [x])), "weight_fake_quant")


@pytest.mark.parametrize("flags", [{"optional": True}, {"observe_only": True}], ids=str)
@pytest.mark.parametrize("kind", BAD)
def test_bad_numbers_are_reported_whatever_the_flags_of_a_quantizer(kind: str, flags: dict[str, bool]) -> None:
    model, x = net()
    config = sq.QuantConfig(rules=(sq.Rule(name="x", **flags),))
    q, params = sq.quantize(model, config, example_args=x), sq.params_of(model)
    says(message(sq.StateError, lambda: q.calibrate(params, [spoiled(x, BAD[kind])])), "x.post_act_fake_quantizer")


def test_a_value_that_becomes_bad_inside_the_model_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.log(x))

    model, x = Root(), torch.rand(2, 4)
    r = ready(model, x)
    says(message(sq.StateError, lambda: r.q.calibrate(r.params, [-x])), "log.post_act_fake_quantizer", "NaN")


@pytest.mark.parametrize("batches", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_batches_are_refused(batches: Any) -> None:
    model, x = net()
    r = ready(model, x)
    says(message(sq.StateError, lambda: r.q.calibrate(r.params, batches)), "calibrate", "no batches", "Fix")


def test_batches_without_examples_leave_the_model_uncalibrated() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    r = ready(model, x)
    says(message(sq.StateError, lambda: r.q.calibrate(r.params, [x[:0]])), "not calibrated", "input.post_act_fake_quantizer")


def test_qparams_before_any_batch_name_what_is_not_calibrated() -> None:
    model, x = net()
    r = ready(model, x)
    text = message(sq.StateError, lambda: r.q.qparams(r.params, r.q.init(r.params)))
    says(text, "not calibrated", "x.post_act_fake_quantizer", "q.calibrate(params, batches)")
    assert "weight_fake_quant" not in text


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38, -1e-38, 3e38], ids=str)
def test_constant_data_gives_a_finite_positive_scale(value: float) -> None:
    model = nn.Linear(4, 4, bias=False)
    q, params = sq.quantize(model, DEFAULT, example_args=torch.ones(2, 4)), sq.params_of(model)
    scale = q.calibrate(params, [torch.full((2, 4), value)])["input.post_act_fake_quantizer"].scale
    assert bool(scale.isfinite()) and float(scale) > 0


def test_inside_a_transform_a_bad_statistic_gives_a_bad_scale() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 2, 4)
    r = ready(model, x[0])

    def scale(x: Tensor) -> Tensor:
        _, ostate = r.q.observe(r.params, r.q.init(r.params), x)
        return r.q.qparams(r.params, ostate)["input.post_act_fake_quantizer"].scale

    x[1, 0, 0] = torch.nan
    assert torch.vmap(scale)(x).isfinite().tolist() == [True, False, True]


def test_a_model_that_is_called_wrongly_says_so_itself() -> None:
    model, x = net()
    r = ready(model, x)
    with pytest.raises(TypeError, match="y"):
        r.q.apply(r.params, r.qparams, x, y=x)


# Plans


def paths(data: Any) -> Iterator[tuple[Any, ...]]:
    yield ()
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield from ((key, *path) for path in paths(item))


def damaged(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``data`` with one place replaced, or left out where ``value`` is ``...``."""
    if not path:
        return None if value is ... else value
    key, *rest = path
    pairs = list(data.items() if isinstance(data, dict) else enumerate(data))
    kept = [(k, damaged(v, tuple(rest), value) if k == key else v) for k, v in pairs if k != key or rest or value is not ...]
    return dict(kept) if isinstance(data, dict) else [v for _, v in kept]


def small_plan() -> sq.Plan:
    return sq.quantize(nn.Linear(2, 2), DEFAULT, example_args=torch.ones(1, 2)).plan


@pytest.mark.parametrize("value", [..., None, 5, "x", [], {}, [None], {"a": 1}], ids=repr)
def test_a_damaged_plan_is_a_config_error_or_a_plan(value: Any) -> None:
    data = json.loads(small_plan().to_json())
    wrong = []
    for path in paths(data):
        text = json.dumps(damaged(data, path, value))
        try:
            sq.build(nn.Linear(2, 2), sq.Plan.from_json(text))
        except (sq.ConfigError, sq.PlanError):
            continue
        except Exception as error:
            wrong.append(f"{'.'.join(map(str, path))}: {type(error).__name__}: {error}")
    assert wrong == []


NO_PLANS = ["", "{", "null", "5", "[]", "{}", '"plan"', '{"version": 1}', b"\xff\xfe", None, 5, {}]


@pytest.mark.parametrize("text", NO_PLANS, ids=repr)
def test_what_is_no_plan_is_a_config_error(text: Any) -> None:
    says(message(sq.ConfigError, lambda: sq.Plan.from_json(text)), "Plan.from_json")


def test_a_plan_of_another_version_says_which() -> None:
    data = {**json.loads(small_plan().to_json()), "version": 99}
    says(message(sq.ConfigError, lambda: sq.Plan.from_json(json.dumps(data))), "version", "99", str(VERSION))


def test_a_plan_with_an_unknown_observer_names_it() -> None:
    text = small_plan().to_json().replace('"ema_minmax"', '"ema_minmx"')
    says(message(sq.ConfigError, lambda: sq.build(nn.Linear(2, 2), sq.Plan.from_json(text))), "'ema_minmx'", "'ema_minmax'")


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.head = nn.Sequential(Block(), Block()), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage1(x).mean((2, 3)))


class Unnormed(Net):
    """Has the layers of ``Net``, but nothing that could be folded into them."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.layer1:
            block.bn1 = nn.Identity()


@pytest.mark.parametrize(
    ("other", "name"),
    [(Renamed, "layer1.0.conv1"), (Unnormed, "layer1.0.bn1"), (lambda: nn.Linear(2, 3), "layer1.0.conv1")],
    ids=["renamed", "without norms", "another model"],
)
def test_a_plan_of_another_model_names_what_the_model_has_not(other: Callable[[], nn.Module], name: str) -> None:
    plan = quantized(chip="BM1690").plan
    says(message(sq.PlanError, lambda: sq.build(other(), plan)), name, "Fix")


def test_a_plan_without_weights_of_another_model_never_runs_unnoticed() -> None:
    plan, (_, x) = quantized(weight=None).plan, net()
    model = Renamed()
    params = sq.params_of(model)
    with pytest.raises((sq.PlanError, sq.StateError), match=r"layer1\.0"):
        sq.build(model, plan).calibrate(params, [x])


# A step of the path too many, or too few


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6))).eval()


class Holder(nn.Module):
    """Has the model below one more step, as wrappers for several devices do."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, model)


def one_block_compiled(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2])
    return model


WRAPPERS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    "compiled": (torch.compile, "'_orig_mod.'"),
    "parallel": (lambda model: Holder(model, "module"), "'module.'"),
    "of any name": (lambda model: Holder(model, "backbone"), "'backbone.'"),
    "twice": (lambda model: Holder(torch.compile(model), "module"), "'module._orig_mod.'"),
    "around a part": (one_block_compiled, "'_orig_mod.'"),
}


@pytest.mark.parametrize(("wrap", "step"), WRAPPERS.values(), ids=WRAPPERS)
def test_names_of_a_wrapped_model_are_one_problem(wrap: Callable[[Any], nn.Module], step: str) -> None:
    x = torch.randn(2, 4)
    r = ready(deep(), x)
    wrapped = sq.params_of(wrap(deep()))
    for call in (lambda: r.q.apply(wrapped, r.qparams, x), lambda: r.q.calibrate(wrapped, [x])):
        text = message(sq.StateError, call)
        says(text, f"params have {step}", "_orig_mod inside torch.compile")
        assert len(text.splitlines()) == 1


def test_names_without_the_step_of_a_wrapped_model_are_one_problem() -> None:
    x = torch.randn(2, 4)
    r = ready(nn.Sequential(OrderedDict(module=deep())), x)
    text = message(sq.StateError, lambda: r.q.apply(sq.params_of(deep()), r.qparams, x))
    says(text, "params lack 'module.'")
    assert len(text.splitlines()) == 1


def test_qparams_and_files_of_a_wrapped_model_are_one_problem(tmp_path: Path) -> None:
    x, weights = torch.randn(2, 4), sq.QuantConfig(activation=None)
    bare, wrapped = ready(deep(), x, config=weights), ready(nn.Sequential(OrderedDict(module=deep())), x, config=weights)
    text = message(sq.StateError, lambda: bare.q.apply(bare.params, wrapped.qparams, x))
    says(text, "qparams: the names have 'module.'")
    assert len(text.splitlines()) == 1
    sq.save(tmp_path / "f", qparams=wrapped.qparams, params=wrapped.params)
    with pytest.raises(sq.CheckpointError, match=r"parameters in the file have 'module\.'") as caught:
        sq.load(tmp_path / "f").check(bare.q)
    assert "missing in the file" not in str(caught.value)


def test_other_missing_names_are_listed_one_by_one() -> None:
    x = torch.randn(2, 4)
    r = ready(deep(), x)
    params = {name.replace("weight", "kernel"): tensor for name, tensor in r.params.items()}
    says(message(sq.StateError, lambda: r.q.apply(params, r.qparams, x)), "lack '0.0.weight'", "hold '5.0.kernel'")
