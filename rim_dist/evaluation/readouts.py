"""Answers after every block for the price of one prefix: the prompt runs once, all readouts are decoded side by side.

The prompt with all its blocks is one prefill, exactly as a server runs it. Every readout then goes on from the same keys and
values: a step runs one token of each readout, under the visibility of the packed row. Nothing is copied or computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import DynamicCache, PreTrainedTokenizerBase

from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.attention.visibility import MEMORY, PADDING_SEGMENT, QUESTION, READOUT, Places, RowLayout
from rim_dist.model.generation import Decoding, check_prompts, generation_config, model_positions, stopped
from rim_dist.unwrap import bare_model


def prefix_places(lengths: Sequence[int], blocks: int, block_size: int) -> Places:
    """Places `[prompts, longest]` of prompts of the given lengths, blocks at their end, padded on the left."""
    longest, memory = max(lengths), blocks * block_size
    column = torch.arange(longest).expand(len(lengths), longest)
    position = column - (longest - torch.tensor(lengths)).unsqueeze(1)
    in_memory = column >= longest - memory
    block = torch.where(in_memory, (column - (longest - memory)).div(max(1, block_size), rounding_mode="floor") + 1, 0)
    segment = torch.where(position >= 0, 0, PADDING_SEGMENT)
    return Places(segment, torch.where(in_memory, MEMORY, QUESTION), block, position.clamp_min(0))


def readout_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    budgets: Sequence[int],
    decoding: Decoding,
    bidirectional: bool = False,
) -> list[list[list[int]]]:
    """New token ids of every prompt after each of the `budgets` (numbers of blocks), without the end-of-text token.

    `prompts` end with max(budgets) blocks of `block_size` tokens. Greedy. The model's family must take the RiM mask
    (`probe_family`); its attention is the plain one afterwards. Raises DataError if a prompt does not fit the model.
    """
    check_prompts(prompts, model_positions(model.config))
    answers: list[list[list[int]]] = []
    with torch.no_grad():
        for start in range(0, len(prompts), decoding.batch):
            part = prompts[start : start + decoding.batch]
            answers += _decode(model, tokenizer, part, block_size, budgets, decoding, bidirectional)
    return answers


def _decode(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    budgets: Sequence[int],
    decoding: Decoding,
    bidirectional: bool,
) -> list[list[list[int]]]:
    device = next(model.parameters()).device
    bare = bare_model(model)
    config = generation_config(tokenizer)
    lengths = [len(prompt) for prompt in prompts]
    longest, most = max(lengths), max(budgets)
    ids = torch.tensor([[config.pad_token_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    places = prefix_places(lengths, most, block_size).map(lambda t: t.to(device))
    budget = torch.tensor(budgets, device=device)
    ends = longest - 1 - (most - budget) * block_size  # columns of the last token of each budget's prefix

    cache = DynamicCache()  # all layers in full: a windowed cache would drop keys that shorter readouts still see
    extra: dict[str, Any] = {}
    if bidirectional:
        use_rim_attention(bare, "dense")
        extra["rim_layout"] = RowLayout(places, places, bidirectional=True)
    else:
        use_plain_attention(bare)
        if min(lengths) < longest:
            extra["attention_mask"] = (places.segment != PADDING_SEGMENT).long()
    logits = model(
        input_ids=ids, position_ids=places.position, past_key_values=cache, use_cache=True, logits_to_keep=ends, **extra
    ).logits
    tokens = logits.argmax(dim=-1)  # [prompts, budgets]

    # Readout token t of budget k stands at the position after its prefix; the last one must fit the model.
    first = torch.tensor(lengths, device=device).unsqueeze(1) - (most - budget) * block_size
    room = model_positions(model.config) - first
    done = torch.zeros_like(tokens, dtype=torch.bool)
    written: list[torch.Tensor] = []
    keys = places
    use_rim_attention(bare, "dense")
    for step in range(decoding.max_new_tokens):
        tokens = torch.where(done, config.eos_token_id, tokens)
        written.append(tokens)
        done = done | (tokens == config.eos_token_id) | (step + 1 >= room)
        if decoding.stop:
            so_far = torch.stack(written, dim=2).flatten(0, 1)
            done = done | stopped(tokenizer, so_far, decoding.stop).view_as(done)
        if _all_done(done, decoding.synced_ranks) or step + 1 == decoding.max_new_tokens:
            break
        shape = tokens.shape
        queries = Places(
            torch.zeros(shape, dtype=torch.long, device=device),
            torch.full(shape, READOUT, device=device),
            budget.expand(shape),
            torch.minimum(first + step, first + room - 1),
        )
        keys = Places(*(torch.cat(pair, dim=1) for pair in zip(keys, queries, strict=True)))
        layout = RowLayout(queries, keys, bidirectional=bidirectional)
        tokens = model(
            input_ids=tokens, position_ids=queries.position, past_key_values=cache, use_cache=True, rim_layout=layout
        ).logits.argmax(dim=-1)
    use_plain_attention(bare)
    rows = torch.stack(written, dim=2).tolist()
    return [[_until(answer, config.eos_token_id) for answer in row] for row in rows]


def _all_done(done: torch.Tensor, synced_ranks: bool) -> bool:
    everything = done.all()
    if synced_ranks:
        flag = everything.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)
    return bool(everything)


def _until(row: list[int], token: int) -> list[int]:
    return row[: row.index(token)] if token in row else row
