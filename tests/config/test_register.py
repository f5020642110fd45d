"""A user's own pieces, registered by public names alone: in configs, errors, plans and checkpoints like the library's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq

pytestmark = pytest.mark.usefixtures("scratch_registries")


def margin(share: float = 1.0) -> sq.Observer:
    """The range from the smallest to the largest value, times ``share``."""
    whole = sq.observer("minmax")

    def qparams(state: Any, scheme: sq.QScheme) -> sq.QParams:
        lo, hi = share * state.lo, share * state.hi
        return sq.numerics.ranges.range_to_qparams(lo, hi, scheme)

    return whole._replace(qparams=qparams)


def floor() -> sq.FakeQuantize:
    """Rounds down on the grid of the scheme, with the gradient of the identity."""

    def apply(x: Tensor, qparams: sq.QParams, scheme: sq.QScheme, noise: Tensor | None = None) -> Tensor:
        code = (x / qparams.scale).floor().clamp(scheme.qmin, scheme.qmax)
        return x + (code * qparams.scale - x).detach()

    return sq.FakeQuantize(sq.fake_quantizer("fixed").init, apply)


def quantized(config: sq.QuantConfig) -> tuple[sq.Quantized, dict[str, Tensor], Tensor]:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)), torch.randn(16, 8)
    return sq.quantize(model, config, example_args=(x,)), sq.params_of(model), x


def test_an_observer_and_a_fake_quantizer_are_used_by_name(tmp_path: Path) -> None:
    spec = sq.register.observer("margin", "MarginObserver", ratio="share")(margin)
    sq.register.fake_quantizer("floor")(floor)
    assert spec(share=2.0) == sq.observers.margin(2.0) == sq.observers.MarginObserver(ratio=2.0)
    assert "margin" in dir(sq.observers) and "floor" in dir(sq.fake_quantize)
    assert pickle.loads(pickle.dumps(spec(2.0))) == spec(2.0)
    half = sq.override(observer=spec(2.0), fake_quantize="FLOOR", granularity="per_tensor")
    q, params, x = quantized(sq.QuantConfig(weight=half, activation=sq.override(observer="margin")))
    assert q.plan["0.weight_fake_quant"].observer == spec(2.0)
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    qparams = q.calibrate(params, [x], progress=False)
    torch.testing.assert_close(qparams["0.weight_fake_quant"].scale, 2 * params["0.weight"].abs().max() / 127.5)
    ostate = q.init(params)
    sq.save(tmp_path / "a.safetensors", plan=q.plan, qparams=qparams, ostate=ostate)
    checkpoint = sq.load(tmp_path / "a.safetensors").check(q)
    assert torch.equal(q.apply(params, checkpoint.qparams, x), q.apply(params, qparams, x))


def test_its_name_is_suggested() -> None:
    sq.register.observer("margin")(margin)
    with pytest.raises(sq.ConfigError, match="observer 'margn' is not known, did you mean 'margin'"):
        sq.override(observer="margn")
    with pytest.raises(sq.ConfigError, match=r"option 'shar' is not known, did you mean 'share'"):
        sq.observers.margin(shar=1.0)


def test_a_format_is_a_fake_quantizer() -> None:
    e3m4 = sq.register.format("e3m4", sq.formats.float_(3, 4))
    assert e3m4() == sq.fake_quantize.e3m4() and e3m4(rounding="stochastic").options == (("rounding", "stochastic"),)
    q, params, x = quantized(sq.QuantConfig(weight=sq.override(fake_quantize="e3m4"), activation=None))
    qparams = q.calibrate(params, [x], progress=False)
    form, scale = sq.formats.float_(3, 4), qparams["0.weight_fake_quant"].scale[:, None]
    expected = form.round(params["0.weight"] / scale) * scale
    assert torch.equal(dict(q.weights_seen(params))["0.weight_fake_quant"][0], params["0.weight"])
    found = q.quantize_value("0.weight_fake_quant", params["0.weight"], qparams["0.weight_fake_quant"])
    torch.testing.assert_close(found, expected)
    wide = sq.register.format("wide", sq.formats.float_(5, 10))
    assert sq.fake_quantizer(wide().name).encode is None


def test_a_format_of_your_own() -> None:
    class Powers:
        """0 and powers of two on either side."""

        largest = 8.0

        def values(self) -> Tensor:
            positive = 2.0 ** torch.arange(-2, 4, dtype=torch.float64)
            return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])

        def round(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
            return codebook.round(x, noise)

    # once: torch before 2.10 has no numbers of a tensor that is made inside of a transform
    codebook = sq.formats.codebook(Powers().values().tolist())

    sq.testing.check_format(Powers())
    sq.register.format("powers", Powers())
    sq.testing.check_format("Powers")
    sq.testing.check_fake_quantizer("powers")


def test_a_chip_has_defaults_and_limits() -> None:
    known = sq.CHIPS.get("BM1690")
    chip = sq.ChipSpec(
        weight=known.weight, activation=known.activation, weight_bits=(8,), fake_quantizers=("fixed", "learnable")
    )
    assert sq.register.chip("Own", chip, "OwnLite") is chip
    config = sq.QuantConfig(chip=chip)
    assert config == sq.QuantConfig(chip="own") == sq.QuantConfig(chip="OwnLite") and config.chip == "Own"
    with pytest.raises(sq.ConfigError, match=r"4 bits: .*Own"):
        quantized(sq.QuantConfig(chip="Own", weight=sq.override(bits=4)))
    quant_dict = {"chip": "Own", "quantmode": "weight_activation", "strategy": "CNN"}
    assert sq.from_dicts({"quant_dict": quant_dict}).spec is chip
    sq.testing.check_chip("Own")


def test_a_strategy_places_quantizers() -> None:
    def place(graph: sq.Graph, requests: sq.strategies.Requests) -> sq.strategies.Placement:
        inputs = [node.operands[0].value for node in graph if node.is_module(nn.Linear)]
        return sq.strategies.Placement(dict.fromkeys(inputs, "strategy Inputs: a linear layer reads it"))

    own = sq.register.strategy("Inputs", sq.strategies.Strategy(place, weights=(nn.Linear,)))
    q, _, _ = quantized(sq.QuantConfig(strategy=own))
    assert "strategy Inputs" in q.plan.explain("input.post_act_fake_quantizer")
    assert len(q.plan) == 4


def test_a_pattern_is_fused_from_then_on() -> None:
    own = sq.register.pattern("LinearGELU", nn.Linear, nn.GELU)
    q, _, _ = quantized(sq.QuantConfig(rules=(sq.Rule(type=own, activation=sq.override(bits=4)),)))
    bits = {name: config.scheme.bits for name, config in q.plan.items() if q.plan.site(name).pattern == "LinearGELU"}
    assert 4 in bits.values() and sq.patterns.LinearGELU is own


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a name that is taken": (lambda: sq.register.observer("MINMAX"), "registered already"),
    "an alias that is taken": (lambda: sq.register.observer("new", "mse"), "registered already"),
    "what makes no observer": (lambda: sq.register.observer("new")(floor), "makes no Observer"),
    "no function": (lambda: sq.register.fake_quantizer("new")(3), "registered with no function"),
    "no format": (lambda: sq.register.format("new", 3), "is no format"),
    "no chip": (lambda: sq.register.chip("new", sq.QuantConfig()), "is no ChipSpec"),
    "no strategy": (lambda: sq.register.strategy("new", place_nothing), "is no Strategy"),
    "a pattern of one": (lambda: sq.register.pattern("One", nn.Linear), "these parts are no pattern"),
    "a pattern that is there": (lambda: sq.register.pattern("LinearReLU", nn.Linear, nn.ReLU), "cannot name a new pattern"),
}


def place_nothing(graph: sq.Graph, requests: sq.strategies.Requests) -> sq.strategies.Placement:
    return sq.strategies.Placement({})


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_registered_is_refused_and_adds_nothing(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(sq.ConfigError, match=words):
        call()
    for registry in (sq.numerics.contracts.OBSERVERS, sq.numerics.contracts.FAKE_QUANTIZERS, sq.CHIPS):
        assert "new" not in registry
