"""The RiM visibility inside any transformers model, through its attention registry.

`use_rim_attention(model, path)` selects it; the layout travels as the keyword `rim_layout` of the model's
forward. No model code is patched: a family that does not hand the keyword to its attention is found by
`rim_dist.model.proof` and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rim_dist.attention.choice import Path
from rim_dist.attention.dense import ScoreRule, dense_attention
from rim_dist.attention.flex import flex_path
from rim_dist.attention.split import split_attention
from rim_dist.attention.visibility import RowLayout
from rim_dist.errors import ModelError

_PATHS: dict[Path, Callable[..., torch.Tensor]] = {"dense": dense_attention, "split": split_attention, "flex": flex_path}
# Keywords some families pass that change the result and that no path computes.
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
    *,
    path: Path,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query` `[rows, heads, seq, head_dim]`, key/value with KV heads.

    Returns `[rows, seq, heads, head_dim]`. Raises ModelError when the layout did not arrive or a family
    asks for something no path computes: a wrong mask would still train.
    """
    family = type(module).__name__
    if rim_layout is None:
        raise ModelError(f"{family}: the RiM layout did not reach the attention; this model family is not supported")
    for name in _REFUSED:
        if keywords.get(name) is not None:
            raise ModelError(f"{family}: attention with {name} is not supported")
    if rim_layout.bidirectional and sliding_window is not None:
        raise ModelError(f"{family}: bidirectional blocks and a sliding window of {sliding_window} cannot be combined")
    rim_layout.attended.add(id(module))
    # Only packed rows have more than one path; a pass that goes on from a cache has none.
    attend = _PATHS[path if rim_layout.spans else "dense"]
    rule = ScoreRule(scaling, dropout, sliding_window, softcap)
    if rim_layout.share is not None:
        return rim_layout.share.attend(attend, query, key, value, rim_layout, rule).contiguous(), None
    return attend(query, key, value, rim_layout, rule).contiguous(), None


def _no_mask(*_args: Any, **_keywords: Any) -> None:
    """The layout carries the visibility; transformers must not build a mask of its own."""


for _path in _PATHS:
    AttentionInterface.register(f"rim_{_path}", partial(rim_attention, path=_path))
    AttentionMaskInterface.register(f"rim_{_path}", _no_mask)


def use_rim_attention(model: PreTrainedModel, path: Path) -> None:
    """Make every layer of the model use the RiM attention by one of its paths."""
    model.set_attn_implementation(f"rim_{path}")


def use_plain_attention(model: PreTrainedModel) -> None:
    """Back to transformers' own causal attention, as an unmodified server runs it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
