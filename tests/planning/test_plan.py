"""A plan explains itself: table, explanation, tree, difference, one more rule, and a picture."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.planning import picture
from tests.golden.models import ResidualConvNet, TransformerBlock
from tests.notebook import Piece

FOUR = sq.Rule(type=sq.patterns.ConvBnReLU2d, weight=sq.override(bits=4))
QUIET = sq.Rule(name="conv4.post_act_fake_quantizer", observe_only=True)


@pytest.fixture(scope="module")
def plan() -> sq.Plan:
    config = sq.QuantConfig(chip="BM1688", rules=(FOUR, QUIET, sq.Rule(type=nn.GELU, activation=None)))
    return sq.plan(sq.trace(ResidualConvNet().eval(), (torch.zeros(2, 3, 12, 12),)), config)


@pytest.mark.parametrize("width", [60, 100, 250])
def test_the_table_says_of_each_quantizer_what_where_and_why(plan: sq.Plan, width: int) -> None:
    lines = plan.table(width=width).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for name in plan:
        assert name in text
    for word in ("int4", "PerChannel(axis=0)", "ema_minmax(decay=0.9)", "observes only", "after relu1", "bits: Rule(type="):
        assert word in text, word
    assert "chip BM1688" in text
    assert "unused: Rule(type=GELU, activation=None)" in text


def test_the_table_has_the_columns_that_are_asked_for(plan: sq.Plan) -> None:
    lines = plan.table(columns=("grid", "quantizer")).splitlines()
    assert lines[0].split() == ["grid", "quantizer"]
    assert [line.split()[-1] for line in lines[2 : 2 + len(plan)]] == list(plan)
    with pytest.raises(sq.ConfigError, match=r"plan\.table: column 'observers' is not known, did you mean 'observer'"):
        plan.table(columns=["observers"])
    with pytest.raises(sq.ConfigError, match=r"plan\.table: .*width: got 10, allowed an integer of at least 40"):
        plan.table(width=10)


def test_a_notebook_shows_the_table(plan: sq.Plan) -> None:
    piece = Piece(plan._repr_html_())
    rows = [dict(zip(piece.rows[0], row, strict=True)) for row in piece.rows[1:]]
    assert rows == plan.rows()
    assert repr(plan) in piece.text and plan.coverage.lines()[0] in piece.text


def test_an_empty_plan_has_a_table_that_says_so() -> None:
    config = sq.QuantConfig(weight=None, activation=None)
    empty = sq.plan(sq.trace(nn.Linear(2, 2), (torch.ones(1, 2),)), config)
    assert empty.table() == "nothing is quantized"
    assert Piece(empty._repr_html_()).rows == []


def test_explain_says_who_decided_each_field(plan: sq.Plan) -> None:
    text = plan.explain("conv1_weight_fake_quant")
    assert "conv1.weight_fake_quant\n  weight conv1.weight" in text
    assert "fused ConvBnReLU2d: conv1 + bn1 + relu1" in text
    assert "bn1 is folded into the weight" in text
    assert "rounds the bias with the scale of x.post_act_fake_quantizer" in text
    assert re.search(r"bits +4  <- Rule\(type=ConvBnReLU2d", text)
    assert re.search(r"observer +minmax\(\)  <- chip BM1688", text)
    assert re.search(r"observe_only +True  <- Rule\(name='conv4", plan.explain("conv4.post_act_fake_quantizer"))
    with pytest.raises(KeyError, match="conv1"):
        plan.explain("conv1.wight_fake_quant")
    with pytest.raises(KeyError, match=r"no quantizer 'conv1'. Fix: it has 'conv1.weight_fake_quant'"):
        plan.explain("conv1")
    with pytest.raises(KeyError, match=r"list\(plan\) has the names"):
        plan.explain("zzzzzz")


def test_the_tree_is_a_nested_dict_that_draws_itself(plan: sq.Plan) -> None:
    tree = plan.tree()
    assert tree["conv1"]["weight_fake_quant"] is plan["conv1.weight_fake_quant"]
    assert str(tree).splitlines()[:3] == [
        "├─ x.post_act_fake_quantizer  int8 PerTensor()",
        "├─ conv1",
        "│  ├─ weight_fake_quant  int4 PerChannel(axis=0)",
    ]
    assert len(str(tree).splitlines()) == len(plan) + 4


def test_one_more_rule_gives_a_new_plan_and_the_difference_is_told(plan: sq.Plan) -> None:
    digest = plan.digest()
    rule = sq.Rule(name="conv2", weight=sq.override(bits=8), activation=None)
    other = plan.override(rule)
    assert plan.digest() == digest != other.digest()
    difference = plan.diff(other)
    assert difference.removed == ("conv2.post_act_fake_quantizer",)
    assert difference.added == ()
    assert difference.changed["conv2.weight_fake_quant"] == {"bits": (4, 8)}
    assert set(difference.changed["conv3.weight_fake_quant"]) == {"site"}, "its bias is rounded no longer"
    assert str(difference).splitlines()[:2] == ["- conv2.post_act_fake_quantizer", "~ conv2.weight_fake_quant: bits 4 -> 8"]
    assert other.diff(plan).added == difference.removed
    assert not plan.diff(plan)
    assert str(plan.diff(plan)) == "no difference"
    assert other.override(sq.Rule(name="conv2", activation=sq.override())).diff(plan).changed["conv2.weight_fake_quant"]


def test_a_plan_without_its_trace_refuses_one_more_rule_and_says_what_to_do(plan: sq.Plan) -> None:
    for copy in (sq.Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan))):
        assert copy == plan
        with pytest.raises(sq.PlanError, match=r"JSON or a pickle.*Fix: sq\.plan\(sq\.trace"):
            copy.override(FOUR)
    with pytest.raises(sq.ConfigError, match="Rule"):
        plan.override("conv1")  # type: ignore[arg-type]
    with pytest.raises(sq.PlanError, match="Plan"):
        plan.diff({})  # type: ignore[arg-type]


def test_dot_has_every_call_and_quantizer_and_every_way_between_them(plan: sq.Plan) -> None:
    text = plan.to_dot()
    assert text.startswith("digraph plan {")
    assert text.endswith("}")
    for name in (*plan, "x", "conv1", "add", "relu3", "output"):
        assert f'"{name}" [' in text, name
    for way in (
        '"x" -> "x.post_act_fake_quantizer"',
        '"x.post_act_fake_quantizer" -> "conv1"',
        '"conv1.weight_fake_quant" -> "conv1"',
        '"conv1.post_act_fake_quantizer" -> "conv2"',
        '"conv1.post_act_fake_quantizer" -> "add"',
        '"add" -> "relu3"',
        '"conv4.post_act_fake_quantizer" -> "output"',
    ):
        assert f"{way};" in text, way
    assert text.count(" -> ") == len(picture.ways(plan.edges)) + 4
    assert 'style="rounded,dashed"' in next(
        line for line in text.splitlines() if line.startswith('  "conv4.post_act_fake_quantizer" [')
    )
    assert sq.Plan.from_json(plan.to_json()).to_dot() == text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_whole(plan: sq.Plan, tmp_path: Path, ending: str) -> None:
    target = tmp_path / f"plan.{ending}"
    assert sq.draw(plan, target) == target
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    if ending == "svg":
        drawn = target.read_text()
        assert drawn.count("<!-- int8 -->") == sum(config.scheme.bits == 8 for config in plan.values())
        assert drawn.count("<!-- int4 -->") == 2
    else:
        assert target.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_of_shared_inputs_has_a_pill_at_each_call(tmp_path: Path) -> None:
    graph = sq.trace(TransformerBlock().eval(), (torch.zeros(1, 6, 16),))
    plan = sq.plan(graph, sq.QuantConfig(chip="BM1690", strategy="BF16Mixed"))
    drawn = sq.draw(plan, tmp_path / "block.svg").read_text()
    calls = {name: len(plan.site(name).places()) for name in plan}
    assert calls["query.input_act_fake_quantizer"] == 3
    assert drawn.count("<!-- int8 -->") + drawn.count("<!-- bf16 -->") == sum(calls.values())


@pytest.mark.parametrize(
    ("path", "word", "error"),
    [
        ("plan.gif", r"\.png, \.svg", sq.PlanError),
        ("missing/plan.png", "folder", sq.StateError),
        ("plan", "ending", sq.PlanError),
    ],
    ids=str,
)
def test_a_picture_that_cannot_be_written_says_why(
    plan: sq.Plan, tmp_path: Path, path: str, word: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=word):
        sq.draw(plan, tmp_path / path)
    assert list(tmp_path.iterdir()) == []


class Gated(nn.Module):
    """What returns its own input: dropout in eval mode, and Identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same, self.drop, self.second = nn.Linear(4, 4), nn.Identity(), nn.Dropout(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.drop(self.same(self.first(x)))))


def test_a_call_that_returns_its_input_adds_no_call_of_its_own() -> None:
    graph = sq.trace(Gated().eval(), (torch.ones(2, 4),))
    assert list(graph.nodes) == ["x", "first", "same", "drop", "relu", "second"]
