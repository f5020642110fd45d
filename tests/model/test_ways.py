"""Runs that take other ways than the example: each value on its own scale, or an error that names the place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import Ready, ready

WIDTH = 6

MINMAX = sq.QuantConfig(activation=sq.override(observer=sq.observers.minmax()))
"""With scales that follow from the data alone, whatever its order."""

SIZES = torch.tensor([1.0, 8.0, 64.0, 512.0])
"""How large the data of each expert is: a scale of another expert gives a visible error."""


def batch(*experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows for some experts, four for each, and the expert of each row."""
    pick = torch.tensor(experts).repeat_interleave(4)
    x = torch.randn(len(pick), WIDTH, generator=torch.Generator().manual_seed(seed))
    return x * SIZES[pick][:, None], pick


class Routed(nn.Module):
    """Experts in a list, called in the order of their numbers, or in another."""

    def __init__(self, expert: Callable[[], nn.Module], order: Callable[[list[int]], list[int]] = sorted) -> None:
        super().__init__()
        self.experts = nn.ModuleList(expert() for _ in SIZES)
        self.order = order

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in self.order(pick.unique().tolist()):
            rows = (pick == expert).nonzero()[:, 0]
            y = y.index_add(0, rows, self.experts[expert](self.read(x, rows)))
        return y

    def read(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]


class Scaled(Routed):
    """What an expert reads is computed, not only selected, by its parent."""

    def read(self, x: Tensor, rows: Tensor) -> Tensor:
        return torch.tanh(x[rows] / 100).reshape(-1, WIDTH) * 100


class Named(Routed):
    """Experts in a dict, with names."""

    def __init__(self, expert: Callable[[], nn.Module]) -> None:
        super().__init__(expert)
        self.experts = nn.ModuleDict({f"e{i}": expert() for i in range(len(SIZES))})

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        rows = {i: (pick == i).nonzero()[:, 0] for i in pick.unique().tolist()}
        y = torch.zeros_like(x)
        for i, at in rows.items():
            y = y.index_copy(0, at, self.experts[f"e{i}"](x.index_select(0, at)))
        return y


def linear() -> nn.Linear:
    """A layer without a bias, since a bias is rounded to a grid of its own."""
    return nn.Linear(WIDTH, WIDTH, bias=False)


def gated() -> nn.Module:
    return Gated()


class Gated(nn.Module):
    """Two layers of an expert read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = linear(), linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def prepared(model: nn.Module, batches: Sequence[tuple[Tensor, ...]], config: sq.QuantConfig = MINMAX) -> Ready:
    """A model, planned and calibrated on the same batches."""
    torch.manual_seed(0)
    q = sq.quantize(model, config, examples=[(one, {}) for one in batches])
    params = sq.params_of(model)
    return Ready(q, params, q.calibrate(params, batches, progress=False))


def scale_of(x: Tensor) -> Tensor:
    """The scale of 8 bits over the range of some data, zero included."""
    qp = sq.observer("minmax")
    scheme = MINMAX.default("activation").scheme  # type: ignore[union-attr]
    return qp.qparams(qp.update(qp.init(x, scheme), x, scheme), scheme).scale


ONE_BY_ONE = [[batch(i, seed=i) for i in range(len(SIZES))], [batch(0, 1), batch(2, 3)], [batch(3), batch(0, 1, 2)]]


@pytest.mark.parametrize("batches", ONE_BY_ONE, ids=["one by one", "pairs", "one and three"])
@pytest.mark.parametrize("cls", [Routed, Scaled, Named])
def test_each_expert_has_the_input_scale_of_its_own_data(cls: type[Routed], batches: list[tuple[Tensor, Tensor]]) -> None:
    model = cls(linear).eval()
    r = prepared(model, batches)
    names = list(model.get_submodule("experts")._modules)
    for i, name in enumerate(names):
        x = torch.cat([x[pick == i] for x, pick in batches])
        read = model.read(x, torch.arange(len(x)))
        assert torch.equal(r.qparams[f"experts.{name}.input_act_fake_quantizer"].scale, scale_of(read))


@pytest.mark.parametrize("experts", [(0,), (2, 3), (1, 3), (3, 0), (0, 1, 2, 3)])
@pytest.mark.parametrize("cls", [Routed, Scaled, Named])
def test_any_set_of_experts_runs_of_which_each_ran_alone(cls: type[Routed], experts: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = cls(linear).eval()
    r = prepared(model, [batch(i, seed=i) for i in range(len(SIZES))])
    x, pick = batch(*experts, seed=9)
    names = list(model.get_submodule("experts")._modules)
    expected = torch.zeros_like(x)
    for i in experts:
        path = f"experts.{names[i]}"
        read = r.q.quantize_value(
            f"{path}.input_act_fake_quantizer",
            model.read(x[pick == i], torch.arange(4)),
            r.qparams[f"{path}.input_act_fake_quantizer"],
        )
        layer = model.get_submodule(path)
        weight = r.q.quantize_value(f"{path}.weight_fake_quant", layer.weight, r.qparams[f"{path}.weight_fake_quant"])
        expected[pick == i] = F.linear(read, weight)
    torch.testing.assert_close(r(x, pick), expected)


def test_layers_of_an_expert_that_read_one_tensor_share_its_quantizer() -> None:
    r = prepared(Routed(gated).eval(), [batch(0, 1), batch(2), batch(3, 1)])
    site = r.q.plan.site("experts.2.gate.input_act_fake_quantizer")
    assert [place.path for place in site.places()] == ["experts.2.gate", "experts.2.up"]
    assert "experts.2.up.input_act_fake_quantizer" not in r.q.plan
    r(*batch(0, 2))


class Stacked(nn.Module):
    """Experts that are items of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(len(SIZES), WIDTH, WIDTH))

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in pick.unique():
            rows = (pick == expert).nonzero()[:, 0]
            y = y.index_add(0, rows, F.linear(x[rows], self.weight[expert]))
        return y


def test_items_of_a_stacked_weight_are_experts_too() -> None:
    torch.manual_seed(1)
    batches = [batch(0, 2), batch(1), batch(3)]
    r = prepared(Stacked().eval(), batches)
    scales = sorted(r.qparams[name].scale for name in r.q.plan if name.endswith("input_act_fake_quantizer"))
    expected = sorted(scale_of(torch.cat([x[pick == i] for x, pick in batches])) for i in range(len(SIZES)))
    assert scales == expected
    x, pick = batch(1, 2, 3, seed=5)
    weight = r.q.quantize_value("weight_fake_quant", r.params["weight"], r.qparams["weight_fake_quant"])
    by_size = dict(zip(range(len(SIZES)), expected, strict=True))
    for i in (1, 2, 3):
        grid = next(
            r.qparams[n] for n in r.q.plan if n.endswith("input_act_fake_quantizer") and r.qparams[n].scale == by_size[i]
        )
        name = next(n for n in r.q.plan if r.qparams[n] is grid)
        read = r.q.quantize_value(name, x[pick == i], grid)
        torch.testing.assert_close(r(x, pick)[pick == i], F.linear(read, weight[i]))


class Skipping(nn.Module):
    """Layers with residuals, of which a run leaves some out, behind them a shared activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(4))
        self.act, self.head = nn.Hardtanh(-1000, 1000), linear()

    def forward(self, x: Tensor, kept: Sequence[int]) -> Tensor:
        for i in kept:
            x = x + self.act(self.layers[i](x)) * 4
        return self.head(x)


def test_layers_that_are_skipped_keep_their_scales() -> None:
    torch.manual_seed(1)
    model, x = Skipping().eval(), torch.randn(8, WIDTH)
    ways = [(x, (0, 1, 2, 3)), (x, (0, 2)), (x, (1, 3)), (x, (3,))]
    r = prepared(model, ways)
    reads: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    with torch.no_grad():
        for _, kept in ways:
            h = x
            for i in kept:
                reads[i].append(h)
                h = h + model.act(model.layers[i](h)) * 4
    for i in range(1, 4):
        name = f"layers.{i}.input_act_fake_quantizer"
        assert name in [one.quantizer for one in r.q.plan.site(f"layers.{i}.weight_fake_quant").inputs]
        torch.testing.assert_close(r.qparams[name].scale, scale_of(torch.cat(reads[i])))
    float_, quantized = model(x, (0, 2, 3)), r(x, (0, 2, 3))
    assert (quantized - float_).norm() < 0.05 * float_.norm()


def test_a_tap_finds_values_by_the_names_of_the_plan() -> None:
    torch.manual_seed(1)
    model = Routed(linear).eval()
    r = prepared(model, [batch(0, 1), batch(2, 3)])
    name = "experts.3.after.index_add"
    x, pick = batch(1, 3, seed=5)
    out, seen = r.q.tap(name)(r.params, r.qparams, x, pick)
    assert torch.equal(seen[name][0].output, out)


def test_with_one_example_experts_known_by_their_paths_run_in_any_order() -> None:
    order = [2, 0, 3, 1]
    model = Routed(linear, lambda found: [i for i in order if i in found]).eval()
    r = ready(model, *batch(0, 1, 2, 3))
    expected = r(*batch(3, 2, 1, 0))
    order.reverse()
    # the parent computes nothing that is quantized, and each expert writes rows of its own
    assert torch.equal(r(*batch(3, 2, 1, 0)), expected)


def test_with_one_example_values_of_another_order_are_refused() -> None:
    order = [2, 0, 3, 1]
    model = Scaled(linear, lambda found: [i for i in order if i in found]).eval()
    r = ready(model, *batch(0, 1, 2, 3))
    r(*batch(3, 2, 1, 0))
    order.reverse()
    with pytest.raises(sq.StateError, match=r"mul: this run makes call 1 after 'experts.1', the example after 'experts.2'"):
        r(*batch(0, 1, 2, 3))


# Another layer than the examples


class Branches(nn.Module):
    """One of two ways to a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.other, self.norm = linear(), linear(), nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor, way: str = "head") -> Tensor:
        if way == "other":
            return self.head(self.other(x))
        if way == "norm":
            return self.head(self.norm(x))
        if way == "matmul":
            return self.head(x) @ self.weight
        if way == "method":
            return self.head(x).matmul(self.weight)
        if way == "product":
            return self.head(x) @ x.mT
        return self.head(x)


X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0))

WEIGHTS_ONLY = sq.QuantConfig(activation=None)


@pytest.mark.parametrize("way", ["other", "norm", "matmul", "method", "product"])
def test_what_no_example_reached_does_not_run_in_float_unnoticed(way: str) -> None:
    r = ready(Branches().eval(), X)
    place = way if way in ("other", "norm") else "matmul"
    with pytest.raises(sq.StateError, match=f"^{place}: this run calls it and no example does"):
        r(X, way)
    with pytest.raises(sq.StateError, match="no example does"):
        r.q.observe(r.params, r.q.init(r.params), X, way)


@pytest.mark.parametrize("way", ["other", "norm", "matmul"])
def test_nor_does_it_where_weights_alone_are_quantized(way: str) -> None:
    r = ready(Branches().eval(), X, config=WEIGHTS_ONLY)
    with pytest.raises(sq.StateError, match="no example does"):
        r(X, way)


@pytest.mark.parametrize(
    ("way", "rule"),
    [
        ("other", sq.Rule(name="other", weight=None, activation=None)),
        ("other", sq.Rule(name="oth*", weight=None)),
        ("other", sq.Rule(name="other", requests=False)),
        ("norm", sq.Rule(type=nn.LayerNorm, activation=None)),
        ("matmul", sq.Rule(type=torch.matmul, activation=None)),
        ("product", sq.Rule(type="matmul", activation=None)),
        ("matmul", sq.Rule(where=lambda site: site.function == "matmul", activation=None)),
    ],
)
def test_a_rule_that_leaves_it_float_allows_it(way: str, rule: sq.Rule) -> None:
    r = ready(Branches().eval(), X, config=sq.QuantConfig(rules=(rule,)))
    assert r(X, way).shape == Branches()(X, way).shape
    again = sq.build(Branches().eval(), sq.Plan.from_json(r.q.plan.to_json()))
    assert torch.equal(again.apply(r.params, r.qparams, X, way), r(X, way))


def test_a_plan_that_quantizes_nothing_runs_anything() -> None:
    config = sq.QuantConfig(weight=None, activation=None)
    model = Branches().eval()
    r = ready(model, X, config=config)
    assert torch.equal(r(X, "other"), model(X, "other"))


def test_a_module_that_is_never_called_but_whose_parameters_are_read_is_known() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True).eval()
    x = torch.randn(2, 3, WIDTH)
    for config in (sq.QuantConfig(), WEIGHTS_ONLY):
        assert ready(model, x, config=config)(x).shape == x.shape


# The examples' own ways


class Optional(nn.Module):
    """A second input that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.see, self.head = nn.Embedding(10, WIDTH), nn.Linear(4, WIDTH), linear()

    def forward(self, ids: Tensor, image: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        h = self.embed(ids)
        if image is not None:
            h = torch.cat([self.see(image), h], 1)
        return self.head(h if scale is None else h * scale)


IDS, IMAGE, SCALE = torch.tensor([[1, 2, 3]]), torch.randn(1, 2, 4), torch.full((1, 1, WIDTH), 2.0)


@pytest.mark.parametrize("chip", [None, "BM1690"])
def test_each_example_may_run_whatever_inputs_others_have(chip: str | None) -> None:
    ways: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = [
        ((IDS,), {}),
        ((IDS, IMAGE), {}),
        ((IDS,), {"scale": SCALE}),
        ((IDS, IMAGE), {"scale": SCALE}),
    ]
    model = Optional().eval()
    q = sq.quantize(model, sq.QuantConfig(chip=chip, activation=MINMAX.activation), examples=ways)
    params, ostate = sq.params_of(model), q.init(sq.params_of(model))
    for args, kwargs in ways:
        _, ostate = q.observe(params, ostate, *args, **kwargs)
    qparams = q.qparams(params, ostate)
    for args, kwargs in ways:
        expected = model(*args, **kwargs)
        assert (q.apply(params, qparams, *args, **kwargs) - expected).norm() < 0.2 * expected.norm()


def test_an_input_that_every_example_has_is_missed() -> None:
    r = ready(Optional().eval(), IDS, IMAGE)
    with pytest.raises(sq.StateError, match="input 'image' has a quantizer, but this run was not given it"):
        r(IDS)


# One quantizer for all calls of a place


class Scan(nn.Module):
    """A recurrence over time, with a cell of layers or a cell of functions."""

    def __init__(self, functions: bool) -> None:
        super().__init__()
        self.read, self.recur = linear(), linear()
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0] * 0
        for t in range(x.shape[1]):
            if self.functions:
                h = torch.tanh(F.linear(x[:, t], self.read.weight) + h @ self.recur.weight.mT)
            else:
                h = torch.tanh(self.read(x[:, t]) + self.recur(h))
        return h


SHARED = sq.Rule(name="*", share=True)


@pytest.mark.parametrize("chip", [None, "BM1690"])
@pytest.mark.parametrize("functions", [False, True])
def test_a_scan_whose_calls_share_runs_at_any_length(functions: bool, chip: str | None) -> None:
    torch.manual_seed(0)
    model = Scan(functions).eval()
    config = sq.QuantConfig(chip=chip, activation=MINMAX.activation, rules=(SHARED,))
    plans = [sq.quantize(model, config, example_args=(torch.randn(2, n, WIDTH),)).plan for n in (4, 12)]
    assert list(plans[0]) == list(plans[1])
    x = torch.randn(16, 12, WIDTH)
    r = ready(model, x, config=config)
    for length in (1, 4, 9):
        expected = model(x[:, :length])
        assert (r(x[:, :length]) - expected).norm() < 0.2 * expected.norm()
    assert r(torch.randn(2, 20, WIDTH)).shape == (2, WIDTH)


def test_a_shared_quantizer_has_seen_every_call() -> None:
    torch.manual_seed(0)
    model, x = Scan(False).eval(), torch.randn(2, 5, WIDTH)
    config = sq.QuantConfig(activation=sq.override(observer=sq.observers.minmax()), rules=(SHARED,))
    r = ready(model, x, config=config)
    states, h = [], torch.zeros(2, WIDTH)
    with torch.no_grad():
        for t in range(5):
            h = torch.tanh(model.read(x[:, t]) + model.recur(h))
            states.append(h)
    torch.testing.assert_close(r.qparams["tanh.post_act_fake_quantizer"].scale, scale_of(torch.cat(states)))
    assert r.q.plan.site("recur.weight_fake_quant").inputs[-1].quantizer == "tanh.post_act_fake_quantizer"


def test_sharing_holds_in_parts_json_and_numbers() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Scan(False), linear()).eval(), torch.randn(2, 5, WIDTH)
    r = ready(model, x, config=sq.QuantConfig(rules=(sq.Rule(name="0", share=True),)))
    again = sq.build(model, sq.Plan.from_json(r.q.plan.to_json()))
    longer = torch.randn(2, 8, WIDTH)
    assert torch.equal(again.apply(r.params, r.qparams, longer), r(longer))
    part = r.q.part("0")
    seen = r.q.tap("1")(r.params, r.qparams, longer)[1]["1"]
    given = r.q.quantize_value("input.post_act_fake_quantizer", longer, r.qparams["input.post_act_fake_quantizer"])
    assert torch.equal(part.apply(r.params, r.qparams, given), seen[0].args[0])


def test_without_sharing_the_error_says_how() -> None:
    r = ready(Scan(False).eval(), torch.randn(2, 4, WIDTH))
    with pytest.raises(sq.StateError, match=r"the example 4 times.*share=True"):
        r(torch.randn(2, 5, WIDTH))


def test_some_calls_of_a_place_cannot_share() -> None:
    config = sq.QuantConfig(rules=(sq.Rule(name="tanh_1", share=True),))
    with pytest.raises(sq.PlanError, match="share"):
        sq.quantize(Scan(False).eval(), config, example_args=(torch.randn(2, 4, WIDTH),))
