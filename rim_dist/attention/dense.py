"""The reference kernel: one boolean mask `[rows, 1, queries, keys]` over everything. Also what decoding runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rim_dist.attention.visibility import RowLayout


@dataclass(frozen=True)
class ScoreRule:
    """What a layer asks of its attention besides the mask. `scale` None: 1 / sqrt(head_dim). `sinks`: `[heads]`."""

    scale: float | None = None
    dropout: float = 0.0
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def dense_mask(layout: RowLayout, sliding_window: int | None = None) -> torch.Tensor:
    """Mask `[rows, 1, queries, keys]`, built once per batch and window."""
    key = ("dense", sliding_window)
    if key not in layout.cache:
        queries, keys = layout.queries.map(lambda t: t.unsqueeze(2)), layout.keys.map(lambda t: t.unsqueeze(1))
        layout.cache[key] = layout.mask(queries, keys, sliding_window).unsqueeze(1)
    return layout.cache[key]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rule: ScoreRule) -> torch.Tensor:
    """Attention `[rows, queries, heads, head_dim]`; `query` `[rows, heads, queries, head_dim]`, key/value with KV heads."""
    return masked_attention(query, key, value, dense_mask(layout, rule.sliding_window), rule).transpose(1, 2)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, rule: ScoreRule
) -> torch.Tensor:
    """Attention `[rows, heads, queries, head_dim]` under a boolean mask (True: visible)."""
    if rule.softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=rule.dropout, scale=rule.scale, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if rule.scale is None else rule.scale)
    scores = (torch.tanh(scores / rule.softcap) * rule.softcap).masked_fill(~mask, float("-inf"))
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=rule.dropout, training=rule.dropout > 0) @ value
