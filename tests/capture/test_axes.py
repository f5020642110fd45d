"""Which axes of a parameter run along each axis of a tensor that was moved from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sophq_func as sq
from sophq_func.capture.axes import Axes, indices


class Read(nn.Module):
    """Moves a parameter of shape ``(2, 4, 6)`` and multiplies by the result, so that the trace shows its axes."""

    def __init__(self, f: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, 4, 6)) -> None:
        super().__init__()
        self.w, self.f = nn.Parameter(torch.randn(shape)), f

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f(self.w)


def axes(f: Callable[[Tensor], Tensor]) -> Axes | None:
    graph = sq.trace(Read(f), (torch.ones(()),))
    *_, product = graph
    return product.operands[1].axes


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Axes | None]] = {
    "the parameter": (lambda w: w, ((0,), (1,), (2,))),
    "permute": (lambda w: w.permute(2, 0, 1), ((2,), (0,), (1,))),
    "mT": (lambda w: w.mT, ((0,), (2,), (1,))),
    "in place": (lambda w: w.clone().transpose_(0, 2), ((2,), (1,), (0,))),
    "one expert": (lambda w: w[1], ((1,), (2,))),
    "experts by a list": (lambda w: w[torch.tensor([1, 0, 1])], ((0,), (1,), (2,))),
    "one row of each expert": (lambda w: w[torch.arange(2), torch.tensor([3, 0])], ((0, 1), (2,))),
    "joined by a view": (lambda w: w.view(8, 6), ((0, 1), (2,))),
    "joined behind a transposition": (lambda w: w.permute(2, 0, 1).view(6, 8), ((2,), (0, 1))),
    "viewed like another": (lambda w: w.view_as(torch.empty(8, 2, 3)), ((0, 1), (2,), (2,))),
    "joined": (lambda w: w.flatten(0, 1), ((0, 1), (2,))),
    "joined and parted": (lambda w: w.flatten(0, 1).unflatten(0, (2, 4)), ((0,), (1,), (2,))),
    "heads": (lambda w: w.unflatten(2, (3, 2)), ((0,), (1,), (2,), (2,))),
    "a copy by reshape": (lambda w: w.transpose(0, 1).reshape(8, 6), ((0, 1), (2,))),
    "expanded": (lambda w: w[:, None].expand(-1, 5, -1, -1), ((0,), (), (1,), (2,))),
    "repeated": (lambda w: w.repeat_interleave(2, 1), ((0,), (1,), (2,))),
    "padded": (lambda w: F.pad(w, (1, 0, 0, 2)), ((0,), (1,), (2,))),
    "unfolded": (lambda w: w.unfold(2, 2, 1), ((0,), (1,), (2,), (2,))),
    "a part": (lambda w: w.chunk(3, 2)[1][..., :1], ((0,), (1,), ())),
    "converted": (lambda w: w.to(torch.float64).float(), ((0,), (1,), (2,))),
    "a diagonal by index": (lambda w: w[:, torch.arange(4), torch.arange(4)], ((0,), (1, 2))),
    "computed": (lambda w: w * 2, None),
    "chosen by size": (lambda w: F.max_pool1d(w, 2), None),
    "other numbers": (lambda w: w.view(torch.float16).float(), None),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "_"))
def test_axes_are_followed(case: str) -> None:
    f, expected = CASES[case]
    assert axes(f) == expected


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"one row of each expert"}), ids=lambda case: case.replace(" ", "_"))
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_axes_are_followed_without_numbers(case: str) -> None:
    f, expected = CASES[case]
    with torch.device("meta"):
        graph = sq.trace(Read(f), (torch.ones(()),))
    *_, product = graph
    assert product.operands[1].axes == expected
    with FakeTensorMode():
        graph = sq.trace(Read(f), (torch.ones(()),))
    *_, product = graph
    assert product.operands[1].axes == expected


def test_indices_take_the_memory_of_one_axis() -> None:
    for axis, index in enumerate(indices(torch.empty(3, 5, 7))):
        assert index.untyped_storage().nbytes() == 4 * (3, 5, 7)[axis]
        assert index.shape == (3, 5, 7)


def test_following_writes_into_nothing_and_takes_no_random_numbers() -> None:
    model = Read(lambda w: F.dropout(w, 0.5, True).transpose(0, 1).contiguous(), (3, 4))
    before, state = model.w.detach().clone(), torch.get_rng_state()
    sq.trace(model, (torch.ones(()),))
    assert torch.equal(model.w, before)
    assert torch.equal(torch.get_rng_state(), state)
