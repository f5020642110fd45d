"""Weights of functions: which there are, what decides their granularity, and what cannot be cut into groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from tests.helpers import NEEDS_GROUPED_MM, ready

FIXED = sq.fake_quantize.fixed()


class Net(nn.Module):
    """A forward given as a function, and the layers and parameters that it uses."""

    def __init__(self, f: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.f(self, *inputs)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def weights_only(granularity: object = None, **changes: object) -> sq.QuantConfig:
    change = sq.override(granularity=granularity or sq.PerChannel(), fake_quantize=FIXED, **changes)
    return sq.QuantConfig(weight=change, activation=None)


def planned(model: nn.Module, *inputs: Tensor, config: sq.QuantConfig | None = None) -> sq.Plan:
    return sq.plan(sq.trace(model.eval(), inputs), config or weights_only())


X = torch.randn(4, 8)


# Several uses of one weight.

USES: dict[str, tuple[Callable[..., Tensor], object, str]] = {
    "a table and the layer behind it": (
        lambda m, x: F.linear(F.embedding(x.argmax(-1) % 5, m.w), m.w),
        sq.PerChannel(0),
        "",
    ),
    "to and fro": (lambda m, x: (x[:, :5] @ m.w) @ m.w.T, sq.PerTensor(), "different axes: one scale"),
    "parts of one": (lambda m, x: x[:, :5] @ m.w[:, :2] + x[:, :5] @ m.w[:, 2:4], sq.PerChannel(-1), ""),
    "an expert and all": (
        lambda m, x: torch.einsum("ni,eoi->neo", x, m.e).sum(1) + torch.einsum("ni,eoi->no", x, m.e),
        sq.PerChannel(-2),
        "different axes: scales along axis 1 alone",
    ),
    "chosen by size": (lambda m, x: x[:, :5] @ F.max_pool1d(m.w, 2), sq.PerTensor(), "does not tell"),
}


@pytest.mark.parametrize("case", USES, ids=lambda case: case.replace(" ", "_"))
def test_scales_lie_along_what_no_use_sums_over(case: str) -> None:
    f, expected, note = USES[case]
    plan = planned(Net(f, w=weight(5, 4), e=weight(3, 2, 8)), X)
    (name,) = plan
    assert plan[name].scheme.granularity == expected
    assert note in plan.site(name).note
    assert bool(note) == bool(plan.site(name).note)


COMPUTED: dict[str, tuple[Callable[..., Tensor], object]] = {
    "scaled": (lambda m, x: x @ (m.w * 2), sq.PerChannel(-1)),
    "experts": (lambda m, x: torch.bmm(x.expand(3, 4, 8), m.e.mT.tanh() * m.s), sq.PerChannel((0, 2))),
    "zeros for each example": (
        lambda m, x: F.scaled_dot_product_attention(m.proj(x.new_zeros(len(x), 5, 8)), x[:, None], x[:, None]),
        sq.PerTensor(),
    ),
    "queries for each example": (
        lambda m, x: F.scaled_dot_product_attention(m.proj(m.e[:1].expand(len(x), 5, 8)), x[:, None], x[:, None]),
        sq.PerChannel(-2),
    ),
}


@pytest.mark.parametrize("case", COMPUTED, ids=lambda case: case.replace(" ", "_"))
def test_computed_weights_have_scales_along_axes_of_parameters(case: str) -> None:
    f, expected = COMPUTED[case]
    model = Net(f, w=weight(8, 5), e=weight(3, 5, 8), s=weight(5), proj=nn.Linear(8, 8))
    rules = (sq.Rule(name="proj", weight=None),)
    config = sq.QuantConfig(weight=weights_only().weight, activation=None, rules=rules)
    plan = planned(model, X, config=config)
    (name,) = plan
    assert plan[name].scheme.granularity == expected


def test_a_computed_weight_that_grows_with_the_batch_runs_for_any_batch() -> None:
    f, _ = COMPUTED["queries for each example"]
    model = Net(f, e=weight(3, 5, 8), proj=nn.Linear(8, 8)).eval()
    got = ready(model, X, config=weights_only(bits=8))
    x = torch.randn(7, 8)
    torch.testing.assert_close(got(x), model(x), rtol=0, atol=0.1)


def test_a_table_read_through_its_transpose_is_one_weight() -> None:
    model = Net(lambda m, i: m.table(i) @ m.table.weight.T, table=nn.Embedding(5, 4))
    plan = planned(model, torch.tensor([[1, 2]]))
    assert list(plan) == ["table.weight_fake_quant"]
    assert plan["table.weight_fake_quant"].scheme.granularity == sq.PerChannel(-2)


def test_an_axis_that_somebody_asks_for_is_taken() -> None:
    config = weights_only(sq.PerChannel(0))
    (found,) = planned(Net(lambda m, x: x @ m.w, w=weight(8, 3)), X, config=config).values()
    assert found.scheme.granularity == sq.PerChannel(0)


@pytest.mark.parametrize("strategy", ["Dataflow", "Layers"])
def test_a_table_has_a_scale_for_each_row_where_that_is_asked_for(strategy: str) -> None:
    """By default scales lie along the width, as in sophgo-mq; a rare token may be 1,000 times as small as another."""
    table = nn.Embedding(50, 16)
    with torch.no_grad():
        table.weight *= torch.logspace(-2, 1, 50)[:, None]
    errors = {}
    for granularity in (sq.PerChannel(), sq.PerChannel(axis=0)):
        change = sq.override(bits=8, granularity=granularity, fake_quantize=FIXED)
        config = sq.QuantConfig(strategy=strategy, weight=change, activation=None, weight_layers=(nn.Embedding,))
        got = ready(nn.Sequential(table).eval(), torch.arange(50), config=config)
        (entry,) = got.qparams.values()
        difference = (got(torch.arange(50)) - table.weight).norm(dim=1) / table.weight.norm(dim=1)
        errors[tuple(entry.scale.shape)] = float(difference.detach().max())
    assert errors.keys() == {(16,), (50,)}
    # an element is off by half a step, of which 127 cover the largest of its row: 1/254 of the norm, times at most sqrt(16)
    assert errors[50,] <= 4 / 254
    assert errors[16,] > 0.5


def test_axes_survive_json() -> None:
    plan = planned(Net(lambda m, x: torch.bmm(x.expand(3, 4, 8), m.w), w=weight(3, 8, 2)), X)
    again = sq.Plan.from_json(plan.to_json())
    assert again.site("w_fake_quant").axis == (0, 2)
    assert again["w_fake_quant"].scheme.granularity == sq.PerChannel((0, 2))
    assert dict(again) == dict(plan)


# Experts in one tensor.

ENDS = torch.tensor([4, 4, 8], dtype=torch.int32)


@NEEDS_GROUPED_MM
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_a_grouped_product_have_scales_of_their_own(transposed: bool) -> None:
    size = torch.tensor([1.0, 30.0, 1000.0])[:, None, None]
    w = torch.randn(3, 8, 16) * size * torch.logspace(0, 2, 16)
    stored = w.mT.contiguous() if transposed else w

    def forward(m: Net, x: Tensor) -> Tensor:
        return F.grouped_mm(x, m.w.mT if transposed else m.w, offs=ENDS)

    x = torch.randn(8, 8)
    got = ready(Net(forward, w=nn.Parameter(stored)).eval(), x, config=weights_only(bits=8, symmetric_range=True))
    scale = w.abs().amax(1, keepdim=True) / 127
    assert got.qparams["w_fake_quant"].scale.shape == (3, 16)
    torch.testing.assert_close(got.qparams["w_fake_quant"].scale, scale.squeeze(1))
    right = (w * (1 / scale)).round().clamp(-127, 127) * scale
    torch.testing.assert_close(got(x), F.grouped_mm(x, right, offs=ENDS), rtol=1e-5, atol=1e-2)


EXPERTS: dict[str, Callable[..., Tensor]] = {
    "bmm": lambda m, x: torch.bmm(x.expand(3, 4, 8), m.w),
    "loop": lambda m, x: torch.stack([F.linear(x, m.w[e].T) for e in range(3)]),
    "gathered": lambda m, x: torch.einsum("ni,nio->no", x, m.w[torch.tensor([2, 0, 1, 2])]),
    "joined": lambda m, x: x @ m.w.permute(1, 0, 2).reshape(8, 6),
    "matmul": lambda m, x: x @ m.w,
    "vmap in words": lambda m, x: torch.tensordot(x, m.w, ([1], [1])),
}


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.replace(" ", "_"))
def test_experts_of_every_spelling_have_scales_of_their_own(case: str) -> None:
    got = ready(Net(EXPERTS[case], w=weight(3, 8, 2)).eval(), X, config=weights_only(bits=8, symmetric_range=True))
    scale = got.params["w"].abs().amax(1) / 127
    torch.testing.assert_close(got.qparams["w_fake_quant"].scale, scale)


# Groups and blocks.


@pytest.mark.parametrize("case", EXPERTS, ids=lambda case: case.replace(" ", "_"))
def test_groups_lie_along_what_is_summed_over(case: str) -> None:
    config = weights_only(sq.PerGroup(size=4), bits=8, symmetric_range=True)
    got = ready(Net(EXPERTS[case], w=weight(3, 8, 2)).eval(), X, config=config)
    right = got.params["w"].reshape(3, 2, 4, 2).abs().amax(2).mT / 127
    torch.testing.assert_close(got.qparams["w_fake_quant"].scale, right)


BLOCKS: dict[str, Callable[..., Tensor]] = {
    "x @ w": lambda m, x: x @ m.w,
    "linear of T": lambda m, x: F.linear(x, m.w.T),
    "einsum": lambda m, x: torch.einsum("io,ni->no", m.w, x),
    "computed": lambda m, x: x @ (m.w * 1.0),
}


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxint8", "nvfp4"])
@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.replace(" ", "_"))
def test_blocks_lie_along_what_is_summed_over(case: str, name: str) -> None:
    w = torch.randn(40, 3) * torch.logspace(-2, 2, 40)[:, None]
    x = torch.randn(4, 40)
    change = sq.override(fake_quantize=getattr(sq.fake_quantize, name)())
    config = sq.QuantConfig(weight=change, activation=None)
    got = ready(Net(BLOCKS[case], w=nn.Parameter(w)).eval(), x, config=config)
    (quantizer,) = got.qparams
    scheme = sq.QScheme(granularity=sq.PerChannel(0))
    right = sq.fake_quantizer(name).apply(w.T.contiguous(), got.qparams[quantizer], scheme).T
    torch.testing.assert_close(got(x), x @ right)


def test_blocks_of_layers_and_of_tables_lie_as_they_did() -> None:
    for model, x in ((nn.Linear(40, 3), torch.randn(4, 40)), (nn.Embedding(7, 40), torch.arange(7))):
        change = sq.override(fake_quantize=sq.fake_quantize.mxfp4())
        got = ready(model, x, config=sq.QuantConfig(weight=change, activation=None))
        right = sq.fake_quantizer("mxfp4").apply(got.params["weight"], got.qparams["weight_fake_quant"], sq.QScheme())
        torch.testing.assert_close(got(x), torch.func.functional_call(model, {**got.params, "weight": right}, (x,)))


def test_group_sizes_that_do_not_divide_are_reported_together() -> None:
    layers = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 37), nn.Linear(37, 64), nn.Linear(64, 10))
    with pytest.raises(sq.PlanError) as error:
        planned(layers, torch.randn(2, 64), config=weights_only(sq.PerGroup(size=32)))
    lines = str(error.value).splitlines()
    assert lines[0] == "2 problems:"
    assert "1.weight_fake_quant" in lines[1]
    assert "channels of 48 elements" in lines[1]
    assert "2.weight_fake_quant" in lines[2]
    assert "channels of 37 elements" in lines[2]


UNEVEN: dict[str, tuple[Net, Tensor, object, str]] = {
    "matmul": (Net(lambda m, x: x @ m.w, w=weight(8, 32)), X, sq.PerGroup(size=32), "channels of 8 elements"),
    "experts": (
        Net(lambda m, x: torch.bmm(x.expand(3, 4, 8), m.w), w=weight(3, 8, 4)),
        X,
        sq.PerGroup(size=16),
        "channels of 8 elements",
    ),
    "computed": (Net(lambda m, x: x @ (m.w * 2), w=weight(8, 32)), X, sq.PerGroup(size=32), "channels of 8 elements"),
    "convolution": (
        Net(lambda m, x: m.conv(x[None]), conv=nn.Conv1d(4, 6, 3)),
        X,
        sq.PerGroup(size=8),
        "channels of 12 elements",
    ),
    "grouped deconvolution": (
        Net(lambda m, x: m.conv(x[None]), conv=nn.ConvTranspose1d(4, 6, 3, groups=2)),
        X,
        sq.PerGroup(size=4),
        "channels of 6 elements",
    ),
    "blocks": (Net(lambda m, x: m.linear(x), linear=nn.Linear(8, 6)), X, sq.PerBlock(4, 4), "6 by 8 elements"),
}


@pytest.mark.parametrize("case", UNEVEN, ids=lambda case: case.replace(" ", "_"))
def test_what_cannot_be_cut_is_refused_by_name(case: str) -> None:
    model, x, granularity, words = UNEVEN[case]
    with pytest.raises(sq.PlanError, match=rf"weight_fake_quant: its {words}|w_fake_quant: its {words}"):
        planned(model, x, config=weights_only(granularity))


def test_the_fix_of_a_group_size_is_one() -> None:
    model = nn.Sequential(nn.Linear(64, 37), nn.Linear(37, 8))
    rule = sq.Rule(name="1.weight_fake_quant", weight=sq.override(granularity=sq.PerChannel()))
    change = sq.override(granularity=sq.PerGroup(size=32))
    plan = planned(model, torch.randn(2, 64), config=sq.QuantConfig(weight=change, rules=(rule,)))
    assert plan["0.weight_fake_quant"].scheme.granularity == sq.PerGroup(0, 32)
    assert plan["1.weight_fake_quant"].scheme.granularity == sq.PerChannel(0)


def test_groups_of_a_grouped_deconvolution_that_divide_are_planned() -> None:
    model = Net(lambda m, x: m.conv(x[None]), conv=nn.ConvTranspose1d(4, 6, 3, groups=2))
    got = ready(model.eval(), X, config=weights_only(sq.PerGroup(size=3)))
    assert got.qparams["conv.weight_fake_quant"].scale.shape == (6, 2)


@pytest.mark.parametrize("change", [{"granularity": sq.PerGroup(size=2)}, {"fake_quantize": sq.fake_quantize.mxfp4()}])
def test_groups_along_axes_that_nobody_knows_are_refused(change: dict[str, object]) -> None:
    model = Net(lambda m, x: x @ F.max_pool1d(m.w, 2), w=weight(8, 4))
    config = sq.QuantConfig(weight=sq.override(**change), activation=None)
    with pytest.raises(sq.PlanError, match=r"w_fake_quant: this weight has no groups \(because matmul does not tell"):
        planned(model, X, config=config)


# What is no weight, and no value.


@pytest.mark.parametrize("made", [lambda x: torch.eye(8), lambda x: torch.randn(8, 8), lambda x: torch.ones_like(x).T])
def test_a_constant_is_no_weight(made: Callable[[Tensor], Tensor]) -> None:
    assert list(planned(Net(lambda m, x: x @ made(x)), X)) == []


SPARSE = torch.eye(4).to_sparse()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(
    "f",
    [
        lambda m, x: m.linear(SPARSE @ x),
        lambda m, x: torch.sparse.mm(SPARSE.to_sparse_csr(), m.linear(x)),
        lambda m, x: torch.sparse.addmm(torch.zeros(4, 3), SPARSE, m.linear(x)),
        lambda m, x: torch.mm(SPARSE, x @ m.linear.weight.T),
    ],
    ids=["matmul", "csr", "addmm", "mm"],
)
def test_sparse_operands_stay_float_and_the_plan_says_so(f: Callable[..., Tensor]) -> None:
    model = Net(f, linear=nn.Linear(8, 3)).eval()
    got = ready(model, X)
    assert "linear.weight_fake_quant" in got.q.plan
    assert any("is sparse: it stays float" in note for note in got.q.plan.notes)
    cosine = F.cosine_similarity(got(X).flatten(), model(X).flatten(), 0)
    assert cosine > 0.999


def test_a_sparse_argument_of_the_model_goes_through() -> None:
    model = Net(lambda m, x, a: a @ m.linear(a @ x), linear=nn.Linear(8, 3)).eval()
    dense, sparse = ready(model, X, SPARSE.to_dense()), ready(model, X, SPARSE)
    torch.testing.assert_close(sparse(X, SPARSE), dense(X, SPARSE.to_dense()), rtol=0, atol=0.05)
    assert not any(name.startswith("inputs.1") for name in sparse.q.plan)


FOURIER: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module | nn.Parameter]]] = {
    "einsum": (
        lambda m, x: m.out(torch.fft.irfft(torch.einsum("nk,km->nm", torch.fft.rfft(x), m.w), n=8)),
        {"w": nn.Parameter(torch.randn(5, 5, dtype=torch.cfloat)), "out": nn.Linear(8, 3)},
    ),
    "pairs of reals": (
        lambda m, x: m.out(torch.fft.irfft(torch.fft.rfft(x) @ torch.view_as_complex(m.w), n=8)),
        {"w": weight(5, 5, 2), "out": nn.Linear(8, 3)},
    ),
    "layer": (
        lambda m, x: m.out(m.mix(x.to(torch.cfloat)).abs()),
        {"mix": nn.Linear(8, 8, dtype=torch.cfloat), "out": nn.Linear(8, 3)},
    ),
    "convolution": (
        lambda m, x: m.out(m.conv(torch.complex(x, x)[:, None]).abs().flatten(1)),
        {"conv": nn.Conv1d(1, 1, 1, dtype=torch.cfloat), "out": nn.Linear(8, 3)},
    ),
}


@pytest.mark.parametrize("case", FOURIER, ids=lambda case: case.replace(" ", "_"))
def test_complex_tensors_stay_float_and_what_follows_does_not(case: str) -> None:
    f, parts = FOURIER[case]
    model = Net(f, **parts).eval()
    got = ready(model, X)
    values = [name for name in got.q.plan if name.endswith("post_act_fake_quantizer")]
    assert [name for name in got.q.plan if name.endswith("weight_fake_quant")] == ["out.weight_fake_quant"]
    assert "w_fake_quant" not in got.q.plan
    assert len(values) == 1  # what the last layer reads
    assert any("is complex: it stays float" in note for note in got.q.plan.notes)
    assert F.cosine_similarity(got(X).flatten(), model(X).flatten(), 0) > 0.999
