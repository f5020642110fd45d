"""A strategy that is registered can be named in a config; what the strategy ``Transformer`` only observes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.capture.graph import Graph
from sophq_func.config.strategies import PLACEMENTS, Placement, Requests, Strategy


def place_results(graph: Graph, requests: Requests) -> Placement:
    """What the model returns."""
    return Placement({value.name: "the model returns it" for value in graph.values.values() if value.output})


@pytest.fixture
def results(scratch_registries: None) -> str:
    """A strategy for one test."""
    PLACEMENTS.add("Results", Strategy(place_results, weights=(nn.Linear,)), "results only")
    return "Results"


def test_a_registered_strategy_plans(results: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    plan = sq.plan(sq.trace(model, (torch.ones(1, 2),)), sq.QuantConfig(strategy=results))
    assert list(plan) == ["0.weight_fake_quant", "2.weight_fake_quant", "2.post_act_fake_quantizer"]
    assert plan.reasons("2.post_act_fake_quantizer")["placed"] == "the model returns it"


def test_an_alias_of_a_strategy_is_the_same_config(results: str) -> None:
    assert sq.QuantConfig(strategy="results only") == sq.QuantConfig(strategy=results)
    assert sq.QuantConfig(chip="BM1690", strategy="results only").strategy == results


def test_a_strategy_that_is_not_registered_is_refused_with_near_matches() -> None:
    with pytest.raises(sq.ConfigError, match="did you mean 'Dataflow'"):
        sq.QuantConfig(strategy="Dataflw")
    with pytest.raises(sq.ConfigError, match="CNN, Transformer"):
        sq.QuantConfig(strategy=3)  # type: ignore[arg-type]


IMAGES = torch.randn(2, 3, 4, 4)
LAYERS_OF_FUSED = ("conv_bn_relu.0", "conv_bn.0", "conv_relu.0", "conv", "linear_relu.0", "linear_bn.0", "linear")


class Fused(nn.Module):
    """Convolutions and linear layers, alone and fused with what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_bn_relu = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv_bn = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.conv_relu = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.conv = nn.Conv2d(4, 4, 1)
        self.linear_relu = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
        self.linear_bn = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv_relu(self.conv_bn(self.conv_bn_relu(x))))
        return self.linear(self.linear_bn(self.linear_relu(x.flatten(1))))


def test_transformer_quantizes_the_inputs_of_the_classes_on_its_list_and_of_no_others() -> None:
    graph = sq.trace(Fused().eval(), IMAGES)
    plan = sq.plan(graph, sq.QuantConfig(chip="BM1690", strategy="Transformer"))
    read = {name.removesuffix(".0"): plan.site(f"{name}.weight_fake_quant").inputs[0] for name in LAYERS_OF_FUSED}
    assert {name for name, site in read.items() if site.quantizer} == {"conv_relu", "conv", "linear_relu", "linear"}
    # the weights are quantized all the same
    assert not any(plan[name].observe_only for name in plan if plan.site(name).role == "weight")
    cnn = sq.plan(graph, sq.QuantConfig(chip="BM1690", strategy="CNN"))
    assert not any(cnn[name].observe_only for name in cnn)


def test_transformer_explains_what_it_only_observes() -> None:
    graph = sq.trace(Fused().eval(), IMAGES)
    config = sq.QuantConfig(chip="BM1690", strategy="Transformer")
    text = sq.plan(graph, config).explain("x.post_act_fake_quantizer")
    assert "conv_bn_relu.0 is fused to a ConvBnReLU2d, which is not on its list" in text


def test_a_rule_quantizes_what_transformer_only_observes() -> None:
    graph = sq.trace(Fused().eval(), IMAGES)
    rule = sq.Rule(name="conv_bn_relu.0", requests=True)
    plan = sq.plan(graph, sq.QuantConfig(chip="BM1690", strategy="Transformer", rules=(rule,)))
    assert not plan["x.post_act_fake_quantizer"].observe_only


def test_a_value_that_two_layers_read_is_quantized_where_one_is_on_the_list() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x)) + self.b(x)

    plan = sq.plan(sq.trace(Both().eval(), IMAGES), sq.QuantConfig(chip="BM1690", strategy="Transformer"))
    assert not plan["x.post_act_fake_quantizer"].observe_only
