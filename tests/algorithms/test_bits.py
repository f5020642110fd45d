"""Bit widths: what is measured, what is chosen, and that the plan builds it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms import at_widths, bit_operations, bit_sensitivity, choose_bits, pareto, sizes, trace_sensitivity

WIDTHS = (2, 4, 8)


def network() -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(32, 6)
    config = sq.QuantConfig(chip=None, strategy="Layers", weight=sq.override(bits=8, fake_quantize="fixed"))
    q = sq.quantize(model, config, example_args=(x,))
    params = sq.params_of(model)
    _, ostate = q.observe(params, q.init(params), x)
    settings = {bits: q.qparams(params, ostate, bits={"*weight_fake_quant": bits}) for bits in WIDTHS}
    return model, q, params, settings, x


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def test_what_is_measured_is_the_loss_of_one_weight_alone() -> None:
    model, q, params, settings, x = network()
    found = bit_sensitivity(q, params, settings, [x], squared, progress=False)
    name = "2.weight_fake_quant"
    weight = next(weight for weight in q.engine.weights if weight.site.quantizer == name)
    rounded = {**params, "2.weight": weight.quantize(params, settings[4][name])}
    expected = squared(torch.func.functional_call(model, rounded, (x,)), model(x)).detach()
    assert found.added[name][4] == pytest.approx(float(expected), rel=1e-4)
    assert all(by_bits[2] > by_bits[8] for by_bits in found.added.values())
    assert found.error[name] == dict.fromkeys(WIDTHS, 0.0)


def test_batches_are_averaged_and_values_are_measured_where_they_are_named() -> None:
    _, q, params, settings, x = network()
    names = ["input.post_act_fake_quantizer"]
    whole = bit_sensitivity(q, params, settings, [x], squared, names=names, progress=False)
    halves = bit_sensitivity(q, params, settings, list(x.split(16)), squared, names=names, progress=False)
    assert halves.added[names[0]][8] == pytest.approx(whole.added[names[0]][8], rel=1e-4)


def test_the_trace_of_a_quadratic_is_exact() -> None:
    _, q, params, settings, _ = network()

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (p["0.weight"] ** 2).sum() - (p["2.weight"] ** 2).sum()

    found = trace_sensitivity(q, params, settings, loss, torch.Generator().manual_seed(0), names=["0.weight_fake_quant"])
    weight = next(weight for weight in q.engine.weights if weight.site.parameter == "0.weight")
    moved = (weight.quantize(params, settings[2][weight.site.quantizer]) - params["0.weight"]).square().sum()
    assert found.added[weight.site.quantizer][2] == pytest.approx(2 * float(moved), rel=1e-5)
    negative = trace_sensitivity(q, params, settings, loss, torch.Generator(), names=["2.weight_fake_quant"])
    assert negative.added["2.weight_fake_quant"][2] == 0


def test_the_choice_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    names, widths = ["a", "b", "c", "d"], [2, 3, 8]
    loss = {name: {b: float(torch.rand((), generator=generator)) / b for b in widths} for name in names}
    costs = {"a": 3.0, "b": {2: 1.0, 3: 2.0, 8: 5.0}, "c": 1.0, ("c", "d"): 0.5}

    def cost(bits: dict[str, int]) -> float:
        own = {2: 1.0, 3: 2.0, 8: 5.0}[bits["b"]]
        return 3.0 * bits["a"] + own + bits["c"] + 0.5 * bits["c"] * bits["d"]

    def added(bits: dict[str, int]) -> float:
        return sum(loss[name][bits[name]] for name in names)

    every = [dict(zip(names, chosen, strict=True)) for chosen in product(widths, repeat=4)]
    for budget in (12.0, 20.0, 40.0):
        best = min(added(bits) for bits in every if cost(bits) <= budget)
        found = choose_bits(loss, costs, budget)
        assert cost(found) <= budget
        assert added(found) == pytest.approx(best)
    tied = choose_bits(loss, costs, 30.0, tie=[("a", "b"), ("b", "c")])
    assert tied["a"] == tied["b"] == tied["c"]
    assert added(tied) == pytest.approx(
        min(added(bits) for bits in every if cost(bits) <= 30.0 and bits["a"] == bits["b"] == bits["c"])
    )


def test_the_plan_builds_what_was_measured() -> None:
    model, q, params, settings, x = network()
    found = bit_sensitivity(q, params, settings, [x], squared, progress=False)
    size = sizes(q)
    bits = choose_bits(found, size, 5 * sum(size.values()))
    assert len(set(bits.values())) > 1
    qparams = at_widths(settings, bits, settings[8])
    built = sq.build(model, q.plan.with_bits(bits))
    measured, again = (squared(each.apply(params, qparams, x), model(x)) for each in (q, built))
    torch.testing.assert_close(again, measured, rtol=1e-6, atol=0)


def test_bit_operations_count_multiplications_and_pairs() -> None:
    _, q, params, _, x = network()
    costs = bit_operations(q, params, x[:1], names=["input.post_act_fake_quantizer"])
    assert costs["0.weight_fake_quant", "input.post_act_fake_quantizer"] == 6 * 8
    assert costs["2.weight_fake_quant"] == 8 * 8 * 8


def test_a_front_has_no_point_that_another_one_beats() -> None:
    loss = {"a": {2: 1.0, 4: 0.5, 8: 0.5}, "b": {2: 0.4, 4: 0.2, 8: 0.1}}
    front = pareto(loss, {"a": 1.0, "b": 1.0}, budgets=9)
    assert [choice.cost for choice in front] == sorted({choice.cost for choice in front})
    assert [choice.added for choice in front] == sorted({choice.added for choice in front}, reverse=True)
    assert front[-1].bits == {"a": 4, "b": 8} or front[-1].bits == {"a": 8, "b": 8}


def test_what_cannot_be_chosen_is_refused() -> None:
    loss = {"a": {2: 1.0}, "b": {4: 1.0}}
    with pytest.raises(sq.StateError, match="no widths keep this budget"):
        choose_bits(loss, {"a": 1.0}, 1.0)
    with pytest.raises(sq.ConfigError, match="no width in common"):
        choose_bits(loss, {}, 1.0, tie=[("a", "b")])
    with pytest.raises(sq.ConfigError, match="'c' is not known"):
        choose_bits(loss, {"c": 1.0}, 1.0)
    with pytest.raises(sq.StateError, match="no finite loss"):
        choose_bits({"a": {2: float("nan")}}, {}, 1.0)
    _, q, params, settings, x = network()
    with pytest.raises(sq.StateError, match="loss must return a scalar"):
        bit_sensitivity(q, params, settings, [x], lambda y, t: y - t, progress=False)
