"""Other widths of one plan, and qparams for them: one model, whichever way it is reached."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sophq_func as sq

MODEL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WIDTHS = {"0": 4, "*post_act*": 6, "4_weight_fake_quant": 3}


def planned(observer: str = "minmax", **fields: object) -> sq.Quantized:
    half = sq.override(observer=observer, granularity="per_tensor")
    config = sq.QuantConfig(chip=None, weight=sq.override(observer=observer), activation=half, **fields)  # type: ignore[arg-type]
    return sq.quantize(MODEL, config, example_args=(X,))


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile"])
def test_qparams_at_other_widths_are_the_model_of_the_plan_with_these_widths(observer: str) -> None:
    q, params = planned(observer), sq.params_of(MODEL)
    _, ostate = q.observe(params, q.init(params), X)
    narrow = sq.build(MODEL, q.plan.with_bits(WIDTHS))
    qparams = q.qparams(params, ostate, bits=WIDTHS)
    assert torch.equal(narrow.apply(params, qparams, X), q.apply(params, qparams, X))
    own = narrow.calibrate(params, [X], progress=False)
    for name in q.plan:
        if observer != "mse" or q.plan.site(name).role == "weight":
            # an observer that searches a range for one width while it observes keeps that range for values
            torch.testing.assert_close(qparams[name].scale, own[name].scale, rtol=0, atol=0)


def test_one_width_stands_for_all_and_later_entries_override() -> None:
    q = planned()
    assert {config.scheme.bits for config in q.plan.with_bits(5).values()} == {5}
    both = q.plan.with_bits({"*": 4, "0": 2})
    assert both["0.weight_fake_quant"].scheme.bits == 2
    assert both["4.weight_fake_quant"].scheme.bits == 4
    assert both.reasons("0.weight_fake_quant")["bits"] == "plan.with_bits"


def test_everything_else_of_the_plan_stays_and_a_later_rule_keeps_the_widths() -> None:
    plan = planned().plan
    changed = plan.with_bits(WIDTHS)
    assert list(changed) == list(plan)
    assert all(changed.site(name) == plan.site(name) for name in plan)
    assert {field for fields in plan.diff(changed).changed.values() for field in fields} == {"bits"}
    again = changed.override(sq.Rule(name="4", weight=sq.override(bits=3)))
    assert again == changed
    stored = sq.Plan.from_json(plan.to_json()).with_bits(WIDTHS)
    assert stored == changed


def test_all_problems_are_named_at_once() -> None:
    q = sq.quantize(MODEL, sq.QuantConfig(chip="BM1688"), example_args=(X,))
    with pytest.raises(sq.ConfigError, match=r"2 problems(.|\n)*'nope'(.|\n)*from 2 to 16"):
        q.plan.with_bits({"nope": 4, "0": 99})
    with pytest.raises(sq.ConfigError, match=r"the chip does not allow 5 bits.*BM1688"):
        q.plan.with_bits({"0": 5})
    eight = sq.quantize(MODEL, sq.QuantConfig(chip=None, weight=sq.override(fake_quantize="e4m3")), example_args=(X,))
    with pytest.raises(sq.ConfigError, match="has no bit width"):
        eight.plan.with_bits({"0": 4})
    params = sq.params_of(MODEL)
    with pytest.raises(sq.ConfigError, match="cannot change its bit width"):
        eight.qparams(params, eight.observe(params, eight.init(params), X)[1], bits={"0": 4})
