"""What memory blocks look at: the share of each block's attention that goes to the question and to each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rim_dist.attention.registration import use_plain_attention
from rim_dist.errors import ModelError
from rim_dist.evaluation.readouts import prefix_places
from rim_dist.model.generation import check_prompts, generation_config, model_positions

_BATCH = 4  # all layers' attention weights of a batch are in memory at once


def attention_shares(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], block_size: int, blocks: int
) -> torch.Tensor:
    """Shares `[layers, blocks, 1 + blocks]`: attention of block k's tokens to the question (0) and to block j (j).

    Mean over questions, heads and the block's tokens; a row sums to 1. `prompts` end with `blocks` blocks. The model runs
    transformers' own attention with its weights kept; a family without it raises ModelError.
    """
    check_prompts(prompts, model_positions(model.config))
    device = next(model.parameters()).device
    pad = generation_config(tokenizer).pad_token_id
    total: torch.Tensor | None = None
    model.set_attn_implementation("eager")
    try:
        for start in range(0, len(prompts), _BATCH):
            part = prompts[start : start + _BATCH]
            lengths = [len(prompt) for prompt in part]
            longest = max(lengths)
            ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in part], device=device)
            places = prefix_places(lengths, blocks, block_size).map(lambda t: t.to(device))
            mask = (places.segment >= 0).long()
            with torch.no_grad():
                weights = model(
                    input_ids=ids,
                    position_ids=places.position,
                    attention_mask=mask,
                    use_cache=False,
                    output_attentions=True,
                    logits_to_keep=1,
                ).attentions
            if not weights or weights[0] is None:
                raise ModelError(f"{type(model).__name__}: its attention weights cannot be read")
            memory = blocks * block_size
            group = torch.nn.functional.one_hot(places.block, blocks + 1).double()  # [prompts, keys, 1 + blocks]
            shares = torch.stack(
                [
                    (w[:, :, -memory:].double().mean(dim=1) @ group).unflatten(1, (blocks, block_size)).mean(dim=2)
                    for w in weights
                ]
            )
            summed = shares.sum(dim=1).cpu()
            total = summed if total is None else total + summed
    finally:
        use_plain_attention(model)
    assert total is not None
    return total / len(prompts)
