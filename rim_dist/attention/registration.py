"""The RiM visibility inside any transformers model, through its attention registry.

`use_rim_attention(model, path)` selects it; the layout travels as the keyword `rim_layout` of the model's
forward. No model code is patched: a family that does not hand the keyword to its attention is found by
`rim_dist.attention.probe` and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from rim_dist.attention.dense import ScoreRule, dense_attention
from rim_dist.attention.flex import flex_path
from rim_dist.attention.split import split_attention
from rim_dist.attention.visibility import RowLayout
from rim_dist.errors import ConfigError, ModelError

Path = Literal["dense", "split", "flex"]
_PATHS: dict[Path, Callable[..., torch.Tensor]] = {"dense": dense_attention, "split": split_attention, "flex": flex_path}
_DENSE_TOKENS = 256
_FLEX_CHANNELS = 16
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


@dataclass(frozen=True)
class PathChoice:
    """The attention path of a run and why it is this one."""

    path: Path
    reason: str


def choose_path(
    wanted: str, device_type: str, config: PretrainedConfig, dropout: float, bidirectional: bool, micro_batch_tokens: int
) -> PathChoice:
    """Resolve `model.attention` for a device, a model family and the largest dropout of the run.

    `dense` for rows so small that one call over everything beats a call for each sample; `flex` on CUDA where it computes
    what is asked; `split` everywhere else. Raises ConfigError for a path that cannot do what the recipe asks.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if bidirectional and window is not None:
        raise ConfigError(
            f"memory.inside_block: bidirectional cannot be combined with the sliding window ({window}) of {config.model_type}; "
            "allowed: causal"
        )
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    flex_refused = None
    if dropout > 0:
        flex_refused = f"it has no dropout, and a stage has dropout {dropout:g}"
    elif device_type != "cuda":
        flex_refused = f"it has no backward pass on {device_type}"
    elif channels < _FLEX_CHANNELS:
        flex_refused = f"its kernels need heads of at least {_FLEX_CHANNELS} channels, {config.model_type} has {channels} here"
    if wanted == "flex" and flex_refused:
        raise ConfigError(f"model.attention: flex cannot be used: {flex_refused}; allowed: auto, split, dense")
    if wanted != "auto":
        return PathChoice(wanted, "the recipe asks for it")  # type: ignore[arg-type]
    if micro_batch_tokens <= _DENSE_TOKENS:
        return PathChoice("dense", f"micro-batches of at most {_DENSE_TOKENS} tokens")
    if flex_refused is None:
        return PathChoice("flex", "one kernel for the whole row on cuda")
    return PathChoice("split", f"flex is out: {flex_refused}")
