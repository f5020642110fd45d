"""The models and configs whose plans ``tests/golden/plans_of_version_2.json`` holds, as the library wrote them then."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sophq_func as sq
from tests.golden.models import ResidualConvNet, TransformerBlock


class Computed(nn.Module):
    """A weight that is a parameter, and one that is computed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 3))
        self.v = nn.Parameter(torch.ones(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x, self.w)), self.v.abs())


class Case(NamedTuple):
    model: nn.Module
    args: tuple[Tensor, ...]
    config: sq.QuantConfig

    def plan(self) -> sq.Plan:
        return sq.plan(sq.trace(self.model.eval(), self.args), self.config)


FOUR = sq.override(bits=4)
CASES = {
    "residual": Case(
        ResidualConvNet(),
        (torch.zeros(2, 3, 12, 12),),
        sq.QuantConfig(chip="BM1688", rules=(sq.Rule(type=nn.Conv2d, weight=FOUR, activation=FOUR),)),
    ),
    "mixed": Case(TransformerBlock(), (torch.zeros(1, 6, 16),), sq.QuantConfig(chip="BM1690", strategy="BF16Mixed")),
    "computed": Case(Computed(), (torch.zeros(2, 3),), sq.QuantConfig()),
}
