"""Each step of planning by itself: a function of values to values."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sophq_func as sq
from sophq_func.config.names import input_quantizer, value_quantizer, weight_quantizer
from sophq_func.config.site import CallSite, ComputedSite, ValueSite, WeightSite
from sophq_func.config.strategies import PLACEMENTS, Placement, Preset, SharedInput
from sophq_func.planning.biases import round_biases
from sophq_func.planning.deciding import decide
from sophq_func.planning.draft import draft, in_execution_order
from sophq_func.planning.fusing import fuse
from sophq_func.planning.inputs import Quantized
from sophq_func.planning.placing import place
from sophq_func.planning.unite import agreed, merged_order, unite
from sophq_func.planning.values import NO_VALUES, late_uses, quantize_values, value_site
from sophq_func.planning.weights import find_weights

CONFIG = sq.QuantConfig()
DATAFLOW = PLACEMENTS.get("Dataflow")
FOUR = sq.override(bits=4)


class Net(nn.Module):
    """A group, a layer of its own, and a sum of two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return x + self.fc(x)


def raw(model: nn.Module | None = None, *args: Tensor) -> sq.Graph:
    return sq.trace((model or Net()).eval(), args or (torch.ones(1, 3, 2, 2),))


def fused(model: nn.Module | None = None, *args: Tensor) -> sq.Graph:
    return fuse(raw(model, *args))


# place


def test_place_has_what_the_strategy_chooses_with_why() -> None:
    placed = place(fused(), DATAFLOW, CONFIG)
    assert placed.placement.chosen == {"x": "operand of conv", "mean": "operand of fc", "fc": "operand of add"}
    assert placed.used == frozenset()


def test_place_adds_results_that_rules_ask_for_and_keeps_the_strategys_reason() -> None:
    rules = (sq.Rule(name="add", outputs=True), sq.Rule(name="f*", outputs=True), sq.Rule(name="a*", outputs=True))
    placed = place(fused(), DATAFLOW, sq.QuantConfig(rules=rules))
    assert placed.placement.chosen["add"] == repr(rules[0])
    assert placed.placement.chosen["fc"] == "operand of add"
    assert placed.used == {0, 1, 2}


def test_place_knows_which_rules_were_asked() -> None:
    rules = (sq.Rule(name="nothing*", requests=False), sq.Rule(name="fc", requests=False))
    placed = place(fused(), DATAFLOW, sq.QuantConfig(rules=rules))
    assert "mean" in placed.placement.chosen, "the sum takes it, too"
    assert placed.used == {1}


# find_weights


def test_find_weights_has_a_site_for_each_weight_with_its_calls() -> None:
    weights = find_weights(fused(), DATAFLOW)
    assert [place.site.quantizer for place in weights.places] == ["conv.weight_fake_quant", "fc.weight_fake_quant"]
    conv = weights.places[0].site
    assert isinstance(conv, WeightSite)
    assert (conv.norm, conv.bias, conv.pattern, conv.shape) == ("bn", "conv.bias", "ConvBnReLU2d", (4, 3, 1, 1))
    assert [call.name for call in weights.places[0].calls] == ["conv"]
    assert weights.notes == ()


def test_find_weights_notes_what_hinders_folding() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.conv(self.a(self.conv(x))))

    weights = find_weights(fused(Two()), DATAFLOW)
    (weight,) = weights.places
    assert (weight.site.norm, weight.site.note) == ("", "unfolded")
    assert len(weight.calls) == 2
    assert weights.notes == (
        "conv.weight feeds several normalizations, or is used by several modules: quantized once, unfolded",
    )


def test_find_weights_sees_one_that_is_computed_in_the_forward() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w.abs())

    (weight,) = find_weights(fused(Computed(), torch.ones(2, 3)), DATAFLOW).places
    assert isinstance(weight.site, ComputedSite)
    assert (weight.site.operand, weight.site.shape, weight.site.anchor) == (1, (4, 3), CallSite("", "linear", 0))
    assert find_weights(fused(Computed(), torch.ones(2, 3)), DATAFLOW._replace(functions=False)).places == ()


# decide

SITE = WeightSite(quantizer="fc.weight_fake_quant", path="fc", paths=("fc",), parameter="fc.weight", axis=1)


def test_decide_writes_out_the_axis_and_says_who_decided() -> None:
    outcome = decide(CONFIG, SITE, "because", {})
    assert outcome.config is not None
    assert outcome.config.scheme.granularity == sq.PerChannel(axis=1)
    assert outcome.decision is not None
    assert outcome.decision.reasons["placed"] == "because"
    assert outcome.kind == "learnable"


def test_decide_takes_the_preset_before_rules_and_rules_before_it() -> None:
    presets = {SITE.quantizer: Preset(FOUR, "an edge")}
    preset = decide(CONFIG, SITE, "", presets)
    assert preset.config is not None
    assert preset.config.scheme.bits == 4
    rules = (sq.Rule(name="fc", weight=sq.override(bits=5)),)
    ruled = decide(sq.QuantConfig(rules=rules), SITE, "", presets)
    assert ruled.config is not None
    assert (ruled.config.scheme.bits, ruled.used) == (5, (0,))


def test_decide_remembers_what_a_rule_left_out() -> None:
    outcome = decide(sq.QuantConfig(rules=(sq.Rule(name="fc", weight=None),)), SITE, "", {})
    assert outcome.config is None
    assert (outcome.kind, outcome.used) == ("learnable", (0,))


def test_decide_returns_what_the_chip_forbids() -> None:
    outcome = decide(sq.QuantConfig(chip="BM1688", rules=(sq.Rule(name="fc", weight=sq.override(bits=3)),)), SITE, "", {})
    (problem,) = outcome.problems
    assert "3 bits" in problem
    assert "4 or 8" in problem


# quantize_values


def test_quantize_values_decides_about_what_was_chosen_and_nothing_else() -> None:
    graph = fused()
    values = quantize_values(graph, DATAFLOW, CONFIG, Placement({"mean": "for a test"}), {})
    assert list(values.outcomes) == ["mean.post_act_fake_quantizer"]
    assert (values.inputs, values.misfits) == ({}, ())


def test_quantize_values_leaves_out_an_input_quantizer_behind_one_of_its_kind() -> None:
    graph = fused()
    name = input_quantizer("fc")
    shared = SharedInput("fc", (("fc", 0),), "for a test", "mean")
    both = quantize_values(graph, DATAFLOW, CONFIG, Placement({"mean": "."}, {name: shared}), {})
    assert both.outcomes[name].config is None
    assert both.inputs == {}
    lone = quantize_values(graph, DATAFLOW, CONFIG, Placement({}, {name: shared}), {})
    assert lone.outcomes[name].config is not None
    assert lone.inputs == {("fc", 0): name}


def test_quantize_values_gives_a_layer_of_4_bits_its_own_input() -> None:
    graph, cnn = fused(), PLACEMENTS.get("CNN")
    config = sq.QuantConfig(chip="BM1688", rules=(sq.Rule(name="fc", weight=FOUR, activation=FOUR),))
    weight = decide(config, SITE, "", {})
    values = quantize_values(graph, cnn, config, Placement({"fc": "."}), {SITE.quantizer: weight})
    assert values.inputs == {("fc", 0): "fc.input_act_fake_quantizer"}
    assert quantize_values(graph, DATAFLOW, config, Placement({"fc": "."}), {SITE.quantizer: weight}).inputs == {}


def test_late_uses_are_the_first_calls_that_take_a_value_under_an_old_name() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            old = y.view(-1)
            y.add_(1)
            return old.relu() + y.sum()

    late = late_uses(raw(Late(), torch.ones(2, 2)))
    assert late["add"] == "relu"
    assert "mul" not in late
    assert late_uses(raw()) == {}


# round_biases


def test_round_biases_names_the_inputs_quantizer_and_leaves_out_a_float_input() -> None:
    graph = fused()
    weights = find_weights(graph, DATAFLOW).places
    names = [weight_quantizer("conv.weight"), weight_quantizer("fc.weight"), value_quantizer("x")]
    weight, activation = (CONFIG.default(role) for role in ("weight", "activation"))
    assert weight is not None
    assert activation is not None
    per_channel = replace(weight, scheme=replace(weight.scheme, granularity=sq.PerChannel(axis=0)))
    configs = dict(zip(names, (per_channel, per_channel, activation), strict=True))
    biases = round_biases(Quantized(graph, DATAFLOW, configs, {}), weights)
    assert {name: source for name, source in biases.sources.items() if source} == {names[0]: names[2]}
    never = DATAFLOW._replace(rounds_bias=False)
    assert round_biases(Quantized(graph, never, configs, {}), weights).sources == {}


# in_execution_order


def test_sites_come_in_the_order_of_execution_whatever_order_they_had() -> None:
    graph = raw()
    sites = draft(graph, CONFIG).sites
    assert list(sites) == [
        "x.post_act_fake_quantizer",
        "conv.weight_fake_quant",
        "mean.post_act_fake_quantizer",
        "fc.weight_fake_quant",
        "fc.post_act_fake_quantizer",
    ]
    for order in itertools.islice(itertools.permutations(sites.values()), 0, 120, 7):
        assert list(in_execution_order(graph, order)) == list(sites)


# unite


def test_a_merged_order_keeps_each_order_as_far_as_they_agree() -> None:
    assert merged_order([["a", "b", "c"]]) == ["a", "b", "c"]
    assert merged_order([["a", "c"], ["a", "b", "c"]]) == ["a", "b", "c"]
    assert merged_order([["a", "b", "c"], ["n", "a"], ["b", "m"]]) == ["n", "a", "b", "m", "c"]
    assert merged_order([[], ["a"]]) == ["a"]


def test_weights_agree_on_no_norm_or_source_that_one_example_lacks() -> None:
    folded = replace(SITE, norm="bn", source="x.post_act_fake_quantizer")
    site, note = agreed(folded, SITE)
    assert (site.norm, site.source, site.note) == ("", "", "unfolded")
    assert "fc.weight" in note
    site, note = agreed(replace(SITE, source="a"), replace(SITE, source="b"))
    assert (site.source, note) == ("", "")
    assert agreed(folded, folded) == (folded, "")


def test_a_value_that_sits_elsewhere_in_another_example_is_refused() -> None:
    here = ValueSite(quantizer="relu.post_act_fake_quantizer", value="relu", anchor=CallSite("", "relu", 0))
    assert agreed(here, replace(here, shape=(2,)))[0].shape == (2,), "that of the latest example"
    with pytest.raises(sq.PlanError, match="one name for different calls"):
        agreed(here, replace(here, anchor=CallSite("", "relu", 1)))


def test_unite_counts_each_examples_calls() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, norm: bool) -> Tensor:
            x = self.conv(x)
            return torch.relu(self.bn(x)) + x if norm else torch.relu(x)

    model, x = Either().eval(), torch.ones(1, 3, 2, 2)
    drafts = [draft(sq.trace(model, (x, norm)), CONFIG) for norm in (True, False)]
    united = unite(drafts)
    assert [counts[("", "relu")] for counts in united.counts if ("", "relu") in counts] in ([1, 1], [])
    assert list(united.sites) == list(united.decisions)
    assert set(united.sites) == {name for own in drafts for name in own.sites}
    assert len(united.counts) == len(united.runs) == 2


def test_the_site_of_a_value_is_that_of_its_call() -> None:
    graph = fused()
    site = value_site(graph, graph.nodes["conv"], "conv")
    assert (site.pattern, site.members) == ("ConvBnReLU2d", ("conv", "bn", "relu"))
    assert site.anchor == CallSite("", "relu", 0), "a group acts behind its last call"
    assert NO_VALUES.outcomes == {}
