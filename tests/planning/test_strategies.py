"""A strategy that is registered can be named in a config."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.capture.graph import Graph
from sophq_func.config.strategies import PLACEMENTS, Placement, Requests, Strategy


def place_results(graph: Graph, requests: Requests) -> Placement:
    """What the model returns."""
    return Placement({value.name: "the model returns it" for value in graph.values.values() if value.output})


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A strategy for one test: registries have no way to take one out again."""
    for part in ("_values", "_canonical"):
        monkeypatch.setattr(PLACEMENTS, part, dict(getattr(PLACEMENTS, part)))
    PLACEMENTS.add("Results", Strategy(place_results, weights=(nn.Linear,)), "results only")
    yield "Results"


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
