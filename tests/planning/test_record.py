"""What the log says of a plan: every decision once, and nothing without a reader or while a model runs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq


class Net(nn.Module):
    """A BatchNorm to fold, a tied weight, and a layer to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean((2, 3))
        return self.head(self.second(self.first(x)))


RULES = (
    sq.Rule(name="head", weight=None, activation=None),
    sq.Rule(name="mean.post_act_fake_quantizer", observe_only=True),
    sq.Rule(type=nn.GELU, activation=None),
)
CONFIG = sq.QuantConfig(chip="BM1690", strategy="Layers", rules=RULES)
X = torch.ones(1, 3, 4, 4)


@pytest.fixture
def graph() -> sq.Graph:
    return sq.trace(Net().eval(), (X,))


def said(records: list[logging.LogRecord], level: int) -> list[str]:
    return [record.getMessage() for record in records if record.levelno == level]


def test_info_is_about_the_whole_and_debug_about_each_decision(graph: sq.Graph, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sophq_func"):
        plan = sq.plan(graph, CONFIG)
    assert {record.name for record in caplog.records} == {"sophq_func.planning"}
    info, debug = said(caplog.records, logging.INFO), said(caplog.records, logging.DEBUG)
    weights = sum(plan.site(name).role == "weight" for name in plan)
    counts = f"{weights} weight and {len(plan) - weights} activation quantizers"
    assert info == [
        f"plan of 1 example with chip BM1690, strategy Layers: {counts}",
        *(f"note: {note}" for note in plan.notes),
        f"unused: {RULES[2]!r}",
        plan.coverage.lines()[0],
    ]
    assert [line for line in debug if line.startswith("in effect: ")] == [f"in effect: {rule!r}" for rule in RULES[:2]]
    about = {name: line for line in debug for name in plan if line.startswith(f"{name}: ")}
    assert about.keys() == plan.keys()
    assert "norm folded into it" in about["conv.weight_fake_quant"]
    assert "tied, also named second.weight_fake_quant" in about["first.weight_fake_quant"]
    quiet = about["mean.post_act_fake_quantizer"]
    assert f"observes only, after mean; operand of first; observe_only: {RULES[1]!r}" in quiet
    assert f"head.weight_fake_quant: left out: {RULES[0]!r}" in debug
    assert [line.removeprefix("float: ") for line in debug if line.startswith("float: ")] == [
        str(left) for left in plan.coverage.left
    ]


def test_each_example_adds_to_one_record(graph: sq.Graph, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="sophq_func"):
        sq.plan([graph, graph], CONFIG)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("plan of 2 examples")
    assert len(set(lines)) == len(lines)


def test_a_quantizer_that_all_calls_share_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.tanh(x @ x)
            return x

    rule = sq.Rule(name="*", share=True)
    with caplog.at_level(logging.DEBUG, logger="sophq_func.planning"):
        sq.plan(sq.trace(Loop(), (torch.eye(3),)), sq.QuantConfig(rules=(rule,)))
    assert any(record.getMessage().startswith("tanh.post_act_fake_quantizer: ") for record in caplog.records)
    assert any("shared by all calls" in record.getMessage() for record in caplog.records)


class Other(nn.Module):
    """A weight that the strategy CNN does not see: of a function."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.weight)


def test_what_a_user_is_warned_of_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    graph = sq.trace(Other(nn.Linear(4, 4)), (torch.ones(2, 4),))
    with caplog.at_level(logging.INFO, logger="sophq_func"), pytest.warns(sq.PlanWarning) as caught:
        sq.plan(graph, sq.QuantConfig(strategy="CNN"))
    assert f"warned: {caught[0].message}" in said(caplog.records, logging.INFO)


def test_a_model_that_runs_says_nothing(graph: sq.Graph, caplog: pytest.LogCaptureFixture) -> None:
    model = Net().eval()
    q = sq.quantize(model, CONFIG, example_args=(X,))
    params = sq.params_of(model)
    with caplog.at_level(logging.DEBUG, logger="sophq_func"):
        qparams = q.calibrate(params, [X], progress=False)
        q.apply(params, qparams, X)
    assert caplog.records == []


def test_a_user_who_does_not_configure_logging_sees_nothing(graph: sq.Graph, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger("sophq_func").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]
    sq.plan(graph, CONFIG)
    assert capfd.readouterr() == ("", "")
