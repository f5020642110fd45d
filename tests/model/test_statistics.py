"""What each weight multiplies: the error that moments give is the change of the output, for every spelling of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.config.site import WeightSite
from sophq_func.model.weight_quantizer import arranged
from sophq_func.numerics.layout import rows
from sophq_func.numerics.moments import merged, moments_of, output_error
from sophq_func.testing.models import Language
from tests.helpers import NEEDS_GROUPED_MM, same

# torch says of an even kernel that it copies the input
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


class Product(nn.Module):
    """A product with one parameter, however it is written."""

    def __init__(self, shape: tuple[int, ...], forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


ENDS = torch.tensor([3, 6, 9], dtype=torch.int32)
"""Of the rows of each expert, as many for each."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 8)),
    "of one image": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0)), (4, 9, 8)),
    "same, reflected": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, padding_mode="reflect"),
        (3, 4, 9, 8),
    ),
    "same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (3, 4, 9)),
    "valid": (lambda: nn.Conv1d(4, 6, 4, padding="valid"), (3, 4, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (3, 4, 9, 8)),
    "three axes": (lambda: nn.Conv3d(2, 6, 2), (3, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 6)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2, dilation=2), (3, 4, 5, 6)),
    "transposed, cropped": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, dilation=2), (3, 4, 5)),
    "x @ w": (lambda: Product((5, 7), lambda x, w: x @ w), (3, 4, 5)),
    "w @ x": (lambda: Product((6, 4), lambda x, w: w @ x), (3, 4, 7)),
    "w @ a vector": (lambda: Product((6, 4), lambda x, w: w @ x), (4,)),
    "x @ w.T": (lambda: Product((7, 5), lambda x, w: x @ w.T), (3, 4, 5)),
    "linear, function": (lambda: Product((7, 5), F.linear), (3, 5)),
    "a batch of matrices": (lambda: Product((3, 7, 4), torch.bmm), (3, 5, 7)),
    "items of a stack": (lambda: Product((2, 4, 4), lambda x, w: torch.stack([x @ w[0], x @ w[1]])), (3, 4)),
    "einsum, linear": (lambda: Product((7, 5), lambda x, w: torch.einsum("...i,oi->...o", x, w)), (3, 4, 5)),
    "einsum, the weight first": (lambda: Product((5, 7), lambda x, w: torch.einsum("io,bi->bo", w, x)), (3, 5)),
    "einsum, without a result": (lambda: Product((5, 7), lambda x, w: torch.einsum("bi,io", [x, w])), (3, 5)),
    "einsum, numbers": (lambda: Product((7, 5), lambda x, w: torch.einsum(x, [..., 0], w, [1, 0], [..., 1])), (3, 4, 5)),
    "einsum, heads": (lambda: Product((3, 5, 4), lambda x, w: torch.einsum("bthi,hio->btho", x, w)), (2, 6, 3, 5)),
    "einsum, heads joined": (lambda: Product((3, 4, 7), lambda x, w: torch.einsum("bthd,hdo->bto", x, w)), (2, 6, 3, 4)),
    "einsum, a permuted view": (
        lambda: Product((4, 3, 7), lambda x, w: torch.einsum("bthd,hdo->bto", x, w.permute(1, 0, 2))),
        (2, 6, 3, 4),
    ),
    "einsum, summed over time": (lambda: Product((7, 5), lambda x, w: torch.einsum("bti,oi->bo", x, w)), (2, 6, 5)),
    "einsum, summed over rows": (lambda: Product((4, 7, 5), lambda x, w: torch.einsum("bi,koi->bo", x, w)), (6, 5)),
    "einsum, three operands": (
        lambda: Product((7, 5), lambda x, w: torch.einsum("bi,oi,b->bo", x, w, torch.arange(1.0, 7.0))),
        (6, 5),
    ),
    "einsum, one for all heads": (lambda: Product((1, 5, 4), lambda x, w: torch.einsum("bhi,hio->bho", x, w)), (2, 3, 5)),
    "tensordot": (lambda: Product((3, 4, 7), torch.tensordot), (6, 3, 4)),
    "tensordot, axes": (lambda: Product((7, 5), lambda x, w: torch.tensordot(x, w, dims=([1], [-1]))), (6, 5)),
    "experts": (lambda: Product((3, 8, 4), lambda x, w: F.grouped_mm(x, w, offs=ENDS)), (9, 8)),
    "experts, transposed": (lambda: Product((3, 4, 8), lambda x, w: F.grouped_mm(x, w.mT, offs=ENDS)), (9, 8)),
    "experts, all alike": (lambda: Product((3, 8, 4), F.grouped_mm), (3, 8, 8)),
    "mv": (lambda: Product((6, 4), lambda x, w: torch.mv(w, x)), (4,)),
    "inner": (lambda: Product((6, 4), torch.inner), (2, 3, 4)),
    "addmm": (lambda: Product((5, 7), lambda x, w: torch.addmm(torch.zeros(7), x, w)), (3, 5)),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NEEDS_GROUPED_MM) if kind.startswith("experts") else kind for kind in LAYERS]
)
def test_the_error_that_moments_give_is_the_change_of_the_output(kind: str) -> None:
    make, shape = LAYERS[kind]
    model, x = make(), torch.randn(shape)
    q = sq.quantize(model, sq.QuantConfig(chip=None), example_args=(x,))
    params = sq.params_of(model)
    (name,) = (name for name in q.plan if isinstance(q.plan.site(name), WeightSite))
    moments = sq.statistics(q, params, [x], progress=False)[name]
    site = q.plan.site(name)
    change = torch.randn_like(params[site.parameter])
    before, after = (
        torch.func.functional_call(model, {**params, site.parameter: weight}, x)
        for weight in (params[site.parameter], params[site.parameter] + change)
    )
    flat = rows(arranged(change, site), sq.PerChannel(0 if site.groups > 1 else site.axis))
    error = output_error(flat.reshape(-1, flat.shape[-1]), moments.second).mean()
    torch.testing.assert_close(error, (after - before).detach().square().mean(), rtol=1e-4, atol=0)


@NEEDS_GROUPED_MM
def test_experts_have_moments_of_their_own_rows_however_many() -> None:
    ends = torch.tensor([5, 5, 8], dtype=torch.int32)
    model, x = Product((3, 8, 4), lambda x, w: F.grouped_mm(x, w, offs=ends)), torch.randn(8, 8)
    q = sq.quantize(model, sq.QuantConfig(chip=None), example_args=(x,))
    found = sq.statistics(q, sq.params_of(model), [x], progress=False)["w_fake_quant"]
    assert found.count.tolist() == [5, 0, 3]
    for part, own in ((0, x[:5]), (1, x[5:5]), (2, x[5:])):
        torch.testing.assert_close(tuple(field[part] for field in found), tuple(moments_of(own)))


PARTIAL: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "a diagonal": ((5, 5), lambda x, w: torch.einsum("bi,ii->bi", x, w)),
    "heads behind the channels": ((4, 5, 3), lambda x, w: torch.einsum("bhi,oih->bho", x.reshape(2, 3, 5), w)),
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_products_of_which_no_rows_can_be_told_have_no_moments(kind: str) -> None:
    shape, forward = PARTIAL[kind]
    model, x = Product(shape, forward), torch.randn(6, 5)
    q = sq.quantize(model, sq.QuantConfig(chip=None), example_args=(x,))
    assert sq.statistics(q, sq.params_of(model), [x], progress=False) == {}


def test_batches_add_up_and_quantized_runs_show_quantized_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    q = sq.quantize(model, sq.QuantConfig(chip=None, weight=sq.override(bits=2)), example_args=(torch.ones(1, 6),))
    params, batches = sq.params_of(model), [torch.randn(5, 6), torch.randn(9, 6)]
    qparams = q.calibrate(params, batches, progress=False)
    whole = sq.statistics(q, params, batches, progress=False)
    one, two = (sq.statistics(q, params, [batch], progress=False) for batch in batches)
    for name, moments in whole.items():
        torch.testing.assert_close(tuple(merged(one[name], two[name])), tuple(moments), rtol=1e-5, atol=1e-5)
    quantized = sq.statistics(q, params, batches, qparams, progress=False)
    _, seen = q.tap("2")(params, qparams, batches[0])
    x = seen["2"][0].args[0]
    torch.testing.assert_close(
        sq.statistics(q, params, batches[:1], qparams, progress=False)["2.weight_fake_quant"].second, x.T @ x / len(x)
    )
    assert not torch.equal(quantized["2.weight_fake_quant"].second, whole["2.weight_fake_quant"].second)


def test_layers_that_read_one_value_share_their_moments_and_a_table_has_those_of_the_head() -> None:
    model, ids = Language(blocks=1).eval(), torch.randint(0, 16, (2, 5))
    q = sq.quantize(model, sq.QuantConfig(chip=None), example_args=(ids,))
    found = sq.statistics(q, sq.params_of(model), [ids], progress=False)
    first, *others = (f"layers.0.{name}_proj.weight_fake_quant" for name in "qkv")
    assert all(found[name].second is found[first].second for name in others)
    _, seen = q.tap("head")(sq.params_of(model), None, ids)
    x = seen["head"][0].args[0].reshape(-1, 8)
    torch.testing.assert_close(found["embed.weight_fake_quant"].second, x.T @ x / len(x))


def test_where_chooses_weights_and_a_part_has_its_own() -> None:
    model, ids = Language().eval(), torch.randint(0, 16, (2, 5))
    q = sq.quantize(model, sq.QuantConfig(chip=None, activation=None), example_args=(ids,))
    params = sq.params_of(model)
    whole = sq.statistics(q, params, [ids], progress=False)
    some = sq.statistics(q, params, [ids], where=["layers.1.down_proj", "*q_proj*"], progress=False)
    assert sorted(some) == [f"layers.{i}.{name}_proj.weight_fake_quant" for i, name in ((0, "q"), (1, "down"), (1, "q"))]
    same(some["layers.1.down_proj.weight_fake_quant"], whole["layers.1.down_proj.weight_fake_quant"])
    _, seen = q.tap("layers.1", stop=True)(params, None, ids)
    part = sq.statistics(q.part("layers.1"), params, [seen["layers.1"][0].args], progress=False)
    same(part["layers.1.up_proj.weight_fake_quant"], whole["layers.1.up_proj.weight_fake_quant"])


def test_a_function_of_a_tree_has_statistics_too() -> None:
    params, x = {"a": [torch.randn(3, 4)], "b": torch.randn(4, 2)}, torch.randn(6, 3)
    q = sq.quantize(lambda p, x: (x @ p["a"][0]).relu() @ p["b"], sq.QuantConfig(), params=params, example_args=(x,))
    found = sq.statistics(q, params, [x], q.calibrate(params, [x], progress=False), progress=False)
    assert {name: moments.second.shape[0] for name, moments in found.items()} == {"a.0_fake_quant": 3, "b_fake_quant": 4}


def test_a_weight_that_is_summed_over_other_axes_has_no_moments() -> None:
    model, x = Product((5, 5), lambda x, w: (x @ w) @ w.T), torch.randn(3, 5)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(x,))
    found = sq.statistics(q, sq.params_of(model), [x], progress=False)
    assert found.keys() <= {"w_fake_quant"}
    wide = Product((5, 6), lambda x, w: (x @ w) @ w.T)
    q = sq.quantize(wide, sq.QuantConfig(), example_args=(x,))
    assert not sq.statistics(q, sq.params_of(wide), [x], progress=False)


@pytest.mark.parametrize("batches, match", [([], "no batches"), (torch.ones(1, 2), "cannot be read")])
def test_data_that_is_none_is_refused(batches: Any, match: str) -> None:
    model = nn.Linear(2, 3)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(torch.ones(1, 2),))
    with pytest.raises(sq.StateError, match=match):
        sq.statistics(q, sq.params_of(model), batches)


def test_what_where_does_not_find_is_named() -> None:
    model = nn.Linear(2, 3)
    q = sq.quantize(model, sq.QuantConfig(), example_args=(torch.ones(1, 2),))
    with pytest.raises(sq.ConfigError, match=r"2 problems(.|\n)*weight_fake_qant(.|\n)*chooses nothing"):
        sq.statistics(q, sq.params_of(model), [torch.ones(1, 2)], where=["weight_fake_qant", 3])  # type: ignore[list-item]
