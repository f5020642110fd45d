"""Functions whose calls a run does not report: none that a plan acts at, counts or refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq
from sophq_func.core.operations import CONTRACTIONS, called, without_names

X = torch.randn(3, 4)


class Branch(nn.Module):
    """A product that only some runs make."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, multiplies: bool = False) -> Tensor:
        x = self.layer(x + x.abs()).sigmoid().view(x.shape)
        return torch.mm(x, self.w) if multiplies else F.relu(x)


def idle(strategy: str) -> frozenset[object]:
    q = sq.quantize(Branch().eval(), sq.QuantConfig(strategy=strategy), example_args=(X,))
    return q.engine.loop.schedule.idle


def test_what_a_plan_acts_at_is_reported() -> None:
    functions = idle("Layers")  # the input of the layer is what ``add`` returns
    assert torch.Tensor.add not in functions and torch.add not in functions and torch.Tensor.__radd__ not in functions
    assert torch.Tensor.view in functions and torch.Tensor.shape.__get__ in functions


def test_products_are_reported_whatever_the_plan_says() -> None:
    assert not [function for function in idle("Layers") if called(function) in CONTRACTIONS]  # type: ignore[arg-type]


def test_getters_are_one_name() -> None:
    assert torch.Tensor.shape.__get__ in without_names(()) and torch.Tensor.shape.__get__ not in without_names({"get"})


def test_a_product_that_no_example_makes_is_still_refused() -> None:
    model = Branch().eval()
    q = sq.quantize(model, sq.QuantConfig(strategy="Layers"), example_args=(X,))
    params = sq.params_of(model)
    qparams = q.calibrate(params, [X], progress=False)
    with pytest.raises(sq.StateError, match="mm: this run calls it and no example does"):
        q.apply(params, qparams, X, True)
    with pytest.raises(sq.StateError, match="mm: this run calls it and no example does"):
        q.bind(params, qparams)(X, True)
