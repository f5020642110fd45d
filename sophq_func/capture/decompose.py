"""Functions that call others where no function mode sees them, rewritten so that it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sophq_func.core.types import Output


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
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
    """``F.multi_head_attention_forward`` as projections, attention and a projection, with the same arguments.

    Self-attention projects once with the packed weight; otherwise each of query, key and value has its own projection.
    With ``need_weights`` attention is two matrix products around a softmax, else ``scaled_dot_product_attention``. In the
    comments, L is the length of the query, S that of the keys, N the batch, E the width, H the heads.
    """
    batched = query.dim() == 3
    self_attention = query is key and key is value
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    # projections, each of shape L or S by N by E
    packed = None if use_separate_proj_weight else in_proj_weight
    if self_attention and packed is not None:
        q, k, v = F.linear(query, packed, in_proj_bias).chunk(3, dim=-1)
    else:
        # where there is no packed weight, all three others are given
        separate: tuple[Tensor, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)  # type: ignore[assignment]
        weights = separate if packed is None else packed.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    length, batch, width = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
    # heads, each of shape N by H by L or S by E / H
    q, k, v = (t.reshape(t.shape[0], batch, num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    if static_k is not None:
        k = _heads(static_k, batch)
    if static_v is not None:
        v = _heads(static_v, batch)
    extra = int(bias_k is not None) + int(add_zero_attn)  # keys that no mask given by the user covers
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[3])], dim=2) for t in (k, v))
    # torch reads ``is_causal`` only where it need not return weights; else it is a hint, and the mask is given
    causal = is_causal and not need_weights
    mask = _mask(attn_mask, key_padding_mask, causal, q, k, num_heads, extra)
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
    """Keys or values given as ``(N * H, S, E / H)``, in the shape ``(N, H, S, E / H)``."""
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
    """Attention and padding masks as one additive mask ``(N or 1, H or 1, L or 1, S + extra)``; ``None`` without any."""
    masks = []
    if attn_mask is None and causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2] - extra, dtype=torch.bool, device=q.device).triu(1)
    if attn_mask is not None:
        shape = (-1, num_heads) if attn_mask.dim() == 3 else (1, 1)
        masks.append(_additive(attn_mask, q.dtype).reshape(*shape, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
    if not masks:
        return None
    total = masks[0] if len(masks) == 1 else masks[0] + masks[1]
    return F.pad(total, (0, extra)) if extra else total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores; a boolean one is -inf where it is set."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


DECOMPOSED: Mapping[str, Callable[..., Output]] = {"multi_head_attention_forward": multi_head_attention_forward}
"""The function to call instead of the original, by canonical name."""
