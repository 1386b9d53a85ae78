"""The RiM mask inside any transformers model, through transformers' attention registry.

`use_rim_attention(model, kernel)` selects it; the layout travels as the keyword `rim_layout` of the model's forward. No model
code is patched: a family that does not hand the keyword to its attention is found by `rim_dist.model.proof` and refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rim_dist.attention.dense import ScoreRule
from rim_dist.attention.kernels import REFERENCE, kernel_of
from rim_dist.attention.kernels.base import Kernel
from rim_dist.attention.visibility import RowLayout
from rim_dist.errors import ModelError

# Keywords some families pass that change the result and that no kernel can declare.
_REFUSED = ("position_bias", "head_mask")


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
    s_aux: torch.Tensor | None = None,
    *,
    kernel: Kernel,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: `query` `[rows, heads, seq, head_dim]`, key/value with KV heads; `s_aux` `[heads]`: sinks.

    Returns `[rows, seq, heads, head_dim]`. Raises ModelError when the layout did not arrive or a family asks for something
    that the kernel does not compute: a wrong mask would still train.
    """
    family = type(module).__name__
    if rim_layout is None:
        raise ModelError(f"{family}: the RiM layout did not reach the attention; this model family is not supported")
    if not (rim_layout.spans or kernel.decoding):
        kernel = kernel_of(REFERENCE)
    asked = (
        ("dropout", dropout or None, kernel.dropout),
        ("sliding_window", sliding_window, kernel.sliding_window),
        ("softcap", softcap, kernel.softcap),
        ("s_aux", s_aux, kernel.sinks),
        *((name, keywords.get(name), False) for name in _REFUSED),
    )
    for name, setting, supported in asked:
        if setting is not None and not supported:
            raise ModelError(f"{family}: attention with {name} is not supported by model.attention {kernel.name}")
    if rim_layout.bidirectional and sliding_window is not None:
        raise ModelError(f"{family}: bidirectional blocks and a sliding window of {sliding_window} cannot be combined")
    rim_layout.attended.add(id(module))
    rule = ScoreRule(scaling, dropout, sliding_window, softcap, s_aux)
    if rim_layout.exchange is not None:
        return rim_layout.exchange.attend(kernel.attend, query, key, value, rim_layout, rule).contiguous(), None
    return kernel.attend(query, key, value, rim_layout, rule).contiguous(), None


def _no_mask(*_args: Any, **_keywords: Any) -> None:
    """The layout carries the mask; transformers must not build one of its own."""


def use_rim_attention(model: PreTrainedModel, kernel: str) -> None:
    """Make every layer of the model use the RiM attention by one of its kernels."""
    name = f"rim_{kernel}"
    AttentionInterface.register(name, partial(rim_attention, kernel=kernel_of(kernel)))
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)


def use_recording_attention(model: PreTrainedModel) -> set[float]:
    """Make every layer use an attention that returns zeros. The set returned gets the dropouts that layers ask it for."""
    given: set[float] = set()

    def record(
        _module: nn.Module, query: torch.Tensor, _key: Any, value: torch.Tensor, *_args: Any, dropout: float = 0.0, **_kw: Any
    ) -> tuple[torch.Tensor, None]:
        given.add(dropout)
        rows, heads, length, _ = query.shape
        return value.new_zeros(rows, length, heads, value.shape[-1]), None

    AttentionInterface.register("rim_recording", record)
    AttentionMaskInterface.register("rim_recording", _no_mask)
    model.set_attn_implementation("rim_recording")
    return given


def use_plain_attention(model: PreTrainedModel) -> None:
    """Back to transformers' own causal attention, as an unmodified server runs it."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
