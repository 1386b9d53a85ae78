"""Answering with as many blocks as it takes: block by block, until a probe trusts the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from rim_dist.evaluation.latency import synchronise
from rim_dist.evaluation.probe import Probe
from rim_dist.model.generation import Decoding, check_prompts, generation_config, model_positions, stopped


@dataclass(frozen=True)
class SteppedAnswer:
    """New token ids without the end-of-text token, the blocks they were given, and the time it took."""

    ids: list[int]
    blocks: int
    first_token_seconds: float
    answer_seconds: float


def answer_stepwise(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    question: Sequence[int],
    block: Sequence[int],
    blocks: int,
    decoding: Decoding,
    probe: Probe | None = None,
    confidence: float = 1.0,
) -> SteppedAnswer:
    """Answer one question (its prompt's token ids without blocks) greedily, with a key-value cache.

    With a probe blocks of the ids `block` are run one by one until its probability reaches `confidence`, at most
    `blocks`; without one all of them are part of the prefill. The same decoding follows.
    """
    positions = model_positions(model.config)
    check_prompts([[*question, *list(block) * blocks]], positions)
    device = next(model.parameters()).device
    config = generation_config(tokenizer)
    cache = DynamicCache()

    def run(ids: Sequence[int]) -> Any:
        return model(
            input_ids=torch.tensor([list(ids)], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=probe is not None,
        )

    synchronise()
    start = time.perf_counter()
    with torch.no_grad():
        used = 1 if probe is not None else blocks
        output = run([*question, *list(block) * used])
        while probe is not None and used < blocks:
            if float(probe.probabilities(output.hidden_states[-1][0, -1].float().cpu())) >= confidence:
                break
            output = run(block)
            used += 1
        ids: list[int] = []
        token = int(output.logits[0, -1].argmax())
        first = time.perf_counter()
        room = min(decoding.max_new_tokens, positions - len(question) - used * len(block))
        while token != config.eos_token_id:
            ids.append(token)
            if len(ids) == room or (decoding.stop and bool(stopped(tokenizer, torch.tensor([ids]), decoding.stop))):
                break
            token = int(run([token]).logits[0, -1].argmax())
    return SteppedAnswer(ids, used, first - start, time.perf_counter() - start)
