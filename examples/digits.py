"""Handwritten digits, a small residual network for them, and how to train it: shared by the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_SIZE = 597
BATCH = 64

Params = dict[str, Tensor]


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Digits(nn.Module):
    """A residual conv-bn-relu network for 8x8 images, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = Block(16, 24, 1)
        self.layer2 = Block(24, 32, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(self.pool(x).flatten(1))


def load(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(N, 1, 8, 8)`` in [-1, 1] and labels, shuffled by ``seed``: training, then test."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    return x[TEST_SIZE:], y[TEST_SIZE:], x[:TEST_SIZE], y[:TEST_SIZE]


def batches(x: Tensor, y: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of whole batches in an order that depends on ``seed`` alone."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    for part in order.split(BATCH):
        if len(part) == BATCH:
            yield x[part], y[part]


def accuracy(predict: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Share of right answers, in percent."""
    with torch.no_grad():
        return float((predict(x).argmax(1) == y).float().mean()) * 100


def trained(seed: int = 0, epochs: int = 15) -> Digits:
    """A float network, trained in the ordinary way."""
    torch.manual_seed(seed)
    x, y, _, _ = load(seed)
    model = Digits().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for images, labels in batches(x, y, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def adam_init(tree: Params) -> tuple[Params, Params, Tensor]:
    """First and second moments, and the number of steps, of a functional Adam (arXiv:1412.6980)."""
    zeros = {name: torch.zeros_like(value) for name, value in tree.items()}
    return zeros, dict(zeros), torch.zeros(())


def adam_step(tree: Params, grads: Params, state: Any, rates: Mapping[str, float]) -> tuple[Params, Any]:
    """New leaves and new state; nothing is changed in place."""
    first, second, count = state
    count = count + 1
    first = {name: 0.9 * first[name] + 0.1 * g for name, g in grads.items()}
    second = {name: 0.999 * second[name] + 0.001 * g * g for name, g in grads.items()}
    size = torch.sqrt(1 - 0.999**count) / (1 - 0.9**count)
    new = {n: v - rates[n] * size * first[n] / (second[n].sqrt() + 1e-8) for n, v in tree.items()}
    return new, (first, second, count)
