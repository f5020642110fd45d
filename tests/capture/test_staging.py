"""Functions that run as flat programs: the same bits as the functions themselves, or a refusal."""

from __future__ import annotations

import copy
import pickle
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import sophq_func as sq
from sophq_func.core.pytree import tensors, tree_map
from sophq_func.numerics.eager import LARGE


class Small(nn.Module):
    """A convolution with a BatchNorm, an activation that writes in place, and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.fc = nn.Linear(width * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.norm(self.conv(x))).flatten(1) * 0.5)


class Made(NamedTuple):
    """A quantized network in training mode, what it learns and what it does not, and a batch."""

    q: sq.Quantized
    learned: tuple[dict[str, Tensor], dict[str, Tensor]]
    buffers: dict[str, Tensor]
    rest: dict[str, Any]
    x: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return {**self.learned[0], **self.buffers}

    @property
    def qparams(self) -> dict[str, Any]:
        return sq.merge(self.learned[1], self.rest)

    def loss(self, learned: tuple[dict[str, Tensor], dict[str, Tensor]], x: Tensor) -> Tensor:
        weights, scales = learned
        return self.q.apply({**weights, **self.buffers}, sq.merge(scales, self.rest), x).square().mean()


def made(width: int = 3, fake_quantize: str = "lsq") -> Made:
    torch.manual_seed(0)
    model, x = Small(width).eval(), torch.randn(4, 2, 5, 5)
    weight = sq.QuantizerConfig(
        scheme=sq.QScheme(bits=4, granularity=sq.PerChannel()), observer="minmax", fake_quantize=fake_quantize
    )
    activation = sq.QuantizerConfig(
        scheme=sq.QScheme(bits=8, symmetric=False), observer="minmax", fake_quantize=fake_quantize
    )
    q = sq.quantize(model, sq.QuantConfig(strategy="Layers", weight=weight, activation=activation), example_args=(x,))
    params = sq.params_of(model)
    scales, rest = q.split(q.calibrate(params, [x], progress=False))
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    return Made(q, (weights, scales), {name: params[name] for name in params.keys() - weights.keys()}, rest, x)


def assert_same_bits(found: Any, expected: Any) -> None:
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


def tangents(m: Made) -> Any:
    return tree_map(torch.ones_like, m.learned)


TRANSFORMED: dict[str, Callable[[Made], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "grad": lambda m: (grad(m.loss), (m.learned, m.x)),
    "vmap(grad)": lambda m: (vmap(grad(lambda one, x: m.loss(one, x[None])), (None, 0)), (m.learned, m.x)),
    "jvp": lambda m: (lambda one, way, x: jvp(lambda one: m.loss(one, x), (one,), (way,)), (m.learned, tangents(m), m.x)),
    "hvp": lambda m: (
        lambda one, way, x: jvp(grad(lambda one: m.loss(one, x)), (one,), (way,)),
        (m.learned, tangents(m), m.x),
    ),
    "jvp of scales": lambda m: (
        lambda one, x: jvp(lambda one: m.loss((m.learned[0], one), x), (one,), (one,)),
        (m.learned[1], m.x),
    ),
    "autograd": lambda m: (
        lambda one, x: torch.autograd.grad(m.loss(one, x), tensors(one)),
        (tree_map(lambda t: t.clone().requires_grad_(), m.learned), m.x),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_program_of_a_derivative_gives_the_bits_of_the_derivative(name: str) -> None:
    m = made()
    f, args = TRANSFORMED[name](m)
    staged = sq.stage(f)
    assert_same_bits(staged(*args), f(*args))
    *kept, x = args
    assert_same_bits(staged(*kept, 2 * x), f(*kept, 2 * x))
    assert staged.cache_info()[:2] == (1, 1)


@pytest.mark.parametrize("name", ["grad", "vmap(grad)"])
def test_tensors_that_have_a_kernel_of_their_own_give_the_same_bits_too(name: str) -> None:
    m = made(width=-(-LARGE // 18))  # with a BatchNorm folded in: 18 elements a channel
    assert m.learned[0]["conv.weight"].numel() >= LARGE
    f, args = TRANSFORMED[name](m)
    assert_same_bits(sq.stage(f)(*args), f(*args))
    with torch.no_grad():
        assert_same_bits(sq.stage(m.q.apply)(m.params, m.qparams, m.x), m.q.apply(m.params, m.qparams, m.x))


def test_forward_observers_and_buffers_give_the_same_bits() -> None:
    m = made()
    trained, ostate = m.q.train(), m.q.init(m.params)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (m.q.apply, (m.params, m.qparams, m.x)),
        (m.q.observe, (m.params, ostate, m.x)),
        (trained.apply_and_update, (m.params, m.qparams, m.x)),
        (m.q.qparams, (m.params, m.q.observe(m.params, ostate, m.x)[1])),
    ]
    before = tree_map(torch.clone, (m.params, m.qparams, ostate))
    with torch.no_grad():
        for f, args in calls:
            staged = sq.stage(f)
            for _ in range(2):
                assert_same_bits(staged(*args), f(*args))
    assert_same_bits((m.params, m.qparams, ostate), before)


@pytest.mark.parametrize("name", ["minmax", "mse", "percentile"])
def test_observers_can_be_staged(name: str) -> None:
    torch.manual_seed(0)
    scheme, x = sq.QScheme(bits=8), torch.randn(3, 50)
    observer = sq.observer(name)

    def seen(state: Any, x: Tensor) -> Any:
        state = observer.update(state, x, scheme)
        return state, observer.qparams(state, scheme)

    state, staged = observer.init(x, scheme), sq.stage(seen)
    for batch in (x, 2 * x):
        expected = seen(state, batch)
        assert_same_bits(staged(state, batch), expected)
        state = expected[0]


@pytest.mark.parametrize("fake_quantize", ["fixed", "lsq", "dorefa", "mxfp4", "e4m3"])
def test_steps_of_training_give_the_same_bits(fake_quantize: str) -> None:
    m = made(fake_quantize=fake_quantize) if fake_quantize in ("fixed", "lsq", "dorefa") else by_format(fake_quantize)

    def step(learned: Any, rate: Tensor, x: Tensor) -> Any:
        slopes = grad(m.loss)(learned, x)
        return tree_map(lambda one, slope: one - rate * slope, learned, slopes)

    staged, rate = sq.stage(step), torch.tensor(0.1)
    one = other = m.learned
    for k in range(3):
        x = m.x + k
        one, other = staged(one, rate, x), step(other, rate, x)
        assert_same_bits(one, other)
    assert staged.cache_info()[:2] == (2, 1)


def by_format(fake_quantize: str) -> Made:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(4, 32)
    weight = sq.QuantizerConfig(scheme=sq.QScheme(), observer="minmax", fake_quantize=fake_quantize)
    q = sq.quantize(model, sq.QuantConfig(strategy="Layers", weight=weight, activation=None), example_args=(x,))
    params = sq.params_of(model)
    scales, rest = q.split(q.calibrate(params, [x], progress=False))
    return Made(q, (params, scales), {}, rest, x)


def test_a_quantizer_that_no_batch_has_reached_does_not_hinder_a_program() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.ones(1, 2)
    q = sq.quantize(model, sq.QuantConfig(rules=(sq.Rule(name="0", optional=True),)), example_args=(x,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x], progress=False)
    with torch.no_grad():
        assert_same_bits(sq.stage(q.apply)(params, qparams, x), q.apply(params, qparams, x))


def test_another_kind_of_arguments_has_another_program() -> None:
    staged = sq.stage(lambda x, power=2: x**power)
    x = torch.rand(2, 3)
    kinds = [x, torch.rand(3, 3), x.double(), torch.rand(3, 2).T, nn.Parameter(x)]
    with torch.no_grad():
        for size, kind in enumerate(kinds, 1):
            for _ in range(2):
                assert_same_bits(staged(kind), kind**2)
            assert staged.cache_info() == (size, size, size)
        assert_same_bits(staged(x, power=3), x**3)
        assert staged.cache_info().size == 6
    assert_same_bits(staged(x, power=True), x)
    assert_same_bits(staged(x), x**2)  # with gradients enabled
    assert staged.cache_info().size == 8
    staged.cache_clear()
    assert staged.cache_info() == (0, 0, 0)


def test_a_tensor_that_was_given_twice_is_two_arguments() -> None:
    staged, x = sq.stage(lambda a, b: a - 2 * b), torch.ones(2)
    assert_same_bits(staged(x, x), -x)
    assert_same_bits(staged(x, 0 * x), x)


def test_outputs_keep_their_structure() -> None:
    class Output(NamedTuple):
        logits: Tensor
        kind: str

    def f(batch: dict[str, Any]) -> Any:
        return {"b": Output(batch["x"] + 1, "logits"), "a": [None, batch["x"], 3.0]}

    x = torch.ones(2)
    staged = sq.stage(f)
    for _ in range(2):
        found = staged({"x": x, "name": "train", "none": None})
        assert isinstance(found["b"], Output)
        assert found["b"].kind == "logits"
        assert found["a"][0] is None
        assert found["a"][1] is x
        assert found["a"][2] == 3.0
        assert_same_bits(found["b"].logits, x + 1)


def test_what_is_computed_twice_stays_apart_where_that_can_be_seen() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        a, b = x + 1, x + 1
        a.mul_(3)
        c, d = x * 0.0, x * -0.0
        return a, b, x + 5, x + 5, c, d, (x - 1).view(-1)[:1].add_(4), x - 1

    staged, x = sq.stage(f), torch.tensor([1.0, 2.0])
    for _ in range(2):
        found = staged(x)
        assert_same_bits(found, f(x))
        assert torch.equal(found[5].signbit(), torch.tensor([True, True]))
    assert len({tensor.data_ptr() for tensor in found}) == len(found)


def test_a_program_is_shorter_than_the_function() -> None:
    text = sq.stage(lambda x: (x.sin() + x.sin(), x.cos())[0]).lower(torch.ones(2)).text()
    assert text.count("sin_default(") == 1
    assert "cos" not in text
    assert "# arg0_1: 0, float32[2]" in text


SCALE = torch.tensor(2.0)


def test_tensors_of_the_closure_are_read_at_each_call() -> None:
    held: dict[str, Any] = {"a": [torch.tensor(3.0)]}
    module = nn.Linear(2, 1, bias=False)

    def f(x: Tensor, extra: Tensor = torch.tensor(5.0)) -> Tensor:  # noqa: B008
        return x * SCALE * held["a"][0] + extra + module.weight.detach().sum()

    staged, x = sq.stage(f), torch.ones(2)
    for change in (
        lambda: held["a"][0].fill_(7),
        lambda: held.update(a=[torch.tensor(11.0)]),
        lambda: held.update(a=(torch.tensor(13.0, dtype=torch.float64),)),
        lambda: globals().update(SCALE=torch.tensor(17.0)),
        lambda: module.load_state_dict({"weight": torch.ones(1, 2)}),
        lambda: setattr(module, "weight", nn.Parameter(torch.full((1, 2), 19.0))),
    ):
        assert_same_bits(staged(x), f(x))
        change()
        assert_same_bits(staged(x), f(x))
    assert staged.cache_info().size == 2  # the float64 needs a program of its own
    held.clear()
    with pytest.raises(KeyError):
        staged(x)


def test_closures_are_followed_through_transforms_partials_and_methods() -> None:
    class Holder:
        def __init__(self) -> None:
            self.scale = torch.tensor(2.0)

        def loss(self, factor: Tensor, x: Tensor) -> Tensor:
            return (x * self.scale * factor).sum()

    holder = Holder()
    factor = torch.tensor(3.0)
    staged, x = sq.stage(vmap(grad(partial(holder.loss, factor)))), torch.ones(2)
    assert_same_bits(staged(x), torch.full((2,), 6.0))
    holder.scale = torch.tensor(5.0)
    assert_same_bits(staged(x), torch.full((2,), 15.0))
    assert staged.cache_info().size == 1


def test_a_tensor_that_cannot_be_found_again_is_refused() -> None:
    hidden = iter([torch.ones(3)] * 9)
    with pytest.raises(sq.PlanError, match=r"neither arguments nor found in its closure \(float32\[3\]\)"):
        sq.stage(lambda x: x + next(hidden))(torch.ones(3))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x * x.sum().item(), r"line \d+ of .*test_staging.py reads one"),
        (lambda x: x if x.sum() > 0 else -x, r"line \d+ of .*test_staging.py reads one"),
        (grad(lambda x: (x if x.sum() > 0 else -x).sum()), "depend on numbers"),
        (lambda x: x[x > 0], "the shape of what index returns"),
        (lambda x: x.nonzero(), "the shape of what nonzero returns"),
        (lambda x: torch.tensor(x.tolist()), "Tensor.tolist reads"),
        (lambda x: torch.from_numpy(x.numpy() + 1), "Tensor.numpy reads"),
        (lambda x: x * random.random(), "random numbers of Python or numpy"),
        (lambda x: x * float(np.random.rand()), "random numbers of Python or numpy"),
        (lambda x: x + torch.rand(2, generator=torch.Generator()), "rand draws from a generator"),
        (lambda x: x.add_(1), "writes into an argument"),
        (lambda x: SCALE.mul_(1) * x, "writes into an argument, or into a tensor of its closure"),
        (lambda x: x * nn.Parameter(torch.ones(2)), "the output requires a gradient"),
    ],
)
def test_what_a_program_cannot_hold_is_refused(f: Callable[[Tensor], Any], message: str) -> None:
    x = torch.ones(2)
    with pytest.raises(sq.PlanError, match=message):
        sq.stage(f)(x)
    assert torch.equal(x, torch.ones(2))


def test_arguments_that_cannot_be_inputs_are_refused() -> None:
    class Batch:
        def __init__(self) -> None:
            self.x = torch.ones(2)

    with pytest.raises(sq.PlanError, match=r"argument 0.y cannot be taken apart: got 'Batch'"):
        sq.stage(lambda batch: batch["y"].x)({"y": Batch()})
    with pytest.raises(sq.PlanError, match="argument 0 must be a plain tensor"):
        sq.stage(lambda x: x)(torch.ones(2).to_sparse())
    with pytest.raises(sq.ConfigError, match="'indctor' is not known, did you mean 'inductor'"):
        sq.stage(torch.sin, backend="indctor")  # type: ignore[arg-type]
    with pytest.raises(sq.ConfigError, match="it takes a function"):
        sq.stage(3)  # type: ignore[type-var, arg-type]


def test_random_numbers_are_those_that_the_function_draws() -> None:
    def f(x: Tensor) -> Tensor:
        torch.rand(3)  # nobody reads it, but it is drawn
        return nn.functional.dropout(x, 0.5) + torch.rand_like(x) - torch.rand_like(x)

    staged, x = sq.stage(f), torch.ones(64)
    drawn = []
    for _ in range(2):  # the first call records
        torch.manual_seed(0)
        found = [staged(x), staged(x)]
        torch.manual_seed(0)
        assert_same_bits(found, [f(x), f(x)])
        drawn += found
    assert not torch.equal(drawn[0], drawn[1])


def test_transforms_see_through_a_staged_function() -> None:
    m = made()
    staged = sq.stage(m.loss)
    assert_same_bits(grad(staged)(m.learned, m.x), grad(m.loss)(m.learned, m.x))
    mapped = vmap(lambda x: staged(m.learned, x[None]))
    assert_same_bits(mapped(m.x), vmap(lambda x: m.loss(m.learned, x[None]))(m.x))
    assert_same_bits(sq.stage(grad(staged))(m.learned, m.x), grad(m.loss)(m.learned, m.x))
    assert staged.cache_info().misses == 0


def test_autocast_is_recorded_and_not_applied_again() -> None:
    def f(weight: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            exact = x @ weight
        return (x @ weight).float() - exact

    torch.manual_seed(0)
    weight, x = torch.randn(8, 8), torch.randn(8, 8)
    staged = sq.stage(f)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert_same_bits(staged(weight, x), f(weight, x))
    assert_same_bits(staged(weight, x), f(weight, x))
    assert staged.cache_info().size == 2


def test_a_float_model_writes_into_nothing_in_eval() -> None:
    model, x = nn.BatchNorm1d(2).eval(), torch.rand(3, 2)
    f = lambda params, x: functional_call(model, params, (x,))  # noqa: E731
    with torch.no_grad():
        assert_same_bits(sq.stage(f)(sq.params_of(model), x), model(x))


def test_a_float_model_in_training_names_what_it_writes_into() -> None:
    model = nn.BatchNorm1d(2)
    params = sq.params_of(model)
    f = lambda params, x: functional_call(model, params, (x,))  # noqa: E731
    before = tree_map(torch.clone, params)
    with torch.no_grad(), pytest.raises(sq.PlanError, match="writes into an argument"):
        sq.stage(f)(params, torch.rand(3, 2))
    assert_same_bits(params, before)


def test_a_bound_model_is_staged_and_follows_its_parameters() -> None:
    m = made()
    bound = m.q.bind(m.params, m.qparams, learn="params")
    staged = sq.stage(bound)
    with torch.no_grad():
        for _ in range(2):
            assert_same_bits(staged(m.x), bound(m.x))
            for parameter in bound.parameters():
                parameter.mul_(0.5)
    assert staged.cache_info().size == 1


def test_inference_mode_has_a_program_of_its_own() -> None:
    m = made()
    staged = sq.stage(m.q.apply)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                found = staged(m.params, m.qparams, m.x)
                assert found.is_inference() == (mode is torch.inference_mode)
                assert_same_bits(found, m.q.apply(m.params, m.qparams, m.x))
    assert staged.cache_info()[1:] == (2, 2)


def test_threads_may_share_a_staged_function() -> None:
    staged, xs = sq.stage(lambda x: (x * 2).sin()), [torch.rand(n % 3 + 1) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(staged, xs))
    assert_same_bits(found, [(x * 2).sin() for x in xs])


def test_a_copy_records_its_own_programs() -> None:
    staged, x = sq.stage(torch.sin), torch.ones(2)
    staged(x)
    for other in (copy.deepcopy(staged), pickle.loads(pickle.dumps(staged))):
        assert other.cache_info().size == 0
        assert_same_bits(other(x), x.sin())


def test_tensors_of_any_strides_and_sizes_are_inputs() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    f = lambda x: (x + 1, x.sum(), x.reshape(-1))  # noqa: E731
    staged = sq.stage(f)
    for x in (base, base.T, base[::2, 1::2], base[:1].expand(3, 6), base[:0], base[0, 0], base.to(torch.int8)):
        for _ in range(2):
            assert_same_bits(staged(x), f(x))


def test_a_staged_function_says_what_it_is() -> None:
    def loss(x: Tensor) -> Tensor:
        """A loss."""
        return x.sum()

    staged = sq.stage(loss)
    assert staged.__name__ == "loss"
    assert staged.__doc__ == "A loss."
    assert "loss" in repr(staged)
    assert "programs=0" in repr(staged)
    lowered = staged.lower(torch.ones(2))
    assert repr(lowered) == f"Lowered({len(lowered.text().splitlines())} lines)"
    assert staged.cache_info() == (0, 0, 0)


@pytest.mark.slow
def test_inductor_compiles_a_program() -> None:
    def f(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return ((x / scale).round().clamp(-8, 7) * scale + SCALE).relu(), x.sum()

    staged, x, scale = sq.stage(f, backend="inductor"), torch.linspace(-3, 3, 12).reshape(3, 4), torch.tensor(0.3)
    for _ in range(2):
        torch.testing.assert_close(staged(x, scale), f(x, scale))
        x = x.flip(0).contiguous()
    assert staged.cache_info() == (1, 1, 1)


@pytest.mark.slow
def test_a_compiler_sees_through_a_staged_function() -> None:
    staged = sq.stage(lambda x: x.sin() * 2)
    x = torch.ones(3)
    torch.testing.assert_close(torch.compile(staged, fullgraph=True, backend="aot_eager")(x), staged(x))
    assert staged.cache_info().misses == 1


class Interrupted:
    """A function that is interrupted so many times while it computes, and notes how far it comes."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.came: list[str] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.came.append("begin")
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)
        self.came.append("end")
        return x * 2


@pytest.mark.parametrize("times, came", [(1, ["begin", "end"]), (2, ["begin"])])
def test_while_a_recorder_is_at_work_the_first_ctrl_c_waits_and_a_second_does_not(times: int, came: list[str]) -> None:
    function, before = Interrupted(times), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sq.stage(function)(torch.ones(2))
    assert function.came == came
    assert signal.getsignal(signal.SIGINT) == before
    assert torch.equal(sq.stage(Interrupted(0))(torch.ones(2)), torch.full((2,), 2.0))


def test_what_answers_a_ctrl_c_may_be_changed_while_a_recorder_is_at_work() -> None:
    def function(x: Tensor) -> Tensor:
        signal.signal(signal.SIGINT, mine)
        return x * 2

    def mine(*_: object) -> None:
        raise AssertionError

    before = signal.getsignal(signal.SIGINT)
    try:
        sq.stage(function)(torch.ones(2))
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_that_records_leaves_signals_alone() -> None:
    found: list[object] = []

    def function(x: Tensor) -> Tensor:
        found.append(signal.getsignal(signal.SIGINT))
        return x * 2

    thread = threading.Thread(target=sq.stage(function), args=(torch.ones(2),))
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
