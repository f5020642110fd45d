"""Configs as JSON: nothing is lost, equal configs have equal texts, and what cannot be stored is said."""

from __future__ import annotations

import json
import math
import operator
from collections import ChainMap, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sophq_func as sq
from sophq_func.config.rules import UNSET
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS


class Block(nn.Linear):
    """A layer of a user's."""


class Around:
    """Classes in classes have a path, too."""

    class Inner(nn.Module):
        """One of them."""


def is_small(site: sq.Site) -> bool:
    return site.groups == 1


LINEAR_GELU = sq.patterns.fused("LinearGELU", nn.Linear, nn.GELU, F.dropout, "add")
WHOLE = sq.QuantizerConfig(
    scheme=sq.QScheme(bits=4, symmetric=False, granularity=sq.PerGroup(axis=(0, 2), size=16)),
    observer=sq.observers.mse(p=3.0),
    fake_quantize=sq.fake_quantize.learnable(rounding="stochastic"),
    observe_only=True,
)
TYPES = [
    nn.Linear,
    Block,
    Around.Inner,
    torch.sigmoid,
    F.softmax,
    torch.Tensor.add,
    torch.Tensor.__matmul__,
    operator.add,
    math.sqrt,
    torch.linalg.norm,
    nn.Module,
    sq.patterns.ConvBnReLU2d,
    LINEAR_GELU,
    "Linear",
]
HALVES = st.sampled_from(
    [
        UNSET,
        None,
        WHOLE,
        sq.override(bits=4, granularity="per_channel"),
        sq.override(scheme=sq.QScheme(bits=3), observer="kld"),
        sq.override(granularity=sq.PerBlock(rows=4), optional=True),
        sq.override(),
    ]
)
FLAGS = st.sampled_from([None, True, False])
RULES = st.builds(
    sq.Rule,
    name=st.sampled_from(["head", "layer*"]),
    type=st.none() | st.sampled_from(TYPES),
    where=st.sampled_from([None, is_small]),
    weight=HALVES,
    activation=HALVES,
    requests=FLAGS,
    outputs=st.sampled_from([None, True]),
    share=FLAGS,
    observe_only=FLAGS,
    origin=st.sampled_from(["", "object_type"]),
)
CONFIGS = st.builds(
    sq.QuantConfig,
    chip=st.sampled_from([None, "BM1690", "CV183X"]),
    strategy=st.sampled_from([None, "Transformer", "Layers"]),
    weight=HALVES,
    activation=HALVES,
    rules=st.lists(RULES, max_size=3).map(tuple),
    leaf_module=st.sampled_from([(), (Block, nn.MultiheadAttention)]),
    operations=st.sampled_from([(), ("softmax", F.softmax, nn.GELU)]),
    weight_layers=st.sampled_from([(), (Block,)]),
    patterns=st.sampled_from([(), (LINEAR_GELU,)]),
)


@given(CONFIGS)
@settings(max_examples=100, deadline=None)
def test_any_config_comes_back(config: sq.QuantConfig) -> None:
    text = config.to_json()
    found = sq.QuantConfig.from_json(text)
    assert found == config
    assert [rule.origin for rule in found.rules] == [rule.origin for rule in config.rules]
    assert found.to_json() == text
    assert found.digest() == config.digest()


@pytest.mark.parametrize(
    ("field", "name"),
    [(field, name) for field, names in (("observer", OBSERVERS), ("fake_quantize", FAKE_QUANTIZERS)) for name in names],
)
def test_every_piece_comes_back(field: str, name: str) -> None:
    config = sq.QuantConfig(activation=sq.override(**{field: name}))
    assert sq.QuantConfig.from_json(config.to_json()) == config


def test_a_text_shows_types_by_their_public_names() -> None:
    rules = [sq.Rule(type=key, weight=None) for key in (nn.Linear, torch.Tensor.add, F.softmax, Block, LINEAR_GELU)]
    data = json.loads(sq.QuantConfig(rules=tuple(rules)).to_json())
    assert [rule["type"] for rule in data["rules"]] == [
        {"type": "torch.nn.Linear"},
        {"type": "torch.Tensor.add"},
        {"type": "torch.nn.functional.softmax"},
        {"type": f"{__name__}:Block"},
        {
            "pattern": "LinearGELU",
            "parts": [
                {"type": "torch.nn.Linear"},
                {"type": "torch.nn.GELU"},
                {"type": "torch.nn.functional.dropout"},
                "add",
            ],
        },
    ]


def test_the_digest_is_that_of_what_is_compared() -> None:
    rule = sq.Rule(name="head", weight=None)
    one = sq.QuantConfig(chip="SG2260", activation=sq.override(observer=sq.observers.mse(p=2)), rules=[rule])  # type: ignore[arg-type]
    other = sq.QuantConfig(chip="BM1690", activation=sq.override(observer="mse"), rules=(replace(rule, origin="here"),))
    assert one == other
    assert one.digest() == other.digest()
    assert one.digest() != sq.QuantConfig(chip="BM1690").digest()


def test_the_digest_is_one_for_all_processes_and_machines() -> None:
    config = sq.QuantConfig(chip="BM1690", rules=(sq.Rule(type=nn.Linear, weight=sq.override(bits=4)),))
    # recorded; it may change only together with the version of the text
    assert config.digest() == "10d8ddc268519d89b6efc80bde8deb7f3fd12a81bc3556f83632ad3982f1dde2"


def test_dictionaries_make_configs_that_can_be_stored() -> None:
    quant_dict = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
    qconfig = {"object_type": {nn.Conv2d: {"mode": "weight", "bit": 4, "wperchannel": True}}}
    fuse = {"additional_fuser_method_mapping": {(nn.Linear, nn.GELU): len}}
    quantizer = {"exclude_module_name": ["head"]}
    config = sq.from_dicts(
        {
            "quant_dict": quant_dict,
            "extra_qconfig_dict": qconfig,
            "extra_quantizer_dict": quantizer,
            "extra_fuse_dict": fuse,
        }
    )
    assert config.patterns
    assert sq.QuantConfig.from_json(config.to_json()) == config


def test_what_no_import_finds_is_said_at_once() -> None:
    class Local(nn.Module):
        """Defined in a function."""

    rules = (
        sq.Rule(name="a", where=lambda site: True),
        sq.Rule(type=nn.Linear, weight=None),
        sq.Rule(type=Local, weight=None),
    )
    for method in (sq.QuantConfig.to_json, sq.QuantConfig.digest):
        with pytest.raises(sq.ConfigError) as caught:
            method(sq.QuantConfig(rules=rules, leaf_module=(Local,)))
        text = str(caught.value)
        assert "Rule(name='a', where=<lambda>): QuantConfig.to_json: <function" in text
        assert "Rule(type=Local, weight=None): QuantConfig.to_json" in text
        assert text.count("define it with a name at the top level of a module") == 3
        assert "Linear" not in text


# What a person writes


def test_data_as_a_person_writes_them() -> None:
    found = sq.QuantConfig.from_dict(
        {
            "chip": "bm1690".upper(),
            "weight": {"bits": 4, "granularity": {"name": "PerGroup", "size": 32}, "fake_quantize": "lsq"},
            "activation": {"observer": {"name": "mse", "options": {"p": 3.0}}, "scheme": {"bits": 8, "symmetric": False}},
            "rules": [{"name": "head", "weight": None}, {"type": "Linear", "requests": False}],
            "leaf_module": ["torch.nn.MultiheadAttention", f"{__name__}:Block"],
        }
    )
    assert found == sq.QuantConfig(
        chip="BM1690",
        weight=sq.override(bits=4, granularity=sq.PerGroup(size=32), fake_quantize=sq.fake_quantize.learnable()),
        activation=sq.override(observer=sq.observers.mse(p=3.0), scheme=sq.QScheme(bits=8, symmetric=False)),
        rules=(sq.Rule(name="head", weight=None), sq.Rule(type="Linear", requests=False)),
        leaf_module=(nn.MultiheadAttention, Block),
    )


def test_other_mappings_and_sequences_are_read_and_not_changed() -> None:
    data = ChainMap(
        {"rules": deque([ChainMap({"name": "head", "weight": None})]), "weight": ChainMap({"bits": 4}), "version": 1}
    )
    expected = sq.QuantConfig(weight=sq.override(bits=4), rules=(sq.Rule(name="head", weight=None),))
    assert sq.QuantConfig.from_dict(data) == expected
    assert "version" in data
    assert sq.QuantConfig(rules=deque(expected.rules)).rules == expected.rules  # type: ignore[arg-type]


def test_a_piece_of_another_package_may_be_registered_later() -> None:
    config = sq.QuantConfig(weight=sq.override(observer=sq.Spec("theirs", (("sizes", (1, 2)),))))
    assert sq.QuantConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("method", [sq.QuantConfig.to_json, sq.QuantConfig.digest], ids=["text", "digest"])
def test_an_option_that_is_no_data_is_refused(method: Callable[[sq.QuantConfig], str]) -> None:
    config = sq.QuantConfig(weight=sq.override(observer=sq.Spec("theirs", (("device", torch.device("cpu")),))))
    with pytest.raises(sq.ConfigError, match=r"an option cannot be stored: got device"):
        method(config)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chips": "BM1690"}, "field 'chips' is not known, did you mean 'chip'?"),
    ({"chip": "BM169"}, "chip 'BM169' is not known"),
    ({"weight": {"bit": 4}}, "weight: field 'bit' is not known"),
    ({"weight": 4}, "weight: this is no dict"),
    ({"weight": {"config": 4}}, "weight: this is no config"),
    ({"weight": {"config": {"observer": "mse"}}}, "QuantizerConfig: scheme is missing"),
    ({"weight": {"observer": "mes"}}, "'mes' is not known"),
    ({"weight": {"observer": {"name": "mse", "options": {"q": 1}}}}, "option 'q' is not known"),
    ({"weight": {"observer": {"options": {}}}}, "this is no observer"),
    ({"weight": {"granularity": {"name": "PerRow"}}}, "granularity 'PerRow' is not known"),
    ({"weight": {"granularity": {"name": "PerGroup", "length": 3}}}, "PerGroup: field 'length' is not known"),
    ({"weight": {"scheme": {"bit": 3}}}, "scheme: field 'bit' is not known"),
    ({"weight": {"scheme": 3}}, "scheme must be a QScheme"),
    ({"rules": {"name": "head"}}, "rules: this is no list"),
    ({"rules": {"head": {"weight": None}}}, 'Fix: [{"name": "head", "weight": {"bits": 8}}]'),
    ({"activation": "none"}, "or null to leave it float"),
    ({"weight": {"observer": {"name": "mse", "p": 2.0}}}, 'Fix: {"name": "mse", "options": {"p": 2.0}}'),
    ({"weight": {"granularity": {"per_group": 32}}}, 'Fix: {"name": "PerGroup", "size": 32}'),
    ({"rules": ["head"]}, "rules[0]: this is no dict"),
    ({"rules": [{"weight": None}]}, "rules[0]: Rule: it says nothing about what it matches"),
    ({"rules": [{"type": {"type": "torch.nn.Liner"}}]}, "rules[0]: type: path: this path leads to no class or function"),
    ({"rules": [{"type": {"type": "nowhere:Block"}}]}, "No module named 'nowhere'"),
    ({"rules": [{"type": {"type": f"{__name__}:FLAGS.nothing"}}]}, "leads to no class"),
    ({"rules": [{"type": {"type": f"{__name__}:__name__"}}]}, "leads to no class"),
    ({"rules": [{"type": {"type": 3}}]}, "leads to no class"),
    ({"rules": [{"type": {"pattern": "ConvBn9d"}}]}, "'ConvBn9d' is not known"),
    ({"rules": [{"type": {"pattern": "New", "parts": [{"type": "torch.nn.Linear"}]}}]}, "two or more module classes"),
    ({"rules": [{"type": 3}]}, "this is no type"),
    ({"rules": [{"where": "lambda site: True"}]}, "leads to no class or function"),
    ({"leaf_module": ["torch.sigmoid"]}, "leaf_module has an item of a wrong type"),
    ({"version": 9}, "this version cannot be read: got 9"),
]


@pytest.mark.parametrize(("data", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_wrong_is_said_with_its_place(data: dict[str, Any], words: str) -> None:
    with pytest.raises(sq.ConfigError) as caught:
        sq.QuantConfig.from_dict(data)
    assert words in str(caught.value)
    assert "from_dict" in str(caught.value)


def test_a_granularity_with_fields_has_either_of_its_names() -> None:
    short = sq.QuantConfig.from_dict({"weight": {"granularity": {"name": "per_group", "size": 32}}})
    assert short.weight == sq.override(granularity=sq.PerGroup(32))


def test_all_problems_are_in_one_message() -> None:
    rules = [{"names": "a"}, {"type": {"type": "torch.nn.Liner"}, "weight": {"bit": 3}}]
    with pytest.raises(sq.ConfigError) as caught:
        sq.QuantConfig.from_dict({"chip": "BM169", "weight": {"bit": 4}, "rules": rules})
    for words in ("chip 'BM169'", "weight: field 'bit'", "rules[0]: field 'names'", "rules[1]: type", "rules[1]: weight"):
        assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", 3, "1" * 5000, "[" * 100000], ids=lambda text: repr(text)[:9])
def test_a_text_that_is_no_config_is_refused(text: Any) -> None:
    with pytest.raises(sq.ConfigError, match=r"QuantConfig.from_json: the text holds no config"):
        sq.QuantConfig.from_json(text)


# OmegaConf and hydra, which need no adapter


def test_containers_of_omegaconf_are_read() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    config = {"weight": {"bits": "${width}"}, "rules": [{"name": "0", "weight": None}]}
    loaded = omegaconf.OmegaConf.create({"width": 4, "config": config})
    expected = sq.QuantConfig(weight=sq.override(bits=4), rules=(sq.Rule(name="0", weight=None),))
    assert sq.QuantConfig.from_dict(loaded.config) == expected
    quant_dict = {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"}
    table = {
        "quant_dict": quant_dict,
        "extra_qconfig_dict": {"object_type": {"Linear": {"mode": "weight", "bit": 4}}, "w_qscheme": {"bit": 8}},
        "extra_quantizer_dict": {"exclude_module_name": ["0"]},
    }
    assert sq.from_dicts(omegaconf.OmegaConf.create(table)) == sq.from_dicts(table)
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    q = sq.prepare_by_platform(model, omegaconf.OmegaConf.create(table), example_args=(x,))
    assert q.plan == sq.prepare_by_platform(model, table, example_args=(x,)).plan


def test_hydra_makes_configs_of_targets() -> None:
    pytest.importorskip("omegaconf")
    hydra = pytest.importorskip("hydra.utils")
    rules = [{"_target_": "sophq_func.Rule", "name": "head", "weight": None}]
    weight = {"_target_": "sophq_func.override", "bits": 4, "observer": "mse", "granularity": "per_channel"}
    found = hydra.instantiate(
        {"_target_": "sophq_func.QuantConfig", "_convert_": "all", "chip": "BM1690", "weight": weight, "rules": rules}
    )
    half = sq.override(bits=4, observer="mse", granularity="per_channel")
    assert found == sq.QuantConfig(chip="BM1690", weight=half, rules=(sq.Rule(name="head", weight=None),))
    data = {"chip": "BM1690", "weight": {"bits": 4}, "rules": [{"name": "head", "weight": None}]}
    target = {"_target_": "sophq_func.QuantConfig.from_dict", "data": data}
    assert hydra.instantiate(target) == sq.QuantConfig.from_dict(data)
