"""A network with the layer names that sophgo-mq's document on fine-grained control uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Layer1(nn.Module):
    """conv-bn-relu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))


class Layer2(nn.Module):
    """conv-relu, twice; the second by its type alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class Layer3(nn.Module):
    """A convolution behind an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x.flip(0))


class DocumentedNet(nn.Module):
    """``features.0.0``, ``layer1.conv1``, ``layer2.conv2``, ``layer3.conv3`` and ``F.sigmoid``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
        self.layer1, self.layer2, self.layer3 = Layer1(), Layer2(), Layer3()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.features(x))))
        return self.head(F.sigmoid(x).mean((2, 3)))
