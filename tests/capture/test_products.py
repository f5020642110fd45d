"""How many multiplications a call makes, against torch's own counter and against sums written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sophq_func as sq
from sophq_func.capture.products import COUNTS, multiplications
from sophq_func.core.operations import CONTRACTIONS
from tests.model.test_edges import Net

R = torch.randn


def counted(model: nn.Module, *inputs: Any) -> int:
    return sum(node.multiplications for node in sq.trace(model.eval(), inputs))


BY_TORCH: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "matmul": (lambda a, b: a @ b, (R(5, 2, 3), R(3, 4))),
    "matmul of a batch": (lambda a, b: a @ b, (R(5, 2, 3), R(5, 3, 4))),
    "mm": (torch.mm, (R(2, 3), R(3, 4))),
    "addmm": (torch.addmm, (R(4), R(2, 3), R(3, 4))),
    "bmm": (torch.bmm, (R(5, 2, 3), R(5, 3, 4))),
    "baddbmm": (torch.baddbmm, (R(5, 2, 4), R(5, 2, 3), R(5, 3, 4))),
    "linear": (F.linear, (R(2, 5, 3), R(4, 3), R(4))),
    "grouped conv": (lambda x, w: F.conv2d(x, w, groups=2, stride=2), (R(2, 4, 9, 8), R(6, 2, 3, 2))),
    "conv1d": (F.conv1d, (R(2, 4, 9), R(6, 4, 3))),
    "conv3d": (F.conv3d, (R(2, 4, 5, 5, 5), R(6, 4, 3, 1, 2))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=([1, 2], [2, 0])), (R(2, 3, 4), R(4, 5, 3))),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->bij", a, b), (R(5, 2, 3), R(5, 3, 4))),
    "einsum in another order": (lambda a, b: torch.einsum("ki,jk->ij", a, b), (R(3, 2), R(4, 3))),
    "einsum with an ellipsis": (lambda a, b: torch.einsum("...ik,kj->...ij", a, b), (R(5, 2, 3), R(3, 4))),
    "einsum of lists": (lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), (R(2, 3), R(3, 4))),
    "attention": (F.scaled_dot_product_attention, (R(2, 3, 5, 4), R(2, 3, 7, 4), R(2, 3, 7, 6))),
}


@pytest.mark.parametrize("name", BY_TORCH)
def test_products_are_those_that_torch_counts(name: str) -> None:
    f, inputs = BY_TORCH[name]
    model = Net(lambda m, *x: f(*x))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    # torch counts a multiplication and an addition for each
    assert 2 * counted(model, *inputs) == counter.get_total_flops() > 0


BY_HAND: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int]] = {
    "mv": (torch.mv, (R(2, 3), R(3)), 6),
    "dot": (torch.dot, (R(3), R(3)), 3),
    "vdot": (torch.vdot, (R(3), R(3)), 3),
    "inner": (torch.inner, (R(2, 3), R(4, 3)), 24),
    "outer": (torch.outer, (R(2), R(3)), 6),
    "addbmm": (torch.addbmm, (R(2, 4), R(5, 2, 3), R(5, 3, 4)), 5 * 2 * 3 * 4),
    "multi_dot": (lambda *x: torch.linalg.multi_dot(x), (R(2, 3), R(3, 4), R(4, 5)), 2 * 3 * 4 + 2 * 4 * 5),
    "cdist": (torch.cdist, (R(2, 3), R(4, 3)), 24),
    "bilinear": (F.bilinear, (R(2, 3), R(2, 4), R(5, 3, 4)), 2 * 5 * 3 * 4),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, groups=2), (R(2, 4, 3, 3), R(4, 3, 2, 2)), 72 * 12),
    "conv_tbc": (torch.conv_tbc, (R(5, 2, 3), R(2, 3, 4), R(4)), 4 * 2 * 4 * 2 * 3),
    "embedding": (lambda w: F.embedding(torch.tensor([1, 2]), w), (R(5, 3),), 0),
    "addition": (torch.add, (R(2), R(2)), 0),
    "integers": (lambda x: x.long() @ x.long(), (R(3, 3),), 0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_products_are_those_of_the_sums_written_out(name: str) -> None:
    f, inputs, expected = BY_HAND[name]
    assert counted(Net(lambda m, *x: f(*x)), *inputs) == expected


LAYERS: dict[str, tuple[nn.Module, tuple[Tensor, ...], int]] = {
    "Conv2d": (nn.Conv2d(4, 6, 3, groups=2, padding_mode="circular", padding=1), (R(2, 4, 5, 5),), 2 * 25 * 6 * 2 * 9),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 6, 3), (R(2, 4, 5),), 2 * 5 * 4 * 6 * 3),
    "Bilinear": (nn.Bilinear(3, 4, 5), (R(2, 3), R(2, 4)), 2 * 3 * 4 * 5),
    "Embedding": (nn.Embedding(5, 3), (torch.tensor([1, 2]),), 0),
    "LSTM": (nn.LSTM(3, 4, 2), (R(5, 2, 3),), 5 * 2 * (16 * 3 + 16 * 4 + 16 * 4 + 16 * 4)),
    "GRU of one sequence": (nn.GRU(3, 4, bidirectional=True), (R(5, 3),), 5 * 2 * 12 * (3 + 4)),
    "LSTM with projections": (nn.LSTM(3, 4, proj_size=2), (R(5, 2, 3),), 5 * 2 * (16 * 3 + 16 * 2 + 2 * 4)),
    "RNNCell": (nn.RNNCell(3, 4), (R(2, 3),), 2 * 4 * (3 + 4)),
    "LSTMCell": (nn.LSTMCell(3, 4), (R(2, 3),), 2 * 16 * (3 + 4)),
    "ReLU": (nn.ReLU(), (R(2, 3),), 0),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # they are slow, says torch
@pytest.mark.parametrize("name", LAYERS)
def test_layers_make_the_products_of_the_functions_that_they_call(name: str) -> None:
    model, inputs, expected = LAYERS[name]
    assert counted(model, *inputs) == expected


def test_a_packed_sequence_counts_its_steps_alone() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(R(5, 2, 3), torch.tensor([5, 2]))
    model = Net(lambda m, x: m.lstm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2])))[0].data, lstm=nn.LSTM(3, 4))
    assert counted(model, R(5, 2, 3)) == len(packed.data) * 16 * (3 + 4)


def test_an_unknown_function_multiplies_nothing_that_is_known() -> None:
    assert multiplications("no_such_function", (R(2, 2),), {}, R(2, 2)) == 0


def test_every_contraction_has_a_count_but_those_that_look_rows_up() -> None:
    assert CONTRACTIONS.keys() - COUNTS.keys() == {"embedding", "embedding_bag"}
