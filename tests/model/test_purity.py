"""Law 1: nothing that goes in is changed, and the same things in give the same bits out."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.pytree import leaves, tensors, tree_map
from tests.helpers import DEFAULT, FLOAT, WATCHED, Ready, ready, same, unchanged


class Net(nn.Module):
    """BatchNorm, Dropout, a buffer that the forward writes in place, one that it replaces, and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.head, self.act = nn.Linear(4, 3), nn.ReLU(inplace=True)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.constant, self.names = torch.ones(3), ["a", "b"]
        self.head.register_forward_hook(_double)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.total += x.detach().sum()
        self.steps = self.steps + 1
        x = self.act(self.bn(self.conv(x)))
        return self.head(self.drop(x.mean((2, 3)))) * scale + self.constant


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def batch() -> Tensor:
    return torch.randn(2, 2, 5, 5)


def repeatable(call: Callable[[], Any]) -> Any:
    """``call`` with the same random numbers each time; the global generator stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return call()


Call = Callable[[Ready, dict[str, Any], Tensor], Any]

METHODS: dict[str, Call] = {
    "init": lambda r, s, x: r.q.init(r.params),
    "init from states": lambda r, s, x: r.q.init(r.params, s),
    "observe": lambda r, s, x: r.q.observe(r.params, s, x, scale=2.0),
    "observe_quantized": lambda r, s, x: r.q.observe_quantized(r.params, s, r.qparams, x),
    "qparams": lambda r, s, x: r.q.qparams(r.params, s),
    "calibrate": lambda r, s, x: r.q.calibrate(r.params, [x, (x, 2.0), {"x": x}], progress=False),
    "apply": lambda r, s, x: r.q.apply(r.params, r.qparams, x),
    "apply_and_update": lambda r, s, x: r.q.apply_and_update(r.params, r.qparams, x),
    "capture": lambda r, s, x: r.q.capture(r.params, r.qparams, x),
    "split and merge": lambda r, s, x: sq.merge(*r.q.split(r.qparams)),
    "grad": lambda r, s, x: torch.func.grad(lambda x: r.q.apply(r.params, r.qparams, x).sum())(x),
}

CONFIGS = {"default": DEFAULT, "BM1690": sq.QuantConfig(chip="BM1690"), "float": FLOAT, "watched": WATCHED}


def states(r: Ready, x: Tensor) -> dict[str, Any]:
    return r.q.observe(r.params, r.q.init(r.params), x)[1]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_nothing_that_goes_in(method: str, config: str, training: bool) -> None:
    model, x = Net().train(training), batch()
    r = ready(model, x, config=CONFIGS[config])
    ostate = states(r, x)
    with unchanged(model, r.params, r.qparams, ostate, x):
        METHODS[method](r, ostate, x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_inputs_give_the_same_bits(method: str, config: str, training: bool) -> None:
    x = batch()
    r = ready(Net().train(training), x, config=CONFIGS[config])
    ostate = states(r, x)
    first = repeatable(lambda: METHODS[method](r, ostate, x))
    for other in METHODS.values():
        other(r, ostate, x + 1)
    same(repeatable(lambda: METHODS[method](r, ostate, x)), first)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "prepare",
    [
        sq.params_of,
        lambda model: sq.trace(model, (batch(),)),
        lambda model: sq.quantize(model, DEFAULT, example_args=batch()),
        lambda model: sq.quantize(model, DEFAULT, example_args=batch()).train().eval(),
        lambda model: sq.quantize(model, DEFAULT, examples=[((batch(),), None), ((batch(),), {"scale": 2.0})]),
        lambda model: ready(model, batch()).q.apply_and_update,
    ],
    ids=["params_of", "trace", "quantize", "train and eval", "several examples", "calibrate"],
)
def test_preparing_changes_nothing_in_the_model(prepare: Callable[[nn.Module], Any], training: bool) -> None:
    model = Net().train(training)
    before = copy.deepcopy(model.state_dict())
    with unchanged(model):
        prepare(model)
    same(model.state_dict(), before)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "grad"])
def test_results_share_no_memory_with_what_went_in(method: str) -> None:
    """Writing into a result must not reach the caller's tensors, unless the result is the caller's tensor itself."""
    model, x = Net().eval(), batch()
    r = ready(model, x, config=WATCHED)
    ostate = states(r, x)
    mine = [t for tree in (r.params, r.qparams, ostate, x) for t in leaves(tree)]
    own, storages = {id(t) for t in mine}, {t.untyped_storage().data_ptr() for t in mine}
    for result in tensors(METHODS[method](r, ostate, x)):
        assert id(result) in own or result.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("options", [{"example_args": (batch(),)}, {"example_kwargs": {"x": batch()}}], ids=" ".join)
def test_the_example_is_not_changed(options: dict[str, Any]) -> None:
    with unchanged(options, *options.values()):
        sq.quantize(Net(), DEFAULT, **options)


def test_the_three_dictionaries_are_not_changed() -> None:
    given: dict[str, Any] = {
        "quant_dict": {"chip": "BM1690", "quantmode": "weight_activation", "strategy": "CNN"},
        "extra_qconfig_dict": {
            "w_observer": "MinMaxObserver",
            "a_qscheme": {"bit": "8", "symmetry": False},
            "module_name": {"head": {"mode": "weight", "bit": 4}, "conv": {"mode": "activation"}},
            "object_type": {nn.Linear: {"mode": "weight", "bit": 8, "wperchannel": True}},
        },
        "extra_quantizer_dict": {"exclude_module_name": ["bn"], "module_only_enable_observer": ["conv"]},
    }
    before = copy.deepcopy(given)
    with unchanged(*[inner for outer in given.values() for inner in (outer, *outer.values()) if isinstance(inner, dict)]):
        sq.prepare_by_platform(Net(), given, example_args=batch())
    assert given == before
    assert list(given) == list(before)


def test_batches_are_not_changed() -> None:
    x = batch()
    r = ready(Net(), x)
    named, listed = {"x": x, "scale": 2.0}, [x, 2.0]
    batches = [named, listed, (x,), x]
    with unchanged(named, x):
        r.q.calibrate(r.params, batches)
    assert [id(b) for b in batches] == [id(named), id(listed), id(batches[2]), id(x)]
    assert (named.keys(), len(listed)) == ({"x": x, "scale": 2.0}.keys(), 2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model, x: sq.trace(model, (x,)),
        lambda model, x: sq.quantize(model, DEFAULT, example_args=x),
        lambda model, x: sq.quantize(model, DEFAULT, example_args=x).eval().train(),
    ],
    ids=["trace", "quantize", "train"],
)
def test_random_generators_stay_where_they_are(prepare: Callable[[nn.Module, Tensor], Any], training: bool) -> None:
    model, x = Net().train(training), batch()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    prepare(model, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize("method", METHODS)
def test_methods_draw_no_random_numbers_of_their_own(method: str) -> None:
    x = batch()
    r = ready(Net().eval(), x)
    ostate, before = states(r, x), torch.get_rng_state()
    METHODS[method](r, ostate, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_the_model_draws_as_in_the_model() -> None:
    model, x = Net().train(), batch()
    r = ready(model, x, config=FLOAT)
    same(repeatable(lambda: r(x)), repeatable(lambda: copy.deepcopy(model)(x)))


# Models with a memory of their own


class Counts(nn.Module):
    """The result depends on what earlier calls left in a Python attribute."""

    def __init__(self, remember: Callable[[nn.Module], int], initial: Any) -> None:
        super().__init__()
        self.layer, self.remember, self.memory = nn.Linear(4, 4), remember, initial

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.remember(self)


def attribute(model: nn.Module) -> int:
    model.memory += 1
    return model.memory


def new_attribute(model: nn.Module) -> int:
    model.calls = getattr(model, "calls", 0) + 1
    return model.calls


def in_a_list(model: nn.Module) -> int:
    model.memory.append(1)
    return len(model.memory)


def in_a_dict(model: nn.Module) -> int:
    model.memory["n"] = model.memory.get("n", 0) + 1
    return model.memory["n"]


MEMORIES: dict[str, tuple[Callable[[nn.Module], int], Any]] = {
    "attribute": (attribute, 0),
    "new attribute": (new_attribute, None),
    "list": (in_a_list, []),
    "dict": (in_a_dict, {}),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_model_that_counts_its_calls_always_starts_from_the_same_count(kind: str, config: str) -> None:
    model, x = Counts(*copy.deepcopy(MEMORIES[kind])), torch.randn(2, 4)
    with unchanged(model):
        r = ready(model, x, config=CONFIGS[config])
        first = r(x)
        ostate = states(r, x)
        for _ in range(2):
            same(r(x), first)
            same(states(r, x), ostate)
            same(r.q.calibrate(r.params, [x]), r.qparams)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_that_counts_its_calls_does_so_when_compiled() -> None:
    model, x = Counts(attribute, 0), torch.randn(2, 4)
    r = ready(model, x)
    compiled = torch.compile(r.q.apply, backend="eager", fullgraph=True)
    expected = r(x)
    for _ in range(3):
        same(compiled(r.params, r.qparams, x), expected)
    same(r(x), expected)


class Caches(nn.Module):
    """Keeps a tensor of one run for the next, as position tables and key-value caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        key = x.shape[-1]
        if key not in self.cache:
            self.cache[key] = torch.arange(key) * x.sum()
        return self.layer(x) + self.cache[key]


def test_a_tensor_that_a_model_caches_does_not_reach_the_next_run() -> None:
    model, x, other = Caches(), torch.randn(2, 4), torch.randn(2, 4)
    r = ready(model, x)
    expected = r(x), r(other)
    torch.func.grad(lambda x: r(x).sum())(x)
    torch.func.vmap(r)(torch.stack([x, other]))
    assert model.cache == {}
    same((r(x), r(other)), expected)
    same(ready(model, x, config=WATCHED)(other), Caches.forward(copy.deepcopy(model), other))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.n = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        self.n += 1
        x = self.layer(x) * self.n
        if fail:
            raise RuntimeError("as asked")
        return self.layer(x)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_that_fails_leaves_nothing_behind(config: str) -> None:
    model, x = Fails(), torch.randn(2, 4)
    r = ready(model, x, config=CONFIGS[config])
    expected = r(x)
    with unchanged(model, r.params, r.qparams), pytest.raises(RuntimeError, match="as asked"):
        r(x, fail=True)
    same(r(x), expected)


# Objects


def test_a_quantized_model_cannot_be_changed() -> None:
    r = ready(nn.Linear(4, 4), torch.randn(2, 4))
    for change in (lambda: setattr(r.q, "plan", None), lambda: delattr(r.q, "plan"), lambda: setattr(r.q, "new", 1)):
        with pytest.raises(AttributeError, match="frozen"):
            change()


def test_train_and_eval_are_new_objects_and_leave_the_old() -> None:
    model, x = Net().eval(), batch()
    r = ready(model, x)
    training = r.q.train()
    assert (r.q.training, training.training, training.eval().training, model.training) == (False, True, False, False)
    same(training.eval().apply(r.params, r.qparams, x), r(x))
    assert not torch.equal(training.apply(r.params, r.qparams, x), r(x))


def test_training_the_model_later_does_not_reach_the_quantized_model() -> None:
    model, x = Net().eval(), batch()
    r = ready(model, x)
    params = tree_map(torch.clone, r.params)
    expected = r(x)
    with torch.no_grad():
        model.train()
        model.constant.fill_(7)
        model.head.weight.fill_(7)
    same(r.q.apply(params, r.qparams, x), expected)


def test_what_methods_return_is_sorted_by_name() -> None:
    x = batch()
    r = ready(Net(), x)
    after = r.q.apply_and_update(r.params, r.qparams, x)[1]
    for tree in (r.params, r.qparams, states(r, x), r.q.init(r.params), *r.q.split(r.qparams), after):
        assert list(tree) == sorted(tree)


def test_updates_of_buffers_come_back_only_from_apply_and_update() -> None:
    model, x = Net().train(), batch()
    r = ready(model, x, config=WATCHED)
    twin = copy.deepcopy(model)
    twin(x)
    _, after = r.q.apply_and_update(r.params, r.qparams, x)
    torch.testing.assert_close(after, sq.params_of(twin))
    assert int(after["steps"]) == 1
    assert float(r.params["total"]) == float(model.total) == 0


class HooksItself(nn.Module):
    """Installs a hook in its first call and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.hooked = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.hooked:
            self.layer.register_forward_hook(_double)
            self.hooked = True
        return self.layer(x)


def test_hooks_that_a_model_installs_in_a_call_are_installed_once() -> None:
    model, x = HooksItself().eval(), torch.randn(2, 4)
    q = sq.quantize(model, sq.QuantConfig(weight=None, activation=sq.override(bits=16)), example_args=(x,))
    params = sq.params_of(model)
    assert len(model.layer._forward_hooks) == 0
    qparams = q.calibrate(params, [x, x], progress=False)
    expected = copy.deepcopy(model)(x)
    for _ in range(2):
        torch.testing.assert_close(q.apply(params, qparams, x), expected, rtol=1e-3, atol=1e-3)
