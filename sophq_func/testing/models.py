"""Models on which the laws of algorithms are tried: small ones of each kind that the laws speak of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophq_func.capture.contents import params_of
from sophq_func.config.rules import QuantConfig, Rule
from sophq_func.core.types import Given, Tree
from sophq_func.model.build import quantize
from sophq_func.model.quantized import Quantized
from sophq_func.numerics.contracts import QParams
from sophq_func.numerics.granularity import PerChannel, PerGroup, PerTensor
from sophq_func.numerics.scheme import Override, override


class Subject(NamedTuple):
    """A quantized model, calibrated, with its data.

    Attributes:
      model: the module or function.
      q, params, qparams: of it.
      batches: to calibrate on.
    """

    model: Any
    q: Quantized
    params: Given
    qparams: dict[str, QParams]
    batches: list[Tree]


class Convolutions(nn.Module):
    """Convolutions: plain, grouped, depthwise and transposed, three of them with a BatchNorm, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.depth_norm = nn.BatchNorm2d(4)
        self.group = nn.Conv2d(4, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2)
        self.up_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.depth_norm(self.depth(x)))
        x = F.relu(self.up_norm(self.up(self.group(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """The norm of a Llama."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """A block of a Llama: attention whose keys and values are shared by two query heads each, and a gated MLP."""

    def __init__(self, width: int = 8, heads: int = 4, shared: int = 2, inner: int = 12) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.shared, self.size = heads, shared, size
        self.before_attention = RMSNorm(width)
        self.q_proj = nn.Linear(width, heads * size, bias=False)
        self.k_proj = nn.Linear(width, shared * size, bias=False)
        self.v_proj = nn.Linear(width, shared * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.before_mlp = RMSNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def attention(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.shared, self.size).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.shared, self.size).transpose(1, 2)
        k, v = (y.repeat_interleave(self.heads // self.shared, 1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(b, t, -1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        h = self.before_mlp(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))  # type: ignore[no-any-return]


class Language(nn.Module):
    """A language model of such blocks; the head may be tied to the embedding."""

    def __init__(self, words: int = 16, width: int = 8, blocks: int = 2, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def mixed(x: Tensor, outliers: bool = True) -> Tensor:
    """Values that correlate, some channels (of the last axis) much larger than others, as inputs of real layers are."""
    channels = x.shape[-1]
    generator = torch.Generator().manual_seed(5)
    x = x @ (torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator))
    return x * torch.exp(torch.randn(channels, generator=generator)) if outliers else x


def perceptron(params: dict[str, Any], x: Tensor) -> Tensor:
    """A function as model."""
    hidden = F.relu(x @ params["first"]["w"] + params["first"]["b"])
    return hidden @ params["second"]  # type: ignore[no-any-return]


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with statistics of its BatchNorms from some data."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(x)
    return model.eval()


def _subject(model: Any, config: QuantConfig, batches: list[Any], params: Any = None) -> Subject:
    args = (batches[0],)
    if params is None:
        q = quantize(model, config, example_args=args)
        params = params_of(model)
    else:
        q = quantize(model, config, params=params, example_args=args)
    return Subject(model, q, params, q.calibrate(params, batches, progress=False), batches)


def _weights(bits: int, **fields: Any) -> Override:
    return override(bits=bits, fake_quantize="fixed", **fields)


def convolutions() -> Subject:
    """Strategy CNN, folded BatchNorms, symmetric channels, quantized activations and biases."""
    torch.manual_seed(0)
    x = mixed(torch.randn(6, 2, 8, 8))
    config = QuantConfig(chip=None, strategy="CNN", weight=_weights(3, granularity=PerChannel()), activation=_weights(8))
    return _subject(trained(Convolutions(), x), config, list(x.chunk(3)))


def language() -> Subject:
    """Strategy Layers, weights alone, in groups; the head is tied to the embedding and stays float."""
    torch.manual_seed(1)
    ids = torch.randint(0, 16, (6, 7))
    head = Rule(name="head", weight=None, requests=False)
    weight = _weights(3, granularity=PerGroup(4), symmetric=False)
    config = QuantConfig(chip=None, strategy="Layers", weight=weight, activation=None, rules=(head,))
    return _subject(Language().eval(), config, list(ids.chunk(3)))


def tied() -> Subject:
    """Strategy Dataflow: the table of the embedding, which is the head, is quantized, too, and so are all operands."""
    torch.manual_seed(2)
    ids = torch.randint(0, 16, (6, 7))
    weight = _weights(4, granularity=PerChannel(), symmetric=False)
    config = QuantConfig(chip=None, strategy="Dataflow", weight=weight, activation=_weights(8))
    return _subject(Language(blocks=1).eval(), config, list(ids.chunk(3)))


def untied() -> Subject:
    """Strategy Transformer, everything of 8 bits but the weights; the head has a weight of its own."""
    torch.manual_seed(4)
    ids = torch.randint(0, 16, (6, 7))
    weight = _weights(4, granularity=PerChannel())
    config = QuantConfig(chip=None, strategy="Transformer", weight=weight, activation=_weights(8))
    return _subject(Language(blocks=1, tied=False).eval(), config, list(ids.chunk(3)))


def function() -> Subject:
    """A function of a tree of params, one scale for each tensor."""
    torch.manual_seed(3)
    params = {"first": {"w": torch.randn(6, 8), "b": torch.randn(8)}, "second": torch.randn(8, 4)}
    config = QuantConfig(chip=None, weight=_weights(3, granularity=PerTensor()), activation=_weights(8))
    x = mixed(torch.randn(12, 6))
    return _subject(perceptron, config, list(x.chunk(3)), params)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "convolutions": convolutions,
    "language": language,
    "tied": tied,
    "untied": untied,
    "function": function,
}
"""By name, what makes them: each call the same one."""


def subject(kind: str) -> Subject:
    """A new one of a kind, without a trace in torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return SUBJECTS[kind]()
