"""Bit widths and switches as data: what they mean, how they compose, and what is refused.

In float64: mapped and alone, sums have another order, and in float32 one near a tie would have another code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, vmap

import sophq_func as sq
from sophq_func.core.pytree import leaves, tree_map
from sophq_func.numerics.contracts import FAKE_QUANTIZERS, OBSERVERS

RESIZABLE = [name for name in FAKE_QUANTIZERS.names() if FAKE_QUANTIZERS.build(FAKE_QUANTIZERS.spec(name)).resizable]
WEIGHTS, ALL = "*weight_fake_quant", "*"


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
    model = nn.Sequential(*layers)
    for _ in range(3):
        model(torch.randn(8, 3, 6, 6))
    return model.double().eval()


def config(bits: int = 8, symmetric: bool = True, fake: str = "learnable", **changes: Any) -> sq.QuantConfig:
    half = sq.override(
        bits=bits, symmetric=symmetric, observer=sq.observers.minmax(), fake_quantize=FAKE_QUANTIZERS.spec(fake)
    )
    return sq.QuantConfig(strategy="CNN", weight=half, activation=half, **changes)


def ready(
    model: nn.Module, settings: sq.QuantConfig
) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, params = sq.quantize(model, settings, example_args=(x,)), sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False), x


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("fake", RESIZABLE)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_other_bits_are_what_calibration_at_those_bits_gives(fake: str, bits: int, symmetric: bool) -> None:
    model = network()
    wide, params, qparams, x = ready(model, config(8, symmetric, fake))
    narrow, _, expected, _ = ready(model, config(bits, symmetric, fake))
    found = sq.with_bits(qparams, wide.plan, bits)
    for name, own in expected.items():
        torch.testing.assert_close(found[name].scale, own.scale, rtol=2e-6 if symmetric else 8e-3, atol=0)
        assert bool(((found[name].zero_point - own.zero_point).abs() <= (0 if symmetric else 1)).all())
    if symmetric:
        same = {n: own._replace(scale=expected[n].scale) for n, own in found.items()}
        torch.testing.assert_close(wide.apply(params, same, x), narrow.apply(params, expected, x), rtol=1e-5, atol=1e-5)


@given(st.integers(1, 16), st.integers(1, 16), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_width_replaces_a_width(first: int, second: int, symmetric: bool, narrow: bool) -> None:
    scheme = sq.QScheme(bits=8, symmetric=symmetric, symmetric_range=narrow and symmetric)
    if narrow and min(first, second) == 1:
        return  # one code is no grid
    q = sq.quantize(nn.Linear(3, 2), sq.QuantConfig(weight=sq.override(scheme=scheme)), example_args=(torch.randn(2, 3),))
    qp = {"weight_fake_quant": sq.QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), {})}
    twice = sq.with_bits(sq.with_bits(qp, q.plan, first), q.plan, second)
    once = sq.with_bits(qp, q.plan, second)
    torch.testing.assert_close(twice["weight_fake_quant"], once["weight_fake_quant"], rtol=1e-5, atol=0)


def test_the_bounds_are_those_of_the_width() -> None:
    q, _, qparams, _ = ready(network(), config())
    for name, own in sq.with_bits(qparams, q.plan, 3).items():
        expected = replace(q.plan[name].scheme, bits=3)
        assert (own.extras["qmin"], own.extras["qmax"]) == (expected.qmin, expected.qmax)
        assert own.scale.shape == qparams[name].scale.shape


def test_bits_map_like_a_loop() -> None:
    q, params, qparams, x = ready(network(), config())
    widths = torch.tensor([2.0, 4.0, 8.0])
    mapped = vmap(lambda b: q.apply(params, sq.with_bits(qparams, q.plan, b), x))(widths)
    for bits, out in zip(widths, mapped, strict=True):
        torch.testing.assert_close(out, q.apply(params, sq.with_bits(qparams, q.plan, bits), x), rtol=1e-5, atol=1e-5)


def test_bits_by_channel() -> None:
    q, params, qparams, x = ready(network(), config())
    name = "0.weight_fake_quant"
    bits = torch.tensor([2.0, 3, 4, 5, 6, 8])
    found = sq.with_bits(qparams, q.plan, {name: bits})[name]
    assert found.extras["qmax"].tolist() == [1, 3, 7, 15, 31, 127]
    assert q.apply(params, {**qparams, name: found}, x).isfinite().all()


@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_the_gradient_of_bits_is_that_of_the_surrogate(bits: float) -> None:
    """By differences of the surrogate: codes inside are constants plus ``x / s``, codes beyond are the moving bound."""
    scheme = sq.QScheme(bits=8)
    q = sq.quantize(
        nn.Linear(64, 1, bias=False),
        sq.QuantConfig(weight=sq.override(scheme=scheme, fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False))),
        example_args=(torch.randn(2, 64),),
    )
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    amax = torch.tensor(1.5, dtype=torch.float64)  # clips
    weight = torch.arange(1, 65, dtype=torch.float64) / 64
    qp = {"weight_fake_quant": sq.QParams(amax / 127.5, torch.tensor(0, dtype=torch.int32), {})}
    fq = sq.fake_quantizer("learnable", use_grad_scaling=False)

    def out(b: Tensor) -> Tensor:
        return (weight * fq.apply(x, sq.with_bits(qp, q.plan, b)["weight_fake_quant"], scheme)).sum()

    at = torch.tensor(bits, dtype=torch.float64)
    half = 2 ** (at - 1)
    s0 = amax / ((2 * half - 1) / 2)
    code = (x / s0).round()
    inside = (code >= -half) & (code <= half - 1)
    constant = code - x / s0

    def surrogate(b: Tensor) -> Tensor:
        half = 2 ** (b - 1)
        s = amax / ((2 * half - 1) / 2)
        beyond = torch.where(code > 0, half - 1, -half)
        return (weight * s * torch.where(inside, x / s + constant, beyond)).sum()

    assert not bool(inside.all())
    torch.testing.assert_close(out(at), surrogate(at), rtol=1e-12, atol=0)
    difference = (surrogate(at + 1e-6) - surrogate(at - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(out)(at), difference, rtol=1e-6, atol=1e-8)


def test_nothing_of_the_input_changes() -> None:
    q, _, qparams, _ = ready(network(), config())
    before = tree_map(torch.Tensor.clone, qparams)
    sq.with_bits(qparams, q.plan, {WEIGHTS: 3})
    sq.enabled(qparams, {ALL: False})
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(qparams), strict=True))
    assert not any(own.extras for own in qparams.values())


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("off", [False, torch.tensor(0.0), torch.tensor(False)], ids=["bool", "float", "tensor"])
def test_everything_off_is_the_float_model(norm: bool, off: Any) -> None:
    model = network(norm)
    q, params, qparams, x = ready(model, config(4))
    assert torch.equal(q.apply(params, sq.enabled(qparams, off), x), model(x))


def test_everything_on_changes_no_bit() -> None:
    q, params, qparams, x = ready(network(), config(4))
    expected = q.apply(params, qparams, x)
    for on in (True, torch.tensor(1.0), torch.ones(len(qparams))):
        assert torch.equal(q.apply(params, sq.enabled(qparams, on), x), expected)


def test_one_quantizer_alone_equals_a_plan_with_it_alone() -> None:
    model = network()
    q, params, qparams, x = ready(model, config(4))
    names = sorted(qparams)
    outputs = vmap(lambda mask: q.apply(params, sq.enabled(qparams, mask), x))(torch.eye(len(names)))
    for name, out in zip(names, outputs, strict=True):
        others = [sq.Rule(name=other, observe_only=True) for other in names if other != name]
        alone = sq.quantize(model, config(4, rules=tuple(others)), example_args=(x,))
        torch.testing.assert_close(out, alone.apply(params, qparams, x), rtol=1e-5, atol=1e-5)


def test_a_floating_mask_fades_in_and_has_a_gradient() -> None:
    q, params, qparams, x = ready(network(), config(3))
    name = "4.weight_fake_quant"

    def loss(mask: Tensor) -> Tensor:
        masks = {ALL: False, name: mask}
        return q.apply(params, sq.enabled(qparams, masks), x).square().sum()

    at = torch.tensor(0.25, dtype=torch.float64)
    difference = (loss(at + 1e-2) - loss(at - 1e-2)) / 2e-2
    torch.testing.assert_close(grad(loss)(at), difference, rtol=2e-3, atol=1e-3)
    assert grad(loss)(at) != 0


def test_settings_stack_and_come_apart() -> None:
    q, params, qparams, x = ready(network(), config())
    several = [sq.with_bits(qparams, q.plan, bits) for bits in (2, 4, 8)]
    batch = sq.stack(several)
    assert list(batch) == sorted(qparams)
    outputs = vmap(lambda setting: q.apply(params, setting, x))(batch)
    for out, one, again in zip(outputs, several, sq.unstack(batch), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(again), strict=True))
        torch.testing.assert_close(out, q.apply(params, one, x), rtol=1e-5, atol=1e-5)
    assert sq.unstack({}) == []


@pytest.mark.slow
def test_new_data_is_not_compiled_again() -> None:
    q, params, qparams, x = ready(network(), config())
    torch.compiler.reset()
    count = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    run = torch.compile(lambda setting: q.apply(params, setting, x), fullgraph=True, backend=backend)
    for bits, on in ((8, True), (4, True), (2, False)):
        setting = sq.enabled(sq.with_bits(qparams, q.plan, bits), torch.tensor(on))
        torch.testing.assert_close(run(setting), q.apply(params, setting, x), rtol=1e-5, atol=1e-5)
    assert count == 1


@pytest.mark.parametrize("name", [name for name in FAKE_QUANTIZERS.names() if name not in RESIZABLE])
def test_codes_without_a_width_are_refused(name: str) -> None:
    weight = sq.override(fake_quantize=FAKE_QUANTIZERS.spec(name))
    q = sq.quantize(nn.Linear(32, 32), sq.QuantConfig(weight=weight, activation=None), example_args=(torch.randn(2, 32),))
    qp = {"weight_fake_quant": sq.QParams(torch.tensor(0.1), torch.tensor(0), {})}
    with pytest.raises(sq.ConfigError, match="weight_fake_quant"):
        sq.with_bits(qp, q.plan, 4)


@pytest.mark.parametrize("bits", [0, 17, "8", True, None, torch.tensor(40.0), float("nan")])
def test_widths_out_of_bounds_are_refused(bits: Any) -> None:
    q, _, qparams, _ = ready(network(), config())
    with pytest.raises(sq.ConfigError, match="from 1 to 16"):
        sq.with_bits(qparams, q.plan, bits)


@pytest.mark.parametrize("name", ["0.weight_fake", "nothing*", 3])
def test_names_that_fit_nothing_are_refused(name: Any) -> None:
    q, _, qparams, _ = ready(network(), config())
    with pytest.raises(sq.ConfigError, match="with_bits"):
        sq.with_bits(qparams, q.plan, {name: 4})
    with pytest.raises(sq.ConfigError, match="enabled"):
        sq.enabled(qparams, {name: False})


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(3, 3), {ALL: torch.ones(2)}, torch.tensor(1), "no"])
def test_masks_of_another_kind_are_refused(mask: Any) -> None:
    _, _, qparams, _ = ready(network(), config())
    with pytest.raises(sq.ConfigError, match="enabled"):
        sq.enabled(qparams, mask)


def test_settings_that_differ_do_not_stack() -> None:
    q, _, qparams, _ = ready(network(), config())
    with pytest.raises(sq.StateError, match=r"0\.weight_fake_quant\.qmax"):
        sq.stack([qparams, sq.with_bits(qparams, q.plan, 4)])
    with pytest.raises(sq.StateError, match="nothing"):
        sq.stack([])
    with pytest.raises(sq.StateError, match="stack: these are no qparams: got 'a dict of int'"):
        sq.stack([{"a": 1}])  # type: ignore[dict-item]


def test_every_observer_gives_a_range_that_can_be_resized() -> None:
    model = network()
    for name in OBSERVERS.names():
        half = sq.override(observer=OBSERVERS.spec(name))
        q, params, qparams, x = ready(model, replace(config(), weight=half, activation=half))
        assert q.apply(params, sq.with_bits(qparams, q.plan, 4), x).isfinite().all()


def test_several_widths_at_once_are_told_of_stack() -> None:
    model, x = torch.nn.Linear(3, 4).eval(), torch.randn(6, 3)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    qparams = q.calibrate(sq.params_of(model), [x], progress=False)
    with pytest.raises(sq.ConfigError, match=r"got \[2, 4\].*Fix: sq.stack\("):
        sq.with_bits(qparams, q.plan, [2, 4])  # type: ignore[arg-type]


def test_widths_for_qparams_of_another_plan_are_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(1, 4)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    qparams = q.calibrate(sq.params_of(model), [x], progress=False)
    foreign = {f"module.{name}": entry for name, entry in qparams.items()}
    with pytest.raises(sq.ConfigError, match=r"the plan has none of these quantizers.*did you mean"):
        sq.with_bits(foreign, q.plan, 4)
    part = {name: entry for name, entry in qparams.items() if name.startswith("0.")}
    assert sq.with_bits(part, q.plan, 4).keys() == part.keys()
    assert sq.with_bits(qparams, q.part("0").plan, 4).keys() == qparams.keys()


def test_the_path_of_a_module_is_answered_with_a_glob() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.ones(1, 4)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    qparams = q.calibrate(sq.params_of(model), [x], progress=False)
    with pytest.raises(sq.ConfigError, match=r"'0' fits no quantizer. Fix: '0\.\*', which fits 0\.weight_fake_quant"):
        sq.with_bits(qparams, q.plan, {"0": 4})
