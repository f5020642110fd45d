"""Functions of a tree of params as models: the same plan and numbers as a module, in the tree that the function takes."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree
from torch.utils._pytree import tree_leaves, tree_map

import sophq_func as sq
from sophq_func.core.pytree import named_leaves
from tests.helpers import DEFAULT, NEEDS_ATTRIBUTES, Ready, same, unchanged

Tree = Any


class Affine(NamedTuple):
    w: Tensor
    b: Tensor


@dataclass
class Block:
    w: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    w: Tensor
    b: Tensor


@dataclass
class Registered:
    w: Tensor
    b: Tensor


_pytree.register_dataclass(Registered)


def mlp(params: Tree, x: Tensor) -> Tensor:
    return torch.tanh(x @ params["l1"]["w"] + params["l1"]["b"]) @ params["head"][0]


def mlp_params(dtype: torch.dtype = torch.float32) -> Tree:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype) * 0.4

    return {"l1": {"w": normal(6, 16), "b": normal(16)}, "head": [normal(16, 3)]}


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)


def ready(f: Callable[..., Any], params: Tree, *args: Tensor, config: sq.QuantConfig = DEFAULT) -> Ready:
    """A function, planned and calibrated on one call."""
    q = sq.quantize(f, config, params=params, example_args=args)
    return Ready(q, params, q.calibrate(params, [args], progress=False))


class Mlp(nn.Module):
    """The module that :func:`mlp` is written from."""

    def __init__(self) -> None:
        super().__init__()
        params = mlp_params()
        self.l1, self.head = nn.ParameterDict(params["l1"]), nn.ParameterList(params["head"])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.l1["w"] + self.l1["b"]) @ self.head[0]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.ParameterDict(self.weights(4, 2, 3, 3)), nn.ParameterDict(self.weights(3, 4, 1, 1))

    @staticmethod
    def weights(*shape: int) -> dict[str, Tensor]:
        return {"w": torch.randn(shape), "b": torch.randn(shape[0])}

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(torch.relu(F.conv2d(x, self.stem["w"], self.stem["b"])), self.last["w"], self.last["b"]).mean((2, 3))


def convolutions(params: Tree, x: Tensor) -> Tensor:
    stem, last = params["stem"], params["last"]
    return F.conv2d(torch.relu(F.conv2d(x, stem.w, stem.b)), last.w, last.b).mean((2, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ParameterDict({name: torch.randn(6, 6) for name in "qkv"}) for _ in range(2)])  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = (F.linear(x, layer[name]) for name in "qkv")
            x = x + torch.softmax(torch.einsum("bqd,bkd->bqk", q, k), -1) @ v
        return x


def attention(params: Tree, x: Tensor) -> Tensor:
    for layer in params:
        q, k, v = (F.linear(x, layer[name]) for name in "qkv")
        x = x + torch.softmax(torch.einsum("bqd,bkd->bqk", q, k), -1) @ v
    return x


# Modules, the functions that they are, and their params as the functions take them.
TWINS: dict[str, tuple[nn.Module, Callable[..., Any], Tree, Tensor]] = {
    "nested dicts and a list": (Mlp(), mlp, mlp_params(), batch()),
    "dataclasses": (
        Convolutions(),
        convolutions,
        {name: Kernel(p["w"].detach(), p["b"].detach()) for name, p in Convolutions().named_children()},
        torch.randn(2, 2, 5, 5),
    ),
    "a list of dicts": (
        Attention(),
        attention,
        [{name: layer[name].detach() for name in "qkv"} for layer in Attention().layers],
        torch.randn(2, 4, 6),
    ),
}
over_twins = pytest.mark.parametrize(("model", "f", "params", "x"), TWINS.values(), ids=TWINS)
CONFIGS = {
    "default": DEFAULT,
    "4 bits": sq.QuantConfig(weight=sq.override(bits=4), activation=sq.override(bits=4)),
    "weights alone": sq.QuantConfig(weight=sq.override(bits=3, granularity=sq.PerChannel()), activation=None),
}


@over_twins
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_function_has_the_plan_and_the_numbers_of_its_module(
    model: nn.Module, f: Callable[..., Any], params: Tree, x: Tensor, config: sq.QuantConfig
) -> None:
    r = ready(f, params, x, config=config)
    q = sq.quantize(model, config, example_args=(x,))
    assert [(c.scheme, c.observer, c.fake_quantize) for c in r.q.plan.values()] == [
        (c.scheme, c.observer, c.fake_quantize) for c in q.plan.values()
    ]
    assert [s.axis for s in map(r.q.plan.site, r.q.plan)] == [s.axis for s in map(q.plan.site, q.plan)]
    qparams = q.calibrate(sq.params_of(model), [x], progress=False)
    same([r.qparams[name].scale for name in r.q.plan], [qparams[name].scale for name in q.plan])
    same(r(x), q.apply(sq.params_of(model), qparams, x).detach())


def rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with a straight-through gradient inside the range, written by hand."""
    high = 2 ** (bits - 1)
    q = torch.round(x / scale)
    inside = (q >= -high) & (q <= high - 1)
    return scale * torch.where(inside, x / scale + (q - x / scale).detach(), q.clamp(-high, high - 1))


def test_values_and_gradients_are_those_of_the_function_written_by_hand() -> None:
    half = sq.override(
        bits=4, symmetric=True, granularity=sq.PerTensor(), fake_quantize=sq.fake_quantize.learnable(use_grad_scaling=False)
    )
    params, x = mlp_params(torch.float64), batch(torch.float64)
    r = ready(mlp, params, x, config=sq.QuantConfig(weight=half, activation=half))
    assert list(r.q.plan) == [
        "x.post_act_fake_quantizer",
        "l1.w_fake_quant",
        "tanh.post_act_fake_quantizer",
        "head.0_fake_quant",
    ]
    s = {name: entry.scale.double() for name, entry in r.qparams.items()}
    qparams = {name: entry._replace(scale=s[name]) for name, entry in r.qparams.items()}

    def by_hand(p: Tree) -> Tensor:
        h = rounded(x, s["x.post_act_fake_quantizer"], 4) @ rounded(p["l1"]["w"], s["l1.w_fake_quant"], 4) + p["l1"]["b"]
        h = rounded(torch.tanh(h), s["tanh.post_act_fake_quantizer"], 4)
        return h @ rounded(p["head"][0], s["head.0_fake_quant"], 4)

    def loss(run: Callable[[Tree], Tensor]) -> Callable[[Tree], Tensor]:
        return lambda p: run(p).square().mean()

    # float64 on both sides, with the same operations in another order
    torch.testing.assert_close(r.q.apply(params, qparams, x), by_hand(params), rtol=1e-12, atol=1e-12)
    gradients = grad(loss(lambda p: r.q.apply(p, qparams, x)))(params)
    torch.testing.assert_close(gradients, grad(loss(by_hand))(params), rtol=1e-10, atol=1e-12)
    assert (type(gradients["l1"]), type(gradients["head"])) == (dict, list)


def test_stacked_params_under_vmap_are_the_loop_over_their_members() -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)
    members = [tree_map(lambda t, c=c: t * c, r.params) for c in (1.0, 0.9, 0.5)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *members)
    expected = torch.stack([r.q.apply(member, r.qparams, x) for member in members])
    # one product of three instead of three: sums in another order
    torch.testing.assert_close(vmap(lambda p: r.q.apply(p, r.qparams, x))(stacked), expected, rtol=1e-5, atol=1e-5)


def test_meta_learning_goes_through_tasks_and_steps() -> None:
    """MAML: a gradient through a step of gradient descent, for several tasks at once."""
    params, x = mlp_params(torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    y = torch.randn(4, 5, 3, dtype=torch.float64)
    r = ready(mlp, params, x[0])

    def loss(p: Tree, x: Tensor, y: Tensor) -> Tensor:
        return (r.q.apply(p, r.qparams, x) - y).square().mean()

    def after_a_step(p: Tree, x: Tensor, y: Tensor) -> Tensor:
        return loss(tree_map(lambda t, g: t - 0.1 * g, p, grad(loss)(p, x, y)), x, y)

    mapped = vmap(grad(after_a_step), in_dims=(None, 0, 0))(params, x, y)
    looped = [grad(after_a_step)(params, x[i], y[i]) for i in range(4)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *looped)
    torch.testing.assert_close(mapped, stacked, rtol=1e-9, atol=1e-12)
    assert all(bool(leaf.any()) for leaf in tree_leaves(mapped))


def test_forward_mode_agrees_with_reverse_mode() -> None:
    params, x = mlp_params(torch.float64), batch(torch.float64)
    r = ready(mlp, params, x)

    def loss(p: Tree) -> Tensor:
        return r.q.apply(p, r.qparams, x).square().mean()

    tangents = tree_map(torch.randn_like, params)
    _, forward = jvp(loss, (params,), (tangents,))
    pairs = zip(tree_leaves(grad(loss)(params)), tree_leaves(tangents), strict=True)
    torch.testing.assert_close(forward, sum((g * t).sum() for g, t in pairs), rtol=1e-10, atol=1e-12)


TREES: dict[str, Callable[[Tensor, Tensor], Tree]] = {
    "dict": lambda w, b: {"w": w, "b": b},
    "named tuple": Affine,
    "dataclass": Block,
    "frozen dataclass with slots": Kernel,
    "registered dataclass": Registered,
}


def affine_pair(params: Tree, x: Tensor) -> Tensor:
    def part(tree: Tree, name: str) -> Tensor:
        return tree[name] if isinstance(tree, dict) else getattr(tree, name)

    (first, second) = params
    h = torch.relu(F.linear(x, part(first, "w"), part(first, "b")))
    return h @ part(second, "w").T + part(second, "b")


def pair_of(make: Callable[[Tensor, Tensor], Tree]) -> Tree:
    torch.manual_seed(0)
    return make(torch.randn(8, 6), torch.randn(8)), make(torch.randn(3, 8), torch.randn(3))


@pytest.mark.parametrize("make", TREES.values(), ids=TREES)
def test_every_kind_of_tree_has_the_same_names_and_comes_back_as_it_is(make: Callable[[Tensor, Tensor], Tree]) -> None:
    params, x = pair_of(make), batch()
    r = ready(affine_pair, params, x)
    twin = ready(affine_pair, pair_of(TREES["dict"]), x)
    assert list(r.q.plan) == list(twin.q.plan)
    same(r(x), twin(x))
    before = [leaf.clone() for _, leaf in named_leaves(params)]
    output, after = r.q.apply_and_update(params, r.qparams, x)
    same(output, r(x))
    frozen, baked = r.q.freeze(params, r.qparams)
    same(frozen.apply(baked, r.qparams, x), r(x))
    tree = r.q.tree(sq.params_of(params))
    for back in (after, baked, tree):
        assert type(back) is tuple
        assert [type(part) for part in back] == [type(part) for part in params]
    same([leaf for _, leaf in named_leaves(tree)], before)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=NEEDS_ATTRIBUTES) if "dataclass" in kind else make for kind, make in TREES.items()],
    ids=TREES,
)
def test_every_kind_of_tree_compiles_in_one_graph(make: Callable[[Tensor, Tensor], Tree]) -> None:
    params, x = pair_of(make), batch()
    r = ready(affine_pair, params, x)
    compiled = torch.compile(r.q.apply, backend="aot_eager", fullgraph=True)
    same(compiled(params, r.qparams, x), r(x))


@NEEDS_ATTRIBUTES
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_gradient_to_a_tree_compiles_in_one_graph() -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)

    def loss(p: Tree) -> Tensor:
        return r.q.apply(p, r.qparams, x).square().mean()

    same(torch.compile(grad(loss), backend="aot_eager", fullgraph=True)(r.params), grad(loss)(r.params))


@NEEDS_ATTRIBUTES
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_run_keeps_none_of_the_params() -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)
    new = sq.build(mlp, r.q.plan, params=r.params)  # has never run in eager
    compiled = torch.compile(grad(lambda p: new.apply(p, r.qparams, x).sum()), backend="aot_eager", fullgraph=True)
    same(compiled(r.params), grad(lambda p: r.q.apply(p, r.qparams, x).sum())(r.params))
    assert b"mlp" in pickle.dumps(new)
    same(new.apply(r.params, r.qparams, x), r(x))
    assert all(leaf.is_meta for leaf in new.engine.skeleton.module.leaves)  # type: ignore[union-attr]


def test_a_single_tensor_is_named_as_the_argument() -> None:
    w, x = torch.randn(6, 3), batch()
    r = ready(lambda kernel, x: x @ kernel, w, x)
    assert list(r.q.plan) == ["x.post_act_fake_quantizer", "kernel_fake_quant"]
    assert r.q.apply_and_update(w, r.qparams, x)[1] is w
    assert grad(lambda w: r.q.apply(w, r.qparams, x).sum())(w).shape == w.shape


def test_a_module_called_with_its_params_is_a_function_of_them() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    params, x = sq.params_of(model), batch()
    r = ready(lambda p, x: functional_call(model, p, (x,)), params, x)
    assert [n for n in r.q.plan if r.q.plan.site(n).role == "weight"] == ["0.weight_fake_quant", "2.weight_fake_quant"]
    with torch.no_grad():
        other = {name: tensor * 2 for name, tensor in params.items()}
        assert not torch.equal(r(x), r.q.apply(other, r.qparams, x))


def test_a_module_without_parameters_takes_them_by_params_too() -> None:
    class Thin(nn.Module):
        def forward(self, params: Tree, x: Tensor) -> Tensor:
            return mlp(params, x)

    x = batch()
    same(ready(Thin(), mlp_params(), x)(x), ready(mlp, mlp_params(), x)(x))


def test_arguments_beside_the_params_are_those_of_the_function() -> None:
    def scaled(params: Tree, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return mlp(params, x) * gain

    x = batch()
    r = ready(scaled, mlp_params(), x)
    same(r(x, gain=2.0), r(x) * 2)
    same(r(x=x), r(x))
    half = ready(functools.partial(scaled, gain=0.5), mlp_params(), x)
    same(half(x), r(x) / 2)
    many = ready(lambda params, *xs: mlp(params, xs[0]) + xs[1].sum(), mlp_params(), x, x)
    assert "xs.0.post_act_fake_quantizer" in many.q.plan


def test_leaves_that_are_no_tensors_are_constants() -> None:
    def f(params: Tree, x: Tensor) -> Tensor:
        y = params["act"](x @ params["w"]) * params["scale"]
        return y if params["b"] is None else y + params["b"]

    x, w = batch(), torch.randn(6, 3)
    params = {"w": w, "b": None, "scale": 2.0, "act": torch.tanh}
    r = ready(f, params, x)
    assert r.q.apply_and_update(params, r.qparams, x)[1]["scale"] == 2.0
    same(r.q.apply({"w": w}, r.qparams, x), r(x))
    with pytest.raises(sq.StateError, match=r"'scale'.*got 3.0, allowed 2.0"):
        r.q.apply({**params, "scale": 3.0}, r.qparams, x)
    with pytest.raises(sq.StateError, match="hold 'b'"):
        r.q.apply({**params, "b": torch.zeros(3)}, r.qparams, x)


def test_integer_leaves_are_buffers() -> None:
    def f(params: Tree, x: Tensor) -> Tensor:
        params["steps"] += 1
        return x[:, params["order"]] @ params["w"]

    x = batch()
    params = {"w": torch.randn(6, 3), "order": torch.arange(6).flip(0), "steps": torch.zeros((), dtype=torch.int64)}
    with unchanged(nn.Module(), params):
        r = ready(f, params, x)
        _, after = r.q.apply_and_update(params, r.qparams, x)
    assert (int(after["steps"]), int(params["steps"])) == (1, 0)


def test_what_a_function_does_to_its_tree_stays_in_the_run() -> None:
    def f(params: Tree, x: Tensor) -> Tensor:
        layer = params["l1"]
        layer["w"] = layer["w"] * 2
        params["new"] = x
        return mlp(params, x)

    params, x = mlp_params(), batch()
    r = ready(f, params, x)
    same(r(x), r(x))
    assert params.keys() == {"l1", "head"}


def test_rules_name_leaves_and_branches_by_their_paths() -> None:
    def bits(name: str) -> list[int]:
        rule = sq.Rule(name=name, weight=sq.override(bits=3))
        q = sq.quantize(mlp, sq.QuantConfig(rules=(rule,)), params=mlp_params(), example_args=(batch(),))
        assert not q.plan.unused
        return [q.plan[name].scheme.bits for name in ("l1.w_fake_quant", "head.0_fake_quant")]

    for name in ("l1", "l1.w", "l1.*", "l1.w_fake_quant", "l1_w"):
        assert bits(name) == [3, 8], name
    for name in ("head", "head.0"):
        assert bits(name) == [8, 3], name


def test_a_function_leaves_as_a_module_does(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    x = batch()
    r = ready(mlp, mlp_params(), x)
    expected = r(x)
    # sums of products in another order
    torch.testing.assert_close(sq.convert(r.q, r.params, r.qparams).run(x), expected, rtol=1e-4, atol=1e-4)
    sq.export.onnx(r.q, r.params, r.qparams, x, tmp_path / "f.onnx")
    session = ort.InferenceSession(tmp_path / "f.onnx")
    (output,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
    report = sq.report(r.q, r.params, r.qparams, [x], progress=False)
    assert (report.model, {row.quantizer for row in report.rows}) == ("mlp", set(r.q.plan))


def test_files_hold_the_leaves_by_name(tmp_path: Path) -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)
    sq.save(tmp_path / "f", plan=r.q.plan, qparams=r.qparams, params=sq.params_of(r.params))
    q = sq.build(mlp, sq.load(tmp_path / "f").plan, params=r.params)
    found = sq.load(tmp_path / "f").check(q)
    same(q.apply(found.params, found.qparams, x), r(x))
    same(q.apply(q.tree(found.params), found.qparams, x), r(x))
    same(pickle.loads(pickle.dumps(r.q)).apply(r.params, r.qparams, x), r(x))
    with pytest.raises(sq.CheckpointError, match="params_of"):
        sq.save(tmp_path / "g", params=r.params)


def test_other_methods_take_the_tree_too() -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)
    ostate = r.q.init(r.params)
    _, ostate = r.q.observe(r.params, ostate, x)
    same(r.q.qparams(r.params, ostate), r.qparams)
    same(r.q.observe_quantized(r.params, ostate, r.qparams, x)[0], r(x))
    assert r.q.capture(r.params, r.qparams, x).keys() == r.q.plan.keys()
    assert list(r.q.tap("tanh")(r.params, r.qparams, x)[1]) == ["tanh"]
    same(r.q.sweep(r.params, [r.qparams] * 2, x, progress=False)[1], r(x))
    assert r.q.weights_seen(r.params).keys() == {"l1.w_fake_quant", "head.0_fake_quant"}
    assert sq.sensitivity(r.q, r.params, r.qparams, x, lambda y: y.square().mean(), progress=False).keys() == r.q.plan.keys()
    assert sq.fidelity(r.q, r.params, r.qparams, x).keys() == r.q.plan.keys()
    assert repr(r.q).startswith("Quantized(mlp, ")


def test_a_tree_of_another_structure_is_refused_leaf_by_leaf() -> None:
    x = batch()
    r = ready(mlp, mlp_params(), x)
    p = r.params
    cases: dict[str, Tree] = {
        "lack 'head.0'": {"l1": p["l1"]},
        "lack 'l1.b'": {"l1": {"w": p["l1"]["w"]}, "head": p["head"]},
        "hold 'extra'": {**p, "extra": x},
        "hold 'head.1'": {**p, "head": [p["head"][0], x]},
        "'l1.w'. must be a tensor: got 'float'": {**p, "l1": {"w": 1.0, "b": p["l1"]["b"]}},
        "must be the tree that the function takes": 5,
    }
    for words, tree in cases.items():
        for call in (lambda t: r.q.apply(t, r.qparams, x), r.q.init, lambda t: r.q.calibrate(t, [x]), r.q.tree):
            with pytest.raises(sq.StateError, match=words):
                call(tree)


class WithParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, params: Tree, x: Tensor) -> Tensor:
        return self.layer(x)


def writes(params: Tree, x: Tensor) -> Tensor:
    params["l1"]["b"].add_(1)
    return mlp(params, x)


@pytest.mark.parametrize(
    ("f", "params", "words"),
    [
        (mlp, None, "mlp is a function, which needs its params.*params=params"),
        (5, None, "must be a module or a function"),
        (WithParameters(), mlp_params(), "parameters of its own"),
        (mlp, {**mlp_params(), "l1.w": torch.ones(1)}, "two leaves of params are named 'l1.w'"),
        (mlp, {**mlp_params(), "n": np.ones(1)}, "'n'. cannot be a parameter: got 'ndarray'"),
        (mlp, {**mlp_params(), "m": nn.Linear(1, 1)}, "'m'. cannot be a parameter: got 'Linear'"),
        (writes, mlp_params(), r"writes: a function must not write into its params: got \['l1.b'\]"),
    ],
    ids=["no params", "no function", "two sets of parameters", "one name twice", "an array", "a module", "a write"],
)
def test_what_is_no_function_of_a_tree_is_refused(f: Any, params: Tree, words: str) -> None:
    with pytest.raises(sq.PlanError, match=words):
        sq.quantize(f, DEFAULT, params=params, example_args=(batch(),))


def test_params_of_lists_a_tree_by_name() -> None:
    assert list(sq.params_of(mlp_params())) == ["head.0", "l1.b", "l1.w"]
    for wrong in (5, "model", torch.ones(1)):
        with pytest.raises(sq.PlanError, match="params_of"):
            sq.params_of(wrong)


def test_the_three_dictionaries_take_functions() -> None:
    dictionaries = {"quant_dict": {"chip": "Academic", "quantmode": "weight_activation", "strategy": "CNN"}}
    q = sq.prepare_by_platform(mlp, dictionaries, params=mlp_params(), example_args=(batch(),))
    twin = sq.prepare_by_platform(Mlp(), dictionaries, example_args=(batch(),))
    assert list(q.plan) == list(twin.plan)
