"""Functions that cannot be watched from inside, written in functions that can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` as projections, attention and projection.

    Self-attention projects once with the packed weight; otherwise each of query, key and value has its own projection.
    With ``need_weights`` attention is two matrix products around a softmax, else ``scaled_dot_product_attention``.
    """
    batched = query.dim() == 3
    self_attention = query is key and key is value
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if self_attention and not use_separate_proj_weight:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight:
            weights = in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    length, batch, width = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
    q, k, v = (t.reshape(t.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    k, v = (k if static_k is None else _heads(static_k, batch)), (v if static_v is None else _heads(static_v, batch))
    extra = (bias_k is not None) + add_zero_attn
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[3])], dim=2) for t in (k, v))
    mask = _mask(attn_mask, key_padding_mask, is_causal and not need_weights, q, k, num_heads, extra)
    rate = dropout_p if training else 0.0
    if need_weights:
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-2, -1))
        attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        attention = F.dropout(attention, rate) if rate else attention
        context = torch.matmul(attention, v)
    else:
        attention = None
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
    output = F.linear(context.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    if attention is not None and average_attn_weights:
        attention = attention.mean(dim=1)
    if not batched:
        output, attention = output.squeeze(1), None if attention is None else attention.squeeze(0)
    return output, attention


def _heads(static: Tensor, batch: int) -> Tensor:
    return static.reshape(batch, -1, *static.shape[1:])


def _mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    q: Tensor,
    k: Tensor,
    num_heads: int,
    extra: int,
) -> Tensor | None:
    """Attention and padding masks as one additive mask ``(batch or 1, heads or 1, length, keys)``."""
    found = []
    if attn_mask is None and causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2] - extra, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None:
        shape = (-1, num_heads) if attn_mask.dim() == 3 else (1, 1)
        found.append(_additive(attn_mask, q.dtype).reshape(*shape, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        found.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
    if not found:
        return None
    total = found[0] if len(found) == 1 else found[0] + found[1]
    return F.pad(total, (0, extra)) if extra else total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


DECOMPOSED: Mapping[str, Callable[..., Any]] = {"multi_head_attention_forward": multi_head_attention_forward}
"""By canonical name, the function to run in place of the original."""
