"""Reconstruction: what it learns, in which units, from which options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.algorithms import adam, from_ptq_config, reconstruct
from sophq_func.algorithms._rounding import Rounding, undecided
from sophq_func.fake_quantize import rectified_sigmoid
from tests.helpers import same


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.norm(self.one(x))))


def setting(fake_quantize: Any = "fixed", bits: int = 3, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Block(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(24, 2, 4, 4)
    config = sq.QuantConfig(
        chip=None,
        strategy="Layers",
        weight=sq.override(bits=bits, fake_quantize=fake_quantize),
        activation=sq.override(bits=4, symmetric=False, fake_quantize="fixed"),
        **options,
    )
    q = sq.quantize(model, config, example_args=(x[:2],))
    params = sq.params_of(model)
    data = list(x.split(12))
    with torch.no_grad():
        target = model(x)

    def error(params: Any, qparams: Any) -> float:
        return float((q.apply(params, qparams, x) - target).square().mean() / target.square().mean())

    return model, q, params, q.calibrate(params, data, progress=False), data, error


def run(q: Any, params: Any, qparams: Any, data: Any, **options: Any) -> Any:
    return reconstruct(q, params, qparams, data, **{"steps": 40, "rows": 12, "progress": False, **options})


@pytest.mark.parametrize("units", ["layer", "block", ["0", "1", "3"]])
def test_units_of_every_kind_bring_outputs_closer(units: Any) -> None:
    _, q, params, qparams, data, error = setting()
    new, better = run(q, params, qparams, data, units=units)
    assert error(new, better) < error(params, qparams)


def test_the_rounding_alone_keeps_all_qparams() -> None:
    _, q, params, qparams, data, _ = setting()
    _, better = run(q, params, qparams, data, learn="rounding")
    same(better, qparams)


def test_scales_alone_round_to_the_nearest() -> None:
    _, q, params, qparams, data, error = setting(bits=2)
    new, better = run(q, params, qparams, data, learn="scales", scale_optimizer=adam(0.01))
    assert not torch.equal(better["1.one.weight_fake_quant"].scale, qparams["1.one.weight_fake_quant"].scale)
    _, baked = q.freeze(params, better)
    torch.testing.assert_close(new["1.one.weight"], baked["1.one.weight"])
    assert error(new, better) <= error(params, qparams)


def test_each_element_goes_to_one_of_its_two_neighbours() -> None:
    _, q, params, qparams, data, _ = setting(bits=4)
    new, _ = run(q, params, qparams, data, learn="rounding")
    name = "3.weight_fake_quant"
    moved = ((new["3.weight"] - params["3.weight"]) / qparams[name].scale.reshape(-1, 1)).abs()
    inside = params["3.weight"].abs() / qparams[name].scale.reshape(-1, 1) < 7
    assert float(moved[inside].max()) < 1 + 1e-5
    assert bool((moved[inside] > 0.5 + 1e-5).any())  # not all of them to the nearer one


@pytest.mark.parametrize("rounding", ["soft", "hard"])
def test_a_plan_that_stores_the_rounding_gets_one_that_is_decided(rounding: str) -> None:
    _, q, params, qparams, data, _ = setting(sq.fake_quantize.adaround(rounding=rounding))
    new, better = run(q, params, qparams, data)
    _, baked = q.freeze(new, better)
    same(baked["1.one.weight"], new["1.one.weight"])
    codes = new["3.weight"] / better["3.weight_fake_quant"].scale.reshape(-1, 1)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_dropping_is_seeded_and_a_generator_is_used() -> None:
    _, q, params, qparams, data, _ = setting()
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    one, again, other = (run(q, params, qparams, data, units=["1"], drop=0.5, generator=seed)[0] for seed in seeds)
    same(one, again)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_optimizers_of_ones_own_are_pairs_of_functions() -> None:
    class Descent:
        def init(self, learned: dict[str, Tensor]) -> tuple[()]:
            return ()

        def update(self, gradients: dict[str, Tensor], state: tuple[()], **_: Any) -> Any:
            return {name: -0.5 * slope.sign() for name, slope in gradients.items()}, state

    _, q, params, qparams, data, error = setting()
    new, better = run(q, params, qparams, data, optimizer=Descent())
    assert error(new, better) < error(params, qparams)


def test_adam_is_torchs_and_may_be_mapped_over_its_rate() -> None:
    start = torch.tensor([1.0, -2.0, 3.0])
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (theirs**2).sum().backward()
        optimizer.step()

    def descend(rate: Tensor | float) -> Tensor:
        ours = adam(rate)
        learned = {"x": start}
        state = ours.init(learned)
        for _ in range(5):
            slope = torch.func.grad(lambda p: (p["x"] ** 2).sum())(learned)
            updates, state = ours.update(slope, state)
            learned = {"x": learned["x"] + updates["x"]}
        return learned["x"]

    torch.testing.assert_close(descend(0.1), theirs.detach())
    rates = torch.tensor([0.05, 0.1, 0.2])
    torch.testing.assert_close(torch.vmap(descend)(rates), torch.stack([descend(rate) for rate in rates]))


@pytest.mark.parametrize("options", [{"learn": "both"}, {"learn": "scales"}, {"units": "layer", "drop": 0.5}], ids=str)
def test_rates_may_be_mapped_over(options: dict[str, Any]) -> None:
    _, q, params, qparams, data, _ = setting()

    def learned(rate: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        rates = {"optimizer": adam(rate), "scale_optimizer": adam(0.05 * rate)}
        new, better = run(q, params, qparams, data, steps=15, rows=5, **rates, **options)
        return new, {name: entry.scale for name, entry in better.items()}

    rates = torch.tensor([0.02, 0.1, 0.3])
    weights, scales = torch.vmap(learned)(rates)
    for i, rate in enumerate(rates):
        each, each_scales = learned(rate)
        moved = torch.cat([(weights[name][i] - each[name]).abs().flatten() > 1e-3 for name in each])
        # members are summed in another order, which may take an alpha next to 0, or a value next to a tie, either way
        assert moved.float().mean() < 0.02
        torch.testing.assert_close({name: scale[i] for name, scale in scales.items()}, each_scales, rtol=1e-2, atol=0)
    assert not torch.equal(weights["1.one.weight"][0], weights["1.one.weight"][2])


def test_the_regularizer_is_0_where_all_is_decided_and_1_at_one_half() -> None:
    assert float(undecided([torch.tensor([1.0, 0.0]), torch.tensor([1.0])], 2.0)) == 0
    assert float(undecided([torch.full((3,), 0.5)], 20.0)) == 1


def test_soft_weights_start_where_the_weight_is() -> None:
    _, q, params, qparams, _, _ = setting(bits=8)
    weight = next(weight for weight in q.engine.weights if weight.site.quantizer == "1.one.weight_fake_quant")
    rounding = Rounding.of(weight, params, qparams["1.one.weight_fake_quant"])
    soft = rounding.soft(rectified_sigmoid(rounding.start()))
    torch.testing.assert_close(soft, params["1.one.weight"], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_learned_is_refused_by_name() -> None:
    _, q, params, qparams, data, _ = setting(sq.fake_quantize.dorefa())
    with pytest.raises(sq.PlanError, match="weight_fake_quant cannot be learned"):
        run(q, params, qparams, data)


def test_options_out_of_range_are_reported_together() -> None:
    _, q, params, qparams, data, _ = setting()
    with pytest.raises(sq.ConfigError, match=r"(?s)drop.*steps"):
        run(q, params, qparams, data, drop=1.0, steps=0)
    with pytest.raises(sq.ConfigError, match="units of this kind"):
        run(q, params, qparams, data, units="blocks")


def test_options_of_sophgo_mq_are_translated() -> None:
    theirs = {
        "pattern": "layer",
        "max_count": 20000,
        "weight": 0.01,
        "warm_up": 0.2,
        "b_range": [20, 2],
        "prob": 1.0,
        "round_mode": "learned_hard_sigmoid",
        "keep_gpu": True,
    }
    expected = {"units": "layer", "steps": 20000, "warm_up": 0.2, "beta": (20.0, 2.0), "drop": 0.0, "learn": "rounding"}
    assert from_ptq_config(theirs) == expected
    with pytest.raises(sq.ConfigError, match="did you mean 'max_count'"):
        from_ptq_config({"max_counts": 3})
    with pytest.raises(sq.ConfigError, match="'layer' or 'block'"):
        from_ptq_config({"pattern": "net"})
