"""Many settings of one model, and weights baked once: the same numbers, faster ways.

In float64: faster ways add up in another order, and in float32 a sum near a tie would then have another code.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import sophq_func as sq
from sophq_func.core.pytree import tree_map
from sophq_func.model.sweep import FEWEST, SMALL, Versions, on_host
from tests.golden.models import ResidualConvNet

WAYS = ("auto", "loop", "vmap", pytest.param("compile", marks=pytest.mark.slow))


def prepared(
    chip: str | None = None, training: bool = False
) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, Any], Tensor]:
    torch.manual_seed(0)
    model, x = ResidualConvNet().double().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    q, params = sq.quantize(model, sq.QuantConfig(chip=chip, strategy="CNN"), example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    return (q.train() if training else q), params, qparams, x


def settings_of(q: sq.Quantized, qparams: dict[str, Any]) -> list[dict[str, Any]]:
    return [sq.with_bits(qparams, q.plan, bits) for bits in (2, 4, 8)]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stack"])
def test_a_sweep_is_a_loop_of_apply(how: str, stacked: bool) -> None:
    q, params, qparams, x = prepared()
    each = settings_of(q, qparams)
    torch.compiler.reset()
    found = q.sweep(params, sq.stack(each) if stacked else each, x, how=how, progress=False)
    expected = torch.stack([q.apply(params, setting, x) for setting in each])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad


def test_the_loop_gives_the_bits_of_apply() -> None:
    q, params, qparams, x = prepared("BM1690")
    each = [qparams, sq.enabled(qparams, False), qparams, sq.enabled(qparams, {"*weight*": False})]
    found = q.sweep(params, each, x, how="loop", progress=False)
    for out, setting in zip(found, each, strict=True):
        assert torch.equal(out, q.apply(params, setting, x))


def test_what_is_kept_of_an_output_may_be_any_tree() -> None:
    q, params, qparams, x = prepared()
    each = settings_of(q, qparams)
    found = q.sweep(params, each, (x,), reduce=lambda out: {"norm": out.norm(), "kind": "logits"}, progress=False)
    assert found["norm"].shape == (3,)
    assert found["kind"] == "logits"


def test_a_weight_is_quantized_once_for_settings_that_agree() -> None:
    q, params, qparams, _ = prepared("BM1690")
    names = sorted(qparams)
    settings = [sq.enabled(qparams, mask) for mask in torch.eye(len(names), dtype=torch.bool)]
    versions, changes = Versions(q.engine.acting, params), []
    for setting in settings:
        new = versions(setting, on_host([setting], [w.site.quantizer for w in q.engine.acting], copy=False)[0])
        changes.append({w.site.parameter: new[w.site.parameter] for w in q.engine.acting})
    for parameter in changes[0]:
        assert len({id(step[parameter]) for step in changes}) <= 2


@pytest.mark.parametrize("how", ["auto", "vmap", "loop"])
def test_a_small_model_is_mapped_and_a_model_that_cannot_be_is_looped(how: str) -> None:
    class Moody(nn.Module):
        """Looks at a value, which vmap refuses."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if bool(y.sum() > -1e9) else -y

    model, x = Moody(), torch.randn(2, 4)
    q, params = sq.quantize(model, sq.QuantConfig(), example_args=(x,)), sq.params_of(model)
    assert sum(torch.Size(q.plan.site(name).shape).numel() for name in q.plan) < SMALL
    qparams = q.calibrate(params, [x], progress=False)
    each = settings_of(q, qparams) * 2
    assert len(each) >= FEWEST
    expected = torch.stack([q.apply(params, setting, x) for setting in each])
    if how == "vmap":
        with pytest.raises(RuntimeError, match="vmap"):
            q.sweep(params, each, x, how=how, progress=False)
    elif how == "auto":
        with pytest.warns(RuntimeWarning, match="sweep: settings run one by one"):
            torch.testing.assert_close(q.sweep(params, each, x, progress=False), expected)
    else:
        torch.testing.assert_close(q.sweep(params, each, x, how=how, progress=False), expected)


@pytest.mark.parametrize(
    ("width", "batch", "settings", "mapped"),
    [(8, 2, FEWEST, True), (8, 2, FEWEST - 1, False), (8, SMALL, FEWEST, False)],
    ids=["small", "few", "large"],
)
def test_the_way_depends_on_sizes_alone(
    width: int, batch: int, settings: int, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Linear(width, width), torch.randn(batch, width)
    q, params = sq.quantize(model, sq.QuantConfig(), example_args=(x,)), sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    calls = []
    monkeypatch.setattr(torch, "vmap", lambda f, vmap=torch.vmap: (calls.append(f), vmap(f))[1])
    q.sweep(params, [qparams] * settings, x, progress=False)
    assert bool(calls) == mapped


def test_settings_that_cannot_be_stacked_are_looped() -> None:
    q, params, qparams, x = prepared()
    each = [qparams, sq.enabled(qparams, False)] * FEWEST
    found = q.sweep(params, each, x, progress=False)
    assert torch.equal(found[1], q.apply(params, each[1], x))
    with pytest.raises(sq.StateError, match="settings differ"):
        q.sweep(params, each, x, how="vmap", progress=False)


@pytest.mark.parametrize(
    ("settings", "how", "message"),
    [
        ([], "auto", "no settings to run"),
        (None, "fast", "'fast'"),
        ([{}], "loop", "not calibrated"),
        ([{}], "vmap", "not calibrated"),
    ],
)
def test_bad_sweeps_are_refused(settings: Any, how: str, message: str) -> None:
    q, params, qparams, x = prepared()
    with pytest.raises(sq.StateError, match=message):
        q.sweep(params, [qparams] if settings is None else settings, x, how=how, progress=False)


@pytest.mark.parametrize("chip", [None, "BM1690", "BM1688", "Academic"])
def test_frozen_outputs_are_the_same_bits(chip: str | None) -> None:
    q, params, qparams, x = prepared(chip)
    before = tree_map(torch.Tensor.clone, params)
    frozen, baked = q.freeze(params, qparams)
    assert torch.equal(frozen.apply(baked, qparams, x), q.apply(params, qparams, x))
    assert all(torch.equal(params[name], before[name]) for name in params)
    assert list(baked) == sorted(params)
    assert any(not torch.equal(baked[name], params[name]) for name in params)
    again, twice = frozen.freeze(baked, qparams)
    assert torch.equal(again.apply(twice, qparams, x), frozen.apply(baked, qparams, x))


def test_frozen_models_copy_and_say_what_they_are() -> None:
    q, params, qparams, x = prepared()
    frozen, baked = q.freeze(params, qparams)
    assert "frozen=True" in repr(frozen)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.eval()):
        assert other.frozen
        assert torch.equal(other.apply(baked, qparams, x), frozen.apply(baked, qparams, x))
    learnable, _ = frozen.split(qparams)
    assert not any("weight_fake_quant" in name for name in learnable)


def test_frozen_models_map_and_have_gradients_of_activation_scales() -> None:
    q, params, qparams, x = prepared()
    frozen, baked = q.freeze(params, qparams)
    learnable, rest = frozen.split(qparams)
    gradient = torch.func.grad(lambda scales: frozen.apply(baked, sq.merge(scales, rest), x).square().sum())(learnable)
    assert any(bool(g != 0) for g in gradient.values() if g.ndim == 0)
    mapped = vmap(lambda x: frozen.apply(baked, qparams, x[None]))(x)
    torch.testing.assert_close(mapped[:, 0], frozen.apply(baked, qparams, x), rtol=1e-5, atol=1e-5)


def test_training_and_freezing_exclude_each_other() -> None:
    q, params, qparams, _ = prepared(training=True)
    with pytest.raises(sq.StateError, match=r"q\.eval\(\)\.freeze"):
        q.freeze(params, qparams)
    with pytest.raises(sq.StateError, match="frozen"):
        q.eval().freeze(params, qparams)[0].train()
