"""The models that are measured: ResNet-18 at 224 x 224, a BERT shaped like MiniLM at 8 x 128, and smaller ones.

Weights are random.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """The basic block of ResNet (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = None if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet18(nn.Module):
    """ResNet-18 for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*[Basic(*width) for width in [*widths, (512, 512, 1)]])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Subject(NamedTuple):
    """A way to make a model, arguments for it, and the tensor of its output that a loss is made of."""

    make: Callable[[], nn.Module]
    args: tuple[Tensor, ...]
    read: Callable[[Any], Tensor]


def resnet18(size: int = 224, batch: int = 4) -> Subject:
    """ResNet-18 on random images."""
    return Subject(seeded(ResNet18), (torch.randn(batch, 3, size, size, generator=generator()),), lambda output: output)


def minilm(batch: int = 8, length: int = 128) -> Subject:
    """A BERT of 6 layers and 384 features, fused attention, on random tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation="sdpa",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.randint(0, 30000, (batch, length), generator=generator())
    read = lambda output: output[0] if isinstance(output, tuple | list) else output["last_hidden_state"]  # noqa: E731
    return Subject(seeded(lambda: BertModel(config, add_pooling_layer=False)), (tokens,), read)


def tiny(layers: int = 20, width: int = 8) -> Subject:
    """Convolutions so small that calling them costs more than their arithmetic."""

    def make() -> nn.Module:
        blocks = [nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))]
        return nn.Sequential(*[part for _ in range(layers) for part in copy.deepcopy(blocks)])

    return Subject(seeded(make), (torch.randn(4, width, 8, 8, generator=generator()),), lambda output: output)


class CifarBlock(nn.Module):
    """The basic block of the small ResNets (arXiv:1512.03385, section 4.2)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        projection = (nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.downsample = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet20(nn.Module):
    """ResNet-20 for images of 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.blocks = nn.Sequential(*[CifarBlock(*width) for width in widths])
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class MLP(nn.Module):
    """Three linear layers for digits of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class GPTBlock(nn.Module):
    """A pre-norm transformer block whose attention is written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // self.heads) + mask, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model of 4 layers and 128 features."""

    def __init__(self, layers: int = 4, width: int = 128, vocabulary: int = 256, length: int = 64) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width) * 0.02)
        self.blocks = nn.ModuleList([GPTBlock(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def resnet20() -> Subject:
    """ResNet-20 on 32 random images."""
    return Subject(seeded(ResNet20), (torch.randn(32, 3, 32, 32, generator=generator()),), lambda output: output)


def mlp() -> Subject:
    """784-256-256-10, batch 64."""
    return Subject(seeded(MLP), (torch.randn(64, 784, generator=generator()),), lambda output: output)


def gpt() -> Subject:
    """The language model on 8 random texts of 64 tokens."""
    return Subject(seeded(GPT), (torch.randint(0, 256, (8, 64), generator=generator()),), lambda output: output)


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights at every call, eval mode."""

    def make_seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().eval()

    return make_seeded


def generator() -> torch.Generator:
    """A source of the same random numbers at every call."""
    return torch.Generator().manual_seed(0)


SUBJECTS: dict[str, Callable[[], Subject]] = {"resnet18": resnet18, "minilm": minilm, "tiny": tiny}

RESEARCH: dict[str, Callable[[], Subject]] = {"tiny": tiny, "mlp": mlp, "gpt": gpt, "resnet20": resnet20}
"""The small ones of :mod:`research_speed`, which measures the others, too."""
