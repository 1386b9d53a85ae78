"""Answering with as many blocks as it takes: block by block, until a probe trusts the answer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from rim_dist.data.samples import Sample
from rim_dist.evaluation.latency import in_turns, spread, synchronise
from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.prefixes import decode_greedily
from rim_dist.evaluation.probe import Probe
from rim_dist.evaluation.scoring import is_right
from rim_dist.model.generation import Decoding, answer_texts, check_prompts, end_ids, model_positions
from rim_dist.tokens import appended_block


@dataclass(frozen=True)
class SteppedAnswer:
    """New token ids without the token that ends them, the blocks they were given, and the time it took."""

    ids: list[int]
    blocks: int
    first_token_seconds: float
    answer_seconds: float


def answer_stepwise(
    loaded: LoadedModel,
    question: Sequence[int],
    block: Sequence[int],
    decoding: Decoding,
    probe: Probe | None = None,
    confidence: float = 1.0,
) -> SteppedAnswer:
    """Answer one question (its prompt's token ids without blocks) greedily, with a key-value cache.

    With a probe blocks of the ids `block` are run one by one until its probability reaches `confidence`, at most as many as
    the model was trained with; without one all of them are part of the prefill. The same decoding follows.
    """
    positions = model_positions(loaded.model.config)
    check_prompts([[*question, *list(block) * loaded.blocks]], positions)
    device = next(loaded.model.parameters()).device
    cache = DynamicCache()

    def run(ids: torch.Tensor) -> Any:
        return loaded.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=probe is not None,
        )

    synchronise()
    start = time.perf_counter()
    with torch.no_grad():
        used = 1 if probe is not None else loaded.blocks
        output = run(torch.tensor([[*question, *list(block) * used]], device=device))
        while probe is not None and used < loaded.blocks:
            if float(probe.probabilities(output.hidden_states[-1][0, -1].float().cpu())) >= confidence:
                break
            output = run(torch.tensor([list(block)], device=device))
            used += 1
        token = output.logits[:, -1].argmax(dim=-1)  # [1]
        synchronise()
        first = time.perf_counter()
        room = positions - len(question) - used * len(block)
        ends = end_ids(loaded.model, loaded.tokenizer)
        (ids,) = decode_greedily(
            loaded.tokenizer, ends, token, room, decoding, lambda t, _: run(t.unsqueeze(1)).logits[:, -1].argmax(dim=-1)
        )
    return SteppedAnswer(ids, used, first - start, time.perf_counter() - start)


def time_early_exit(
    loaded: LoadedModel, samples: Sequence[Sample], probe: Probe, confidence: float, decoding: Decoding
) -> dict[str, Any]:
    """Stopping early against all blocks in one prefill, in turns, by the same decoding loop; accuracy on these questions."""
    questions = loaded.prompts([sample.question for sample in samples], 0)
    block = appended_block(loaded.tokenizer)

    def run(used: Probe | None, number: int) -> SteppedAnswer:
        return answer_stepwise(loaded, questions[number], block, decoding, used, confidence)

    figures: dict[str, Any] = {"questions": len(samples), "confidence": confidence}
    for name, answers in in_turns({"all_blocks": None, "early_exit": probe}, len(samples), run).items():
        texts = answer_texts(loaded.tokenizer, [answer.ids for answer in answers], decoding)
        right = [is_right(t, s.answer, loaded.answer_format) for t, s in zip(texts, samples, strict=True)]
        first = [answer.first_token_seconds for answer in answers]
        blocks = statistics.fmean(answer.blocks for answer in answers)
        figures[name] = {
            "accuracy": statistics.fmean(right),
            "blocks": blocks,
            "memory_tokens": blocks * loaded.block_size,
            "first_token_seconds": statistics.median(first),
            "first_token_seconds_iqr": spread(first),
            "answer_seconds": statistics.median(answer.answer_seconds for answer in answers),
        }
    return figures
