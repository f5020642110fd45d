"""What every registered chip and strategy obeys, and the table of chips as documented."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import sophq_func as sq
from sophq_func.config.strategies import PLACEMENTS
from sophq_func.testing import plans as laws
from sophq_func.testing.laws import Law
from tests.golden import models

CHIPS = sq.CHIPS.names()
over_chips = pytest.mark.parametrize("chip", CHIPS)
over_models = pytest.mark.parametrize("model", models.INPUT_SHAPES)
STRATEGIES = [name for name in PLACEMENTS if name != "Academic"]  # that of a chip, which its tests go through
MODES = [(s, m) for s in STRATEGIES for m in ("weight_activation", "weight_only") if (s, m) != ("CNN", "weight_only")]
LIMITED = [
    (chip, half)
    for chip in CHIPS
    for half in ("weight", "activation")
    if getattr(sq.CHIPS.get(chip), f"{half}_bits") is not None
]


@functools.cache
def graph_of(model: str) -> sq.Graph:
    return sq.trace(models.build(model, 0).eval(), (torch.zeros(models.INPUT_SHAPES[model]),))


def weights_of(model: str) -> set[str]:
    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    modules = models.build(model, 0).named_modules()
    return {f"{name}.weight_fake_quant" for name, module in modules if isinstance(module, layers)}


@over_chips
@over_models
def test_every_chip_plans_every_net_with_every_valid_strategy(chip: str, model: str) -> None:
    spec, layers = sq.CHIPS.get(chip), weights_of(model)
    # Academic places activations around linear layers and matrix products only
    placed = spec.placement != "Academic" or any(isinstance(m, nn.Linear) for m in models.build(model, 0).modules())
    for strategy, quantmode in MODES:
        if spec.arithmetic is None and sq.strategies.PLACEMENTS.get(strategy).exact:
            continue  # such a config is refused
        plan = sq.plan(graph_of(model), sq.QuantConfig(chip=chip, strategy=strategy, quantmode=quantmode))
        assert {name for name in plan if plan.site(name).role == "weight"} == layers
        assert bool(plan.keys() - layers) == (placed and quantmode == "weight_activation")
        for name, config in plan.items():
            known = {field for field, reason in plan.reasons(name).items() if reason.startswith("strategy")}
            if known - {"observe_only"}:
                continue
            default = spec.weight if name in layers else spec.activation
            granularity = config.scheme.granularity
            assert type(granularity) is type(default.scheme.granularity)
            scheme = replace(config.scheme, granularity=default.scheme.granularity)
            assert replace(config, scheme=scheme, observe_only=False) == default
        assert sq.Plan.from_json(plan.to_json()).digest() == plan.digest()


@over_chips
def test_convolutions_have_no_weight_only_mode(chip: str) -> None:
    with pytest.raises(sq.ConfigError, match="weight_only"):
        sq.QuantConfig(chip=chip, strategy="CNN", quantmode="weight_only")


@over_chips
@pytest.mark.parametrize("law", laws.CHIP_LAWS, ids=lambda law: law.name)
def test_every_chip_obeys_the_laws_of_all(chip: str, law: Law) -> None:
    assert law.broken(chip) == []


@pytest.mark.parametrize("strategy", PLACEMENTS.names())
@pytest.mark.parametrize("law", laws.STRATEGY_LAWS, ids=lambda law: law.name)
def test_every_strategy_obeys_the_laws_of_all(strategy: str, law: Law) -> None:
    assert law.broken(strategy) == []


@pytest.mark.parametrize(("chip", "half"), LIMITED)
def test_bits_outside_the_allowed_ones_are_refused_naming_chip_and_value(chip: str, half: str) -> None:
    allowed = getattr(sq.CHIPS.get(chip), f"{half}_bits")
    for bits in sorted(set(range(2, 17)) - set(allowed)):
        for config in (
            sq.QuantConfig(chip=chip, **{half: sq.override(bits=bits)}),
            sq.QuantConfig(chip=chip, rules=(sq.Rule(name="*", **{half: sq.override(bits=bits)}),)),
        ):
            with pytest.raises(sq.ConfigError, match=rf"{bits} bits: .*{chip}") as caught:
                sq.plan(graph_of("PoolClassifier"), config)
            assert f"allowed {' or '.join(map(str, allowed))}" in str(caught.value)


@over_chips
@pytest.mark.parametrize("half", ["weight", "activation"])
def test_allowed_bits_are_accepted(chip: str, half: str) -> None:
    for bits in getattr(sq.CHIPS.get(chip), f"{half}_bits") or range(2, 17):
        plan = sq.plan(graph_of("PoolClassifier"), sq.QuantConfig(chip=chip, **{half: sq.override(bits=bits)}))
        edges = {8} if chip == "Academic" and half == "activation" else set()
        assert {plan[n].scheme.bits for n in plan if plan.site(n).role == half} == {bits} | edges


def test_an_unknown_chip_is_refused_with_near_matches() -> None:
    with pytest.raises(sq.ConfigError, match="'BM169' is not known, did you mean 'BM1690'"):
        sq.QuantConfig(chip="BM169")


@over_models
def test_sg2260_is_bm1690(model: str) -> None:
    assert sq.CHIPS.get("SG2260") is sq.CHIPS.get("BM1690")
    assert sq.QuantConfig(chip="SG2260") == sq.QuantConfig(chip="BM1690")
    digests = {sq.plan(graph_of(model), sq.QuantConfig(chip=chip)).digest() for chip in ("SG2260", "BM1690")}
    assert len(digests) == 1


NARROW = ("MARS3", "CV183X", "CV182X", "CV181X", "CV180X", "CV186X")
WIDE = ("BM1688", "BM1684X", "BM1690", "Academic")
BITS = {"BM1688": ((4, 8), (4, 8)), "BM1684X": (None, (8,)), "BM1690": (None, (8,))}


@pytest.mark.parametrize("chip", NARROW + WIDE)
def test_defaults_are_those_of_the_documented_table(chip: str) -> None:
    spec = sq.CHIPS.get(chip)
    weight = sq.fake_quantize.e4m3() if chip == "Academic" else sq.fake_quantize.learnable()
    scheme = sq.QScheme(bits=8, symmetric=True, symmetric_range=chip in NARROW, granularity=sq.PerChannel())
    assert spec.weight == sq.QuantizerConfig(scheme=scheme, observer=sq.observers.minmax(), fake_quantize=weight)
    assert (scheme.qmin, scheme.qmax) == ((-127, 127) if chip in NARROW else (-128, 127))
    assert spec.activation == sq.QuantizerConfig(
        scheme=sq.QScheme(bits=8, symmetric=True),
        observer=sq.observers.ema_minmax(decay=0.9),
        fake_quantize=sq.fake_quantize.learnable(),
    )
    assert (spec.weight_bits, spec.activation_bits) == BITS.get(chip, (None, None))
    assert sq.QuantConfig(chip=chip, strategy="CNN").placement == ("Academic" if chip == "Academic" else "CNN")


def test_the_documented_chips_are_all_there() -> None:
    assert set(NARROW + WIDE) <= set(CHIPS)
