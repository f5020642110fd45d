"""A run never waits for an accelerator: it reads no number, and copies none from Python.

What reads a number calls one of a few operators, which can be counted on a CPU. Large tensors have kernels of their own
on a CPU; on the ``meta`` device they take the way of an accelerator, and whoever reads a number there fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import sophq_func as sq
from sophq_func.core.constants import number, table
from sophq_func.core.pytree import tensors, tree_map
from sophq_func.core.randomness import kept_generators
from sophq_func.model.sweep import on_host
from sophq_func.numerics.eager import LARGE
from sophq_func.numerics.ranges import clamp
from sophq_func.numerics.registries import FAKE_QUANTIZERS, OBSERVERS
from sophq_func.observers import _histogram
from tests.helpers import Ready, ready

WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "lift_fresh")
"""Operators that read numbers, or, the last one, make a tensor of what Python holds."""


class Waits(TorchDispatchMode):
    """Counts operators that wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of(call: Callable[[], object]) -> Counter[str]:
    """Of the second call: the first one makes tables, once for each device."""
    call()
    with Waits() as waits:
        call()
    return waits.seen


def network(fake_quantize: str = "lsq", **rule: Any) -> tuple[Ready, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.randn(2, 2, 5, 5)
    weight = sq.QuantizerConfig(
        scheme=sq.QScheme(bits=4, granularity=sq.PerChannel()), observer="minmax", fake_quantize=fake_quantize
    )
    activation = sq.QuantizerConfig(scheme=sq.QScheme(), observer="minmax", fake_quantize=fake_quantize)
    rules = (sq.Rule(name="*", **rule),) if rule else ()
    return ready(model, x, config=sq.QuantConfig(weight=weight, activation=activation, rules=rules)), x


@pytest.mark.parametrize("what", ["apply", "observe", "step", "func.grad", "vmap(grad)", "jvp", "with_bits"])
def test_a_run_reads_no_number(what: str) -> None:
    (q, params, qparams), x = network()
    scales, rest = q.split(qparams)
    ostate = q.init(params)

    def loss(scales: dict[str, Tensor], x: Tensor) -> Tensor:
        return q.apply(params, sq.merge(scales, rest), x).square().sum()

    def step() -> object:
        leaves = tree_map(lambda t: t.clone().requires_grad_(), scales)
        return torch.autograd.grad(loss(leaves, x), tensors(leaves))

    calls: dict[str, Callable[[], object]] = {
        "apply": lambda: q.apply(params, qparams, x),
        "observe": lambda: q.observe(params, ostate, x),
        "step": step,
        "func.grad": lambda: grad(loss)(scales, x),
        "vmap(grad)": lambda: vmap(grad(lambda s, x: loss(s, x[None])), (None, 0))(scales, x),
        "jvp": lambda: jvp(lambda s: loss(s, x), (scales,), (scales,)),
        "with_bits": lambda: sq.enabled(sq.with_bits(qparams, q.plan, 4), False),
    }
    assert not waits_of(calls[what])


@pytest.mark.parametrize("name", FAKE_QUANTIZERS.names())
def test_no_fake_quantizer_reads_a_number(name: str) -> None:
    fake, scheme, x = sq.fake_quantizer(name), sq.QScheme(bits=4), torch.randn(8, 64)
    observer = sq.observer("minmax")
    qparams = fake.init(observer.qparams(observer.update(observer.init(x, scheme), x, scheme), scheme), x, scheme)
    extras = {**qparams.extras, **({"hessian": torch.eye(64)} if "hessian" in fake.needs else {})}
    qparams = qparams._replace(extras=extras)
    noise = torch.rand_like(x) if fake.noise else None
    assert not waits_of(lambda: fake.apply(x, qparams, scheme, noise))
    assert not waits_of(lambda: vmap(lambda x: fake.apply(x, qparams, scheme, noise), randomness="same")(x[None]))


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_no_observer_reads_a_number(name: str) -> None:
    observer, scheme, x = sq.observer(name), sq.QScheme(), torch.randn(8, 64)
    state = observer.update(observer.init(x, scheme), x, scheme)
    assert not waits_of(lambda: observer.update(state, x, scheme))


def test_a_bound_that_is_a_number_is_filled_and_not_copied() -> None:
    code, high = torch.linspace(-9, 9, 7), torch.tensor(3.0)
    assert not waits_of(lambda: clamp(code, -4, high))
    assert torch.equal(clamp(code, -4, high), code.clamp(-4, 3))


def test_large_tensors_take_the_way_of_an_accelerator_without_reading_numbers() -> None:
    (q, params, qparams), _ = network()
    shape = (LARGE // 50 + 1, 2, 5, 5)
    on_meta = lambda tree: tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, tree)  # noqa: E731
    params, qparams, x = on_meta(params), on_meta(qparams), torch.empty(shape, device="meta")
    scales, rest = q.split(qparams)
    loss = lambda scales, x: q.apply(params, sq.merge(scales, rest), x).square().sum()  # noqa: E731
    assert q.apply(params, qparams, x).is_meta
    for slope in tensors((grad(loss)(scales, x), jvp(lambda s: loss(s, x), (scales,), (scales,)))):
        assert slope.is_meta


def test_an_optional_value_that_no_batch_reached_is_an_error_where_that_costs_nothing() -> None:
    (q, params, qparams), x = network(optional=True)
    assert waits_of(lambda: q.apply(params, qparams, x))["_local_scalar_dense"] > 0
    moved = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (params, qparams, x))
    assert q.apply(*moved).is_meta


def test_tables_are_made_once_for_each_device_whatever_is_active() -> None:
    cpu = torch.device("cpu")

    def made(key: float) -> Tensor:
        return table((key, 1.5), torch.float64, cpu)

    with torch.inference_mode():
        assert not made(0.25).is_inference()
    seen = []
    vmap(grad(lambda x: (seen.append(made(0.5)), (x * made(0.5)).sum())[1]))(torch.ones(3, 2))
    assert seen[0] is made(0.5)
    assert torch.equal(made(0.5), torch.tensor([0.5, 1.5], dtype=torch.float64))
    with torch._subclasses.FakeTensorMode():
        assert type(made(0.75)) is not Tensor
    assert type(made(0.75)) is Tensor


def test_a_number_is_what_torch_makes_of_it() -> None:
    cpu = torch.device("cpu")
    for value in (True, 3, 0.1):
        found, expected = number(value, cpu), torch.as_tensor(value)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    assert number(torch.tensor(3), cpu, torch.float64).dtype == torch.float64


def test_several_histograms_are_searched_as_each_alone() -> None:
    torch.manual_seed(0)
    scheme, x = sq.QScheme(granularity=sq.PerChannel()), torch.randn(_histogram.SCALES_AT_ONCE + 2, 200)
    observer = sq.observer("histogram", bins=64)
    state = observer.update(observer.init(x, scheme), x, scheme)
    expected = _histogram.one_by_one(*state, 16)
    for found, one in zip(_histogram.several_at_once(*state, 16), expected, strict=True):
        torch.testing.assert_close(found, one)


def test_a_sweep_compares_settings_on_the_host() -> None:
    (q, params, qparams), x = network()
    settings = [sq.with_bits(qparams, q.plan, {"*weight*": bits}) for bits in (4, 4, 2)]
    found = q.sweep(params, settings, x, how="loop", progress=False)
    assert torch.equal(found[0], found[1])
    keys = on_host(settings, sorted(qparams), copy=True)
    for setting, key in zip(settings, keys, strict=True):
        for name, entry in setting.items():
            pairs = list(zip(tensors(entry), key[name], strict=True))
            assert all(torch.equal(one.reshape(-1), other.to(one.dtype)) for one, other in pairs)


def test_generators_of_devices_that_are_not_used_are_not_asked() -> None:
    before = torch.get_rng_state()
    with kept_generators([torch.ones(2), torch.ones(2, device="meta")]):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
