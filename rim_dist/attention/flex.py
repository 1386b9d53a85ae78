"""FlexAttention with a block mask made from the predicate: one kernel for the whole packed row, on CUDA.

On a CPU PyTorch has no backward pass for it; there its forward pass is compared with the other kernels in tests.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from rim_dist.attention.dense import ScoreRule
from rim_dist.attention.visibility import RowLayout


@functools.cache
def _kernel(device_type: str) -> Any:
    # Uncompiled it materialises all scores; compiling is what makes it a kernel. Rows differ in length from batch to batch.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def block_mask(layout: RowLayout, sliding_window: int | None = None) -> BlockMask:
    """The block mask of a packed row, built once per batch and window."""
    key = ("flex", sliding_window)
    if key not in layout.cache:
        queries, keys = layout.queries.map(lambda t: t[0]), layout.keys.map(lambda t: t[0])
        device = queries.segment.device

        def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return layout.mask(queries.map(lambda t: t[query]), keys.map(lambda t: t[key]), sliding_window)

        sizes = (queries.segment.shape[0], keys.segment.shape[0])
        layout.cache[key] = create_block_mask(seen, None, None, *sizes, device=str(device), _compile=device.type == "cuda")
    return layout.cache[key]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rule: ScoreRule) -> torch.Tensor:
    """Attention `[1, queries, heads, head_dim]` of a packed row or some of it; key/value with KV heads, of the whole row."""
    softcap = rule.softcap

    def cap(score: torch.Tensor, *_index: Any) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=cap if softcap is not None else None,
        block_mask=block_mask(layout, rule.sliding_window),
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)
