"""A network with each operation that a chip computes with integers in a way of its own, and how it is planned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sophq_func as sq

CHIPS = ("BM1684X", "BM1690", "CV183X")
"""BM1688 computes as BM1684X does, CV186X as BM1690."""


class Operations(nn.Module):
    """Two residual sums, a concatenation, products, activations, three kinds of pooling, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.gate, self.value, self.mixed = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.pool = nn.AvgPool2d(3, 1)
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gated = self.value(x) * torch.sigmoid(self.gate(x))
        x = F.relu(F.silu(gated) + self.shortcut(x))
        x = self.mixed(torch.cat([x, gated], 1))
        x = self.pool(F.relu(F.max_pool2d(x, 2)))
        x = x + F.hardswish(x)
        return self.head(torch.tanh(self.hidden(F.adaptive_avg_pool2d(x, 1).flatten(1))))


class Residual(nn.Module):
    """Convolutions, two sums and a linear layer, all of which the compiler computes with zero points, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(F.adaptive_avg_pool2d(x + self.last(x), 1).flatten(1))


def planned(chip: str, model: nn.Module, x: Tensor) -> sq.Quantized:
    """The model with a plan that simulates a chip."""
    return sq.quantize(model, sq.QuantConfig(chip=chip, strategy="Chip"), example_args=(x,))
