"""Each trap of interception, with a test that fails where its rule is missing."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sophq_func as sq
from tests.helpers import DEFAULT, RELEASE, WATCHED, Ready, ready, same, unchanged


class Loop(nn.Module):
    """Calls one layer as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.layer(x)
        return self.head(x)


class TwoLoops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, m: int, n: int) -> Tensor:
        for _ in range(m):
            x = self.first(x)
        for _ in range(n):
            x = self.second(x)
        return torch.tanh(x) @ x.mT


class Gated(nn.Module):
    """A function between two layers; ``gate`` says in which spelling."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(4, 4), gate, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.gate(self.a(x)))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, gate: bool = True) -> Tensor:
        x = self.a(x)
        return self.b(torch.sigmoid(x) if gate else x)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class TiedLayers(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


class InPlace(nn.Module):
    """``step`` gets the result of a layer, and its result goes into the next."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.step, self.b = nn.Linear(4, 4), step, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.step(self.a(x), x))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def rounded(r: Ready, quantizer: str, x: Tensor) -> Tensor:
    """``x`` as one quantizer of the model represents it."""
    return r.q.quantize_value(quantizer, x, r.qparams[quantizer])


def is_quantized(r: Ready, model: nn.Module, *args: Any) -> bool:
    return not torch.equal(r(*args), model(*args))


# Another path than the example's


@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("method", ["apply", "observe", "observe_quantized", "apply_and_update"])
def test_another_number_of_calls_names_the_layer(method: str, times: int) -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    states = {
        "observe": (r.q.init(r.params),),
        "observe_quantized": (r.q.init(r.params), r.qparams),
    }.get(method, (r.qparams,))
    with pytest.raises(sq.StateError, match=rf"layer.*{times} times.*2 times"):
        getattr(r.q, method)(r.params, *states, x, times=times)


def test_another_number_of_calls_of_a_function_names_it() -> None:
    x = torch.randn(2, 4)
    r = ready(Skips(), x)
    with pytest.raises(sq.StateError, match="sigmoid"):
        r(x, gate=False)


def test_calibration_on_another_path_names_the_layer() -> None:
    r = ready(Loop(), torch.randn(2, 4))
    with pytest.raises(sq.StateError, match="layer"):
        r.q.calibrate(r.params, [(torch.randn(2, 4), 3)])


def optional(*names: str) -> sq.QuantConfig:
    return sq.QuantConfig(rules=tuple(sq.Rule(name=name, optional=True) for name in names))


def test_an_optional_value_may_be_left_out() -> None:
    x, model = torch.randn(2, 4), Skips()
    r = ready(model, x, config=optional("sigmoid"))
    a = F.linear(rounded(r, "x.post_act_fake_quantizer", x), rounded(r, "a.weight_fake_quant", model.a.weight))
    same(r(x, gate=False), F.linear(a, rounded(r, "b.weight_fake_quant", model.b.weight)))


def test_an_optional_value_is_quantized_where_a_run_reaches_it() -> None:
    x, model = torch.randn(2, 4), Skips()
    same(ready(model, x, config=optional("sigmoid"))(x), ready(model, x)(x))


@pytest.mark.parametrize("times", [1, 3])
def test_optional_means_all_calls_or_none(times: int) -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x, config=optional("layer", "layer_1"))
    assert r(x, times=0).shape == (2, 3)
    with pytest.raises(sq.StateError, match="layer"):
        r(x, times=times)


def test_one_optional_value_does_not_excuse_another_of_the_same_layer() -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x, config=optional("layer_1.post_act_fake_quantizer"))
    with pytest.raises(sq.StateError, match="layer"):
        r(x, times=0)


def several(model: nn.Module, x: Tensor, *rest: tuple[Any, ...]) -> Ready:
    """``model``, planned and calibrated on several calls that differ in their further arguments."""
    q = sq.quantize(model, DEFAULT, examples=[((x, *more), None) for more in rest])
    params = sq.params_of(model)
    return Ready(q, params, q.calibrate(params, [(x, *more) for more in rest]))


@pytest.mark.parametrize("times", [2, 3])
def test_each_of_several_examples_is_accepted(times: int) -> None:
    x, model = torch.randn(2, 4), Loop()
    r = several(model, x, (2,), (3,))
    torch.testing.assert_close(r(x, times), model(x, times), rtol=0, atol=0.1)
    assert not torch.equal(r(x, times), model(x, times))


@pytest.mark.parametrize("times", [1, 4])
def test_what_no_example_did_is_refused(times: int) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(sq.StateError, match="layer"):
        several(Loop(), x, (2,), (3,))(x, times)


def test_counts_are_those_of_one_example_and_not_mixed_of_two() -> None:
    x = torch.randn(2, 4)
    r = several(TwoLoops(), x, (2, 3), (3, 2))
    assert r(x, 2, 3).shape == r(x, 3, 2).shape == (2, 2)
    with pytest.raises(sq.StateError, match=r"first|second"):
        r(x, 2, 2)


def test_the_plan_of_several_examples_is_their_union() -> None:
    x, model = torch.randn(2, 4), Skips()
    both = sq.quantize(model, DEFAULT, examples=[((x,), None), ((x,), {"gate": False})]).plan
    one, other = (sq.quantize(model, DEFAULT, example_args=x, example_kwargs={"gate": g}).plan for g in (True, False))
    assert both.keys() == one.keys() | other.keys()


# Under Dynamo


def compiled_error(r: Ready, x: Tensor) -> str:
    with pytest.raises(Exception) as caught:
        torch.compile(r.q.apply, backend="eager", fullgraph=True)(r.params, r.qparams, x)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (F.sigmoid, "sigmoid"),
        pytest.param(abs, "abs", marks=pytest.mark.skipif(RELEASE < (2, 10), reason="Dynamo of torch 2.9 shows abs")),
        (torch.relu_, "relu"),
        (F.relu_, "relu"),
    ],
    ids=["F.sigmoid", "abs", "torch.relu_", "F.relu_"],
)
def test_what_dynamo_hides_is_an_error_that_says_what_to_write(spelling: Callable[[Tensor], Tensor], name: str) -> None:
    x = torch.randn(2, 4)
    text = compiled_error(ready(Gated(spelling), x), x)
    assert f"torch.compile hides this spelling of {name}" in text
    assert f"torch.{name}(x)" in text


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_optional_does_not_excuse_what_dynamo_hides() -> None:
    x = torch.randn(2, 4)
    r = ready(Gated(F.sigmoid), x, config=optional("sigmoid"))
    assert "hides" in compiled_error(r, x)


SHOWN = {"torch.sigmoid": torch.sigmoid, "torch.abs": torch.abs, "module": nn.Sigmoid(), "F.gelu": F.gelu}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo", "in_float64")
@pytest.mark.parametrize("kind", SHOWN)
def test_what_dynamo_shows_compiles_to_the_numbers_of_eager(kind: str) -> None:
    x = torch.randn(2, 4)
    r = ready(Gated(SHOWN[kind]), x)
    compiled = torch.compile(r.q.apply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(r.params, r.qparams, x), r(x))


# A module registered twice, tied weights


def test_after_a_gradient_a_module_registered_twice_runs_as_before() -> None:
    x, model = torch.randn(2, 64), Twice()
    r = ready(model, x)
    before = r(x)
    gradient = torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).sum())(r.params)
    assert gradient.keys() == {"a.weight", "a.bias"}
    same(r(x), before)
    same(ready(model, x, config=WATCHED)(x), model(x))


def test_no_tensor_of_a_run_stays_in_the_skeleton() -> None:
    x, model = torch.randn(2, 64), Twice()
    r = ready(model, x, config=WATCHED)
    torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).sum())(r.params)
    torch.func.vmap(lambda x: r.q.apply(r.params, r.qparams, x))(x[:, None])
    assert len(pickle.dumps(r.q)) < model.a.weight.nbytes
    same(copy.deepcopy(r.q).apply(r.params, r.qparams, x), model(x))


def test_the_gradient_of_a_module_registered_twice_is_that_of_the_plain_model() -> None:
    x, model = torch.randn(2, 64), Twice()
    r = ready(model, x, config=WATCHED)
    actual = torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).square().sum())(r.params)
    expected = torch.autograd.grad(model(x).square().sum(), [model.a.weight, model.a.bias])
    torch.testing.assert_close((actual["a.weight"], actual["a.bias"]), expected)


@pytest.mark.parametrize("name", ["a", "b"])
def test_each_path_of_a_shared_module_matches_a_rule(name: str) -> None:
    config = sq.QuantConfig(rules=(sq.Rule(name=name, weight=sq.override(bits=4)),))
    plan = sq.quantize(Twice(), config, example_args=torch.randn(2, 64)).plan
    assert [plan[n].scheme.bits for n in plan if plan.site(n).role == "weight"] == [4]


def test_tied_weights_have_one_quantizer_with_the_first_name() -> None:
    x, model = torch.randn(2, 4), TiedLayers()
    r = ready(model, x)
    assert [n for n in r.q.plan if n.endswith("weight_fake_quant")] == ["a.weight_fake_quant"]
    assert list(r.params) == ["a.bias", "a.weight", "b.bias"]
    w = rounded(r, "a.weight_fake_quant", model.a.weight)
    hidden = F.linear(rounded(r, "x.post_act_fake_quantizer", x), w, model.a.bias)
    same(r(x), F.linear(rounded(r, "a.post_act_fake_quantizer", hidden), w, model.b.bias))


def test_both_uses_of_a_tied_weight_add_to_its_gradient() -> None:
    x, model = torch.randn(2, 4), TiedLayers()
    r = ready(model, x, config=WATCHED)
    actual = torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).square().sum())(r.params)
    (expected,) = torch.autograd.grad(model(x).square().sum(), [model.a.weight])
    torch.testing.assert_close(actual["a.weight"], expected)


def test_an_embedding_tied_with_a_linear_layer_looks_up_quantized_rows() -> None:
    ids, model = torch.tensor([[0, 3, 6]]), TiedEmbedding()
    r = ready(model, ids)
    assert [n for n in r.q.plan if n.endswith("weight_fake_quant")] == ["embed.weight_fake_quant"]
    w = rounded(r, "embed.weight_fake_quant", model.embed.weight)
    assert not torch.equal(w, model.embed.weight)
    same(r(ids), F.linear(rounded(r, "tanh.post_act_fake_quantizer", torch.tanh(F.embedding(ids, w))), w))


def test_a_parameter_that_feeds_two_norms_is_quantized_once_and_unfolded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.conv(x)) + self.two(self.conv(x + 1))

    plan = ready(Shared().eval(), torch.randn(2, 2, 4, 4)).q.plan
    assert plan.site("conv.weight_fake_quant").norm == ""
    assert any("conv.weight" in note and "unfolded" in note for note in plan.notes)


# Threads and copies


def test_two_threads_share_one_quantized_model() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.full((2, 4), float(i)) for i in range(20)]
    r = ready(model, torch.randn(8, 4) * 20)
    expected = [r(x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(r, batches * 10))
    assert sum(not torch.equal(a, b) for a, b in zip(found, expected * 10, strict=True)) == 0


def test_threads_observe_each_into_their_own_states() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    batches = [torch.full((2, 4), float(i)) for i in range(20)]
    r = ready(model, batches[0])
    ostate = r.q.init(r.params)
    expected = [r.q.observe(r.params, ostate, x) for x in batches]
    with ThreadPoolExecutor(2) as pool:
        same(list(pool.map(lambda x: r.q.observe(r.params, ostate, x), batches * 5)), expected * 5)


def clone(q: sq.Quantized) -> sq.Quantized:
    return pickle.loads(pickle.dumps(q))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, clone, copy.copy], ids=["deepcopy", "pickle", "copy"])
def test_a_copy_quantizes(duplicate: Callable[[sq.Quantized], sq.Quantized]) -> None:
    model, x = ConvNet().eval(), torch.randn(2, 2, 5, 5)
    r = ready(model, x)
    other = duplicate(r.q)
    assert is_quantized(r, model, x)
    assert other.plan == r.q.plan
    same(other.apply(r.params, r.qparams, x), r(x))
    same(other.calibrate(r.params, [x]), r.qparams)


def test_a_copy_runs_beside_its_original() -> None:
    x = torch.randn(2, 64)
    r = ready(Twice(), x)
    other = r._replace(q=copy.deepcopy(r.q))
    expected = r(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda f: f(x), [r, other] * 20))


# In-place operations


def stale(step: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """``step`` changes its argument in place; what it returns is dropped, and the old name goes on."""

    def run(y: Tensor, x: Tensor) -> Tensor:
        step(y)
        return y

    return run


def both_names(y: Tensor, x: Tensor) -> Tensor:
    z = torch.relu_(y)
    return torch.matmul(z, y)


@pytest.mark.parametrize(
    "step",
    [
        stale(torch.relu_),
        stale(torch.Tensor.relu_),
        stale(lambda y: y.mul_(2)),
        stale(lambda y: y.clamp_(min=0)),
        stale(lambda y: operator.iadd(y, 1)),
        stale(lambda y: F.relu(y, inplace=True)),
        stale(lambda y: operator.setitem(y, 0, 0.0)),
        stale(lambda y: torch.add(y, 1, out=y)),
        both_names,
    ],
    ids=["relu_", "method", "mul_", "clamp_", "iadd", "inplace=True", "setitem", "out=", "both names"],
)
def test_the_old_name_of_a_planned_value_made_in_place_is_refused(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(sq.PlanError, match=r"in place.*old name.*Fix"):
        sq.quantize(InPlace(step), DEFAULT, example_args=torch.randn(4, 4))


def test_the_old_name_behind_a_module_in_place_is_refused() -> None:
    with pytest.raises(sq.PlanError, match="in place"):
        sq.quantize(InPlace(stale(nn.ReLU(inplace=True))), DEFAULT, example_args=torch.randn(4, 4))


def test_a_value_made_in_place_may_be_used_under_its_old_name_where_it_stays_float() -> None:
    model, x = InPlace(stale(torch.relu_)), torch.randn(4, 4)
    r = ready(model, x, config=sq.QuantConfig(activation=None))
    w = {name: rounded(r, f"{name}.weight_fake_quant", getattr(model, name).weight) for name in "ab"}
    same(r(x), F.linear(torch.relu(F.linear(x, w["a"], model.a.bias)), w["b"], model.b.bias))


def plus(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


@pytest.mark.parametrize(
    ("step", "pure"),
    [
        (plus, torch.add),
        (lambda y, x: y.relu_(), lambda y, x: torch.relu(y)),
        (lambda y, x: nn.ReLU(inplace=True)(y), lambda y, x: nn.ReLU()(y)),
        (lambda y, x: y.add_(x).mul_(2), lambda y, x: torch.mul(torch.add(y, x), 2)),
    ],
    ids=["iadd", "relu_", "module", "chain"],
)
def test_a_value_made_in_place_is_quantized_as_its_pure_twin(
    step: Callable[[Tensor, Tensor], Tensor], pure: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x, model = torch.randn(4, 4), InPlace(step)
    twin = InPlace(pure)
    twin.load_state_dict(model.state_dict())
    a, b = ready(model, x), ready(twin, x)
    assert a.q.plan == b.q.plan
    same(a(x), b(x))
    assert is_quantized(a, model, x)


# Names of states and parameters


def dropped(tree: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


METHODS: dict[str, Callable[[Ready, dict[str, Tensor], Tensor], Any]] = {
    "init": lambda r, p, x: r.q.init(p),
    "observe": lambda r, p, x: r.q.observe(p, r.q.init(r.params), x),
    "observe_quantized": lambda r, p, x: r.q.observe_quantized(p, r.q.init(r.params), r.qparams, x),
    "qparams": lambda r, p, x: r.q.qparams(p, r.q.init(r.params)),
    "calibrate": lambda r, p, x: r.q.calibrate(p, [x]),
    "apply": lambda r, p, x: r.q.apply(p, r.qparams, x),
    "apply_and_update": lambda r, p, x: r.q.apply_and_update(p, r.qparams, x),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_parameter_is_named(method: str) -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    with pytest.raises(sq.StateError, match=r"head\.bias"):
        METHODS[method](r, dropped(r.params, "head.bias"), x)


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_parameter_is_named(method: str) -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    with pytest.raises(sq.StateError, match=r"layer\.wieght"):
        METHODS[method](r, {**r.params, "layer.wieght": x}, x)


def test_a_misspelled_parameter_is_reported_with_the_right_name() -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    wrong = {**dropped(r.params, "layer.weight"), "layer.wieght": r.params["layer.weight"]}
    with pytest.raises(sq.StateError, match=r"(?s)'layer\.weight'.*'layer\.wieght'.*did you mean 'layer\.weight'"):
        r.q.apply(wrong, r.qparams, x)


@pytest.mark.parametrize("method", ["apply", "apply_and_update"])
def test_missing_qparams_are_not_calibrated(method: str) -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    name = "layer.post_act_fake_quantizer"
    with pytest.raises(sq.StateError, match=f"not calibrated: .*{name}"):
        getattr(r.q, method)(r.params, dropped(r.qparams, name), x)
    with pytest.raises(sq.StateError, match="not calibrated"):
        getattr(r.q, method)(r.params, {}, x)


def test_a_missing_state_is_named() -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    ostate = r.q.init(r.params)
    for call in (lambda s: r.q.observe(r.params, s, x), lambda s: r.q.qparams(r.params, s), lambda s: r.q.init(r.params, s)):
        with pytest.raises(sq.StateError, match=r"layer\.weight_fake_quant"):
            call(dropped(ostate, "layer.weight_fake_quant"))


def test_qparams_that_the_plan_has_not_are_named() -> None:
    x = torch.randn(2, 4)
    r = ready(Loop(), x)
    with pytest.raises(sq.StateError, match=r"haed\.weight_fake_quant.*did you mean 'head\.weight_fake_quant'"):
        r.q.apply(r.params, {**r.qparams, "haed.weight_fake_quant": r.qparams["head.weight_fake_quant"]}, x)


# Attention


def attention(**options: Any) -> nn.MultiheadAttention:
    model = nn.MultiheadAttention(8, 2, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return model


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


PADDING = torch.tensor([[False, False, True], [False, False, False]])


ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "boolean mask": ({}, {"attn_mask": causal(3)}),
    "causal": ({}, {"attn_mask": causal(3), "is_causal": True, "need_weights": False}),
    "mask of each head": ({}, {"attn_mask": torch.randn(4, 3, 3)}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False}, {}),
    "bias of keys": ({"add_bias_kv": True}, {}),
    "zero key": ({"add_zero_attn": True}, {"attn_mask": causal(3)}),
    "padding": ({}, {"key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_that_is_watched_is_the_original(kind: str) -> None:
    options, call = ATTENTIONS[kind]
    model, x = attention(**options), torch.randn(2, 3, 8) if options.get("batch_first") else torch.randn(3, 2, 8)
    torch.testing.assert_close(ready(model, x, x, x, config=WATCHED, **call)(x, x, x, **call), model(x, x, x, **call))


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 5}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention_that_is_watched_is_the_original(options: dict[str, Any], need_weights: bool) -> None:
    model, query = attention(**options), torch.randn(3, 2, 8)
    key, value = torch.randn(5, 2, options.get("kdim", 8)), torch.randn(5, 2, options.get("vdim", 8))
    watched = ready(model, query, key, value, config=WATCHED, need_weights=need_weights)
    actual = watched(query, key, value, need_weights=need_weights)
    torch.testing.assert_close(actual, model(query, key, value, need_weights=need_weights))


def test_attention_of_one_tensor_whose_query_stays_float_runs() -> None:
    model, x = attention(), torch.randn(3, 2, 8)
    r = ready(model, x, x, x, config=sq.QuantConfig(rules=(sq.Rule(name="query", activation=None),)))
    assert "query.post_act_fake_quantizer" not in r.q.plan
    torch.testing.assert_close(r(x, x, x), model(x, x, x), rtol=0, atol=0.1)


def test_attention_without_a_batch_axis_is_the_original() -> None:
    model, x = attention(), torch.randn(3, 8)
    torch.testing.assert_close(ready(model, x, x, x, config=WATCHED)(x, x, x), model(x, x, x))


def test_attention_quantizes_its_projections_and_products() -> None:
    model, x = attention(), torch.randn(3, 2, 8)
    r = ready(model, x, x, x)
    assert {"in_proj_weight_fake_quant", "out_proj.weight_fake_quant", "softmax.post_act_fake_quantizer"} <= r.q.plan.keys()
    (out, weights), (expected, expected_weights) = r(x, x, x), model(x, x, x)
    assert not torch.equal(out, expected)
    torch.testing.assert_close((out, weights), (expected, expected_weights), rtol=0, atol=0.1)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer_that_is_watched_is_the_original_and_quantized_otherwise(norm_first: bool, training: bool) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).train(training)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(ready(model, x, config=WATCHED)(x), model(x))
    r = ready(model, x)
    weights = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert {f"{name}_fake_quant" for name in weights} == {n for n in r.q.plan if r.q.plan.site(n).role == "weight"}
    torch.testing.assert_close(r(x), model(x), rtol=0, atol=0.3)
    assert is_quantized(r, model, x)


def test_an_encoder_in_eval_takes_no_fast_path_around_the_quantizers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        watched = ready(model, x, config=WATCHED, src_key_padding_mask=PADDING)
        torch.testing.assert_close(watched(x, src_key_padding_mask=PADDING), expected)
        r = ready(model, x, src_key_padding_mask=PADDING)
        assert not torch.equal(r(x, src_key_padding_mask=PADDING), expected)
        assert sum(r.q.plan.site(n).role == "weight" for n in r.q.plan) == 8


def test_a_whole_transformer_that_is_watched_is_the_original() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(ready(model, source, target, config=WATCHED)(source, target), model(source, target))


@pytest.mark.usefixtures("in_float64")
def test_gradients_pass_through_quantized_attention_under_vmap() -> None:
    model, x = attention(), torch.randn(3, 2, 8)
    r = ready(model, x, x, x)

    def loss(x: Tensor) -> Tensor:
        return r(x, x, x)[0].square().sum()

    many = torch.randn(3, 3, 2, 8)
    one_by_one = torch.stack([torch.func.grad(loss)(one) for one in many])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(many), one_by_one)


# Leaves


class Plain(nn.Linear):
    """Keeps the forward of its base."""


class Own(nn.Linear):
    """Has a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.weight, self.bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize(
    ("layer", "inside"),
    [(Plain(4, 4), ["0"]), (Own(4, 4), ["0.tanh", "0.linear"]), (Block(), ["0.inner", "0.tanh"])],
    ids=["inherited forward", "own forward", "container"],
)
def test_a_leaf_is_a_torch_module_that_keeps_its_forward(layer: nn.Module, inside: list[str]) -> None:
    assert list(sq.trace(nn.Sequential(layer), (torch.randn(2, 4),)).nodes) == ["input", *inside]


def test_a_leaf_type_is_not_looked_into() -> None:
    model, x = nn.Sequential(Block(), nn.Linear(4, 4, bias=False)), torch.randn(2, 4)
    assert list(sq.trace(model, (x,), leaf_module=(Block,)).nodes) == ["input", "0", "1"]
    r = ready(model, x, config=sq.QuantConfig(leaf_module=(Block,)))
    assert list(r.q.plan) == ["0.post_act_fake_quantizer", "1.weight_fake_quant"]
    w = rounded(r, "1.weight_fake_quant", model[1].weight)
    same(r(x), F.linear(rounded(r, "0.post_act_fake_quantizer", model[0](x)), w))


# Weights


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm])
def test_a_parametrized_weight_is_quantized_at_the_call(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = wrap(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    r = ready(nn.Sequential(layer), x)
    assert r.q.plan.site("0.weight_fake_quant").parameter == ""
    w = rounded(r, "0.weight_fake_quant", layer.weight)
    assert not torch.equal(w, layer.weight)
    torch.testing.assert_close(r(x), F.linear(rounded(r, "input.post_act_fake_quantizer", x), w, layer.bias))
    assert r.qparams["0.weight_fake_quant"].scale.shape == (4,)


def test_gradients_reach_what_a_parametrized_weight_is_computed_from() -> None:
    layer, x = parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)
    r = ready(layer, x)
    gradient = torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).square().sum())(r.params)
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in gradient.values())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_dead_batchnorm_channel_gives_no_nan(training: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).train(training)
    with torch.no_grad():
        model[1].weight[0] = 0
        model[1].bias.normal_()
    x = torch.randn(2, 2, 5, 5)
    r = ready(model, x, config=sq.QuantConfig(chip="BM1690"))
    assert r.q.plan.site("0.weight_fake_quant").norm == "1"
    learnable, rest = r.q.split(r.qparams)
    floats = {n: p for n, p in r.params.items() if p.is_floating_point()}
    others = {n: p for n, p in r.params.items() if n not in floats}

    def loss(floats: Any, learnable: Any, x: Tensor) -> Any:
        out, after = r.q.apply_and_update(floats | others, sq.merge(learnable, rest), x)
        return out.square().sum(), (out, after)

    gradients, (out, after) = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(floats, learnable, x)
    for tree in (gradients[0], gradients[1], {"x": gradients[2]}, {"out": out}, after):
        assert all(bool(t.isfinite().all()) for t in tree.values())
    assert bool(gradients[0]["0.weight"][1:].any())


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """The weight of a grouped transposed convolution, one row for each output channel."""
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(groups)])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_has_one_scale_for_each_output_channel(groups: int) -> None:
    model, x = nn.ConvTranspose2d(4, 6, 2, groups=groups), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        model.weight.mul_(torch.logspace(-2, 1, model.weight.numel()).reshape(model.weight.shape))
    r = ready(model, x)
    w, qp = outputs_first(model.weight, groups), r.qparams["weight_fake_quant"]
    torch.testing.assert_close(qp.scale, w.abs().amax((1, 2, 3)) / 127.5)
    grid = sq.fake_quantizer("learnable").apply(w, qp, sq.QScheme(granularity=sq.PerChannel(0)))
    back = torch.cat([part.transpose(0, 1) for part in grid.chunk(groups)])
    same(r(x), F.conv_transpose2d(rounded(r, "input.post_act_fake_quantizer", x), back, model.bias, groups=groups))


def test_a_batchnorm_behind_a_grouped_transposed_convolution_is_folded_by_output_channel() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.logspace(-1, 1, 6))
    r = ready(model, torch.randn(2, 4, 3, 3), config=sq.QuantConfig(chip="BM1690"))
    assert r.q.plan.site("0.weight_fake_quant").norm == "1"
    factor = model[1].weight / torch.sqrt(model[1].running_var + model[1].eps)
    folded = outputs_first(model[0].weight, 2) * factor[:, None, None, None]
    torch.testing.assert_close(r.qparams["0.weight_fake_quant"].scale, folded.abs().amax((1, 2, 3)) / 127.5)


# Tensors that are plain attributes


class Holder(nn.Module):
    """Uses its parameter through a list, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.held = [self.layer.weight]
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x) + self.constant, self.held[0])


def test_a_parameter_held_in_a_list_is_the_one_that_is_passed() -> None:
    x, model = torch.randn(2, 4), Holder()
    r = ready(model, x, config=WATCHED)
    same(r(x), model(x))
    zeros = {name: torch.zeros_like(p) for name, p in r.params.items()}
    same(r.q.apply(zeros, r.qparams, x), torch.zeros(2, 4))
    gradient = torch.func.grad(lambda p: r.q.apply(p, r.qparams, x).square().sum())(r.params)
    (expected,) = torch.autograd.grad(model(x).square().sum(), [model.layer.weight])
    torch.testing.assert_close(gradient["layer.weight"], expected)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.memory = nn.Linear(4, 4), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.memory += x.detach().sum(0)
        return self.layer(x) + self.memory


def test_writing_in_place_into_a_plain_attribute_says_to_register_a_buffer() -> None:
    with pytest.raises(sq.PlanError, match=r"Remembers.*register_buffer"):
        sq.trace(Remembers(), (torch.randn(2, 4),))


def test_an_optional_value_that_calibration_never_saw_is_an_error_when_a_run_reaches_it() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            x = self.layer(x)
            return torch.tanh(x) @ x.mT if again else x

    model, x = Branch(), torch.randn(2, 4)
    config = sq.QuantConfig(rules=(sq.Rule(name="tanh", optional=True), sq.Rule(name="layer", optional=True)))
    q = sq.quantize(model, config, examples=[((x,), {}), ((x, True), {})])
    params = sq.params_of(model)
    qparams = q.calibrate(params, [x])
    assert bool(q.apply(params, qparams, x).isfinite().all())
    with pytest.raises(sq.StateError, match=r"tanh.post_act_fake_quantizer is optional and has seen no data"):
        q.apply(params, qparams, x, True)


# Tensors that reach a call past params


def _calls(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


class InPlain:
    """An object that is copied as it is."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __deepcopy__(self, memo: object) -> InPlain:
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Escaping(nn.Module):
    """Calls its layers through a function that holds them."""

    def __init__(self, holds: Callable[[nn.Module], Callable[[Tensor], Tensor]], layer: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), layer
        self.head = holds(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x))


HOLDERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "a closure": _calls,
    "a default argument": lambda layer: lambda x, layer=layer: layer(x),
    "an object that is not copied": InPlain,
    "a list in a closure": lambda layer: (lambda layers: lambda x: layers[0](x))([layer]),
    "a function with its parameter": lambda layer: (lambda weight: lambda x: x @ weight)(next(layer.parameters())),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.BatchNorm1d(4)])
def test_a_layer_that_a_function_holds_is_refused_before_it_is_called(holder: str, layer: nn.Module) -> None:
    if holder == "a function with its parameter" and isinstance(layer, nn.BatchNorm1d):
        pytest.skip("its parameter is no matrix")
    model = Escaping(HOLDERS[holder], layer)
    with unchanged(model), pytest.raises(sq.PlanError, match=r"b\..* reach this call past params"):
        sq.quantize(model, DEFAULT, example_args=(torch.randn(2, 4),))


def test_a_layer_in_a_partial_or_a_bound_method_is_the_copy_and_reads_params() -> None:
    x, layer = torch.randn(2, 4), nn.Linear(4, 4)
    for holds in (lambda layer: partial(nn.Linear.forward, layer), lambda layer: layer.forward):
        r = ready(Escaping(holds, layer), x)
        zeros = {name: torch.zeros_like(value) for name, value in r.params.items()}
        assert r.q.apply(zeros, r.qparams, x).abs().max() == 0
