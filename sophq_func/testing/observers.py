"""The laws of observers, and the check that holds one to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sophq_func import observers
from sophq_func.capture.contents import params_of
from sophq_func.config.rules import QuantConfig
from sophq_func.core.errors import StateError
from sophq_func.core.public import public_as
from sophq_func.core.pytree import flatten, torch_leaves, tree_map
from sophq_func.core.registry import Spec
from sophq_func.fake_quantize import fake_quantizer
from sophq_func.model.build import quantize
from sophq_func.numerics.contracts import OBSERVERS, Observer, State
from sophq_func.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from sophq_func.numerics.scheme import QScheme, override
from sophq_func.observers import observer
from sophq_func.planning.plan import Plan
from sophq_func.testing.laws import Law, check_all, hold, law, refused
from sophq_func.testing.pieces import Piece, named, piece_of
from sophq_func.testing.subjects import (
    AFFINE,
    COARSE,
    SCHEMES,
    SHAPE,
    assert_same,
    compiled,
    pick,
    sample,
    stack,
    unchanged,
)

UNCLAMPED = ("lsq",)
"""Observers whose zero point may lie beyond the grid, as recorded; a fake quantizer clamps it."""

CONSTANT = ("fixed_range",)
"""Observers whose range does not depend on the values."""

POWERS = ("minmax_floor", "pot_mode")
"""Observers whose step starts at 1 where the grid has no code for the values at all."""

CLIPS = ("kld", "percentile")
"""Observers that may leave out a share of the values, and so what a heavy tail is made of."""

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


def spec_of(piece: Piece) -> Spec:
    """A name and options as data."""
    return piece if isinstance(piece, Spec) else OBSERVERS.spec(piece)


def made(piece: Piece) -> Observer:
    """A registered observer, as a user gets it."""
    spec = spec_of(piece)
    return observer(spec.name, **dict(spec.options))


def after(observer: Observer, scheme: QScheme, *batches: Tensor) -> State:
    """The state after some tensors."""
    state = observer.init(batches[0], scheme)
    for x in batches:
        state = observer.update(state, x, scheme)
    return state


@functools.cache
def seen(piece: Piece, scheme: QScheme, *seeds: int) -> State:
    """The state after some samples; shared between tests, which is safe as long as nothing writes to a state."""
    return after(made(piece), scheme, *map(sample, seeds))


def merges(observer: Observer, state: State) -> bool:
    """Whether states of an observer can be merged."""
    try:
        observer.merge(state, state)
    except StateError:
        return False
    return True


@law(SCHEMES)
def inputs_stay_as_they_are(piece: Piece, scheme: QScheme) -> None:
    """No function writes to the tensors and states that it is given."""
    observer, x, state = made(piece), sample(1), seen(piece, scheme, 0)
    with unchanged(x, state):
        observer.init(x, scheme)
        observer.update(state, x, scheme)
        observer.qparams(state, scheme)
        if merges(observer, state):
            observer.merge(state, observer.init(x, scheme))


@law(SCHEMES)
def equal_inputs_give_equal_bits(piece: Piece, scheme: QScheme) -> None:
    """The same tensors give the same state, bit for bit."""
    assert_same(after(made(piece), scheme, sample(0)), seen(piece, scheme, 0))


@law(AFFINE, {str(item): item for item in [torch.float32, torch.float16, torch.bfloat16, torch.float64]})
def shapes_and_dtypes_of_a_state_are_stable(piece: Piece, scheme: QScheme, dtype: torch.dtype) -> None:
    """A state keeps its type, shapes and dtypes; its floating numbers are float32 whatever the tensors are."""
    observer = made(piece)
    first = observer.init(sample(0, dtype=dtype), scheme)
    last = after(observer, scheme, sample(0, dtype=dtype), sample(1, dtype=dtype))
    assert type(first) is type(last)
    for before, now in zip(first, last, strict=True):
        assert (before.shape, before.dtype, before.device) == (now.shape, now.dtype, now.device)
        assert now.dtype == torch.float32 or not now.is_floating_point()


@law(AFFINE)
def init_does_not_look_at_values(piece: Piece, scheme: QScheme) -> None:
    """``init`` reads shape, dtype and device alone."""
    observer = made(piece)
    assert_same(observer.init(sample(0), scheme), observer.init(torch.full(SHAPE, torch.nan), scheme))


@law(AFFINE)
def no_gradient_flows_into_statistics(piece: Piece, scheme: QScheme) -> None:
    """A state of tensors that require a gradient requires none."""
    state = after(made(piece), scheme, sample(0).requires_grad_())
    assert_same(state, seen(piece, scheme, 0))
    assert not any(leaf.requires_grad for leaf in state)


@law(SCHEMES)
def qparams_have_the_shape_of_the_granularity(piece: Piece, scheme: QScheme) -> None:
    """Scale and zero point have the shape of the granularity, float32 and int32, the zero point on the grid."""
    observer = made(piece)
    scale, zero_point, extras = observer.qparams(seen(piece, scheme, 0), scheme)
    expected = {PerTensor(): (), PerChannel(0): (3,), PerChannel(1): (4,), PerGroup(0, 4): (3, 2)}
    expected |= {PerBlock(3, 2): (1, 4), PerToken(): (3, 4)}
    assert scale.shape == zero_point.shape == expected[scheme.granularity]
    assert (scale.dtype, zero_point.dtype, list(extras)) == (torch.float32, torch.int32, sorted(extras))
    if named(piece) in UNCLAMPED and not scheme.symmetric:
        expected_zero = scheme.qmin - torch.round(seen(piece, scheme, 0).lo / scale)
        assert torch.equal(zero_point, expected_zero.to(torch.int32))
    else:
        assert bool(((zero_point >= scheme.qmin) & (zero_point <= scheme.qmax)).all())


@law(SCHEMES)
def vmap_equals_the_loop(piece: Piece, scheme: QScheme) -> None:
    """``init``, ``update`` and ``qparams`` under ``vmap`` equal the loop."""
    observer, xs = made(piece), torch.stack([sample(2), sample(3)])
    fresh = torch.vmap(lambda x: observer.init(x, scheme))(xs)
    states = stack([seen(piece, scheme, 0), seen(piece, scheme, 1)])
    states = torch.vmap(lambda s, x: observer.update(s, x, scheme))(states, xs)
    qparams = torch.vmap(lambda s: observer.qparams(s, scheme))(states)
    for i in range(2):
        expected = seen(piece, scheme, i, 2 + i)
        assert_same(pick(fresh, i), observer.init(xs[i], scheme))
        assert_same(pick(states, i), expected, rtol=1e-6, atol=0.0)  # sums may be taken in another order
        assert_same(pick(qparams, i), observer.qparams(expected, scheme), rtol=1e-6, atol=0.0)


@law(AFFINE)
def both_tree_libraries_read_states_and_qparams_alike(piece: Piece, scheme: QScheme) -> None:
    """torch's pytree and optree see the same leaves in the same order, tensors all."""
    observer, state = made(piece), seen(piece, scheme, 0)
    for tree in (state, observer.qparams(state, scheme)):
        ours, (theirs, rebuilt) = torch_leaves(tree), flatten(tree)
        assert [id(leaf) for leaf in ours] == [id(leaf) for leaf in theirs]
        assert all(isinstance(leaf, Tensor) for leaf in ours)
        for back in (tree_map(lambda leaf: leaf, tree), rebuilt(theirs)):
            assert_same(back, tree)


@law(AFFINE, {str(item): item for item in [(0, 4, 2), (3, 0, 2), (3, 4, 0), (0,)]})
def an_empty_tensor_leaves_the_state_as_it_is(piece: Piece, scheme: QScheme, shape: tuple[int, ...]) -> None:
    """A tensor without elements changes no state."""
    if len(shape) == 1 and scheme.granularity == PerChannel(1):
        shape = (3, 0)
    observer = made(piece)
    for state in (observer.init(sample(0), scheme), seen(piece, scheme, 0)):
        assert_same(observer.update(state, torch.empty(shape), scheme), state)


@law()
def extreme_values_give_a_finite_positive_scale(piece: Piece) -> None:
    """Constant, zero, tiny and huge tensors give a finite scale above 0."""
    observer = made(piece)

    def law(scheme: QScheme, values: tuple[Any, ...]) -> None:
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


def allowed_less(piece: Piece, scheme: QScheme, values: str) -> bool:
    """Whether an observer loses some of these values by its definition."""
    one_sign = named(piece) in ("absmax", *POWERS) and not scheme.symmetric
    return made(piece).clips or one_sign or (named(piece) in CLIPS and values.startswith("heavy"))


def fidelity(piece: Piece, scheme: QScheme, x: Tensor) -> tuple[float, int]:
    """The ratio of signal to noise in decibels, and the number of codes that are used."""
    observer = made(piece)
    y = fake_quantizer("fixed").apply(x, observer.qparams(after(observer, scheme, x), scheme), scheme)
    noise = float((y - x).double().square().sum())
    return 10 * math.log10(float(x.double().square().sum()) / noise), len(set(y.tolist()))


@functools.cache
def widest(scheme: QScheme, values: str) -> tuple[float, int]:
    """The same of the range from the smallest to the largest value."""
    return fidelity("minmax", scheme, distributions()[values])


@law({str(item): item for item in [4, 8]}, {str(item): item for item in [True, False]})
def no_range_collapses(piece: Piece, bits: int, symmetric: bool) -> None:
    """Half of the codes that the full range uses, and one bit less, are the least; where ``Observer.clips``, none is."""
    scheme = QScheme(bits=bits, symmetric=symmetric)
    allowed = [values for values in distributions() if allowed_less(piece, scheme, values)]

    def law(values: str) -> None:
        ratio, codes = fidelity(piece, scheme, distributions()[values])
        full_ratio, full_codes = widest(scheme, values)
        assert 2 * codes >= full_codes
        assert ratio >= full_ratio - ONE_BIT

    hold(law, {values: values for values in distributions() if values not in allowed})


@law()
def values_that_are_not_finite_are_refused_in_eager_and_nan_under_vmap(piece: Piece) -> None:
    """NaN and infinity are a ``StateError`` in eager, and a NaN scale under ``vmap``, of the scales that they belong to."""
    observer = made(piece)

    def law(scheme: QScheme, value: float) -> None:
        bad = sample(0)
        bad[1, 2, 1] = value
        states = [seen(piece, scheme, 0, 1), after(observer, scheme, bad, sample(1))]
        with refused(StateError):
            observer.qparams(states[1], scheme)
        batched = torch.vmap(lambda s: observer.qparams(s, scheme))(stack(states))
        assert_same(pick(batched, 0), observer.qparams(states[0], scheme))
        touched: dict[Granularity, Any] = {PerTensor(): (), PerChannel(0): 1, PerChannel(1): 2, PerGroup(0, 4): (1, 1)}
        touched |= {PerBlock(3, 2): (0, 2), PerToken(): (1, 2)}
        expected = torch.zeros_like(batched.scale[1], dtype=torch.bool)
        expected[touched[scheme.granularity]] = True
        assert torch.equal(batched.scale[1].isnan(), expected)
        assert not batched.scale[1].isinf().any()

    # which scales such a value reaches is a question of granularity; the kinds of schemes are tried with one
    hold(law, {name: scheme for name, scheme in SCHEMES.items() if name.startswith("affine-")}, NOT_FINITE)
    hold(law, COARSE, {"nan": torch.nan})


@law(SCHEMES)
def what_was_never_observed_is_refused_in_eager_and_nan_under_vmap(piece: Piece, scheme: QScheme) -> None:
    """A state before any tensor is a ``StateError`` in eager, and gives NaN scales under ``vmap``."""
    observer = made(piece)
    state = observer.init(sample(0), scheme)
    with refused(StateError):
        observer.qparams(state, scheme)
    assert bool(torch.vmap(lambda s: observer.qparams(s, scheme))(stack([state])).scale.isnan().all())


def rounding_of_sums(piece: Piece) -> dict[str, float]:
    """The tolerance for states that are sums of floats in another order; none for states that are not."""
    if not made(piece).sums:
        return {}
    # n additions of x move their sum by n * eps * sum |x| at most, in whatever order
    values = torch.cat([sample(i).flatten() for i in range(3)])
    worst = values.numel() * torch.finfo(torch.float32).eps
    return {"rtol": worst, "atol": worst * float(values.abs().sum())}


@law(SCHEMES)
def merging_shards_equals_observing_them_in_turn_or_is_refused(piece: Piece, scheme: QScheme) -> None:
    """``merge`` equals observing in turn, up to rounding for ``Observer.sums``, or is a ``StateError``.

    It is associative, with ``init`` as neutral element.
    """
    observer = made(piece)
    a, b, c = (seen(piece, scheme, i) for i in range(3))
    if merges(observer, a):
        neutral, merge = observer.init(sample(0), scheme), observer.merge
        assert_same(merge(neutral, a), a)
        assert_same(merge(a, neutral), a)
        rounding = rounding_of_sums(piece)
        assert_same(merge(merge(a, b), c), merge(a, merge(b, c)), **rounding)
        assert_same(merge(merge(a, b), c), seen(piece, scheme, 0, 1, 2), **rounding)
    else:
        forward, backward = seen(piece, scheme, 0, 1, 2), seen(piece, scheme, 2, 1, 0)
        assert any(not torch.equal(f, b) for f, b in zip(forward, backward, strict=True))
        with refused(StateError, named(piece), "merged"):
            observer.merge(a, b)


@law(slow=True)
def a_compiled_update_equals_the_eager_one(piece: Piece) -> None:
    """``update`` compiles as one graph and computes the same."""
    observer, scheme = made(piece), QScheme(bits=4, symmetric=False, granularity=PerChannel(1))
    state, x = seen(piece, scheme, 0), sample(1)
    update = compiled(lambda s, x: observer.update(s, x, scheme))
    assert_same(update(state, x), observer.update(state, x, scheme), rtol=1e-6, atol=0.0)


@law()
def every_alias_leads_to_one_spec(piece: Piece) -> None:
    """Every alias, and the function of the name, gives one spec."""
    name = named(piece)
    spec = OBSERVERS.spec(name)
    assert getattr(observers, name)() == spec
    assert {OBSERVERS.spec(alias) for alias in OBSERVERS.aliases(name)} == {spec}
    assert OBSERVERS.spec(name, **dict(spec.options)) == spec


@law()
def every_reference_name_of_an_option_means_the_own_one(piece: Piece) -> None:
    """Every other name of an option means the option."""
    name = named(piece)
    options = dict(OBSERVERS.spec(name).options)
    for foreign, own in OBSERVERS.get(name).renamed.items():
        assert OBSERVERS.spec(name, **{foreign: options[own]}) == OBSERVERS.spec(name)


@law(SCHEMES, {str(item): item for item in [0.125, 4.0]})
def a_scale_is_as_large_as_the_values(piece: Piece, scheme: QScheme, factor: float) -> None:
    """Values times a power of two have a scale times it, and the same zero point."""
    if named(piece) in POWERS and not scheme.symmetric:
        return  # values below 0 have no size on this grid
    observer, plain = made(piece), seen(piece, scheme, 0, 1)
    scaled = after(observer, scheme, factor * sample(0), factor * sample(1))
    before, now = observer.qparams(plain, scheme), observer.qparams(scaled, scheme)
    if named(piece) in CONSTANT:
        factor = 1.0
    assert_same(now.scale, factor * before.scale, rtol=1e-6, atol=0.0)
    assert_same(now.zero_point, before.zero_point)


@law(SCHEMES)
def the_order_of_the_elements_of_a_scale_does_not_matter(piece: Piece, scheme: QScheme) -> None:
    """Elements that share a scale may stand in any order."""
    observer, x = made(piece), sample(0)
    turned = {PerTensor(): x.flip(0, 1, 2), PerChannel(0): x.flip(1, 2), PerChannel(1): x.flip(0, 2)}
    turned |= {PerGroup(0, 4): x.reshape(3, 2, 4).flip(2).reshape(x.shape)}
    turned |= {PerBlock(3, 2): x.flip(0, 2), PerToken(): x.flip(2)}
    other = after(observer, scheme, turned[scheme.granularity])
    assert_same(other, seen(piece, scheme, 0), rtol=1e-6, atol=1e-7)


@law(slow=True)
def statistics_are_taken_alone_by_compiled_qparams_too(piece: Piece) -> None:
    """``qparams`` compiles as one graph and computes the same."""
    observer, scheme = OBSERVERS.build(spec_of(piece)), QScheme(bits=4, symmetric=False)
    state = seen(piece, scheme, 0, 1)
    resolve = compiled(lambda s: observer.qparams(s, scheme))
    assert_same(resolve(state), observer.qparams(state, scheme), rtol=1e-6, atol=0.0)


@law(AFFINE)
def tangents_do_not_reach_statistics(piece: Piece, scheme: QScheme) -> None:
    """Forward-mode derivatives of a state are 0."""
    observer, x, state = made(piece), sample(1), seen(piece, scheme, 0)
    value, tangent, *_ = torch.func.jvp(lambda x: observer.update(state, x, scheme), (x,), (torch.ones_like(x),))
    assert_same(value, observer.update(state, x, scheme))
    assert all(not leaf.is_floating_point() or not leaf.any() for leaf in tangent)


@law()
def a_model_is_calibrated_with_it(piece: Piece) -> None:
    """A model is planned and calibrated with it, its plan survives JSON, and its output is finite."""
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4)), torch.randn(16, 8)
    half = override(observer=spec_of(piece))
    q = quantize(model, QuantConfig(weight=half, activation=half), example_args=(x,))
    assert Plan.from_json(q.plan.to_json()) == q.plan
    params = params_of(model)
    qparams = q.calibrate(params, [x, torch.randn(5, 8)], progress=False)
    assert {f"{layer}.weight_fake_quant" for layer in (0, 2)} < set(qparams)
    assert all(bool((qp.scale > 0).all()) for qp in qparams.values())
    assert bool(q.apply(params, qparams, x).isfinite().all())


LAWS = tuple(one for one in list(globals().values()) if isinstance(one, Law))
"""All of them, in the order in which they are tried."""


@public_as("testing.check_observer")
def check_observer(name: str | Spec | Callable[[], Spec], *, without: Collection[str] = (), slow: bool = False) -> None:
    """Hold a registered observer to the laws that the library's own obey.

    Args:
      name: of the observer; or the function that :func:`sophq_func.register.observer` made, or what it returns, with
        options.
      without: names of laws that it does not claim, which its docstring should say, too: an observer that clips on purpose
        breaks ``no_range_collapses``.
      slow: try the laws about compiling, too, which takes a minute.

    Raises:
      ConfigError: an unknown observer or law, or an observer that is not registered.
      LawError: an ``AssertionError`` that names each law that is broken, with a case.

    Example:
      >>> import sophq_func as sq
      >>> sq.testing.check_observer("minmax")
      >>> sq.testing.check_observer(sq.observers.mse(p=2.0))
    """
    seen.cache_clear()  # of another piece that had this name
    check_all("observer", piece_of(OBSERVERS, name, "testing.check_observer"), LAWS, without, slow)
