"""The reference path: one boolean mask `[rows, 1, queries, keys]` over everything. Also what decoding runs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from rim_dist.attention.visibility import RowLayout


def dense_mask(layout: RowLayout, sliding_window: int | None = None) -> torch.Tensor:
    """Mask `[rows, 1, queries, keys]`, built once per batch and window."""
    key = ("dense", sliding_window)
    if key not in layout.cache:
        queries, keys = layout.queries.map(lambda t: t.unsqueeze(2)), layout.keys.map(lambda t: t.unsqueeze(1))
        layout.cache[key] = layout.mask(queries, keys, sliding_window).unsqueeze(1)
    return layout.cache[key]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: RowLayout,
    scale: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention `[rows, queries, heads, head_dim]`; `query` `[rows, heads, queries, head_dim]`, key/value with KV heads."""
    mask = dense_mask(layout, sliding_window)
    return masked_attention(query, key, value, mask, scale, dropout, softcap).transpose(1, 2)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention `[rows, heads, queries, head_dim]` under a boolean mask (True: visible), or an additive one without softcap."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout, training=dropout > 0) @ value
