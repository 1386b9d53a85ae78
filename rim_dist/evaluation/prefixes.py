"""Prompts that end with their memory blocks as one prefill, and greedy decoding after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from rim_dist.attention.visibility import MEMORY, PADDING_SEGMENT, QUESTION, TokenCoordinates
from rim_dist.model.generation import Decoding, before_end, check_prompts, model_positions, pad_id, stopped


def prefix_coordinates(lengths: Sequence[int], blocks: int, block_size: int) -> TokenCoordinates:
    """Coordinates `[prompts, longest]` of prompts of the given lengths, blocks at their end, padded on the left."""
    longest, memory = max(lengths), blocks * block_size
    column = torch.arange(longest).expand(len(lengths), longest)
    position = column - (longest - torch.tensor(lengths)).unsqueeze(1)
    in_memory = column >= longest - memory
    block = torch.where(in_memory, (column - (longest - memory)).div(max(1, block_size), rounding_mode="floor") + 1, 0)
    segment = torch.where(position >= 0, 0, PADDING_SEGMENT)
    return TokenCoordinates(segment, torch.where(in_memory, MEMORY, QUESTION), block, position.clamp_min(0))


def prefix_batches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    blocks: int,
    block_size: int,
    batch: int,
) -> Iterator[tuple[dict[str, torch.Tensor], TokenCoordinates]]:
    """Arguments of the model's forward for `batch` prompts at a time, and the coordinates of their tokens.

    `prompts` (token ids) end with `blocks` blocks of `block_size` tokens. Raises DataError if one does not fit the model.
    """
    check_prompts(prompts, model_positions(model.config))
    device = next(model.parameters()).device
    pad = pad_id(tokenizer)
    for start in range(0, len(prompts), batch):
        lengths = [len(prompt) for prompt in prompts[start : start + batch]]
        longest = max(lengths)
        ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts[start : start + batch]]
        coordinates = prefix_coordinates(lengths, blocks, block_size).map(lambda t: t.to(device))
        arguments = {"input_ids": torch.tensor(ids, device=device), "position_ids": coordinates.position}
        if min(lengths) < longest:
            arguments["attention_mask"] = (coordinates.segment != PADDING_SEGMENT).long()
        yield arguments, coordinates


def decode_greedily(
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    tokens: torch.Tensor,
    room: torch.Tensor | int,
    decoding: Decoding,
    next_tokens: Callable[[torch.Tensor, int], torch.Tensor],
) -> list[list[int]]:
    """Token ids of all answers, in the order of `tokens.flatten()`, without the token that ends them, one of `ends`.

    `tokens`: the first token of each answer. `room`: how many tokens each may have at most, besides the limit of `decoding`.
    `next_tokens(tokens, t)` runs token t of every answer, from 0, and gives the ones that follow, in the same shape.
    """
    last = torch.tensor(ends, device=tokens.device)
    done = torch.zeros_like(tokens, dtype=torch.bool)
    written: list[torch.Tensor] = []
    for step in range(decoding.max_new_tokens):
        tokens = torch.where(done, ends[0], tokens)
        written.append(tokens)
        done = done | torch.isin(tokens, last) | (step + 1 >= room)
        if decoding.stop:
            so_far = torch.stack(written, dim=-1).flatten(0, -2)
            done = done | stopped(tokenizer, so_far, decoding.stop).view_as(done)
        if _all_done(done, decoding.synced_ranks) or step + 1 == decoding.max_new_tokens:
            break
        tokens = next_tokens(tokens, step)
    rows = torch.stack(written, dim=-1).flatten(0, -2).tolist()
    return [before_end(row, ends) for row in rows]


def _all_done(done: torch.Tensor, synced_ranks: bool) -> bool:
    flag = done.all().int()
    if synced_ranks:
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
