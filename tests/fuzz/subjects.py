"""Small models whose plans and checkpoints are mutated: every kind of site, bias rounding, folding, a chip's sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sophq_func as sq


class Convolutions(nn.Module):
    """Convolutions with a BatchNorm, a sum, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.side = nn.Conv2d(2, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(N, 2, 5, 5)`` to ``(N, 4)``."""
        y = self.relu(self.norm(self.conv(x))) + self.side(x)
        return self.fc(torch.relu(self.fc(y.mean((2, 3)))))


class Attention(nn.Module):
    """Products of values, a weight that is computed, groups, and a parameter that functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.query = parametrizations.weight_norm(nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.ones(8))
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """From two tensors ``(N, 3, 8)`` to one."""
        q = self.query(x)
        k = y @ (self.weight * self.scale)
        attended = torch.softmax(q @ k.transpose(-1, -2), -1) @ k
        return torch.cat([self.out(attended), x], -1)


class Subject(NamedTuple):
    """A model with its plan and what a run needs.

    Attributes:
      batch: positional arguments of the model.
    """

    model: nn.Module
    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]
    batch: tuple[Tensor, ...]


def _made(model: nn.Module, config: sq.QuantConfig, *batch: Tensor) -> Subject:
    q = sq.quantize(model.eval(), config, example_args=batch)
    params = sq.params_of(model)
    return Subject(model, q, params, q.calibrate(params, [batch], progress=False), batch)


def _convolutions(config: sq.QuantConfig) -> Subject:
    torch.manual_seed(0)
    return _made(Convolutions(), config, torch.randn(2, 2, 5, 5))


def _attention(config: sq.QuantConfig) -> Subject:
    torch.manual_seed(0)
    return _made(Attention(), config, torch.randn(2, 3, 8), torch.randn(2, 3, 8))


PICKED = sq.Rule(name="out.weight", weight=sq.override(bits=4, granularity=sq.PerGroup(4), fake_quantize="fixed"))

SUBJECTS: dict[str, Callable[[], Subject]] = {
    "convolutions on a chip": lambda: _convolutions(sq.QuantConfig(chip="BM1690", strategy="CNN")),
    "convolutions with multipliers": lambda: _convolutions(sq.QuantConfig(chip="BM1684X", strategy="Chip")),
    "attention": lambda: _attention(sq.QuantConfig(chip=None, rules=(PICKED,))),
    "attention in microscaling": lambda: _attention(sq.presets.mxfp4()),
}
"""By name, what makes a subject."""
