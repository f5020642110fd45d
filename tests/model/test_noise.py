"""Noise is an argument: drawn by an explicit generator, the same for the same seed, and missed loudly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from tests.golden.models import ResidualConvNet

DROP = sq.fake_quantize.qdrop(prob=0.5)


def prepared(spec: sq.Spec = DROP) -> tuple[sq.Quantized, dict[str, Tensor], dict[str, sq.QParams], Tensor]:
    model, x = ResidualConvNet().eval(), torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    both = sq.override(fake_quantize=spec)
    q = sq.quantize(model, sq.QuantConfig(weight=both, activation=both), example_args=(x,))
    params = sq.params_of(model)
    return q, params, q.calibrate(params, [x], progress=False), x


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_seed_gives_one_noise_and_another_another() -> None:
    q, params, qparams, x = prepared()
    outs = [q.apply(params, q.with_noise(params, qparams, seeded(seed), x), x) for seed in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_noise_has_the_shape_of_what_is_quantized_and_lies_in_the_unit_interval() -> None:
    q, params, qparams, x = prepared()
    noisy = q.with_noise(params, qparams, seeded(0), x)
    for name, (before, _) in q.capture(params, noisy, x).items():
        noise = noisy[name].extras["noise"]
        assert noise.shape == before.shape
        assert bool(((noise >= 0) & (noise < 1)).all())
    assert "noise" not in qparams["conv4.weight_fake_quant"].extras, "what goes in stays as it is"


def test_noise_is_not_learned() -> None:
    q, params, qparams, x = prepared()
    learnable, rest = q.split(q.with_noise(params, qparams, seeded(0), x))
    assert not any("noise" in name for name in learnable)
    assert any("noise" in name for name in rest)


def test_the_global_random_state_and_the_model_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x, both = torch.randn(3, 4), sq.override(fake_quantize=DROP)
    q = sq.quantize(model, sq.QuantConfig(weight=both, activation=both), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    state = torch.random.get_rng_state()
    q.with_noise(params, qparams, seeded(0), x)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_missing_noise_is_an_error_that_says_where_it_comes_from() -> None:
    q, params, qparams, x = prepared()
    with pytest.raises(sq.StateError, match=r"with_noise"):
        q.apply(params, qparams, x)
    with pytest.raises(sq.StateError, match=r"with_noise.*torch\.Generator"):
        q.with_noise(params, qparams, 0, x)  # type: ignore[arg-type]


def test_quantizers_that_need_none_get_none() -> None:
    q, params, qparams, x = prepared(sq.fake_quantize.qdrop(prob=1.0))
    noisy = q.with_noise(params, qparams, seeded(0), x)
    assert noisy.keys() == qparams.keys()
    assert not any("noise" in own.extras for own in noisy.values())


@pytest.mark.usefixtures("in_float64")
def test_an_ensemble_over_noises_is_one_vmap() -> None:
    q, params, qparams, x = prepared()
    noises = [q.with_noise(params, qparams, seeded(seed), x) for seed in range(3)]
    stacked = torch.utils._pytree.tree_map(lambda *leaves: torch.stack(leaves), *noises)
    outs = torch.vmap(lambda qparams: q.apply(params, qparams, x))(stacked)
    for out, own in zip(outs, noises, strict=True):
        torch.testing.assert_close(out, q.apply(params, own, x))


STOCHASTIC = sq.fake_quantize.fixed(rounding="stochastic")


@pytest.mark.parametrize(
    "spec",
    [STOCHASTIC, sq.fake_quantize.learnable(rounding="stochastic"), sq.fake_quantize.e4m3(rounding="stochastic")],
    ids=lambda spec: spec.name,
)
def test_stochastic_rounding_in_a_model_is_unbiased(spec: sq.Spec) -> None:
    """With a BatchNorm folded in, too: it is the folded weight that is rounded."""
    q, params, qparams, x = prepared(spec)
    weights = [name for name in q.plan if name.endswith("weight_fake_quant")]
    generator = seeded(0)
    draws = [q.capture(params, q.with_noise(params, qparams, generator, x), x) for _ in range(64)]
    for name in weights:
        before = draws[0][name][0]
        mean = torch.stack([one[name][1] for one in draws]).mean(0)
        step = torch.stack([one[name][1] for one in draws]).std(0).max()
        # the outermost code of a symmetric grid is half a step short of the range
        inner = before.abs() < 0.9 * before.abs().amax(tuple(range(1, before.ndim)), keepdim=True)
        # five standard deviations of a mean of 64
        assert float((mean - before)[inner].abs().max()) <= 5 * float(step) / 8
    q_nearest, _, _, _ = prepared(sq.Spec(spec.name, tuple(o for o in spec.options if o[0] != "rounding")))
    exact = q_nearest.apply(params, qparams, x)
    noisy = q.apply(params, q.with_noise(params, qparams, seeded(1), x), x)
    assert not torch.equal(noisy, exact)
    assert float((noisy - exact).norm() / exact.norm()) < 0.5


def test_each_member_of_a_map_may_draw_inside_it() -> None:
    q, params, qparams, x = prepared(STOCHASTIC)
    generator = seeded(0)

    def f(shift: Tensor) -> Tensor:
        return q.apply(params, q.with_noise(params, qparams, generator, x + shift), x + shift)

    outs = torch.vmap(f, randomness="different")(torch.zeros(3))
    assert not torch.equal(outs[0], outs[1])
    same = torch.vmap(f, randomness="same")(torch.zeros(3))
    torch.testing.assert_close(same[0], same[1])


def test_a_step_of_training_through_stochastic_rounding_has_gradients_everywhere() -> None:
    q, params, qparams, x = prepared(sq.fake_quantize.learnable(rounding="stochastic"))
    learnable, rest = q.split(q.with_noise(params, qparams, seeded(0), x))

    def loss(learnable: dict[str, Tensor]) -> Tensor:
        return q.apply(params, sq.merge(learnable, rest), x).square().mean()

    gradient = torch.func.grad(loss)(learnable)
    assert gradient.keys() == learnable.keys()
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in gradient.values())


def test_a_dynamic_scheme_rounds_stochastically_too() -> None:
    model, x = nn.Linear(16, 4).eval(), torch.randn(8, 16, generator=seeded(0))
    value = sq.override(granularity=sq.PerToken(), dynamic=True, fake_quantize=STOCHASTIC)
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=value), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    outs = [q.apply(params, q.with_noise(params, qparams, seeded(seed), x), x) for seed in (0, 1)]
    assert not torch.equal(*outs)


@pytest.mark.parametrize("has_noise", [False, True], ids=["without noise", "with noise"])
def test_what_is_rounded_at_random_does_not_leave(has_noise: bool, tmp_path: Path) -> None:
    """An exit promises the numbers of apply, which differ from draw to draw; the plan with 'nearest' takes the qparams."""
    q, params, qparams, x = prepared(STOCHASTIC)
    given = q.with_noise(params, qparams, seeded(0), x) if has_noise else qparams
    with pytest.raises(sq.StateError, match=r"rounds at random.*rounding='nearest'"):
        sq.convert(q, params, given)
    with pytest.raises(sq.ConfigError, match="rounds at random"):
        sq.export.tables(q, params, given, tmp_path, compiler="sophgo-mq")
    nearest, _, _, _ = prepared(sq.fake_quantize.fixed())
    assert sq.convert(nearest, params, qparams)


def test_leftover_noise_is_refused_by_a_plan_without_use_for_it() -> None:
    q, params, qparams, x = prepared(STOCHASTIC)
    noisy = q.with_noise(params, qparams, seeded(0), x)
    nearest, _, _, _ = prepared(sq.fake_quantize.fixed())
    with pytest.raises(sq.StateError, match="has no use for it"):
        nearest.apply(params, noisy, x)


def test_an_option_that_is_by_keyword_leaves_specs_and_plans_as_they_were() -> None:
    assert sq.fake_quantize.fixed() == sq.fake_quantize.fixed(rounding="nearest") == sq.Spec("fixed")
    assert repr(STOCHASTIC) == "fixed(rounding='stochastic')"
    q, _, _, _ = prepared(STOCHASTIC)
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
