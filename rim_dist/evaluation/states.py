"""Hidden states at the end of every memory block, all from one prefill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rim_dist.evaluation.readouts import prefix_places
from rim_dist.model.generation import check_prompts, generation_config, model_positions


def block_states(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    blocks: int,
    batch: int = 64,
) -> torch.Tensor:
    """States `[prompts, blocks, hidden]` at the end token of each block, as the output head sees them; float32 on the CPU.

    `prompts` (token ids) end with `blocks` blocks. The state after block k does not depend on later blocks: it is the one
    that the first token of the answer after k blocks is read from. Plain causal attention, as a server runs it. Raises
    DataError if a prompt does not fit the model.
    """
    check_prompts(prompts, model_positions(model.config))
    device = next(model.parameters()).device
    pad = generation_config(tokenizer).pad_token_id
    states = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        lengths = [len(prompt) for prompt in part]
        longest = max(lengths)
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in part], device=device)
        places = prefix_places(lengths, blocks, block_size).map(lambda t: t.to(device))
        ends = longest - 1 - torch.arange(blocks - 1, -1, -1, device=device) * block_size
        padded = {"attention_mask": (places.segment >= 0).long()} if min(lengths) < longest else {}
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, position_ids=places.position, use_cache=False, **padded)[0]
        states.append(hidden[:, ends].float().cpu())
    return torch.cat(states)
