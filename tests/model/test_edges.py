"""Corners of the contract: shared pieces, in-place writes, names, and what a plan must carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sophq_func as sq
from tests.helpers import DEFAULT, ready, same

BM1690 = sq.QuantConfig(chip="BM1690")


class Net(nn.Module):
    """Layers by name, and a forward given as a function."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


@pytest.mark.parametrize("hold", [lambda w: {"w": w}, lambda w: (w,), lambda w: [w, None], lambda w: {"a": [(w,)]}])
def test_a_parameter_kept_in_a_plain_container_is_the_parameter(hold: Callable[[Tensor], Any]) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.box = hold(self.w)

        def forward(self, x: Tensor) -> Tensor:
            box = self.box
            while not isinstance(box, Tensor):
                box = next(iter(box.values())) if isinstance(box, dict) else box[0]
            return F.linear(x, box)

    model, x = Holds(), torch.randn(2, 4)
    r = ready(model, x)
    assert "w_fake_quant" in r.q.plan
    torch.testing.assert_close(r(x), model(x), rtol=0, atol=0.1)
    assert bool(torch.func.grad(lambda w: r.q.apply({"w": w}, r.qparams, x).sum())(r.params["w"]).any())


def write_through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    view = y.view(-1, 2)
    y += 100.0
    return m.b(view)


def return_the_old_name(m: Any, x: Tensor) -> Tensor:
    y = z = m.a(x)
    z += x
    return y


@pytest.mark.parametrize("forward", [write_through_a_view, return_the_old_name])
def test_a_write_in_place_that_quantization_would_lose_is_refused(forward: Callable[..., Any]) -> None:
    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(2, 2))
    with pytest.raises(sq.PlanError, match="in place"):
        sq.quantize(model, BM1690, example_args=torch.randn(2, 4))


def test_a_write_through_a_view_that_nobody_quantizes_is_seen() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, :2].mul_(0.0)
        return m.b(y)

    model, x = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), torch.randn(2, 4)
    torch.testing.assert_close(ready(model, x)(x), model(x), rtol=0, atol=0.1)


def test_inputs_that_a_model_writes_into_stay_as_they_are() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x += 1
        return m.a(x)

    model, x = Net(forward, a=nn.Linear(4, 4)), torch.zeros(2, 4)
    r = ready(model, x, config=sq.QuantConfig(activation=None))
    r(x)
    sq.build(model, sq.Plan.from_json(r.q.plan.to_json())).apply(r.params, r.qparams, x)
    assert r.q.plan.written == ("args.0",)
    assert x._version == 0
    same(x, torch.zeros(2, 4))


def test_a_norm_shared_by_two_layers_takes_no_rounded_bias() -> None:
    layers = {"a": nn.Conv2d(3, 4, 3, bias=False), "b": nn.Conv2d(3, 4, 3, bias=False), "bn": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), **layers).eval()
    plan = sq.quantize(model, BM1690, example_args=torch.randn(1, 3, 8, 8)).plan
    assert [plan.site(f"{n}.weight_fake_quant").source for n in "ab"] == ["", ""]
    assert "not rounded" in " ".join(plan.notes)


def test_layers_that_share_a_bias_or_have_several_round_none() -> None:
    shared = Net(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    shared.b.bias = shared.a.bias
    tied = Net(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    tied.b.weight = tied.a.weight
    for model in (shared, tied):
        plan = sq.quantize(model, BM1690, example_args=torch.randn(2, 4)).plan
        assert {plan.site(n).source for n in plan if plan.site(n).role == "weight"} == {""}
        assert "not rounded" in " ".join(plan.notes)


def test_a_weight_of_two_modules_is_not_folded_though_their_norm_is_one() -> None:
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x + 1)), **layers).eval()
    model.b.weight = model.a.weight
    plan = sq.quantize(model, BM1690, example_args=torch.randn(1, 3, 8, 8)).plan
    assert plan.site("a.weight_fake_quant").norm == ""
    assert "unfolded" in " ".join(plan.notes)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_whether_a_weight_is_folded_does_not_depend_on_the_order_of_examples(order: tuple[bool, bool]) -> None:
    layers = {"c": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)}
    model = Net(lambda m, x, n: m.bn(m.c(x)) if n else m.c(x), **layers).eval()
    x = torch.randn(1, 3, 8, 8)
    plan = sq.quantize(model, sq.QuantConfig(activation=None), examples=[((x, flag), {}) for flag in order]).plan
    assert plan.site("c.weight_fake_quant").norm == ""
    assert "unfolded" in " ".join(plan.notes)


def test_a_frozen_weight_that_is_a_buffer_comes_back_as_it_was_and_its_scale_is_learned() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    weight = model.weight.detach().clone()
    del model.weight
    model.register_buffer("weight", weight)
    r = ready(model, x, config=BM1690)
    _, after = r.q.apply_and_update(r.params, r.qparams, x)
    same(after, r.params)
    scales, rest = r.q.split(r.qparams)
    gradient = torch.func.grad(lambda s: r.q.apply(r.params, sq.merge(s, rest), x).square().sum())(scales)
    assert bool(gradient["weight_fake_quant.scale"].any())


def test_an_argument_named_like_a_module_is_found() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Linear(4, 4)

        def forward(self, features: Tensor) -> Tensor:
            return self.features(features)

    model, x = Features(), torch.randn(2, 4)
    r = ready(model, x, config=BM1690)
    assert r.q.plan.site("features_1.post_act_fake_quantizer").argument == "features"
    torch.testing.assert_close(r(x), model(x), rtol=0, atol=0.1)


def test_reading_a_shape_is_no_call() -> None:
    model = Net(lambda m, x: (m.a(x)[: x.shape[0]] @ x.T)[: x.shape[0]], a=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    torch.testing.assert_close(ready(model, x, config=BM1690)(x), model(x), rtol=0, atol=0.2)


def test_a_value_assigned_into_can_be_observed() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 0] = 0
        return torch.sigmoid(y)

    model, x = Net(forward, a=nn.Linear(4, 4)), torch.randn(2, 4)
    r = ready(model, x, config=sq.QuantConfig(chip="BM1690", strategy="Transformer"))
    assert r.q.plan["setitem.post_act_fake_quantizer"].observe_only
    _, ostate = r.q.observe(r.params, r.q.init(r.params), x)
    y = model.a(x).detach()
    y[:, 0] = 0
    torch.testing.assert_close(ostate["setitem.post_act_fake_quantizer"].hi, y.max())


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


def test_a_plan_remembers_which_modules_are_not_looked_into() -> None:
    model, x = nn.Sequential(Inner(), nn.Linear(4, 4)), torch.randn(2, 4)
    config = sq.QuantConfig(chip="BM1690", leaf_module=(Inner,), rules=(sq.Rule(type=Inner, requests=True),))
    r = ready(model, x, config=config)
    again = sq.build(model, sq.Plan.from_json(r.q.plan.to_json()))
    same(again.apply(r.params, r.qparams, x), r(x))
    graph = sq.trace(model, (x,), leaf_module=config.leaf_module)
    assert sq.plan(graph, config) == r.q.plan
    with pytest.raises(sq.ConfigError, match="leaf_module"):
        sq.plan(sq.trace(model, (x,)), config)


CONTRACTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tensordot": lambda m, x: torch.tensordot(x, x.T, dims=1),
    "inner": lambda m, x: torch.inner(x, x + 1),
    "linalg.matmul": lambda m, x: torch.linalg.matmul(x, x.T),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x, x.T, x]),
    "einsum": lambda m, x: torch.einsum("ij,kj,kl,ml->im", x, x + 1, x + 2, x + 3),
    "matmul by keyword": lambda m, x: torch.matmul(input=x, other=x.T),
    "bilinear": lambda m, x: m.bilinear(x, x.sigmoid()),
    "lstm cell": lambda m, x: m.cell(x)[0],
}


@pytest.mark.parametrize("kind", CONTRACTIONS)
def test_dataflow_quantizes_the_operands_of_every_contraction(kind: str) -> None:
    layers = {"bilinear": nn.Bilinear(4, 4, 2), "cell": nn.LSTMCell(4, 3)}
    model, x = Net(CONTRACTIONS[kind], **layers), torch.randn(3, 4)
    r = ready(model, x)
    wanted = {"args.0"} | ({"add", "add_1", "add_2"} if kind == "einsum" else set())
    assert wanted <= {r.q.plan.site(n).value for n in r.q.plan}
    assert any(r.q.plan.site(n).role == "weight" for n in r.q.plan) == (kind in ("bilinear", "lstm cell"))
    expected = model(x)
    torch.testing.assert_close(r(x), expected, rtol=0, atol=0.05 * float(expected.detach().abs().max()) + 0.05)


def test_academic_has_no_input_quantizers_for_4_bits() -> None:
    four = sq.override(bits=4, fake_quantize=sq.fake_quantize.learnable())
    rules = (sq.Rule(name="1", weight=four, activation=sq.override(bits=4)),)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    names = {
        chip: sq.quantize(model, sq.QuantConfig(chip=chip, rules=rules), example_args=x).plan.keys()
        for chip in ("Academic", "BM1688")
    }
    assert "1.input_act_fake_quantizer" not in names["Academic"]
    assert "1.input_act_fake_quantizer" in names["BM1688"]


def test_reflected_operators_have_the_name_of_the_operation() -> None:
    graph = sq.trace(Net(lambda m, x: 2**x + 2.0 % x + 3.0 // x + torch.special.expit(x)), (torch.rand(2, 2) + 1,))
    assert {node.function for node in graph} - {""} == {"pow", "remainder", "floor_divide", "add", "sigmoid"}


def test_every_owner_of_a_tied_weight_names_its_quantizer() -> None:
    model = Net(lambda m, x: m.head(m.table(x)), table=nn.Embedding(5, 4), head=nn.Linear(4, 5))
    model.head.weight = model.table.weight
    config = sq.QuantConfig(rules=(sq.Rule(name="head.weight_fake_quant", weight=sq.override(bits=4)),))
    plan = sq.quantize(model, config, example_args=torch.tensor([[1, 2]])).plan
    assert plan["table.weight_fake_quant"].scheme.bits == 4
    assert plan.unused == ()
    assert next(iter(plan)) == "table.weight_fake_quant"


def test_a_rule_by_a_base_class_of_a_container_reaches_what_is_inside() -> None:
    class Base(nn.Sequential):
        pass

    class Block(Base):
        pass

    model = nn.Sequential(Block(nn.Linear(4, 4)), nn.Linear(4, 4))
    config = sq.QuantConfig(rules=(sq.Rule(type=Base, weight=None),))
    plan = sq.quantize(model, config, example_args=torch.randn(2, 4)).plan
    assert [n for n in plan if n.endswith("weight_fake_quant")] == ["1.weight_fake_quant"]


def test_a_union_of_examples_is_in_execution_order() -> None:
    model = Net(lambda m, x, long: m.b(m.a(x) if long else x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    config = sq.QuantConfig(rules=(sq.Rule(name="*", optional=True),))
    plan = sq.quantize(model, config, examples=[((x, False), {}), ((x, True), {})]).plan
    weights = [n for n in plan if n.endswith("weight_fake_quant")]
    assert weights == ["a.weight_fake_quant", "b.weight_fake_quant"]


def test_unknown_names_and_chip_limits_are_reported_together() -> None:
    rules = (sq.Rule(name="nope", weight=None), sq.Rule(name="0", activation=sq.override(bits=4)))
    config = sq.QuantConfig(chip="BM1690", rules=rules)
    with pytest.raises(sq.ConfigError) as caught:
        sq.quantize(nn.Sequential(nn.Linear(4, 4)), config, example_args=torch.randn(2, 4))
    assert "'nope'" in str(caught.value)
    assert "4 bits" in str(caught.value)


def test_a_plan_is_immutable() -> None:
    plan = sq.quantize(nn.Linear(4, 4), DEFAULT, example_args=torch.randn(2, 4)).plan
    digest = plan.digest()
    plan.counts[0].clear()
    with pytest.raises(AttributeError, match="immutable"):
        plan.notes = ("other",)  # type: ignore[misc]
    with pytest.raises(AttributeError, match="immutable"):
        del plan.notes
    assert plan.digest() == digest


def test_a_rule_whose_word_is_overruled_has_matched_all_the_same() -> None:
    rules = (sq.Rule(type=nn.Sigmoid, requests=False), sq.Rule(name="1", requests=True))
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    assert sq.quantize(model, sq.QuantConfig(rules=rules), example_args=torch.randn(2, 4)).plan.unused == ()


def test_an_underscored_name_of_two_quantizers_is_refused_by_the_plan() -> None:
    layers = {"a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)})}
    model = Net(lambda m, x: m.a["b_c"](m.a_b["c"](x)), **layers)
    plan = sq.quantize(model, DEFAULT, example_args=torch.randn(2, 4)).plan
    with pytest.raises(sq.ConfigError, match=r"'a_b.c.weight_fake_quant' and 'a.b_c.weight_fake_quant'"):
        plan.site("a_b_c_weight_fake_quant")
    assert plan.site("a.b_c.weight_fake_quant").call == 0


def test_a_rule_by_the_path_of_any_module_in_a_fused_group_reaches_its_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    config = sq.QuantConfig(chip="BM1690", rules=(sq.Rule(name="2", activation=None),))
    plan = sq.quantize(model, config, example_args=torch.randn(1, 3, 8, 8)).plan
    assert "0.post_act_fake_quantizer" not in plan
    assert plan["0.weight_fake_quant"].scheme.bits == 8
    assert plan.unused == ()


def test_no_gradient_reaches_a_fixed_scale_through_the_rounded_bias() -> None:
    fixed = sq.override(fake_quantize=sq.fake_quantize.fixed())
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    r = ready(model, x, config=sq.QuantConfig(chip="BM1690", weight=fixed, activation=fixed))
    assert r.q.plan.site("weight_fake_quant").source == "input.post_act_fake_quantizer"
    scales = {name: own.scale for name, own in r.qparams.items()}

    def loss(scales: dict[str, Tensor]) -> Tensor:
        qparams = {name: own._replace(scale=scales[name]) for name, own in r.qparams.items()}
        return r.q.apply(r.params, qparams, x).square().sum()

    assert not any(bool(gradient.any()) for gradient in torch.func.grad(loss)(scales).values())


PARAMETRIZED: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), ((6, 3), (6, 4))),
    "linear": (lambda: nn.Linear(3, 5), ((6, 3),)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2), ((6, 3, 4),)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 5, 2), ((6, 3, 4, 4),)),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_the_computed_weight_of_a_layer_is_quantized_and_none_of_its_inputs(kind: str) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 0.5

    make, shapes = PARAMETRIZED[kind]
    layer, inputs = make(), [torch.randn(shape) for shape in shapes]
    parametrize.register_parametrization(layer, "weight", Half())
    config = sq.QuantConfig(weight=sq.override(bits=4), activation=None)
    q = sq.quantize(layer, config, example_args=tuple(inputs))
    params = sq.params_of(layer)
    qparams = q.calibrate(params, [tuple(inputs)], progress=False)
    (name,) = q.plan
    weight = q.quantize_value(name, layer.weight.detach(), qparams[name])
    plain = make()
    plain.load_state_dict({"weight": weight, "bias": layer.bias.detach()})
    assert torch.equal(q.apply(params, qparams, *inputs), plain(*inputs))


def test_qparams_in_the_place_of_params_are_one_problem() -> None:
    r, x = ready(nn.Linear(3, 2), torch.randn(4, 3)), torch.randn(4, 3)
    for call in (lambda: r.q.apply(r.qparams, r.params, x), lambda: r.q.bind(r.qparams, r.params)):
        with pytest.raises(sq.StateError, match=r"params hold no tensors: got 'QParams'.*which come before qparams.$"):
            call()


def test_the_leaves_of_split_in_the_place_of_qparams_name_merge() -> None:
    r, x = ready(nn.Linear(3, 2), torch.randn(4, 3)), torch.randn(4, 3)
    scales, rest = r.q.split(r.qparams)
    for leaves in (scales, {**scales, **rest}):
        with pytest.raises(
            sq.StateError, match=r"qparams are in leaves, as q.split gives them. Fix: sq.merge\(learned, rest\)"
        ):
            r.q.apply(r.params, leaves, x)


def test_training_mode_is_switched_as_of_a_module() -> None:
    q = ready(nn.Linear(3, 2), torch.randn(4, 3)).q
    assert not q.train(False).training
    assert q.train(True).training
    assert q.train(mode=True).training
