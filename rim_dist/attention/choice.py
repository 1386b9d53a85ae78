"""Which attention path a run takes, and why. Pure: the planner asks it without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rim_dist.errors import ConfigError

Path = Literal["dense", "split", "flex"]
_DENSE_TOKENS = 256
_FLEX_CHANNELS = 16


@dataclass(frozen=True)
class PathChoice:
    """The attention path of a run and why it is this one."""

    path: Path
    reason: str


def choose_path(
    wanted: str, device_type: str, config: Any, dropout: float, bidirectional: bool, micro_batch_tokens: int
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
