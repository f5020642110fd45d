"""Tensors in one line: what is read of them, and where nothing may be."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import vmap

import sophq_func as sq
from sophq_func.core.brief import brief


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.tensor([1.0, 2.0]), "tensor([1., 2.])"),
        (torch.tensor([[1, 2], [3, 4]]), "tensor([[1, 2], [3, 4]])"),
        (torch.zeros(5), "(5,) float32 0"),
        (torch.tensor([0.0, 1.0, float("nan"), 2.0, 3.0]), "(5,) float32 nan"),
        (torch.tensor([True] * 4 + [False]), "(5,) bool 0..1"),
        (torch.arange(5.0).to(torch.float8_e4m3fn), "(5,) float8_e4m3fn 0..4"),
        (torch.arange(5.0, requires_grad=True), "(5,) float32 0..4"),
        (torch.empty(0), "tensor([])"),
        (torch.empty(3, device="meta"), "(3,) float32 on meta"),
        (None, "None"),
        ({"a": 0}, "{'a': 0}"),
    ],
)
def test_a_value_in_one_line(value: object, text: str) -> None:
    assert brief(value) == text


def test_nothing_is_read_inside_a_transform_or_of_a_fake_tensor() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(brief(x))
        return x

    vmap(look)(torch.ones(2, 3))
    with FakeTensorMode():
        look(torch.ones(3))
    assert seen == ["(3,) float32", "(3,) float32"]


def test_qparams_of_a_whole_model_fit_the_screen() -> None:
    entry = sq.QParams(torch.linspace(0.1, 0.2, 512), torch.zeros(512, dtype=torch.int32), {"qmax": torch.full((512,), 7.0)})
    text = "QParams(scale=(512,) float32 0.1..0.2, zero_point=(512,) int32 0, extras={'qmax': (512,) float32 7})"
    assert repr(entry) == text
    assert torch.equal(pickle.loads(pickle.dumps(entry)).scale, entry.scale)
    assert repr(sq.QParams(0, None, {"noise": 0})) == "QParams(scale=0, zero_point=None, extras={'noise': 0})"  # type: ignore[arg-type]
