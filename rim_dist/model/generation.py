"""Answers from a model, generated as an unmodified server does: the prompt with its blocks, then greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from rim_dist.errors import DataError
from rim_dist.heartbeat import send_heartbeat
from rim_dist.tokens import prompt_ids


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: at most `max_new_tokens`, until the end-of-text token or the first of the `stop` texts.

    `batch` prompts run together. `synced_ranks`: all ranks run equally many steps (ZeRO-3 gathers weights in each).
    """

    max_new_tokens: int
    batch: int = 64
    synced_ranks: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """Sampling instead of greedy decoding: `answers` per prompt, from the whole distribution at a temperature."""

    answers: int
    temperature: float = 1.0
    seed: int = 0


def stopped(tokenizer: PreTrainedTokenizerBase, answers: torch.Tensor, stop: Sequence[str]) -> torch.Tensor:
    """Whether each answer (token ids `[answers, tokens]`) contains one of the stop texts."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return torch.tensor([any(s in text for s in stop) for text in texts], device=answers.device)


class _StopTexts(StoppingCriteria):
    """transformers' own `stop_strings` fail on tokenizers that decode a first word differently."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stop, self._prompt = tokenizer, stop, prompt

    def __call__(self, input_ids: Any, scores: Any, **_keywords: Any) -> Any:  # noqa: ARG002 - transformers' signature
        return stopped(self._tokenizer, input_ids[:, self._prompt :], self._stop)


def padding_note(tokenizer: PreTrainedTokenizerBase) -> str:
    """A note to the user if the tokenizer has no pad token; empty if it has one."""
    if tokenizer.pad_token_id is not None:
        return ""
    return f"note: the tokenizer has no pad token; generation pads with {tokenizer.eos_token!r}, masked"


def generation_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int | None = None, sampling: Sampling | None = None
) -> GenerationConfig:
    """Decoding to the end-of-text token; a tokenizer without a pad token pads with end-of-text, masked."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    how: dict[str, Any] = {"do_sample": sampling is not None}
    if sampling is not None:
        how |= {"temperature": sampling.temperature, "top_k": 0, "num_return_sequences": sampling.answers}
    return GenerationConfig(
        **how,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )


def model_positions(config: Any) -> int:
    """Longest sequence a model takes; a large number where the family has no limit."""
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def check_prompts(prompts: Sequence[Sequence[int]], positions: int) -> None:
    """Raise DataError, naming the first question, if a prompt leaves no position for an answer."""
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) >= positions:
            raise DataError(
                f"question {number}: {len(prompt)} tokens with its memory blocks; the model has {positions} positions"
            )


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    sampling: Sampling | None = None,
    watch: StoppingCriteria | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the end-of-text token. Prompts are padded on the left and masked.

    With `sampling` the answers to a prompt follow each other; they depend on its seed alone. Answers end at the model's last
    position. `watch` is called after every token. Raises DataError if a prompt does not fit the model.
    """
    positions = model_positions(model.config)
    check_prompts(prompts, positions)
    device = next(model.parameters()).device
    answers: list[list[int]] = []
    for start in range(0, len(prompts), decoding.batch):
        batch = prompts[start : start + decoding.batch]
        send_heartbeat(f"answer {start + 1} of {len(prompts)}")
        length = max(map(len, batch))
        config = generation_config(tokenizer, min(decoding.max_new_tokens, positions - length), sampling)
        ids = torch.tensor([[config.pad_token_id] * (length - len(p)) + list(p) for p in batch], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch], device=device)
        criteria: list[StoppingCriteria] = [watch] if watch is not None else []
        if decoding.stop:
            criteria.append(_StopTexts(tokenizer, decoding.stop, length))
        with torch.no_grad(), torch.random.fork_rng(enabled=sampling is not None):
            if sampling is not None:
                torch.manual_seed(sampling.seed + start)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=decoding.synced_ranks,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        for row in output[:, length:].tolist():
            end = row.index(config.eos_token_id) if config.eos_token_id in row else len(row)
            answers.append(row[:end])
    return answers


def answer_questions(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[str], blocks: int | None, decoding: Decoding
) -> list[str]:
    """Answer texts after `blocks` memory blocks (None: as many as the chat template appends)."""
    return answer_texts(tokenizer, generate_ids(model, tokenizer, prompt_ids(tokenizer, questions, blocks), decoding), decoding)


def answer_texts(tokenizer: PreTrainedTokenizerBase, answers: list[list[int]], decoding: Decoding) -> list[str]:
    """Answers as text, cut before the first stop text (the token that completes it may contain more)."""
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    for stop in decoding.stop:
        texts = [text.partition(stop)[0] for text in texts]
    return texts
