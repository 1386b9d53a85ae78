"""What a block does for the answer: exchange it between two questions, or leave it out, and see whether the answer changes.

A prompt's prefix is a key-value cache. To exchange block k, question a's cache up to block k - 1 is joined with the keys and
values that block k has after question b, later blocks are run anew on top, and the answer is decoded. Question a is visible
throughout, so an answer that becomes b's was carried by the block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rim_dist.evaluation.scoring import extract_answer, same_answer
from rim_dist.model.generation import Decoding, answer_texts, check_prompts, generation_config, model_positions

Pieces = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values `[prompts, heads, tokens, head_dim]` of every layer


@dataclass(frozen=True)
class Prefixes:
    """Prompts of one length that have been run: their ids `[prompts, tokens]`, cache, and the logits that answer them."""

    ids: torch.Tensor
    layers: Pieces
    logits: torch.Tensor


def _extend(model: Any, layers: Pieces, ids: torch.Tensor, first_position: int | None = None) -> Prefixes:
    """Run `ids` after a cache (which is left as it is), at the positions that follow it or from `first_position` on."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    extra: dict[str, Any] = {}
    if first_position is not None:
        places = torch.arange(first_position, first_position + ids.shape[1], device=ids.device)
        extra["position_ids"] = places.expand(ids.shape)
    with torch.no_grad():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return Prefixes(ids, [(layer.keys, layer.values) for layer in cache.layers], output.logits[:, -1])


def _cut(layers: Pieces, start: int, end: int) -> Pieces:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in layers]


def _joined(*parts: Pieces) -> Pieces:
    return [
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2)) for layer in zip(*parts, strict=True)
    ]


def _decoded(
    model: Any, tokenizer: PreTrainedTokenizerBase, prefix: Prefixes, position: int, decoding: Decoding
) -> list[list[int]]:
    """Greedy answers, without the end-of-text token; the first new token stands at `position`."""
    end = generation_config(tokenizer).eos_token_id
    written: list[torch.Tensor] = []
    done = torch.zeros(len(prefix.ids), dtype=torch.bool, device=prefix.ids.device)
    room = min(decoding.max_new_tokens, model_positions(model.config) - position)
    while len(written) < room:
        tokens = torch.where(done, end, prefix.logits.argmax(dim=-1))
        written.append(tokens)
        done = done | (tokens == end)
        if bool(done.all()) or len(written) == room:
            break
        prefix = _extend(model, prefix.layers, tokens.unsqueeze(1), position + len(written) - 1)
    rows = torch.stack(written, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def exchanged_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    donors: torch.Tensor,
    block_size: int,
    blocks: int,
    decoding: Decoding,
) -> dict[str, list[str]]:
    """Answer texts of prompts `ids` `[prompts, tokens]` (with their blocks): as they are, and with blocks of others.

    `donors`: for each prompt the row whose blocks it gets. Keys: `own`; `block 1` ..: one block exchanged; `all`: every block;
    `without 1` ..: one block left out, everything else at its place.
    """
    length = ids.shape[1]
    question = length - blocks * block_size
    own = _extend(model, [], ids)
    other = [(keys[donors], values[donors]) for keys, values in own.layers]

    def answers(prefix: Prefixes, position: int = length) -> list[str]:
        return answer_texts(tokenizer, _decoded(model, tokenizer, prefix, position, decoding), decoding)

    result = {"own": answers(own)}
    for k in range(1, blocks + 1):
        start, end = question + (k - 1) * block_size, question + k * block_size
        patched = _joined(_cut(own.layers, 0, start), _cut(other, start, end))
        # After the last block the answer starts from the state of that block, so from the donor's.
        prefix = _extend(model, patched, ids[:, end:]) if k < blocks else Prefixes(ids, patched, own.logits[donors])
        result[f"block {k}"] = answers(prefix)
    everything = _joined(_cut(own.layers, 0, question), _cut(other, question, length))
    result["all"] = answers(Prefixes(ids, everything, own.logits[donors]))
    for k in range(1, blocks + 1):
        start, end = question + (k - 1) * block_size, question + k * block_size
        before = _extend(model, [], ids[:, :start])
        if k < blocks:
            result[f"without {k}"] = answers(_extend(model, before.layers, ids[:, end:], end))
        else:
            result[f"without {k}"] = answers(before, start)  # nothing follows: a prompt of one block less
    return result


def exchange_blocks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    blocks: int,
    decoding: Decoding,
) -> dict[str, Any]:
    """Shares over pairs of questions of equal length whose own answers differ; `pairs` is their number.

    `exchanged`: by block, and for all blocks: the answer stays (`own`), becomes the donor's (`donor`), or something else
    (`other`). `left_out`: by block, the share of answers that stay. Empty lists where no two prompts are of one length.
    """
    check_prompts(prompts, model_positions(model.config))
    device = next(model.parameters()).device
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    names = [*(f"block {k}" for k in range(1, blocks + 1)), "all"]
    exchanged = {name: {"own": 0, "donor": 0, "other": 0} for name in names}
    kept = [0] * blocks
    pairs = 0
    for group in by_length.values():
        for start in range(0, len(group), decoding.batch):
            part = group[start : start + decoding.batch]
            ids = torch.tensor([list(prompt) for prompt in part], device=device)
            donors = torch.arange(len(part), device=device).roll(-1)
            if len(part) < 2:
                continue
            texts = exchanged_answers(model, tokenizer, ids, donors, block_size, blocks, decoding)
            for i, donor in enumerate(donors.tolist()):
                own, others = texts["own"][i], texts["own"][donor]
                if _same(own, others):
                    continue
                pairs += 1
                for name in names:
                    text = texts[name][i]
                    exchanged[name]["own" if _same(text, own) else "donor" if _same(text, others) else "other"] += 1
                for k in range(blocks):
                    kept[k] += _same(texts[f"without {k + 1}"][i], own)
    if not pairs:
        return {"pairs": 0, "exchanged": [], "left_out": []}
    return {
        "pairs": pairs,
        "exchanged": [{"blocks": name, **{k: v / pairs for k, v in counts.items()}} for name, counts in exchanged.items()],
        "left_out": [{"block": k, "own": count / pairs} for k, count in enumerate(kept, 1)],
    }


def _same(a: str, b: str) -> bool:
    """Whether two generated texts give the same answer, each the target of the other."""
    target = extract_answer(b, b)
    return same_answer(extract_answer(a, target), target)
