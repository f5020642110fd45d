"""What every registered observer obeys, on every granularity and kind of scheme."""

from __future__ import annotations

import functools
import math
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

import sophq_func as sq
from sophq_func.numerics.contracts import OBSERVERS
from tests.contracts import (
    COARSE,
    SCHEMES,
    SHAPE,
    assert_same,
    compiled,
    hold,
    over_granularities,
    over_schemes,
    pick,
    sample,
    stack,
    unchanged,
)

over_observers = pytest.mark.parametrize("name", OBSERVERS.names())
SUMS = ("rms",)
"""Observers whose statistic is a sum of floats, which is associative up to rounding."""

UNCLAMPED = ("lsq",)
"""Observers whose zero point may lie beyond the grid, as recorded; a fake quantizer clamps it."""

CONSTANT = ("fixed_range",)
"""Observers whose range does not depend on the values."""

POWERS = ("minmax_floor", "pot_mode")
"""Observers whose step starts at 1 where the grid has no code for the values at all."""

CLIPS = ("kld", "percentile")
"""Observers that may leave out a share of the values, and so what a heavy tail is made of."""

KEEPS_LESS = ("clip_std", "fixed_range", "lsq", "lsq_plus", "rms")
"""Observers that do not look at the extremes by definition."""

ONE_BIT = 20 * math.log10(2)
"""In decibels. The law below allows an observer to lose as much as a grid with half as many codes."""

EXTREMES = {
    "constant": (torch.float32, 1.5),
    "negative": (torch.float32, -1.5),
    "zero": (torch.float32, 0.0),
    "tiny": (torch.float32, 1e-38, -1e-38),
    "huge": (torch.float32, 3e38),
    "huge both ways": (torch.float32, 3e38, -3e38),
    "half tiny": (torch.float16, 6e-8, -6e-8),
    "half huge": (torch.float16, 65504.0, -65504.0),
    "bfloat16 huge": (torch.bfloat16, 3e38, -3e38),
}


NOT_FINITE = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}

OF_EVERY_GRANULARITY = {name: scheme for name, scheme in SCHEMES.items() if name.startswith("affine-")}
"""Which scales such a value reaches is a question of granularity; the kinds of schemes are tried with one granularity."""


def after(observer: sq.Observer, scheme: sq.QScheme, *batches: Tensor) -> Any:
    state = observer.init(batches[0], scheme)
    for x in batches:
        state = observer.update(state, x, scheme)
    return state


@functools.cache
def seen(name: str, scheme: sq.QScheme, *seeds: int) -> Any:
    """The state after some samples; shared between tests, which is safe as long as nothing writes to a state."""
    return after(sq.observer(name), scheme, *map(sample, seeds))


def merges(observer: sq.Observer, state: Any) -> bool:
    try:
        observer.merge(state, state)
    except sq.StateError:
        return False
    return True


@over_observers
@over_schemes
def test_inputs_stay_as_they_are(name: str, scheme: sq.QScheme) -> None:
    observer, x, state = sq.observer(name), sample(1), seen(name, scheme, 0)
    with unchanged(x, state):
        observer.init(x, scheme)
        observer.update(state, x, scheme)
        observer.qparams(state, scheme)
        if merges(observer, state):
            observer.merge(state, observer.init(x, scheme))


@over_observers
@over_schemes
def test_equal_inputs_give_equal_bits(name: str, scheme: sq.QScheme) -> None:
    assert_same(after(sq.observer(name), scheme, sample(0)), seen(name, scheme, 0))


@over_observers
@over_granularities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_shapes_and_dtypes_of_a_state_are_stable(name: str, scheme: sq.QScheme, dtype: torch.dtype) -> None:
    observer = sq.observer(name)
    first = observer.init(sample(0, dtype=dtype), scheme)
    last = after(observer, scheme, sample(0, dtype=dtype), sample(1, dtype=dtype))
    assert type(first) is type(last)
    for before, now in zip(first, last, strict=True):
        assert (before.shape, before.dtype, before.device) == (now.shape, now.dtype, now.device)
        assert now.dtype == torch.float32 or not now.is_floating_point()


@over_observers
@over_granularities
def test_init_does_not_look_at_values(name: str, scheme: sq.QScheme) -> None:
    observer = sq.observer(name)
    assert_same(observer.init(sample(0), scheme), observer.init(torch.full(SHAPE, torch.nan), scheme))


@over_observers
@over_granularities
def test_no_gradient_flows_into_statistics(name: str, scheme: sq.QScheme) -> None:
    state = after(sq.observer(name), scheme, sample(0).requires_grad_())
    assert_same(state, seen(name, scheme, 0))
    assert not any(leaf.requires_grad for leaf in state)


@over_observers
@over_schemes
def test_qparams_have_the_shape_of_the_granularity(name: str, scheme: sq.QScheme) -> None:
    observer = sq.observer(name)
    scale, zero_point, extras = observer.qparams(seen(name, scheme, 0), scheme)
    expected = {sq.PerTensor(): (), sq.PerChannel(0): (3,), sq.PerChannel(1): (4,), sq.PerGroup(0, 4): (3, 2)}
    expected |= {sq.PerBlock(3, 2): (1, 4), sq.PerToken(): (3, 4)}
    assert scale.shape == zero_point.shape == expected[scheme.granularity]
    assert (scale.dtype, zero_point.dtype, list(extras)) == (torch.float32, torch.int32, sorted(extras))
    if name in UNCLAMPED and not scheme.symmetric:
        expected_zero = scheme.qmin - torch.round(seen(name, scheme, 0).lo / scale)
        assert torch.equal(zero_point, expected_zero.to(torch.int32))
    else:
        assert bool(((zero_point >= scheme.qmin) & (zero_point <= scheme.qmax)).all())


@over_observers
@over_schemes
def test_vmap_equals_the_loop(name: str, scheme: sq.QScheme) -> None:
    observer, xs = sq.observer(name), torch.stack([sample(2), sample(3)])
    fresh = torch.vmap(lambda x: observer.init(x, scheme))(xs)
    states = stack([seen(name, scheme, 0), seen(name, scheme, 1)])
    states = torch.vmap(lambda s, x: observer.update(s, x, scheme))(states, xs)
    qparams = torch.vmap(lambda s: observer.qparams(s, scheme))(states)
    for i in range(2):
        expected = seen(name, scheme, i, 2 + i)
        assert_same(pick(fresh, i), observer.init(xs[i], scheme))
        assert_same(pick(states, i), expected, rtol=1e-6, atol=0.0)  # sums may be taken in another order
        assert_same(pick(qparams, i), observer.qparams(expected, scheme), rtol=1e-6, atol=0.0)


@over_observers
@over_granularities
def test_both_tree_libraries_read_states_and_qparams_alike(name: str, scheme: sq.QScheme) -> None:
    observer, state = sq.observer(name), seen(name, scheme, 0)
    for tree in (state, observer.qparams(state, scheme)):
        ours, spec = _pytree.tree_flatten(tree)
        theirs, treedef = optree.tree_flatten(tree)
        assert [id(leaf) for leaf in ours] == [id(leaf) for leaf in theirs]
        assert all(isinstance(leaf, Tensor) for leaf in ours)
        for back in (_pytree.tree_unflatten(ours, spec), optree.tree_unflatten(treedef, theirs)):
            assert_same(back, tree)


@over_observers
@over_granularities
@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0,)], ids=str)
def test_an_empty_tensor_leaves_the_state_as_it_is(name: str, scheme: sq.QScheme, shape: tuple[int, ...]) -> None:
    if len(shape) == 1 and scheme.granularity == sq.PerChannel(1):
        shape = (3, 0)
    observer = sq.observer(name)
    for state in (observer.init(sample(0), scheme), seen(name, scheme, 0)):
        assert_same(observer.update(state, torch.empty(shape), scheme), state)


@over_observers
def test_extreme_values_give_a_finite_positive_scale(name: str) -> None:
    observer = sq.observer(name)

    def law(scheme: sq.QScheme, values: tuple[Any, ...]) -> None:
        dtype, *numbers = values
        x = torch.tensor(numbers, dtype=dtype).repeat(24 // len(numbers)).reshape(SHAPE)
        scale = observer.qparams(after(observer, scheme, x), scheme).scale
        assert bool((torch.isfinite(scale) & (scale > 0)).all())

    hold(law, COARSE, EXTREMES)


@functools.cache
def distributions() -> dict[str, Tensor]:
    """Tensors as networks have them, of 20,000 values each.

    One-sided, two-sided, with one value that is frequent, and with a heavy tail. So many that ``kld`` may clip at 8 bits.
    """
    draw = torch.Generator().manual_seed(0)
    normal, uniform, chosen = (f(20_000, generator=draw) for f in (torch.randn, torch.rand, torch.rand))
    chi = torch.randn(3, 20_000, generator=draw).square().mean(0).sqrt()
    return {
        "softplus": F.softplus(normal + 8),
        "shifted": normal + 20,
        "saturated": torch.sigmoid(2 * normal + 6),
        "negative": -F.softplus(normal + 3),
        "normal": normal,
        "uniform": 2 * uniform - 1,
        "silu": F.silu(2 * normal),
        "relu": F.relu(normal),
        "relu6": (3 * normal - 1.5).clamp(0, 6),
        "padded": torch.where(chosen < 0.8, -0.4242, 3.2 * uniform - 0.4242),
        "sparse": torch.where(chosen < 0.95, 0.0, uniform + 3),
        "heavy student": normal / chi,
        "heavy mixture": torch.where(chosen < 0.02, 25 * normal, normal),
        "heavy outlier": torch.cat([normal, torch.tensor([1000.0])]),
    }


def allowed_less(name: str, scheme: sq.QScheme, values: str) -> bool:
    """Whether an observer loses some of these values by its definition."""
    one_sign = name in ("absmax", *POWERS) and not scheme.symmetric
    return name in KEEPS_LESS or one_sign or (name in CLIPS and values.startswith("heavy"))


def fidelity(name: str, scheme: sq.QScheme, x: Tensor) -> tuple[float, int]:
    """The ratio of signal to noise in decibels, and the number of codes that are used."""
    observer = sq.observer(name)
    y = sq.fake_quantizer("fixed").apply(x, observer.qparams(after(observer, scheme, x), scheme), scheme)
    noise = float((y - x).double().square().sum())
    return 10 * math.log10(float(x.double().square().sum()) / noise), y.unique().numel()


@functools.cache
def widest(scheme: sq.QScheme, values: str) -> tuple[float, int]:
    """The same of the range from the smallest to the largest value."""
    return fidelity("minmax", scheme, distributions()[values])


@over_observers
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_range_collapses(name: str, bits: int, symmetric: bool) -> None:
    """Half of the codes that the full range uses, and one bit less, are the least; else the docstring says what is kept."""
    scheme = sq.QScheme(bits=bits, symmetric=symmetric)
    allowed = [values for values in distributions() if allowed_less(name, scheme, values)]
    assert not allowed or "Keeps" in (getattr(sq.observers, name).__doc__ or "")

    def law(values: str) -> None:
        ratio, codes = fidelity(name, scheme, distributions()[values])
        full_ratio, full_codes = widest(scheme, values)
        assert 2 * codes >= full_codes
        assert ratio >= full_ratio - ONE_BIT

    hold(law, {values: values for values in distributions() if values not in allowed})


@over_observers
def test_values_that_are_not_finite_are_refused_in_eager_and_nan_under_vmap(name: str) -> None:
    observer = sq.observer(name)

    def law(scheme: sq.QScheme, value: float) -> None:
        bad = sample(0)
        bad[1, 2, 1] = value
        states = [seen(name, scheme, 0, 1), after(observer, scheme, bad, sample(1))]
        with pytest.raises(sq.StateError, match=name):
            observer.qparams(states[1], scheme)
        batched = torch.vmap(lambda s: observer.qparams(s, scheme))(stack(states))
        assert_same(pick(batched, 0), observer.qparams(states[0], scheme))
        touched = {sq.PerTensor(): (), sq.PerChannel(0): 1, sq.PerChannel(1): 2, sq.PerGroup(0, 4): (1, 1)}
        touched |= {sq.PerBlock(3, 2): (0, 2), sq.PerToken(): (1, 2)}
        expected = torch.zeros_like(batched.scale[1], dtype=torch.bool)
        expected[touched[scheme.granularity]] = True
        assert torch.equal(batched.scale[1].isnan(), expected)
        assert not batched.scale[1].isinf().any()

    hold(law, OF_EVERY_GRANULARITY, NOT_FINITE)
    hold(law, COARSE, {"nan": torch.nan})


@over_observers
@over_schemes
def test_what_was_never_observed_is_refused_in_eager_and_nan_under_vmap(name: str, scheme: sq.QScheme) -> None:
    observer = sq.observer(name)
    state = observer.init(sample(0), scheme)
    with pytest.raises(sq.StateError, match=name):
        observer.qparams(state, scheme)
    assert bool(torch.vmap(lambda s: observer.qparams(s, scheme))(stack([state])).scale.isnan().all())


@over_observers
@over_schemes
def test_merging_shards_equals_observing_them_in_turn_or_is_refused(name: str, scheme: sq.QScheme) -> None:
    observer = sq.observer(name)
    a, b, c = (seen(name, scheme, i) for i in range(3))
    if merges(observer, a):
        neutral, merge = observer.init(sample(0), scheme), observer.merge
        assert_same(merge(neutral, a), a)
        assert_same(merge(a, neutral), a)
        rounding = {"rtol": 1e-6, "atol": 0.0} if name in SUMS else {}
        assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), **rounding)
        assert_same(merge(merge(a, b), c), seen(name, scheme, 0, 1, 2), **rounding)
    else:
        forward, backward = seen(name, scheme, 0, 1, 2), seen(name, scheme, 2, 1, 0)
        assert any(not torch.equal(f, b) for f, b in zip(forward, backward, strict=True))
        with pytest.raises(sq.StateError, match=f"{name}: states of this observer cannot be merged"):
            observer.merge(a, b)


@pytest.mark.slow
@over_observers
def test_a_compiled_update_equals_the_eager_one(name: str) -> None:
    observer, scheme = sq.observer(name), sq.QScheme(bits=4, symmetric=False, granularity=sq.PerChannel(1))
    state, x = seen(name, scheme, 0), sample(1)
    update = compiled(lambda s, x: observer.update(s, x, scheme))
    assert_same(update(state, x), observer.update(state, x, scheme), rtol=1e-6, atol=0.0)


@over_observers
def test_every_alias_leads_to_one_spec(name: str) -> None:
    spec = OBSERVERS.spec(name)
    assert getattr(sq.observers, name)() == spec
    assert {OBSERVERS.spec(alias) for alias in OBSERVERS.aliases(name)} == {spec}
    assert OBSERVERS.spec(name, **dict(spec.options)) == spec


@over_observers
def test_every_reference_name_of_an_option_means_the_own_one(name: str) -> None:
    options = dict(OBSERVERS.spec(name).options)
    for foreign, own in OBSERVERS.get(name).renamed.items():
        assert OBSERVERS.spec(name, **{foreign: options[own]}) == OBSERVERS.spec(name)


@over_observers
@over_schemes
@pytest.mark.parametrize("factor", [0.125, 4.0])
def test_a_scale_is_as_large_as_the_values(name: str, scheme: sq.QScheme, factor: float) -> None:
    """Powers of two, so that no rounding differs."""
    if name in POWERS and not scheme.symmetric:
        pytest.skip("values below 0 have no size on this grid")
    observer, plain = sq.observer(name), seen(name, scheme, 0, 1)
    scaled = after(observer, scheme, factor * sample(0), factor * sample(1))
    before, now = observer.qparams(plain, scheme), observer.qparams(scaled, scheme)
    if name in CONSTANT:
        factor = 1.0
    assert_same(now.scale, factor * before.scale, rtol=1e-6, atol=0.0)
    assert_same(now.zero_point, before.zero_point)


@over_observers
@over_schemes
def test_the_order_of_the_elements_of_a_scale_does_not_matter(name: str, scheme: sq.QScheme) -> None:
    observer, x = sq.observer(name), sample(0)
    turned = {sq.PerTensor(): x.flip(0, 1, 2), sq.PerChannel(0): x.flip(1, 2), sq.PerChannel(1): x.flip(0, 2)}
    turned |= {sq.PerGroup(0, 4): x.reshape(3, 2, 4).flip(2).reshape(x.shape)}
    turned |= {sq.PerBlock(3, 2): x.flip(0, 2), sq.PerToken(): x.flip(2)}
    other = after(observer, scheme, turned[scheme.granularity])
    assert_same(other, seen(name, scheme, 0), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@over_observers
def test_statistics_are_taken_alone_by_compiled_qparams_too(name: str) -> None:
    observer, scheme = OBSERVERS.build(OBSERVERS.spec(name)), sq.QScheme(bits=4, symmetric=False)
    state = seen(name, scheme, 0, 1)
    resolve = compiled(lambda s: observer.qparams(s, scheme))
    assert_same(resolve(state), observer.qparams(state, scheme), rtol=1e-6, atol=0.0)


@over_observers
@over_granularities
def test_tangents_do_not_reach_statistics(name: str, scheme: sq.QScheme) -> None:
    observer, x, state = sq.observer(name), sample(1), seen(name, scheme, 0)
    value, tangent = torch.func.jvp(lambda x: observer.update(state, x, scheme), (x,), (torch.ones_like(x),))
    assert_same(value, observer.update(state, x, scheme))
    assert all(not leaf.is_floating_point() or not leaf.any() for leaf in tangent)


def test_a_moving_average_forgets_at_the_rate_of_its_decay() -> None:
    observer, scheme = sq.observer("EMAMinMaxObserver", ema_ratio=0.5), sq.QScheme()
    state = after(observer, scheme, torch.tensor([0.0, 8.0]), torch.tensor([-4.0, 4.0]), torch.tensor([0.0, 2.0]))
    assert (state.lo, state.hi) == (-1.0, 4.0)


def test_mse_finds_the_best_of_its_candidates() -> None:
    x, scheme = sample(0, 50), sq.QScheme(bits=3)

    def error(shrink: float) -> float:
        scale = float(x.abs().max()) * shrink / 3.5
        return float(((x / scale).round().clamp(-4, 3) * scale - x).square().mean())

    candidates = [1.0 - 0.01 * i for i in range(95)]
    best = min(candidates, key=error)
    assert best < 1.0
    state = after(sq.observer("mse"), scheme, x)
    torch.testing.assert_close(state.hi, x.max() * best)
    torch.testing.assert_close(state.lo, x.min() * best)


@over_observers
def test_a_model_is_calibrated_with_it(name: str) -> None:
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), torch.randn(16, 8)
    half = sq.override(observer=OBSERVERS.spec(name))
    q = sq.quantize(model, sq.QuantConfig(weight=half, activation=half), example_args=(x,))
    assert sq.Plan.from_json(q.plan.to_json()) == q.plan
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x, torch.randn(5, 8)], progress=False)
    assert {f"{layer}.weight_fake_quant" for layer in (0, 2)} < set(qparams)
    assert all(bool((qp.scale > 0).all()) for qp in qparams.values())
    assert bool(q.apply(params, qparams, x).isfinite().all())
