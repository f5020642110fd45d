"""Along which axes of a weight its scales lie, for every spelling of a product, behind views of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.operations import CONTRACTIONS
from sophq_func.planning.contractions import BY_EQUATION, SUMMED
from tests.helpers import Ready, ready

SIZES = {"b": 2, "i": 4, "o": 3, "j": 2, "k": 2, "l": 4, "n": 5}
"""Of each letter: batch, input, output, a second input, taps, the input once more, rows of the input."""

ROUNDED = sq.override(bits=8, symmetric_range=True, fake_quantize=sq.fake_quantize.fixed())
"""127 codes on each side, so that no channel's extreme is a tie that two orders of arithmetic round apart."""


class Product(nn.Module):
    """A product of the input and a parameter, as a function writes it."""

    def __init__(self, weight: Tensor, f: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.f = nn.Parameter(weight), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.weight)


def quantized(model: nn.Module, x: Tensor, **changes: object) -> Ready:
    """A model whose weights alone are quantized."""
    change = sq.override(**dict(ROUNDED.values) | {"granularity": sq.PerChannel()} | changes)
    return ready(model.eval(), x, config=sq.QuantConfig(weight=change, activation=None))


class Spelling(NamedTuple):
    """One way to write a product.

    Attributes:
      f: of the input and the weight.
      x: letters of the input.
      weight: letters of the weight as the product reads it.
      kept: those of its letters that are not summed over.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    x: str
    weight: str
    kept: str


SPELLINGS: dict[str, Spelling] = {
    "matmul": Spelling(lambda x, w: x @ w, "ni", "io", "o"),
    "torch.mm": Spelling(torch.mm, "ni", "io", "o"),
    "spmm": Spelling(torch.spmm, "ni", "io", "o"),
    "reversed matmul": Spelling(lambda x, w: w.__rmatmul__(x), "ni", "io", "o"),
    "left factor": Spelling(lambda x, w: w @ x, "in", "oi", "o"),
    "broadcast matmul": Spelling(lambda x, w: x @ w, "ni", "bio", "bo"),
    "linear": Spelling(F.linear, "ni", "oi", "o"),
    "inner": Spelling(torch.inner, "ni", "oi", "o"),
    "addmm": Spelling(lambda x, w: torch.addmm(x.new_zeros(3), x, w), "ni", "io", "o"),
    "mv": Spelling(lambda x, w: torch.mv(w, x), "i", "oi", "o"),
    "addmv": Spelling(lambda x, w: torch.addmv(x.new_zeros(3), w, x), "i", "oi", "o"),
    "vector": Spelling(lambda x, w: x @ w, "ni", "i", ""),
    "dot": Spelling(torch.dot, "i", "i", ""),
    "vdot": Spelling(torch.vdot, "i", "i", ""),
    "vecdot": Spelling(lambda x, w: torch.linalg.vecdot(w, x), "i", "oi", "o"),
    "vecdot along an axis": Spelling(lambda x, w: torch.linalg.vecdot(w, x[:, None], dim=0), "i", "io", "o"),
    "outer": Spelling(torch.outer, "n", "o", "o"),
    "ger": Spelling(torch.ger, "n", "o", "o"),
    "bmm": Spelling(torch.bmm, "bni", "bio", "bo"),
    "baddbmm": Spelling(lambda x, w: torch.baddbmm(x.new_zeros(1), x, w), "bni", "bio", "bo"),
    "addbmm": Spelling(lambda x, w: torch.addbmm(x.new_zeros(1), x, w), "bni", "bio", "o"),
    "tensordot": Spelling(lambda x, w: torch.tensordot(x, w, 1), "ni", "io", "o"),
    "tensordot of lists": Spelling(lambda x, w: torch.tensordot(w, x, ([2, 0], [1, 2])), "nij", "joi", "o"),
    "multi_dot": Spelling(lambda x, w: torch.linalg.multi_dot([x, w]), "ni", "io", "o"),
    "multi_dot, first": Spelling(lambda x, w: torch.linalg.multi_dot([w, x, x.mT]), "in", "oi", "o"),
    "multi_dot, middle": Spelling(lambda x, w: torch.linalg.multi_dot([x, w, w.new_ones(3, 1)]), "ni", "io", ""),
    "einsum": Spelling(lambda x, w: torch.einsum("ni,oi->no", x, w), "ni", "oi", "o"),
    "einsum, weight first": Spelling(lambda x, w: torch.einsum("bio,bni->bno", w, x), "bni", "bio", "bo"),
    "einsum, batch summed": Spelling(lambda x, w: torch.einsum("bni,bio->no", x, w), "bni", "bio", "o"),
    "einsum, implicit": Spelling(lambda x, w: torch.einsum("ni,io", x, w), "ni", "io", "o"),
    "einsum, ellipsis": Spelling(lambda x, w: torch.einsum("...i, ...io -> ...o", x, w), "bi", "bio", "bo"),
    "einsum, lists": Spelling(lambda x, w: torch.einsum(x, [0, 1], w, [2, 1], [0, 2]), "ni", "oi", "o"),
    "einsum, implicit lists": Spelling(lambda x, w: torch.einsum(x, [0, 1], w, [1, 2]), "ni", "io", "o"),
    "einsum, lists with an ellipsis": Spelling(
        lambda x, w: torch.einsum(x, [..., 1], w, [..., 1, 2], [..., 2]), "bi", "bio", "bo"
    ),
    "einsum, weight alone summed": Spelling(lambda x, w: torch.einsum("ni,oj->n", x, w), "ni", "oj", ""),
    "attention": Spelling(lambda x, w: F.scaled_dot_product_attention(x, w, w), "bni", "boi", "b"),
    "conv1d": Spelling(lambda x, w: F.conv1d(x, w), "bin", "oik", "o"),
    "convolution": Spelling(lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1), "bin", "oik", "o"),
    "transposed convolution": Spelling(
        lambda x, w: torch.convolution(x, w, None, [1], [0], [1], True, [0], 1), "bin", "iok", "o"
    ),
    "conv_transpose1d": Spelling(lambda x, w: F.conv_transpose1d(x, w), "bin", "iok", "o"),
    "conv_tbc": Spelling(lambda x, w: torch.conv_tbc(x, w, x.new_zeros(3)), "nbi", "kio", "o"),
    "bilinear": Spelling(lambda x, w: F.bilinear(x, x, w), "ni", "oil", "o"),
    "embedding": Spelling(lambda x, w: F.embedding(x.argmax(-1), w), "ni", "io", "o"),
    "embedding_bag": Spelling(lambda x, w: F.embedding_bag(x.argmax(-1)[None], w, mode="sum"), "ni", "io", "o"),
}


def tensor(letters: str, sizes: Sequence[int] | None = None) -> Tensor:
    """Random numbers of these axes, of other magnitudes at each place of an axis, so that each shared scale shows."""
    made = torch.randn(tuple(sizes) if sizes else [SIZES[letter] for letter in letters])
    for axis, size in enumerate(made.shape):
        magnitudes = 3.0 ** torch.arange(size).reshape([-1 if a == axis else 1 for a in range(made.ndim)])
        made = made * magnitudes
    return made


def rounded(weight: Tensor, summed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The scale for each index along the axes that are not summed over, and the weight rounded with it."""
    scale = weight.abs().amax(summed, keepdim=True) / 127 if summed else weight.abs() / 127
    return scale, (weight * (1 / scale)).round().clamp(-127, 127) * scale


def check(got: Ready, x: Tensor, f: Callable[[Tensor, Tensor], Tensor], summed: tuple[int, ...], name: str) -> None:
    """Compare the scales and the output with those of a weight that is rounded by the letters of the equation."""
    weight = got.params["weight"]
    scale, right = rounded(weight, summed)
    found = got.qparams[name].scale
    torch.testing.assert_close(found.reshape(-1), scale.reshape(-1))
    # Two orders of summation; an element that is rounded another way would be off by a whole step.
    torch.testing.assert_close(got(x), f(x, right), rtol=1e-5, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.replace(" ", "_"))
def test_scales_lie_along_what_is_not_summed_over(case: str) -> None:
    spelling = SPELLINGS[case]
    x, weight = torch.randn([SIZES[letter] for letter in spelling.x]), tensor(spelling.weight)
    got = quantized(Product(weight, spelling.f), x)
    summed = tuple(axis for axis, letter in enumerate(spelling.weight) if letter not in spelling.kept)
    check(got, x, spelling.f, summed, "weight_fake_quant")


def test_every_contraction_says_what_it_sums_over() -> None:
    assert SUMMED.keys() | BY_EQUATION.keys() == CONTRACTIONS.keys()
    assert not SUMMED.keys() & BY_EQUATION.keys()
    for name, rules in SUMMED.items():
        assert len(rules) == len(CONTRACTIONS[name]) // 2


class Layout(NamedTuple):
    """How a parameter is stored, and the calls that make the operand of a product of it.

    Attributes:
      groups: for each axis of the parameter, the letters that it joins; none for one that the views take away.
      sizes: of these axes.
      views: from the parameter to the operand.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    views: Callable[[Tensor], Tensor]

    def before(self, groups: list[str], sizes: list[int], view: Callable[[Tensor], Tensor]) -> Layout:
        """The layout of a parameter that one more call, the first of all, brings into this layout."""
        return Layout(tuple(groups), tuple(sizes), lambda w: self.views(view(w)))


def swapped(draw: st.DrawFn, layout: Layout) -> Layout:
    """Two axes are swapped."""
    ndim = len(layout.groups)
    a, b = draw(st.integers(0, ndim - 1)), draw(st.integers(0, ndim - 1))
    order = list(range(ndim))
    order[a], order[b] = b, a
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "transpose": lambda w: w.transpose(a, b),
        "swapaxes": lambda w: torch.swapaxes(w, a, b),
        "permute": lambda w: w.permute(order),
    }
    if a != b:
        ways["movedim"] = lambda w: w.movedim((a, b), (b, a))
    if {a, b} == {ndim - 1, ndim - 2}:
        ways["mT"] = lambda w: w.mT
    way = ways[draw(st.sampled_from(sorted(ways)))]
    return layout.before([layout.groups[i] for i in order], [layout.sizes[i] for i in order], way)


def joined(draw: st.DrawFn, layout: Layout) -> Layout:
    """One axis is split into two."""
    if len(layout.groups) < 2:
        return layout
    at = draw(st.integers(0, len(layout.groups) - 2))
    pair, whole = layout.sizes[at : at + 2], layout.sizes
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.unflatten(at, pair),
        lambda w: w.reshape(whole),
        lambda w: w.contiguous().view(whole),
    ]
    groups, sizes = list(layout.groups), list(layout.sizes)
    groups[at : at + 2], sizes[at : at + 2] = ["".join(groups[at : at + 2])], [pair[0] * pair[1]]
    return layout.before(groups, sizes, draw(st.sampled_from(ways)))


def taken(draw: st.DrawFn, layout: Layout) -> Layout:
    """One of several tensors along an axis is taken."""
    at = draw(st.integers(0, len(layout.groups)))
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.select(at, 1),
        lambda w: w.unbind(at)[0],
        lambda w: w.chunk(2, at)[1].squeeze(at),
        lambda w: w.narrow(at, 0, 1).squeeze(at),
        lambda w: w[(slice(None),) * at + (1,)],
        lambda w: w.index_select(at, torch.tensor([1])).squeeze(at),
    ]
    groups, sizes = list(layout.groups), list(layout.sizes)
    groups.insert(at, "")
    sizes.insert(at, 2)
    return layout.before(groups, sizes, draw(st.sampled_from(ways)))


def copied(draw: st.DrawFn, layout: Layout) -> Layout:
    """The numbers are copied, or moved to and fro."""
    at = draw(st.integers(0, len(layout.groups) - 1))
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.contiguous(),
        lambda w: w.clone(),
        lambda w: w.to(torch.float32),
        lambda w: w.flip(at).flip(at),
        lambda w: w.roll(1, at).roll(-1, at),
        lambda w: w.expand(2, *w.shape)[1],
        lambda w: F.pad(w, (1, 2)).narrow(-1, 1, w.shape[-1]),
        lambda w: w.unsqueeze(at).squeeze(at),
    ]
    return layout.before(list(layout.groups), list(layout.sizes), draw(st.sampled_from(ways)))


@st.composite
def layouts(draw: st.DrawFn, letters: str) -> Layout:
    """A random layout of a weight of these letters, up to four calls away from the operand."""
    layout = Layout(tuple(letters), tuple(SIZES[letter] for letter in letters), lambda w: w)
    for step in draw(st.lists(st.sampled_from((swapped, joined, taken, copied)), max_size=4)):
        layout = step(draw, layout)
    return layout


BEHIND_VIEWS = [name for name, case in SPELLINGS.items() if "l" not in case.weight and "embedding" not in name]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scales_are_followed_through_views(data: st.DataObject) -> None:
    spelling = SPELLINGS[data.draw(st.sampled_from(BEHIND_VIEWS))]
    layout = data.draw(layouts(spelling.weight))
    weight = tensor("".join(group[:1] or "1" for group in layout.groups), layout.sizes)
    x = torch.randn([SIZES[letter] for letter in spelling.x])

    def f(x: Tensor, w: Tensor) -> Tensor:
        return spelling.f(x, layout.views(w))

    summed = tuple(axis for axis, group in enumerate(layout.groups) if any(c not in spelling.kept for c in group))
    check(quantized(Product(weight, f), x), x, f, summed, "weight_fake_quant")


LETTERS = "bijo"


@settings(max_examples=40, deadline=None)
@given(
    st.text(LETTERS, min_size=1, max_size=4).filter(lambda text: len(set(text)) == len(text)),
    st.text(LETTERS, min_size=1, max_size=4).filter(lambda text: len(set(text)) == len(text)),
    st.randoms(use_true_random=False),
)
def test_any_einsum(of_x: str, of_weight: str, random: object) -> None:
    letters = sorted(set(of_x + of_weight))
    kept = "".join(letter for letter in letters if random.random() < 0.6)  # type: ignore[attr-defined]
    equation = f"{of_x},{of_weight}->{kept}"
    x, weight = torch.randn([SIZES[letter] for letter in of_x]), tensor(of_weight)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(equation, x, w)

    summed = tuple(axis for axis, letter in enumerate(of_weight) if letter not in kept)
    check(quantized(Product(weight, f), x), x, f, summed, "weight_fake_quant")
