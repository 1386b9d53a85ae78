"""Attention kernels: which one a run gets and why, what is refused, and a new one in one file from recipe to report."""

from __future__ import annotations

import pytest
import transformers

from rim_dist.attention.choice import choose_path
from rim_dist.errors import ConfigError

CONFIGS = {channels: transformers.LlamaConfig(hidden_size=4 * channels, num_attention_heads=4) for channels in (12, 16, 128)}
DROPOUT = "it has no dropout, and a stage has dropout 0.1"
CPU = "it has no backward pass on cpu"
SMALL_HEADS = "its kernels need heads of at least 16 channels, llama has 12 here"
# Device, channels of a head, largest dropout: why flex is out of the question, and empty where it is not.
FLEX_IS_OUT = {
    ("cuda", 128, 0.0): "",
    ("cuda", 16, 0.0): "",
    ("cuda", 12, 0.0): SMALL_HEADS,
    ("cuda", 128, 0.1): DROPOUT,
    ("cuda", 16, 0.1): DROPOUT,
    ("cuda", 12, 0.1): DROPOUT,
    ("cpu", 128, 0.0): CPU,
    ("cpu", 16, 0.0): CPU,
    ("cpu", 12, 0.0): CPU,
    ("cpu", 128, 0.1): DROPOUT,
    ("cpu", 16, 0.1): DROPOUT,
    ("cpu", 12, 0.1): DROPOUT,
}


def choice(wanted: str, device: str, channels: int, dropout: float, tokens: int) -> tuple[str, str]:
    found = choose_path(wanted, device, CONFIGS[channels], dropout, False, tokens)
    return found.path, found.reason


@pytest.mark.parametrize(("device", "channels", "dropout"), FLEX_IS_OUT)
def test_choices(device: str, channels: int, dropout: float) -> None:
    reason = FLEX_IS_OUT[device, channels, dropout]
    large = ("split", f"flex is out: {reason}") if reason else ("flex", "one kernel for the whole row on cuda")
    for tokens in (1, 256):
        assert choice("auto", device, channels, dropout, tokens) == ("dense", "micro-batches of at most 256 tokens")
    for tokens in (257, 8192):
        assert choice("auto", device, channels, dropout, tokens) == large
    for tokens in (1, 256, 257, 8192):
        for wanted in ("dense", "split"):
            assert choice(wanted, device, channels, dropout, tokens) == (wanted, "the recipe asks for it")
        if reason:
            with pytest.raises(ConfigError) as refused:
                choice("flex", device, channels, dropout, tokens)
            message = f"model.attention: flex cannot be used: {reason}; allowed: auto, split, dense"
            assert str(refused.value) == message
        else:
            assert choice("flex", device, channels, dropout, tokens) == ("flex", "the recipe asks for it")
