"""Small models for recorded cases, and numbers for them that every machine makes alike.

Nothing is drawn by torch: weights and inputs are integers of ``numpy.random.RandomState``, whose streams numpy keeps as
they are, times powers of two.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 2.0**-10
"""Of every BatchNorm: ``var + EPS`` is then exactly a power of four, and its root and their quotients are exact."""


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Integers from ``low`` to ``high``, both included, as float32."""
    return torch.from_numpy(np.random.RandomState(seed).randint(low, high + 1, shape).astype(np.float32))


def fill_exact(model: nn.Module, seed: int, bits: int = 8, peak: float = 2.0**7) -> nn.Module:
    """Weights whose codes are exact and coarse, so that sums of their products stay below 24 bits; in eval mode.

    With ``half = (2 ** bits - 1) / 2`` the first element of each output channel is ``-half`` steps and no other is larger,
    so that min/max gives a power of two as the step, ``1 / peak``. The others are multiples of a quarter of the smallest
    code, plus nothing, a quarter or a half of a step, which rounding takes away: the half is a tie.
    """
    half, coarse = (2**bits - 1) / 2, 2 ** (bits - 1) / 4
    for index, (path, module) in enumerate(model.named_modules()):
        del path
        stream = seed * 1000 + index * 10
        for name, own in module.named_parameters(recurse=False):
            stream += 1
            if isinstance(module, nn.BatchNorm2d):
                own.data = 2.0 ** integers(stream, -1, 0, *own.shape) if name == "weight" else _biases(stream, own)
            elif own.ndim < 2:
                own.data = _biases(stream, own)
            else:
                offset = torch.tensor([0.0, 0.25, 0.5, -0.25])[integers(stream + 5, 0, 3, *own.shape).long()]
                codes = integers(stream, -2, 2, *own.shape) * coarse + offset
                own.data = _with_extremes(module, codes, -half) / peak
        if isinstance(module, nn.BatchNorm2d):
            module.eps = EPS
            module.running_mean = integers(stream + 6, -4, 4, module.num_features) / 4
            module.running_var = 4.0 ** integers(stream + 7, 0, 1, module.num_features) - EPS
    return model.eval()


def _biases(seed: int, own: Tensor) -> Tensor:
    """Finer than the steps of the sums that they are added to, so that they are rounded."""
    return integers(seed, -1024, 1024, *own.shape) / 2**12


def _with_extremes(module: nn.Module, codes: Tensor, extreme: float) -> Tensor:
    """The first element of each output channel replaced by the extreme."""
    if isinstance(module, nn.ConvTranspose2d):
        codes[:: codes.shape[0] // module.groups, :, 0, 0] = extreme
    else:
        codes.reshape(codes.shape[0], -1)[:, 0] = extreme
    return codes


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Weights with the spread of a trained model, on a fine grid of powers of two; in eval mode."""
    for index, (name, own) in enumerate(model.named_parameters()):
        fan_in = max(1, own[0].numel()) if own.ndim > 1 else 16
        values = integers(seed * 1000 + index, -1000, 1000, *own.shape) / 2**10
        is_norm = own.ndim == 1 and name.endswith("weight")
        own.data = 1 + values / 2 if is_norm else values * 2.0 ** -round(np.log2(fan_in) / 2)
    for index, (name, own) in enumerate(model.named_buffers()):
        if name.endswith("running_mean"):
            own.copy_(integers(seed * 1000 + 500 + index, -300, 300, *own.shape) / 2**10)
        elif name.endswith("running_var"):
            own.copy_(integers(seed * 1000 + 500 + index, 500, 1500, *own.shape) / 2**10)
    return model.eval()


class ConvNet(nn.Module):
    """Convolutions with BatchNorm, max pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.pool(F.relu(self.bn2(self.conv2(x))))
        return self.head(x.flatten(1))


class Residual(nn.Module):
    """A shortcut around two convolutions, with a BatchNorm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Depthwise(nn.Module):
    """A depthwise convolution and a pointwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.dw_bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU6()
        self.pw = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        return self.pw(self.act(self.dw_bn(self.dw(x))))


class Deconv(nn.Module):
    """Transposed convolutions, one of them grouped, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.up2 = nn.ConvTranspose2d(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.up1(F.relu(self.conv(x)))))
        return self.up2(torch.cat([x, y], 1))


class Perceptron(nn.Module):
    """Three linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Tied(nn.Module):
    """An embedding whose weight is also that of the last layer, and one layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.mix = nn.Linear(16, 16)
        self.last = nn.Linear(16, 12, bias=False)
        self.last.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = F.relu(self.mix(x))
        return self.last(F.relu(self.mix(x)))


class Functional(nn.Module):
    """Weights as plain parameters, used by functions; products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(4, 2, 3, 3))
        self.matrix = nn.Parameter(torch.zeros(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, stride=2).flatten(2).transpose(1, 2)
        y = F.linear(y, self.matrix).relu()
        return torch.einsum("bij,bkj->bik", y, y) + torch.bmm(y, y.mT)


class Branches(nn.Module):
    """Another layer for each of two kinds of input: needs an example of both."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Linear(16, 8)
        self.image = nn.Conv2d(1, 8, 4)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.flat(x)) if x.ndim == 2 else self.image(x).flatten(1).clamp(min=0)
        return self.last(y)


class Attention(nn.Module):
    """Pre-norm attention and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q, k.mT) * 8**-0.5
        mixed = torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).flatten(2)
        x = x + self.proj(mixed)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Fused(nn.Module):
    """Attention as torch has it in one function, an embedding, and a dict as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.gate = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        y, _ = self.attention(x, x, x, need_weights=False)
        return {"gated": y * torch.sigmoid(self.gate(x)), "mean": y.mean(1)}
