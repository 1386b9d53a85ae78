"""What memory blocks attend to: the attention mass of each block on the question and on each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rim_dist.attention.registration import use_plain_attention
from rim_dist.errors import ModelError
from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.prefixes import prefix_batches

_BATCH = 4  # all layers' attention weights of a batch are in memory at once


def attention_mass(loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mass `[layers, blocks, 1 + blocks]`: attention of block k's tokens to the question (0) and to block j (j).

    Mean over questions, heads and the block's tokens; a row sums to 1. `prompts` end with the model's trained blocks. The
    model runs transformers' own attention with its weights kept; a family without it raises ModelError.
    """
    model, blocks, memory = loaded.model, loaded.blocks, loaded.blocks * loaded.block_size
    total = torch.zeros(())
    model.set_attn_implementation("eager")
    try:
        for arguments, coordinates in prefix_batches(model, loaded.tokenizer, prompts, blocks, loaded.block_size, _BATCH):
            with torch.no_grad():
                weights = model(**arguments, use_cache=False, output_attentions=True, logits_to_keep=1).attentions
            if not weights or weights[0] is None:
                raise ModelError(f"{type(model).__name__}: its attention weights cannot be read")
            group = torch.nn.functional.one_hot(coordinates.block, blocks + 1).double()  # [prompts, keys, 1 + blocks]
            by_token = [w[:, :, -memory:].double().mean(dim=1) @ group for w in weights]  # [prompts, memory, 1 + blocks]
            mass = torch.stack(by_token).unflatten(2, (blocks, loaded.block_size)).mean(dim=3)
            total = total + mass.sum(dim=1).cpu()
    finally:
        use_plain_attention(model)
    return total / len(prompts)
