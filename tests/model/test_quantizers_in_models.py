"""Every fake quantizer inside a model: calibrated, applied, differentiated, written down."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.helpers import with_hessians

NAMES = FAKE_QUANTIZERS.names()
FOR_WEIGHTS = ("adaround", "dorefa")
"""No gradient to the weight; another size of the weight, so that values fall out of ranges that were observed before."""


class Net(nn.Module):
    """A convolution with a BatchNorm, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.second(torch.relu(self.first(x)))


def quantized(name: str) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]:
    model, x = Net().eval(), torch.randn(6, 3, 8, 8)
    spec = FAKE_QUANTIZERS.spec(name, **({"alpha": 0.5} if name == "pact" else {}))
    activation = sq.override() if name in FOR_WEIGHTS else sq.override(fake_quantize=spec)
    q = sq.quantize(model, sq.QuantConfig(weight=sq.override(fake_quantize=spec), activation=activation), example_args=(x,))
    params = sq.params_of(model)
    return q, params, with_hessians(q, params, q.calibrate(params, [x, 2 * x], progress=False)), x


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_calibrated_applied_and_trained(name: str) -> None:
    q, params, qparams, x = quantized(name)
    out = q.apply(params, qparams, x)
    assert out.isfinite().all()
    assert not torch.equal(out, Net()(x))
    learnable, rest = q.split(qparams)
    assert bool(learnable) == bool(sq.fake_quantizer(name).learnable or name in FOR_WEIGHTS)
    assert {key.rpartition(".")[2] for key in learnable} - {"scale"} <= set(sq.fake_quantizer(name).learnable)

    def loss(learnable: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        return q.apply(params | weights, sq.merge(learnable, rest), x).square().mean()

    weights = {key: leaf for key, leaf in params.items() if key.endswith("weight")}
    gradients, over_weights = torch.func.grad(loss, argnums=(0, 1))(learnable, weights)
    assert all(g.isfinite().all() for g in (*gradients.values(), *over_weights.values()))
    assert all(g.any() for g in over_weights.values()) or name in FOR_WEIGHTS
    for field in set(sq.fake_quantizer(name).learnable) - {"zero_point", "n_alpha"}:
        assert any(g.any() for key, g in gradients.items() if key.endswith(f".{field}")), field
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    json.loads(q.plan.to_json())


HESSIANS = ("gptq", "gptqfp4")


@pytest.mark.parametrize("name", HESSIANS)
def test_a_quantizer_without_its_hessian_is_refused_wherever_it_would_act(name: str) -> None:
    """It would be ``fixed``, bit for bit, and nobody would know."""
    spec = FAKE_QUANTIZERS.spec(name)
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).eval(), torch.randn(6, 8)
    rule = sq.Rule(name="0", weight=sq.override(fake_quantize=spec))
    q = sq.quantize(model, sq.QuantConfig(activation=None, rules=(rule,)), example_args=(x,))
    params = sq.params_of(model)
    bare = q.calibrate(params, [x], progress=False)
    says = rf"^0.weight_fake_quant: {name} cannot quantize without extras\['hessian'\]"
    uses = (
        lambda: q.apply(params, bare, x),
        lambda: q.capture(params, bare, x),
        lambda: q.freeze(params, bare),
        lambda: sq.convert(q, params, bare),
        lambda: torch.func.grad(lambda p: q.apply(p, bare, x).sum())(params),
        lambda: torch.vmap(lambda x: q.apply(params, bare, x))(x),
    )
    for use in uses:
        with pytest.raises(sq.StateError, match=says):
            use()
    inputs = torch.randn(50, 8)
    hessian, _ = sq.fake_quantize.hessian_update(torch.zeros(8, 8), 0, inputs)
    own = bare["0.weight_fake_quant"]
    given = bare | {"0.weight_fake_quant": own._replace(extras={"hessian": hessian})}
    scheme = q.plan["0.weight_fake_quant"].scheme
    weight = sq.fake_quantizer(name).apply(params["0.weight"], given["0.weight_fake_quant"], scheme)
    assert torch.equal(q.freeze(params, given)[1]["0.weight"], weight)
    fixed = sq.fake_quantizer("fixed").apply(params["0.weight"], own, scheme)
    assert not torch.equal(weight, fixed)


@pytest.mark.parametrize("name", HESSIANS)
def test_all_that_lack_a_hessian_are_named_and_those_that_only_observe_are_not(name: str) -> None:
    half = sq.override(fake_quantize=FAKE_QUANTIZERS.spec(name))
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).eval(), torch.randn(6, 8)
    config = sq.QuantConfig(weight=half, activation=half, rules=(sq.Rule(name="1.weight_fake_quant", observe_only=True),))
    q = sq.quantize(model, config, example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with pytest.raises(sq.StateError, match="problems:") as caught:
        q.apply(params, qparams, x)
    assert {n for n in q.plan if f"{n}: {name}" in str(caught.value)} == set(q.plan) - {"1.weight_fake_quant"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dorefa", "adaround", "nnie")])
def test_eight_bits_and_more_stay_close_to_the_float_model(name: str) -> None:
    q, params, qparams, x = quantized(name)
    bits = {"fp4": 4, "gptq": 4, "gptqfp4": 4, "mxfp4": 4, "nvfp4": 4, "mxfp6": 6, "fpxgroup": 6}.get(name, 8)
    expected = q.apply(params, qparams, x) if name == "pact" else nn.Module.__call__(_net(params), x)
    error = (q.apply(params, qparams, x) - expected).norm() / expected.norm()
    assert error < {4: 0.5, 6: 0.2, 8: 0.15}[bits]


def _net(params: dict[str, Tensor]) -> Net:
    model = Net().eval()
    model.load_state_dict(params)
    return model


@pytest.mark.parametrize("name", ["pact", "tqt"])
def test_a_bias_is_rounded_by_the_step_in_force_when_the_range_was_learned(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), torch.randn(8, 4)
    spec = FAKE_QUANTIZERS.spec(name)
    config = sq.QuantConfig(chip="BM1690", activation=sq.override(fake_quantize=spec))
    q = sq.quantize(model, config, example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    source = next(site.source for site in map(q.plan.site, q.plan) if site.source)
    own, grid = qparams[source], sq.fake_quantizer(name).grid
    key, moved = {"pact": ("alpha", own.extras.get("alpha", 0) * 1.7), "tqt": ("log2_t", own.extras.get("log2_t", 0) + 1)}[
        name
    ]
    stale = own._replace(extras=own.extras | {key: moved})
    fresh = grid(stale, q.plan[source].scheme)
    assert fresh.scale > 1.5 * stale.scale
    found = q.apply(params, qparams | {source: stale}, x)
    assert torch.equal(found, q.apply(params, qparams | {source: fresh}, x))
    assert not torch.equal(found, q.apply(params, qparams, x))
