"""Texts of plans: those of version 2 are read as what they were, and this version loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.config.site import ComputedSite, ValueSite, WeightSite
from sophq_func.planning.stored import VERSION, digest_of_version_2
from tests.planning.version_2 import CASES

OLD: dict[str, dict[str, str]] = json.loads((Path(__file__).parents[1] / "golden" / "plans_of_version_2.json").read_text())
each = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name != "computed"])
def test_a_plan_of_version_2_is_the_plan_made_now(name: str) -> None:
    old, now = sq.Plan.from_json(OLD[name]["plan"]), CASES[name].plan()
    assert list(old) == list(now)
    assert old == now
    assert hash(old) == hash(now)
    assert old.digest() == now.digest()
    assert not old.diff(now)
    assert not now.diff(old)
    assert [old.reasons(quantizer) for quantizer in old] == [now.reasons(quantizer) for quantizer in now]
    assert old.to_dot() == now.to_dot() == OLD[name]["dot"]


def test_an_old_plan_rounds_a_computed_weight_twice_as_it_did() -> None:
    old, now = sq.Plan.from_json(OLD["computed"]["plan"]), CASES["computed"].plan()
    assert old.keys() - now.keys() == {"abs.post_act_fake_quantizer"}
    assert not now.keys() - old.keys()
    assert not old.diff(now).changed
    model, (x,) = CASES["computed"].model, CASES["computed"].args
    q, params = sq.build(model, old), sq.params_of(model)
    qparams = q.calibrate(params, [x + 1], progress=False)

    def rounded(name: str, value: Tensor) -> Tensor:
        return q.quantize_value(name, value, qparams[name])

    hidden = F.linear(rounded("x.post_act_fake_quantizer", x), rounded("w_fake_quant", model.w))
    weight = rounded("weight_fake_quant", rounded("abs.post_act_fake_quantizer", model.v.abs()))
    expected = F.linear(rounded("relu.post_act_fake_quantizer", torch.relu(hidden)), weight)
    torch.testing.assert_close(q.apply(params, qparams, x), expected)


@each
def test_its_digest_of_then_is_known_and_its_text_becomes_one_of_this_version(name: str) -> None:
    text = OLD[name]["plan"]
    assert digest_of_version_2(text) == OLD[name]["digest"]
    new = sq.Plan.from_json(text).to_json()
    assert json.loads(new)["version"] == VERSION
    assert digest_of_version_2(new) == ""
    assert sq.Plan.from_json(new).to_json() == new


def test_all_kinds_of_sites_are_in_the_old_plans() -> None:
    plans = [sq.Plan.from_json(old["plan"]) for old in OLD.values()]
    sites = [plan.site(quantizer) for plan in plans for quantizer in plan]
    assert {type(site) for site in sites} == {WeightSite, ComputedSite, ValueSite}
    assert any(site.more for site in sites)
    assert any(site.norm for site in sites)
    assert any(site.source for site in sites)
    assert any(site.argument for site in sites)


@each
def test_a_text_keeps_shapes_and_inputs_though_they_play_no_part_in_comparisons(name: str) -> None:
    now = CASES[name].plan()
    again = sq.Plan.from_json(now.to_json())
    assert again == now
    for quantizer in now:
        assert again.site(quantizer).to_data() == now.site(quantizer).to_data()
        assert again.site(quantizer).input == now.site(quantizer).input


def first_site(text: str) -> tuple[Any, Any]:
    data = json.loads(text)
    return data, data["quantizers"][0]["site"]


@pytest.mark.parametrize("change", [{"value": None}, {"nothing": 1}, {"anchor": ["a", "b"]}, {"shape": ["2"]}])
@pytest.mark.parametrize("version", [2, VERSION])
def test_a_site_with_other_fields_or_types_is_refused(version: int, change: dict[str, Any]) -> None:
    data, site = first_site(OLD["residual"]["plan"] if version == 2 else CASES["residual"].plan().to_json())
    site.update(change)
    with pytest.raises(sq.ConfigError, match=r"Plan\.from_json"):
        sq.Plan.from_json(json.dumps(data))


def test_a_kind_of_site_that_nobody_knows_is_refused() -> None:
    data, site = first_site(CASES["residual"].plan().to_json())
    site["kind"] = "gradient"
    with pytest.raises(sq.ConfigError, match="gradient"):
        sq.Plan.from_json(json.dumps(data))


def test_an_old_plan_lets_a_run_reach_what_it_might_then() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, other: bool = False) -> Tensor:
            return self.other(self.one(x)) if other else self.one(x)

    torch.manual_seed(0)
    model, x = Either().eval(), torch.randn(2, 3)
    q, params = sq.quantize(model, sq.QuantConfig(), example_args=x), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with pytest.raises(sq.StateError, match="other: this run calls it and no example does"):
        q.apply(params, qparams, x, True)
    data = json.loads(q.plan.to_json())
    del data["coverage"], data["excluded"]
    data["runs"] = [[[made[:4] for made in calls], scopes] for calls, scopes in data["runs"]]
    old = sq.build(model, sq.Plan.from_json(json.dumps({**data, "version": 3})))
    expected = F.linear(q.apply(params, qparams, x), model.other.weight, model.other.bias)
    torch.testing.assert_close(old.apply(params, qparams, x, True), expected)
