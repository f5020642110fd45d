"""Noise is an argument: drawn by an explicit generator, the same for the same seed, and missed loudly."""

from __future__ import annotations

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
