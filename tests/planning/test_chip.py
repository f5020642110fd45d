"""Strategy ``Chip``: which values it quantizes, on which grids, and where their integers come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.config.site import Requant, Site
from tests.chip.network import Operations

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_of(model: nn.Module, x: Tensor = X, chip: str | None = "BM1684X", **config: object) -> sq.Plan:
    return sq.plan(sq.trace(model.eval(), (x,)), sq.QuantConfig(chip=chip, strategy="Chip", **config))  # type: ignore[arg-type]


def grids(plan: sq.Plan) -> dict[str, str]:
    """The grid of each value, by its short name."""
    short = {name: name.replace(".post_act_fake_quantizer", "") for name in plan}
    rows = {row["quantizer"]: row["grid"] for row in plan.rows()}
    return {short[name]: rows[name] for name in plan if plan.site(name).role != "weight"}


def test_values_that_are_never_negative_are_unsigned_where_the_chip_has_such() -> None:
    found = grids(plan_of(Operations()))
    assert {name for name, grid in found.items() if grid == "uint8"} == {"stem.0", "sigmoid", "relu"}
    assert not {name for name, grid in grids(plan_of(Operations(), chip="CV183X")).items() if grid.startswith("u")}


def test_a_relu_behind_max_pooling_stays_on_the_grid_before() -> None:
    found = grids(plan_of(Operations()))
    assert not {"max_pool2d", "relu_1"} & found.keys()
    assert found["mixed"] == found["pool"] == "int8"


def test_weights_have_no_code_of_minus_128() -> None:
    plan = plan_of(Operations())
    weights = [plan[name].scheme for name in plan if plan.site(name).role == "weight"]
    assert all(scheme.symmetric_range and scheme.granularity == sq.PerChannel(0) for scheme in weights)


@pytest.mark.parametrize(("chip", "scales"), [("BM1684X", True), ("BM1688", True), ("BM1690", False), ("CV183X", False)])
def test_linear_layers_have_the_scales_that_the_compiler_reads(chip: str, scales: bool) -> None:
    granularity = plan_of(Operations(), chip=chip)["head.weight_fake_quant"].scheme.granularity
    assert granularity == (sq.PerChannel(0) if scales else sq.PerTensor())


def test_the_range_of_a_sigmoid_is_fixed() -> None:
    for chip in ("BM1684X", "CV183X"):
        model = Operations().eval()
        q = sq.quantize(model, sq.QuantConfig(chip=chip, strategy="Chip"), example_args=(X,))
        scale = q.calibrate(sq.params_of(model), [X], progress=False)["sigmoid.post_act_fake_quantizer"].scale
        assert scale == (torch.tensor(1 / 255) if chip == "BM1684X" else torch.tensor(1 / 127))


def test_terms_know_source_and_result() -> None:
    plan = plan_of(Operations())
    (requant,) = plan.site("add.input_act_fake_quantizer").requant
    assert requant == Requant("term", "silu.post_act_fake_quantizer", "relu.post_act_fake_quantizer")
    assert plan["add.input_act_fake_quantizer"].scheme.bits == 16
    assert [name for name in plan if plan.site(name).is_term] == [
        f"{call}.input_act_fake_quantizer{number}" for call in ("add", "cat", "add_1") for number in ("", "_1")
    ]


def test_terms_of_cv18xx_know_all_sources_of_their_sum() -> None:
    plan = plan_of(Operations(), chip="CV183X")
    sources = [requant.source for requant in plan.site("add.input_act_fake_quantizer_1").requant]
    assert sources == ["shortcut.post_act_fake_quantizer", "silu.post_act_fake_quantizer"]
    assert {requant.rule for requant in plan.site("relu.post_act_fake_quantizer").requant} == {"sum"}
    assert {requant.rule for requant in plan.site("cat.input_act_fake_quantizer").requant} == {"term"}


def rule_of(plan: sq.Plan, value: str) -> str:
    return plan.site(f"{value}.post_act_fake_quantizer").requant[0].rule


def test_each_operation_has_the_rule_of_its_chip() -> None:
    plan, other = plan_of(Operations()), plan_of(Operations(), chip="CV183X")
    assert [rule_of(plan, name) for name in ("stem.0", "mul", "pool", "tanh")] == ["layer", "product", "product", "quotient"]
    twice = "layer in two shifts"
    assert [rule_of(other, name) for name in ("stem.0", "mul", "pool", "tanh")] == [twice, twice, "product", "quotient"]
    assert plan.site("pool.post_act_fake_quantizer").requant[0].number == 9
    assert plan.site("adaptive_avg_pool2d.post_act_fake_quantizer").requant[0].number == 4


def test_affine_pools_are_exact_quotients_and_nothing_is_unsigned() -> None:
    plan = plan_of(Operations(), activation=sq.override(symmetric=False))
    assert rule_of(plan, "pool") == "quotient"
    assert not any(plan.site(name).unsigned for name in plan)


def test_pooling_of_a_number_that_the_trace_does_not_tell_is_the_quotient() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 3)

    assert not plan_of(Pooled()).site("avg_pool2d.post_act_fake_quantizer").requant


@pytest.mark.parametrize(
    ("pool", "number"),
    [
        (nn.AvgPool2d(2), 4),
        (nn.AvgPool2d((2, 3), padding=1), 6),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), 0),
        (nn.AvgPool2d(3, ceil_mode=True), 0),
        (nn.AvgPool2d(3, divisor_override=2), 0),
        (nn.AdaptiveAvgPool2d(4), 4),
        (nn.AdaptiveAvgPool2d(3), 0),
    ],
)
def test_pooling_is_exact_where_each_result_has_as_many_elements(pool: nn.Module, number: int) -> None:
    plan = plan_of(nn.Sequential(nn.Conv2d(2, 2, 1), pool))
    requants = plan.site("1.post_act_fake_quantizer").requant
    assert [requant.number for requant in requants] == [number] * bool(number)


def test_a_sum_with_a_constant_has_no_terms() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5

    assert list(grids(plan_of(Shifted()))) == ["x", "add"]


def test_a_float_source_leaves_the_quotient() -> None:
    plan = plan_of(Operations(), rules=[sq.Rule(name="shortcut.post_act_fake_quantizer", activation=None)])
    assert not plan.site("add.input_act_fake_quantizer").requant
    assert plan.site("cat.input_act_fake_quantizer").requant


def test_the_table_says_why() -> None:
    text = plan_of(Operations()).explain("relu.post_act_fake_quantizer")
    assert "symmetric        False  <- strategy Chip: never negative, so its codes are unsigned" in text
    assert "placed because: result of add" in text


def test_a_config_overrides_what_the_strategy_knows() -> None:
    rule = sq.Rule(name="relu.post_act_fake_quantizer", activation=sq.override(symmetric=True))
    plan = plan_of(Operations(), rules=[rule])
    assert plan["relu.post_act_fake_quantizer"].scheme.symmetric and not plan.site("relu.post_act_fake_quantizer").unsigned
    wide = plan_of(Operations(), weight=sq.override(symmetric_range=False))
    assert not wide["head.weight_fake_quant"].scheme.symmetric_range


def test_a_chip_whose_arithmetic_is_not_known_is_refused() -> None:
    with pytest.raises(sq.ConfigError, match=r"'Chip' simulates how a chip computes.*: got 'Academic', allowed BM1688 or"):
        sq.QuantConfig(chip="Academic", strategy="Chip")


def test_without_a_chip_it_is_the_default_one() -> None:
    assert grids(plan_of(Operations(), chip=None)) == grids(plan_of(Operations(), chip="BM1690"))


def test_a_chip_of_ones_own_takes_the_arithmetic_of_another(scratch_registries: None) -> None:
    spec = replace(sq.CHIPS.get("BM1690"), arithmetic=sq.CHIPS.get("CV183X").arithmetic)
    sq.register.chip("Mine", spec)
    assert grids(plan_of(Operations(), chip="Mine")) == grids(plan_of(Operations(), chip="CV183X"))


@pytest.mark.parametrize("chip", ["BM1684X", "CV183X"])
def test_a_plan_can_be_stored(chip: str) -> None:
    plan = plan_of(Operations(), chip=chip)
    again = sq.Plan.from_json(plan.to_json())
    assert again == plan and again.digest() == plan.digest()
    assert all(again.site(name).requant == plan.site(name).requant for name in plan)


def test_sites_of_other_strategies_are_written_as_before() -> None:
    plan = sq.plan(sq.trace(Operations().eval(), (X,)), sq.QuantConfig(chip="BM1684X"))
    for name in plan:
        data = plan.site(name).to_data()
        assert not {"requant", "unsigned"} & data.keys()
        assert Site.from_data(data) == plan.site(name)
