"""What a block does for the answer: exchange it between two questions, or leave it out, and see whether the answer changes.

A prompt's prefix is a key-value cache. To exchange block k, question a's cache up to block k - 1 is joined with the keys and
values that block k has after question b, later blocks are run anew on top, and the answer is decoded. Question a is visible
throughout, so an answer that becomes b's was carried by the block.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.prefixes import decode_greedily
from rim_dist.evaluation.scoring import extract_answer, is_right
from rim_dist.model.generation import Decoding, answer_texts, check_prompts, end_ids, model_positions

Pieces = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values `[prompts, heads, tokens, head_dim]` of every layer


@dataclass(frozen=True)
class Prefixes:
    """Prompts of one length that have been run: their cache, and the logits `[prompts, vocabulary]` that answer them."""

    layers: Pieces
    logits: torch.Tensor


def _extend(model: Any, layers: Pieces, ids: torch.Tensor, first_position: int | None = None) -> Prefixes:
    """Run `ids` after a cache (which is left as it is), at the positions that follow it or from `first_position` on."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    extra: dict[str, Any] = {}
    if first_position is not None:
        positions = torch.arange(first_position, first_position + ids.shape[1], device=ids.device)
        extra["position_ids"] = positions.expand(ids.shape)
    with torch.no_grad():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
    return Prefixes([(layer.keys, layer.values) for layer in cache.layers], output.logits[:, -1])


def _cut(layers: Pieces, start: int, end: int) -> Pieces:
    return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in layers]


def _joined(*pieces: Pieces) -> Pieces:
    return [
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2))
        for layer in zip(*pieces, strict=True)
    ]


def exchanged_answers(loaded: LoadedModel, ids: torch.Tensor, donors: torch.Tensor, decoding: Decoding) -> dict[str, list[str]]:
    """Answer texts of prompts `ids` `[prompts, tokens]` (with their blocks): as they are, and with blocks of others.

    `donors`: for each prompt the row whose blocks it gets. Keys: `own`; `block 1` ..: one block exchanged; `all`: every block;
    `without 1` ..: one block left out, everything else at its place.
    """
    model, blocks, length = loaded.model, loaded.blocks, ids.shape[1]
    question = length - blocks * loaded.block_size
    own = _extend(model, [], ids)
    other = [(keys[donors], values[donors]) for keys, values in own.layers]

    def answers(prefix: Prefixes, position: int = length) -> list[str]:
        """Greedy answers; the first new token stands at `position`."""

        def next_tokens(tokens: torch.Tensor, step: int) -> torch.Tensor:
            nonlocal prefix
            prefix = _extend(model, prefix.layers, tokens.unsqueeze(1), position + step)
            return prefix.logits.argmax(dim=-1)

        room = model_positions(model.config) - position
        ends = end_ids(model, loaded.tokenizer)
        new = decode_greedily(loaded.tokenizer, ends, prefix.logits.argmax(dim=-1), room, decoding, next_tokens)
        return answer_texts(loaded.tokenizer, new, decoding)

    result = {"own": answers(own)}
    bounds = [(question + k * loaded.block_size, question + (k + 1) * loaded.block_size) for k in range(blocks)]
    for k, (start, end) in enumerate(bounds, 1):
        patched = _joined(_cut(own.layers, 0, start), _cut(other, start, end))
        # After the last block the answer starts from the state of that block, so from the donor's.
        result[f"block {k}"] = answers(
            _extend(model, patched, ids[:, end:]) if k < blocks else Prefixes(patched, own.logits[donors])
        )
    everything = _joined(_cut(own.layers, 0, question), _cut(other, question, length))
    result["all"] = answers(Prefixes(everything, own.logits[donors]))
    for k, (start, end) in enumerate(bounds, 1):
        before = _extend(model, [], ids[:, :start])
        if k < blocks:
            result[f"without {k}"] = answers(_extend(model, before.layers, ids[:, end:], end))
        else:
            result[f"without {k}"] = answers(before, start)  # nothing follows: a prompt of one block less
    return result


def exchange_blocks(loaded: LoadedModel, prompts: Sequence[Sequence[int]], decoding: Decoding) -> dict[str, Any]:
    """Fractions over pairs of questions of equal length whose own answers differ; `pairs` is their number.

    `exchanged`: by block, and for all blocks: the answer stays (`own`), becomes the donor's (`donor`), or something else
    (`other`). `left_out`: by block, the fraction of answers that stay. Empty lists where no two prompts are of one length.
    """
    check_prompts(prompts, model_positions(loaded.model.config))
    device = next(loaded.model.parameters()).device
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt)].append(prompt)
    blocks = range(1, loaded.blocks + 1)
    names = [*(f"block {k}" for k in blocks), "all"]
    counts: Counter[tuple[str, str]] = Counter()

    def same(a: str, b: str) -> bool:
        """Whether two generated texts give the same answer: that of the second is the target."""
        return is_right(a, extract_answer(b, "", loaded.answer_format), loaded.answer_format)

    pairs = 0
    for group in by_length.values():
        for start in range(0, len(group), decoding.batch):
            ids = torch.tensor([list(prompt) for prompt in group[start : start + decoding.batch]], device=device)
            donors = torch.arange(len(ids), device=device).roll(-1)
            if len(ids) < 2:
                continue
            texts = exchanged_answers(loaded, ids, donors, decoding)
            for i, donor in enumerate(donors.tolist()):
                own, others = texts["own"][i], texts["own"][donor]
                if same(own, others):
                    continue
                pairs += 1
                for name in (*names, *(f"without {k}" for k in blocks)):
                    text = texts[name][i]
                    counts[name, "own" if same(text, own) else "donor" if same(text, others) else "other"] += 1
    if not pairs:
        return {"pairs": 0, "exchanged": [], "left_out": []}
    return {
        "pairs": pairs,
        "exchanged": [
            {"blocks": name, **{kind: counts[name, kind] / pairs for kind in ("own", "donor", "other")}} for name in names
        ],
        "left_out": [{"block": k, "own": counts[f"without {k}", "own"] / pairs} for k in blocks],
    }
