"""The RiM visibility inside any transformers model, through its attention registry.

`use_rim_attention(model)` selects it; the layout travels as the keyword `rim_layout` of the model's
forward. No model code is patched: a family that does not hand the keyword to its attention is found by
`rim_dist.attention.probe` and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rim_dist.attention.visibility import RowLayout
from rim_dist.errors import ModelError

NAME = "rim"
# Keywords some families pass that change the result and that this attention does not compute.
_REFUSED = ("s_aux", "position_bias", "head_mask")


def rim_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - part of the interface; the layout stands in for it
    scaling: float | None = None,
    dropout: float = 0.0,
    rim_layout: RowLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Dense reference attention: `query` `[rows, heads, seq, head_dim]`, key/value with KV heads.

    Returns `[rows, seq, heads, head_dim]`. Raises ModelError when the layout did not arrive or a family
    asks for something this attention does not compute: a wrong mask would still train.
    """
    family = type(module).__name__
    if rim_layout is None:
        raise ModelError(f"{family}: the RiM layout did not reach the attention; this model family is not supported")
    for name in _REFUSED:
        if keywords.get(name) is not None:
            raise ModelError(f"{family}: attention with {name} is not supported")
    rim_layout.attended.add(id(module))
    mask = rim_layout.dense_mask(sliding_window)
    if softcap is None:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        output = F.dropout(weights, p=dropout, training=dropout > 0) @ value
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_args: Any, **_keywords: Any) -> None:
    """The layout carries the visibility; transformers must not build a mask of its own."""


AttentionInterface.register(NAME, rim_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def use_rim_attention(model: PreTrainedModel) -> None:
    """Make every layer of the model use the RiM attention."""
    model.set_attn_implementation(NAME)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Back to transformers' own causal attention, as an unmodified server runs it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
