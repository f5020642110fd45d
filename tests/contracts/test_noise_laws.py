"""Noise, over everything registered: used as it should be, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sophq_func as sq
from sophq_func.numerics.contracts import FAKE_QUANTIZERS
from tests.contracts import observed

SCHEME = sq.QScheme(bits=4)
SHAPE = (3, 32)
DRAWS = 500

STOCHASTIC = [
    name
    for name in FAKE_QUANTIZERS
    if "rounding" in FAKE_QUANTIZERS.options(name) and name != "adaround"  # whose rounding is soft or hard, and learned
]
over_stochastic = pytest.mark.parametrize("name", STOCHASTIC)


def values() -> Tensor:
    """Numbers from -3/4 to 3/4, with 3/4 in each row.

    It is the largest value of a block that formats of 4 to 8 bits hold exactly with a power of two as scale.
    """
    x = 1.4 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 0.7
    x[:, 0] = 0.75
    return x


def made(name: str, rounding: str | None = "stochastic", x: Tensor | None = None) -> tuple[sq.FakeQuantize, sq.QParams]:
    fq = sq.fake_quantizer(name, **({} if rounding is None else {"rounding": rounding}))
    x = values() if x is None else x
    return fq, fq.init(observed(x, SCHEME), x, SCHEME)


def noise(seed: int = 1) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def inner(x: Tensor) -> Tensor:
    """Elements that lie more than a step of 4 bits within the range."""
    return x.abs() < 0.6


def target(name: str, x: Tensor) -> Tensor:
    """What the rounding alone should have as its mean; DoReFa maps before it rounds."""
    return torch.tanh(x) / torch.tanh(x).abs().max() if name == "dorefa" else x


@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
@pytest.mark.parametrize("given", ["as an argument", "in the qparams"])
def test_noise_that_nobody_uses_is_refused(given: str, name: str) -> None:
    fq, qparams = made(name, rounding=None)
    assert not fq.noise, "by default nothing is random"
    own = {"noise": noise()} if given == "as an argument" else {}
    if not own:
        qparams = qparams._replace(extras={**qparams.extras, "noise": noise()})
    with pytest.raises(sq.StateError, match=rf"{name}\(.*given noise and has no use for it.*Fix: leave the noise out"):
        fq.apply(values(), qparams, SCHEME, **own)


@over_stochastic
def test_it_needs_noise_shaped_like_the_tensor(name: str) -> None:
    fq, qparams = made(name)
    assert fq.noise
    with pytest.raises(sq.StateError, match="needs noise"):
        fq.apply(values(), qparams, SCHEME)
    for bad in (noise()[0], torch.tensor(0.5), noise().T, torch.zeros(SHAPE, dtype=torch.int64)):
        with pytest.raises(sq.StateError, match=r"does not fit.*\(3, 32\)"):
            fq.apply(values(), qparams, SCHEME, noise=bad)


@over_stochastic
def test_an_unknown_rounding_is_refused(name: str) -> None:
    with pytest.raises(sq.ConfigError, match=r"this rounding is not known.*'nearest' or 'stochastic'"):
        sq.fake_quantizer(name, rounding="random")


@over_stochastic
def test_its_mean_is_the_number_itself(name: str) -> None:
    fq, qparams = made(name)
    x = values()
    levels = (torch.arange(DRAWS) + 0.5) / DRAWS  # every number is drawn with every noise
    outs = torch.stack([fq.apply(x, qparams, SCHEME, torch.full(SHAPE, float(u))) for u in levels])
    aim = target(name, x)
    # the share of draws that go up is exact to one of them, and no two neighbours are further apart than 0.25 (or 2 / 15
    # of PACT's range of 12)
    widest = 12 / 15 if name == "pact" else 0.25
    assert float((outs.mean(0) - aim)[inner(aim)].abs().max()) <= 1.05 * widest / DRAWS
    below, above = outs.amin(0), outs.amax(0)
    assert bool(((below <= aim + 1e-6) & (aim <= above + 1e-6))[inner(aim)].all())
    drawn = (outs == below) | (outs == above)
    assert bool(drawn.all()), "one of the two neighbours, and nothing else"


@over_stochastic
def test_values_of_the_grid_stay(name: str) -> None:
    fq, qparams = made(name)
    nearest, _ = made(name, "nearest")
    if name == "dorefa":
        return  # its values are not what it quantizes
    y = nearest.apply(values(), qparams, SCHEME)
    again = nearest.apply(y, qparams, SCHEME)
    # NVFP4 and blocks take their scales from what they get, which is on its grid now
    torch.testing.assert_close(fq.apply(again, qparams, SCHEME, noise=noise()), again, rtol=1e-5, atol=1e-6)


@over_stochastic
def test_its_gradient_is_that_of_rounding_to_the_nearest(name: str) -> None:
    x = 3 * values()  # beyond the grid of an integer, too
    (fq, qparams), (nearest, _) = made(name), made(name, "nearest")
    weight = torch.arange(1.0, x.numel() + 1).reshape(x.shape) / x.numel()
    expected = torch.func.grad(lambda x: (weight * nearest.apply(x, qparams, SCHEME)).sum())(x)
    for seed in (1, 2):
        u = noise(seed)
        found = torch.func.grad(lambda x, u=u: (weight * fq.apply(x, qparams, SCHEME, noise=u)).sum())(x)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@over_stochastic
def test_forward_mode_agrees_with_backward_mode(name: str) -> None:
    fq, qparams = made(name)
    x, u, tangent = 3 * values(), noise(), noise(5) - 0.5

    def f(x: Tensor) -> Tensor:
        return fq.apply(x, qparams, SCHEME, noise=u)

    _, along = torch.func.jvp(f, (x,), (tangent,))
    _, back = torch.func.vjp(f, x)
    torch.testing.assert_close((back(torch.ones(SHAPE))[0] * tangent).sum(), along.sum(), rtol=1e-3, atol=1e-3)


@over_stochastic
def test_a_map_over_noises_is_a_loop(name: str) -> None:
    fq, qparams = made(name)
    x, noises = values(), torch.stack([noise(seed) for seed in range(3)])
    found = torch.vmap(lambda u: fq.apply(x, qparams, SCHEME, noise=u))(noises)
    assert torch.equal(found, torch.stack([fq.apply(x, qparams, SCHEME, noise=u) for u in noises]))


@over_stochastic
def test_each_member_of_a_map_draws_its_own(name: str) -> None:
    fq, qparams = made(name)
    x = values()

    def f(scale: Tensor) -> Tensor:
        return fq.apply(scale * x, qparams, SCHEME, noise=torch.rand(SHAPE))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        outs = torch.vmap(f, randomness="different")(torch.ones(4))
    assert not torch.equal(outs[0], outs[1])
    for out in outs:  # each lies within a step of the others
        assert float((out - outs.mean(0)).abs().max()) <= (12 / 15 if name == "pact" else 0.25)


@over_stochastic
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_keeps_the_dtype(dtype: torch.dtype, name: str) -> None:
    x = values().to(dtype)
    fq, qparams = made(name, x=x)
    assert fq.apply(x, qparams, SCHEME, noise=noise()).dtype == dtype


@over_stochastic
def test_it_has_no_codes(name: str) -> None:
    fq, qparams = made(name)
    assert "at random" in fq.uncoded(qparams, SCHEME)


@pytest.mark.slow
@over_stochastic
def test_compiled_it_is_the_same(name: str) -> None:
    fq, qparams = made(name)
    f: Callable[..., Tensor] = lambda x, u: fq.apply(x, qparams, SCHEME, noise=u)  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values(), noise()), f(values(), noise()))
