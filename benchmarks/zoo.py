"""Models that nobody here wrote: architectures of ``transformers`` and ``torch.nn``, small, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Keyword arguments of one call."""


class Specimen(NamedTuple):
    """One model.

    Attributes:
      model: in eval mode.
      batch: makes the keyword arguments of a call for a number of examples; later calls give other data.
      output: takes from what the model returns the tensor that is compared.
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    output: Callable[[Any], Tensor]


TEXT = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
PATCHES = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def lively(model: nn.Module) -> nn.Module:
    """A model, in eval mode, whose signals neither vanish nor drown each other, as after training.

    Convolutions keep the variance (He et al. 2015, arXiv:1502.01852), class tokens and position tables are as large as
    what they are added to.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif any(True for _ in module.children()) and not isinstance(module, nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter)
    return model.eval()


def specimen(model: nn.Module, batch: Callable[[int], Batch], output: Callable[[Any], Tensor]) -> Specimen:
    """A specimen with lively weights."""
    return Specimen(lively(model), batch, output)


def images(size: int = 32) -> Callable[[int], Batch]:
    """Batches of noise with three channels."""
    return lambda n: {"pixel_values": torch.randn(n, 3, size, size)}


def tokens(length: int = 16, **more: str) -> Callable[[int], Batch]:
    """Batches of random tokens; under further names, the same number of others."""
    return lambda n: {name: torch.randint(5, 99, (n, length)) for name in ("input_ids", *more.values())}


def pick(*names: str) -> Callable[[Any], Tensor]:
    """The first of these attributes that an output has."""
    return lambda out: next(value for name in names if (value := getattr(out, name, None)) is not None)


LAST, LOGITS = pick("last_hidden_state"), pick("logits")


def vision(model: type, config: Any, size: int = 32) -> Specimen:
    """A classifier of images."""
    return specimen(model(config), images(size), LOGITS)


def language(model: type, config: Any, output: Callable[[Any], Tensor] = LOGITS) -> Specimen:
    """A model of tokens."""
    return specimen(model(config), tokens(), output)


def decoder(config: type, model: type, **options: Any) -> Specimen:
    """A decoder with rotary embeddings, grouped queries and gated layers, without a cache."""
    made = config(**TEXT, num_key_value_heads=2, max_position_embeddings=64, use_cache=False, **options)
    return language(model, made)


def resnet() -> Specimen:
    """ResNet-18's shape."""
    options = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    return vision(hf.ResNetForImageClassification, hf.ResNetConfig(**options, num_labels=10), 64)


def detr() -> Specimen:
    """Detection by a transformer, with a ResNet of transformers below."""
    backbone = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=10,
        num_labels=5,
    )
    return specimen(hf.DetrForObjectDetection(config), images(96), LOGITS)


def t5() -> Specimen:
    """Encoder and decoder with relative positions."""
    config = hf.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, use_cache=False, decoder_start_token_id=0
    )
    return specimen(hf.T5ForConditionalGeneration(config), tokens(decoder="decoder_input_ids"), LOGITS)


def whisper() -> Specimen:
    """Speech: convolutions over a spectrogram, then encoder and decoder."""
    config = hf.WhisperConfig(
        vocab_size=99,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )

    def batch(n: int) -> Batch:
        return {"input_features": torch.randn(n, 16, 64), "decoder_input_ids": torch.randint(5, 99, (n, 8))}

    return specimen(hf.WhisperForConditionalGeneration(config), batch, LOGITS)


def clip() -> Specimen:
    """Images and captions in one space."""
    text = {**TEXT, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config={**PATCHES, "intermediate_size": 128}, projection_dim=32)
    model = hf.CLIPModel(config)

    def batch(n: int) -> Batch:
        return {**images()(n), **tokens()(n)}

    return specimen(model, batch, lambda out: torch.cat([out.image_embeds, out.text_embeds], dim=-1))


class Sequences(nn.Module):
    """A module of torch.nn for sequences, called with one sequence or with two."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, source: Tensor, target: Tensor | None = None) -> Tensor:
        """The sequence that comes out."""
        return self.body(source) if target is None else self.body(source, target)


def sequences(body: nn.Module, *names: str) -> Specimen:
    """A module of torch.nn on random sequences."""
    return specimen(Sequences(body), lambda n: {name: torch.randn(n, 12, 64) for name in names}, lambda out: out)


LAYER = {"d_model": 64, "nhead": 4, "dim_feedforward": 128, "batch_first": True}

ZOO: dict[str, Callable[[], Specimen]] = {
    "ResNet": resnet,
    "MobileNetV1": lambda: vision(
        hf.MobileNetV1ForImageClassification, hf.MobileNetV1Config(depth_multiplier=0.25, image_size=64, num_labels=10), 64
    ),
    "MobileNetV2": lambda: vision(
        hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=10), 64
    ),
    "RegNet": lambda: vision(
        hf.RegNetForImageClassification,
        hf.RegNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], groups_width=8, num_labels=10
        ),
        64,
    ),
    "ConvNeXt": lambda: vision(
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=10),
        64,
    ),
    "ViT": lambda: vision(hf.ViTForImageClassification, hf.ViTConfig(**PATCHES, intermediate_size=128, num_labels=10)),
    "Swin": lambda: vision(
        hf.SwinForImageClassification,
        hf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4, num_labels=10
        ),
    ),
    "DeiT": lambda: vision(hf.DeiTForImageClassification, hf.DeiTConfig(**PATCHES, intermediate_size=128, num_labels=10)),
    "SegFormer": lambda: vision(
        hf.SegformerForSemanticSegmentation,
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=5,
        ),
    ),
    "DETR": detr,
    "BERT": lambda: language(hf.BertModel, hf.BertConfig(**TEXT), LAST),
    "DistilBERT": lambda: language(
        hf.DistilBertModel, hf.DistilBertConfig(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=128), LAST
    ),
    "RoBERTa": lambda: language(hf.RobertaModel, hf.RobertaConfig(**TEXT, max_position_embeddings=40), LAST),
    "GPT-2": lambda: language(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=32, use_cache=False, bos_token_id=1, eos_token_id=2
        ),
    ),
    "OPT": lambda: language(
        hf.OPTForCausalLM,
        hf.OPTConfig(
            vocab_size=99,
            hidden_size=64,
            word_embed_proj_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=128,
            max_position_embeddings=32,
            use_cache=False,
        ),
    ),
    "Llama": lambda: decoder(hf.LlamaConfig, hf.LlamaForCausalLM),
    "Mistral": lambda: decoder(hf.MistralConfig, hf.MistralForCausalLM),
    "Qwen2": lambda: decoder(hf.Qwen2Config, hf.Qwen2ForCausalLM),
    "T5": t5,
    "Whisper": whisper,
    "CLIP": clip,
    "nn.Transformer": lambda: sequences(
        nn.Transformer(**LAYER, num_encoder_layers=2, num_decoder_layers=2), "source", "target"
    ),
    "nn.TransformerEncoder": lambda: sequences(nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2), "source"),
    "nn.TransformerDecoder": lambda: sequences(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER), 2), "source", "target"
    ),
}
"""How to make each specimen; the random seed is the caller's."""
