"""Models of all shapes: what they may take, do and return."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.pytree import leaves, tensors
from tests.helpers import DEFAULT, FLOAT, WATCHED, Ready, ready, same

BM1690 = sq.QuantConfig(chip="BM1690")


def weights(plan: sq.Plan) -> list[str]:
    return [name for name in plan if plan.site(name).role == "weight"]


def activations(plan: sq.Plan) -> list[str]:
    return [name.removesuffix(".post_act_fake_quantizer") for name in plan if plan.site(name).role == "activation"]


def on_grid(r: Ready, name: str, x: Tensor) -> Tensor:
    """``x`` as the quantizer of a value or weight represents it."""
    full = name if name in r.q.plan else f"{name}.post_act_fake_quantizer"
    return r.q.quantize_value(full, x, r.qparams[full])


# One model of each kind, and an input


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.b(self.relu(torch.tanh(self.a(x))) + x) * x))


class ByShape(nn.Module):
    """As many layers as the input has steps, at most three."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, step in zip(self.layers, x.unbind(1), strict=False):
            x = x + layer(step).unsqueeze(1)
        return x if x.dim() == 3 else x[None]


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if x.sum() > 0 else self.down(-x)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, shift: Tensor | None = None, negate: bool = False, **rest: Tensor) -> Tensor:
        y = self.layer(x) if shift is None else self.layer(x) + self.layer(shift)
        for other in rest.values():
            y = y @ other
        return -y if negate else y


@dataclasses.dataclass
class Output:
    """What some models return."""

    logits: Tensor
    hidden: Tensor | None = None


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Returns(nn.Module):
    """Wraps its result and an inner value up in ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(4, 4), nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x)
        return self.wrap(self.b(torch.relu(hidden)), hidden)


class Takes(nn.Module):
    """Multiplies all tensors that it finds in its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        first, *others = [self.layer(tensor) for tensor in leaves((args, kwargs))]
        for other in others:
            first = first * other
        return first


class Functional(nn.Module):
    """Parameters and functions of torch, no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((4, 4), (4, 3), (4,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.w, self.b)) @ self.v


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, cls: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(7, 4), cls(4, 5, batch_first=True, **options)
        self.head = nn.Linear(self.rnn.hidden_size * (1 + self.rnn.bidirectional), 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


def two_convolutions(conv: Callable[..., nn.Module], norm: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 2, 1))


def images(*shape: int) -> Tensor:
    return torch.randn(2, 2, *shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "reused": (Reused, lambda: torch.randn(2, 4)),
    "control flow on shapes": (ByShape, lambda: torch.randn(2, 2, 4)),
    "control flow on values": (ByValue, lambda: torch.rand(2, 4)),
    "functional": (Functional, lambda: torch.randn(2, 4)),
    "batchnorm": (Normed, lambda: images(5, 5)),
    "conv1d": (lambda: two_convolutions(nn.Conv1d, nn.BatchNorm1d), lambda: images(6)),
    "conv3d": (lambda: two_convolutions(nn.Conv3d, nn.BatchNorm3d), lambda: images(3, 3, 3)),
    "lstm": (Recurrent, lambda: torch.tensor([[0, 3, 6], [1, 2, 5]])),
    "two-layer bidirectional lstm": (lambda: Recurrent(num_layers=2, bidirectional=True), lambda: torch.tensor([[0, 3, 6]])),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.tensor([[0, 3, 6]])),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)), lambda: torch.randn(2, 4)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), lambda: torch.randn(2, 3, 4)),
    "root linear": (lambda: nn.Linear(4, 3), lambda: torch.randn(2, 4)),
}


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return call()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_with_an_empty_plan_a_model_is_itself_bit_for_bit(kind: str, training: bool) -> None:
    make, example = MODELS[kind]
    model, x = make().train(training).requires_grad_(False), example()
    r = ready(model, x, config=FLOAT)
    assert (list(r.q.plan), r.qparams) == ([], {})
    assert r.q.plan.table() == "nothing is quantized"
    same(seeded(lambda: r(x)), seeded(lambda: copy.deepcopy(model)(x)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_whose_quantizers_only_observe_is_itself(kind: str, training: bool) -> None:
    make, example = MODELS[kind]
    model, x = make().train(training), example()
    r = ready(model, x, config=WATCHED)
    assert len(r.q.plan) >= 2
    torch.testing.assert_close(seeded(lambda: r(x)), seeded(lambda: copy.deepcopy(model)(x)))


@pytest.mark.parametrize("config", [DEFAULT, BM1690], ids=["no chip", "BM1690"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantized_model_is_near_the_original_and_not_equal(kind: str, config: sq.QuantConfig) -> None:
    make, example = MODELS[kind]
    model, x = make().eval(), example()
    r, expected = ready(model, x, config=config), model(x).detach()
    out = r(x)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert 0 < float((out - expected).norm()) < 0.1 * float(expected.norm())


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_reach_every_parameter_that_the_original_uses(kind: str) -> None:
    make, example = MODELS[kind]
    model, x = make().eval(), example()
    r = ready(model, x)
    floats = {n: p for n, p in r.params.items() if n in dict(model.named_parameters())}
    gradient = torch.func.grad(lambda p: r.q.apply({**r.params, **p}, r.qparams, x).square().sum())(floats)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        used = parameter.grad is not None and bool(parameter.grad.abs().max() > 1e-5)
        assert not used or bool(gradient[name].any()), name
        assert bool(gradient[name].isfinite().all()), name


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("kind", ["reused", "functional", "batchnorm", "conv1d", "conv3d", "lstm", "encoder", "root linear"])
def test_the_batch_size_may_change(kind: str) -> None:
    make, example = MODELS[kind]
    model, x = make().eval(), example()
    r = ready(model, x)
    for batch in (torch.cat([x, x, x]), x[:1]):
        torch.testing.assert_close(r(batch)[:1], r(x)[:1])
        assert len(r(batch)) == len(batch)
    assert r.q.calibrate(r.params, [x, x[:1]]).keys() == r.qparams.keys()


# Names of calls


def test_a_module_called_twice_names_its_values_by_call() -> None:
    graph = sq.trace(Reused(), (torch.randn(2, 4),))
    assert list(graph.nodes) == ["x", "a", "tanh", "relu", "add", "b", "mul", "relu_1", "b_1"]
    plan = sq.quantize(Reused(), DEFAULT, example_args=torch.randn(2, 4)).plan
    assert weights(plan) == ["a.weight_fake_quant", "b.weight_fake_quant"]
    assert activations(plan) == ["x", "relu", "add", "b", "relu_1"]


def test_calls_inside_a_module_are_named_after_it() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.relu(x - 1) + x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = nn.Sequential(Inner(), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer1(self.layer1(x)) + x)

    first = ["layer1.0.sub", "layer1.0.relu", "layer1.0.add", "layer1.0.relu_1", "layer1.1"]
    second = ["layer1.0.sub_1", "layer1.0.relu_2", "layer1.0.add_1", "layer1.0.relu_3", "layer1.1_1"]
    assert list(sq.trace(Outer(), (torch.randn(2, 4),)).nodes) == ["x", *first, *second, "add", "relu"]


def test_a_function_does_not_take_the_name_of_a_module() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(torch.relu(x) - 1)

    assert list(sq.trace(Clash(), (torch.randn(2, 4),)).nodes) == ["x", "relu_1", "sub", "relu"]


def test_each_call_of_a_module_has_a_scale_of_its_own() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.layer = nn.SiLU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.act(x)) + self.layer(self.act(x - 100))

    r = ready(Doubles(), torch.randn(2, 4))
    scales = [float(r.qparams[f"{name}.post_act_fake_quantizer"].scale) for name in ("act", "act_1")]
    assert scales[0] > 1e-3 > scales[1]


SPELLINGS: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {
    "add": [torch.add, Tensor.add, lambda a, b: a + b, lambda a, b: b.__radd__(a), lambda a, b: a.add_(b)],
    "mul": [torch.mul, torch.multiply, Tensor.mul, lambda a, b: a * b],
    "sub": [torch.sub, torch.subtract, lambda a, b: a - b],
    "div": [torch.div, torch.true_divide, lambda a, b: a / b],
    "matmul": [torch.matmul, Tensor.matmul, lambda a, b: a @ b],
    "sigmoid": [lambda a, b: torch.sigmoid(a), lambda a, b: F.sigmoid(a), lambda a, b: a.sigmoid_()],
    "relu": [lambda a, b: torch.relu(a), lambda a, b: a.relu(), lambda a, b: F.relu(a), lambda a, b: torch.relu_(a)],
    "cat": [lambda a, b: torch.cat([a, b]), lambda a, b: torch.concat([a, b]), lambda a, b: torch.concatenate([a, b])],
    "clamp": [lambda a, b: a.clamp(0), lambda a, b: torch.clip(a, 0), lambda a, b: torch.clamp(a, min=0)],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_operation_has_one_name_however_it_is_spelled(name: str) -> None:
    class Spelled(nn.Module):
        def __init__(self, spelling: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.spelling = spelling

        def forward(self, x: Tensor) -> Tensor:
            return self.spelling(torch.exp(x), torch.cos(x))

    for spelling in SPELLINGS[name]:
        assert list(sq.trace(Spelled(spelling), (torch.randn(4, 4),)).nodes)[-1] == name


# Control flow


@pytest.mark.parametrize("steps", [2, 3])
def test_control_flow_on_shapes_runs_as_the_example_did(steps: int) -> None:
    model, x = ByShape(), torch.randn(2, steps, 4)
    r = ready(model, x)
    assert weights(r.q.plan) == [f"layers.{i}.weight_fake_quant" for i in range(steps)]
    torch.testing.assert_close(r(x), model(x), rtol=0, atol=0.1)


def test_control_flow_on_values_that_goes_another_way_is_an_error() -> None:
    x = torch.rand(2, 4)
    r = ready(ByValue(), x, config=BM1690)
    with pytest.raises(sq.StateError, match="up"):
        r(-x)


def test_control_flow_on_values_goes_both_ways_with_two_examples() -> None:
    model, x = ByValue(), torch.rand(2, 4)
    q, params = sq.quantize(model, BM1690, examples=[((x,), None), ((-x,), None)]), sq.params_of(model)
    qparams = q.calibrate(params, [x, -x])
    assert weights(q.plan) == ["up.weight_fake_quant", "down.weight_fake_quant"]
    for batch in (x, -x):
        out, expected = q.apply(params, qparams, batch), model(batch)
        assert not torch.equal(out, expected)
        torch.testing.assert_close(out, expected, rtol=0, atol=0.1)


# Arguments


def test_keyword_arguments_reach_the_model() -> None:
    model, x, shift, m = Keywords(), torch.randn(2, 4), torch.randn(2, 4), torch.randn(4, 4)
    r = ready(model, x, config=WATCHED, shift=shift, m=m)
    same(r(x, shift=shift, m=m, negate=True), model(x, shift=shift, m=m, negate=True))
    assert {"x", "shift", "m"} <= set(activations(r.q.plan))
    same(r.q.calibrate(r.params, [{"x": x, "shift": shift, "m": m}]), r.qparams)


def test_an_argument_may_be_given_by_position_or_by_name() -> None:
    x = torch.randn(2, 4)
    r = ready(Keywords(), x)
    same(r(x=x), r(x))
    assert activations(r.q.plan) == ["x"]


def test_an_argument_that_the_example_had_and_a_run_has_not_is_named() -> None:
    x = torch.randn(2, 4)
    r = ready(Keywords(), x, shift=x + 1)
    with pytest.raises(sq.StateError, match="shift"):
        r(x)


NESTED = {
    "dict": (({"a": torch.randn(2, 4), "b": torch.randn(2, 4)},), {}, ["args.0.a", "args.0.b"]),
    "nested tuple": (((torch.randn(2, 4), (torch.randn(2, 4),)),), {}, ["args.0.0", "args.0.1.0"]),
    "list": (([torch.randn(2, 4), torch.randn(2, 4)],), {}, ["args.0.0", "args.0.1"]),
    "named tuple": ((Pair(torch.randn(2, 4), torch.randn(2, 4)),), {}, ["args.0.logits", "args.0.hidden"]),
    "keyword dict": ((), {"x": {"y": [torch.randn(2, 4)]}}, ["x.y.0"]),
    "several": ((torch.randn(2, 4), torch.randn(2, 4)), {"z": torch.randn(2, 4)}, ["args.0", "args.1", "z"]),
    "ordered dict": ((OrderedDict(b=torch.randn(2, 4), a=torch.randn(2, 4)),), {}, ["args.0.b", "args.0.a"]),
}


@pytest.mark.parametrize("kind", NESTED)
def test_tensors_inside_arguments_are_inputs_named_by_their_place(kind: str) -> None:
    args, kwargs, names = NESTED[kind]
    model = Takes()
    q, params = sq.quantize(model, DEFAULT, example_args=args, example_kwargs=kwargs), sq.params_of(model)
    assert [name for name in activations(q.plan) if "layer" not in name and "mul" not in name] == names
    _, ostate = q.observe(params, q.init(params), *args, **kwargs)
    out, expected = q.apply(params, q.qparams(params, ostate), *args, **kwargs), model(*args, **kwargs)
    assert not torch.equal(out, expected)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.1)


def test_a_dict_as_the_only_argument_is_passed_in_a_tuple() -> None:
    class FromDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.layer(batch["x"])

    model, batch = FromDict(), {"x": torch.randn(2, 4)}
    q, params = sq.quantize(model, DEFAULT, example_args=(batch,)), sq.params_of(model)
    assert activations(q.plan) == ["batch.x"]
    same(q.calibrate(params, [(batch,)]), q.calibrate(params, [{"batch": batch}]))


def test_inputs_that_are_no_floating_tensors_are_not_quantized() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, rows: Tensor, mask: Tensor, scale: float) -> Tensor:
            return self.layer(x[rows]).masked_fill(mask, 0.0) * scale

    x, rows, mask = torch.randn(3, 4), torch.tensor([2, 0]), torch.tensor([[True], [False]])
    r = ready(Picks(), x, rows, mask, 2.0, config=BM1690)
    assert not {"rows", "mask"} & set(activations(r.q.plan))
    assert not bool(r(x, rows, mask, 2.0)[0].any())


class Product(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b.mT


def test_one_tensor_given_as_two_arguments_is_quantized_in_both() -> None:
    x = torch.randn(3, 4)
    r = ready(Product(), x, x)
    x_on_grid = on_grid(r, activations(r.q.plan)[0], x)
    same(r(x, x), x_on_grid @ x_on_grid.mT)


def test_two_tensors_where_the_example_had_one_are_not_half_quantized() -> None:
    x = torch.randn(3, 4)
    r = ready(Product(), x, x)
    with pytest.raises(sq.StateError, match=r"'b'.*Fix"):
        r(x, x + 1)


def test_one_tensor_where_the_example_had_two_is_quantized_as_each() -> None:
    x = torch.randn(3, 4)
    r = ready(Product(), x, 2 * x)
    same(r(x, x), on_grid(r, "a", x) @ on_grid(r, "b", x).mT)


# Results


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda out, hidden: (out, hidden),
    "list": lambda out, hidden: [out, None, hidden],
    "dict": lambda out, hidden: {"out": out, "hidden": (hidden, 5, "text")},
    "named tuple": Pair,
    "dataclass": Output,
    "dataclass with None": lambda out, hidden: Output(out),
    "ordered dict": lambda out, hidden: OrderedDict(z=out, a=hidden),
    "nested": lambda out, hidden: ({"a": [out]}, Pair(out, hidden)),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_a_result_keeps_its_structure(kind: str) -> None:
    model, x = Returns(WRAPS[kind]), torch.randn(2, 4)
    expected, watched, out = model(x), ready(model, x, config=WATCHED)(x), ready(model, x, config=BM1690)(x)
    assert type(out) is type(watched) is type(expected)
    torch.testing.assert_close(tensors(watched), tensors(expected))
    assert not torch.equal(tensors(out)[0], tensors(expected)[0])
    torch.testing.assert_close(tensors(out), tensors(expected), rtol=0, atol=0.1)


def test_a_result_inside_a_dataclass_counts_as_one_of_the_model() -> None:
    plans = [sq.quantize(Returns(WRAPS[k]), BM1690, example_args=torch.randn(2, 4)).plan for k in ("tuple", "dataclass")]
    assert plans[0] == plans[1]


def test_a_call_that_returns_several_tensors_is_quantized_in_each() -> None:
    class Extremes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            low, high = torch.aminmax(x, dim=1)
            return low * high

    x = torch.randn(3, 4)
    r = ready(Extremes(), x)
    assert activations(r.q.plan) == ["aminmax.0", "aminmax.1"]
    same(r(x), on_grid(r, "aminmax.0", x.amin(1)) * on_grid(r, "aminmax.1", x.amax(1)))


# BatchNorm and Dropout in training


def settle(model: nn.Module, x: Tensor) -> None:
    """Let the running statistics come near those of ``x``."""
    for _ in range(20):
        model(x)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_returns_the_statistics_of_the_quantized_model(momentum: float | None) -> None:
    model, x = Normed().train(), images(5, 5)
    model.bn.momentum = momentum
    settle(model, x)
    r = ready(model, x, config=DEFAULT)
    params, twin = r.params, copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(3):
            _, params = r.q.apply_and_update(params, r.qparams, x)
            twin(x)
    assert int(params["bn.num_batches_tracked"]) == int(r.params["bn.num_batches_tracked"]) + 3
    for name in ("bn.running_mean", "bn.running_var"):
        assert not torch.equal(params[name], r.params[name])
        torch.testing.assert_close(params[name], twin.get_buffer(name), rtol=0.02, atol=0.02)
    same([params[n] for n, _ in model.named_parameters()], [r.params[n] for n, _ in model.named_parameters()])


def test_training_without_quantizers_returns_the_statistics_of_the_model() -> None:
    model, x = Normed().train(), images(5, 5)
    for config in (FLOAT, WATCHED):
        r, twin = ready(model, x, config=config), copy.deepcopy(model)
        out, after = r.q.apply_and_update(r.params, r.qparams, x)
        torch.testing.assert_close(out, twin(x))
        torch.testing.assert_close(after, sq.params_of(twin))


def test_in_eval_no_statistics_change() -> None:
    model, x = Normed().eval(), images(5, 5)
    r = ready(model, x, config=BM1690)
    same(r.q.apply_and_update(r.params, r.qparams, x)[1], r.params)


def test_the_modes_of_training_and_eval_differ_as_in_the_model() -> None:
    model, x = Normed().eval(), images(5, 5)
    r = ready(model, x, config=WATCHED)
    torch.testing.assert_close(r.q.train().apply(r.params, r.qparams, x), copy.deepcopy(model).train()(x))
    torch.testing.assert_close(r.q.train().eval().apply(r.params, r.qparams, x), model(x))


def test_frozen_statistics_stay_frozen_beside_others_in_training() -> None:
    model, x = nn.Sequential(Normed(), nn.BatchNorm1d(3)).train(), images(5, 5)
    model[0].bn.eval()
    r = ready(model, x, config=BM1690)
    _, after = r.q.apply_and_update(r.params, r.qparams, x)
    same(after["0.bn.running_mean"], r.params["0.bn.running_mean"])
    assert not torch.equal(after["1.running_mean"], r.params["1.running_mean"])


def test_dropout_drops_in_training_and_only_there() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2)).train(), torch.randn(2, 64)
    r = ready(model, x)
    assert not torch.equal(r(x), r(x))
    same(seeded(lambda: r(x)), seeded(lambda: r(x)))
    calm = r._replace(q=r.q.eval())
    same(calm(x), calm(x))


def test_gradients_of_a_batch_of_examples_draw_their_own_dropout() -> None:
    model, x = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 2)).train(), torch.ones(3, 1, 4)
    r = ready(model, x[0])
    out = torch.vmap(r, randomness="different")(x)
    assert not torch.equal(out[0], out[1])


# Kinds of layers


@pytest.mark.parametrize(("kind", "names"), [("conv1d", ["0", "3"]), ("conv3d", ["0", "3"])])
def test_convolutions_of_other_dimensions_fold_their_norms_and_quantize_by_channel(kind: str, names: list[str]) -> None:
    make, example = MODELS[kind]
    model, x = make().eval(), example()
    r = ready(model, x)
    assert weights(r.q.plan) == [f"{name}.weight_fake_quant" for name in names]
    assert r.q.plan.site("0.weight_fake_quant").norm == "1"
    assert r.qparams["0.weight_fake_quant"].scale.shape == (4,)


def test_a_recurrent_layer_quantizes_each_of_its_weights() -> None:
    make, example = MODELS["two-layer bidirectional lstm"]
    model, ids = make(), example()
    r = ready(model, ids)
    own = {f"rnn.{name}_fake_quant" for name, _ in model.rnn.named_parameters() if name.startswith("weight")}
    assert len(own) == 8
    assert own <= set(weights(r.q.plan))


def test_parameters_used_by_functions_are_quantized_by_output_channel() -> None:
    model, x = Functional(), torch.randn(2, 4)
    r = ready(model, x)
    assert weights(r.q.plan) == ["w_fake_quant", "v_fake_quant"]
    torch.testing.assert_close(r.qparams["w_fake_quant"].scale, model.w.detach().abs().amax(1) / 127.5)
    torch.testing.assert_close(r.qparams["v_fake_quant"].scale, model.v.detach().abs().amax(0) / 127.5)
    hidden = torch.tanh(F.linear(on_grid(r, "x", x), on_grid(r, "w_fake_quant", model.w), model.b))
    same(r(x), on_grid(r, "tanh", hidden) @ on_grid(r, "v_fake_quant", model.v))


def test_a_model_without_anything_to_quantize_has_an_empty_plan() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.ReLU()), torch.randn(2, 2, 2)
    r = ready(model, x)
    assert len(r.q.plan) == 0
    same(r(x), model(x))


@pytest.mark.parametrize("half", ["weight", "activation"])
def test_half_a_plan_leaves_the_other_half_float(half: str) -> None:
    model, x = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    r = ready(model, x, config=sq.QuantConfig(**{half: None}))
    assert (len(weights(r.q.plan)), len(activations(r.q.plan))) == ((0, 1) if half == "weight" else (1, 0))
    if half == "weight":
        same(r(x), F.linear(on_grid(r, "input", x), model.weight))
    else:
        same(r(x), F.linear(x, on_grid(r, "weight_fake_quant", model.weight)))


# Number types


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)


@HALVES
@pytest.mark.parametrize("config", [DEFAULT, BM1690], ids=["no chip", "BM1690"])
@pytest.mark.parametrize("kind", ["root linear", "batchnorm", "conv1d", "encoder", "functional"])
def test_a_model_of_another_number_type_keeps_it(kind: str, config: sq.QuantConfig, dtype: torch.dtype) -> None:
    make, example = MODELS[kind]
    model, x = make().eval().to(dtype), example().to(dtype)
    r, expected = ready(model, x, config=config), model(x).detach()
    out = r(x)
    assert out.dtype == dtype
    assert 0 < float((out - expected).float().norm()) < 0.1 * float(expected.float().norm())
    assert {qp.scale.dtype for qp in r.qparams.values()} == {torch.float32}
    _, ostate = r.q.observe(r.params, r.q.init(r.params), x)
    assert {t.dtype for t in leaves(ostate) if t.is_floating_point()} == {torch.float32}


@HALVES
def test_training_keeps_the_number_types_of_buffers(dtype: torch.dtype) -> None:
    model, x = Normed().train().to(dtype), images(5, 5).to(dtype)
    r = ready(model, x, config=BM1690)
    _, after = r.q.apply_and_update(r.params, r.qparams, x)
    assert {n: p.dtype for n, p in after.items()} == {n: p.dtype for n, p in r.params.items()}


@HALVES
def test_an_input_of_another_number_type_comes_back_in_it(dtype: torch.dtype) -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) @ x.mT

    x = torch.randn(3, 4).to(dtype)
    r = ready(Scores(), x)
    assert r(x).dtype == dtype
    torch.testing.assert_close(r(x), x.relu() @ x.mT, rtol=0, atol=0.1)


def test_a_model_calibrated_in_float_runs_in_half() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    r = ready(model, x)
    half = r.q.apply({n: p.half() for n, p in r.params.items()}, r.qparams, x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), r(x), rtol=0, atol=0.05)


def test_autocast_runs_the_quantized_model_in_half() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    r = ready(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        out = r(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), r(x), rtol=0, atol=0.05)
