"""Three small quantized models: a convnet, a BERT and a ResNet, calibrated on other data than they are run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ResNetConfig, ResNetForImageClassification

import sophq_func as sq

Batch = Mapping[str, Tensor]
Params = Mapping[str, Tensor]
QParams = Mapping[str, sq.QParams]


class ConvNet(nn.Module):
    """A residual block and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(x + self.conv2(x)).mean((2, 3)))


@dataclass(frozen=True)
class Subject:
    """A quantized model, calibrated, and a batch for it.

    Attributes:
      name: the column of the table.
      model: the float model.
      q, params, qparams: what the library makes of it.
      batch: keyword arguments of a call.
      read: the tensor that a result is about.
      smooth: a parameter in which the output is smooth where activations are not quantized.
    """

    name: str
    model: nn.Module
    q: sq.Quantized
    params: dict[str, Tensor]
    qparams: dict[str, sq.QParams]
    batch: dict[str, Tensor]
    read: Callable[[Any], Tensor]
    smooth: str

    @property
    def scales(self) -> dict[str, Tensor]:
        """Every learned scale."""
        return self.q.split(self.qparams)[0]

    @property
    def rest(self) -> dict[str, Tensor]:
        """The other leaves of the qparams."""
        return self.q.split(self.qparams)[1]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every parameter: what a gradient reaches."""
        named = {name for name, _ in self.model.named_parameters()}
        return {name: value for name, value in self.params.items() if name in named}

    @property
    def wide(self) -> Subject:
        """The same in float64, where two ways to one number differ by less than would move a code."""
        params, batch = (
            {name: value.double() if value.is_floating_point() else value for name, value in tree.items()}
            for tree in (self.params, self.batch)
        )
        return replace(self, params=params, batch=batch)

    @property
    def calm(self) -> dict[str, sq.QParams]:
        """The qparams with activations switched off."""
        return sq.enabled(self.qparams, {"*post_act_fake_quantizer": False})

    def out(self, params: Params, qparams: QParams, batch: Batch) -> Tensor:
        """The output of the quantized model."""
        return self.read(self.q.apply(params, qparams, **batch))

    def loss(self, scales: Params, weights: Params, batch: Batch) -> Tensor:
        """A curved scalar, as a function of the learned scales and of parameters."""
        return curved(self.out({**self.params, **weights}, sq.merge(scales, self.rest), batch))

    def bent(self, value: Tensor) -> Tensor:
        """The output as a function of the smooth parameter."""
        return self.out({**self.params, self.smooth: value}, self.calm, self.batch)

    def curve(self, value: Tensor) -> Tensor:
        """A curved scalar of the same."""
        return curved(self.bent(value))


def curved(out: Tensor) -> Tensor:
    """A scalar with derivatives of every order; weighted, because a LayerNorm makes the plain mean square a constant."""
    weights = torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype, device=out.device)
    return (out.square() * weights).mean().log1p()


def prepared(
    name: str, model: nn.Module, config: sq.QuantConfig, read: Callable[[Any], Tensor], smooth: str, make: Callable[[], Any]
) -> Subject:
    """A subject that is calibrated on two batches and run on a third."""
    model.eval()
    first, second, batch = make(), make(), make()
    q, params = sq.quantize(model, config, example_kwargs=batch), sq.params_of(model)
    return Subject(name, model, q, params, q.calibrate(params, [first, second], progress=False), batch, read, smooth)


def convnet() -> Subject:
    """Per-channel weights by strategy ``CNN``; activations with zero points."""
    torch.manual_seed(0)
    model = ConvNet()
    model(torch.randn(8, 3, 6, 6))  # statistics for the BatchNorm that is folded into weights
    config = sq.QuantConfig(strategy="CNN", activation=sq.override(symmetric=False))
    return prepared("convnet", model, config, lambda out: out, "bn1.bias", lambda: {"x": torch.randn(4, 3, 6, 6)})


def resnet() -> Subject:
    """A ResNet of ``transformers`` for the chip BM1690."""
    torch.manual_seed(1)
    shape = ResNetConfig(num_channels=3, embedding_size=4, hidden_sizes=[6], depths=[1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(shape)
    model(torch.randn(8, 3, 16, 16))
    config, smooth = sq.QuantConfig(chip="BM1690"), "resnet.embedder.embedder.normalization.bias"
    make = lambda: {"pixel_values": torch.randn(4, 3, 16, 16)}  # noqa: E731
    return prepared("ResNet", model, config, lambda out: out.logits, smooth, make)


def bert(attention: str = "sdpa") -> Subject:
    """A BERT of ``transformers`` with an attention mask, by strategy ``Dataflow``, its attention quantized."""
    torch.manual_seed(2)
    shape = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=20,
        max_position_embeddings=8,
        initializer_range=0.3,
        attn_implementation=attention,
    )

    def make() -> dict[str, Tensor]:
        lengths = torch.tensor([[6], [4], [5], [3]])
        # no padding token: torch lets no gradient into its row, forward mode does, and the Hessian is not symmetric
        return {"input_ids": torch.randint(1, 20, (4, 6)), "attention_mask": (torch.arange(6) < lengths).long()}

    model = BertModel(shape, add_pooling_layer=False)
    read = lambda out: out.last_hidden_state  # noqa: E731
    return prepared("BERT", model, sq.QuantConfig(), read, "embeddings.LayerNorm.bias", make)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"convnet": convnet, "BERT": bert, "ResNet": resnet}
