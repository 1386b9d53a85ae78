"""Answers from a model, generated as an unmodified server does: the prompt with its blocks, then greedy decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jinja2.sandbox import MAX_RANGE
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from rim_dist.errors import ConfigError, DataError, ModelError, first_line
from rim_dist.heartbeat import send_heartbeat
from rim_dist.tokens import prompt_ids
from rim_dist.unwrap import bare_model

ADDED_TOKENS = "_rim_dist_added_tokens"  # attribute of a model: tokens that its `generate` puts after a prompt


@dataclass(frozen=True)
class Decoding:
    """How answers are generated: at most `max_new_tokens`, until a token of `end_ids` or the first of the `stop` texts.

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


def ends_of_folder(source: Path | str, revision: str | None, config: PretrainedConfig) -> list[int]:
    """Tokens that end an answer by the settings beside a model: its generation config's, or else its configuration's.

    Raises ModelError if they are no token ids.
    """
    try:
        own = GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:  # it has none
        own = GenerationConfig.from_model_config(config)
    except Exception as error:
        raise ModelError(f"{source}: generation_config.json cannot be read ({first_line(error)})") from error
    ends = _as_list(own.eos_token_id)
    if not all(isinstance(end, int) for end in ends):
        raise ModelError(f"{source}: generation_config.json: eos_token_id {own.eos_token_id!r} is no token id or list of them")
    return ends


def _as_list(ends: Any) -> list[Any]:
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: end-of-text, with which targets end, and those of the model's generation config.

    Raises ModelError if there are none.
    """
    own = getattr(bare_model(model), "generation_config", None)
    named = [*_as_list(tokenizer.eos_token_id), *_as_list(getattr(own, "eos_token_id", None))]
    ends = [end for end in named if end >= 0]  # -1 is some configurations' way to say none
    if not ends:
        raise ModelError("no answer could ever end: the tokenizer has no end-of-text token, the model no eos_token_id")
    return list(dict.fromkeys(ends))


def before_end(answer: list[int], ends: Sequence[int]) -> list[int]:
    """An answer's tokens before the first that ends it."""
    return answer[: next((place for place, token in enumerate(answer) if token in ends), None)]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch, masked: the pad token, or else end-of-text, or else any."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def generation_config(
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int] = (),
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> GenerationConfig:
    """Decoding to one of the tokens `ends` (without any: to the end-of-text token)."""
    ends = ends or _as_list(tokenizer.eos_token_id)
    how: dict[str, Any] = {"do_sample": sampling is not None}
    if sampling is not None:
        how |= {"temperature": sampling.temperature, "top_k": 0, "num_return_sequences": sampling.answers}
    return GenerationConfig(
        **how,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(ends) if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=pad_id(tokenizer),
    )


def model_positions(config: Any) -> int:
    """Longest sequence a model takes; a large number where the family has no limit."""
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def check_blocks(blocks: int, size: int, positions: int, field: str, size_field: str = "") -> None:
    """Raise ConfigError unless `blocks` memory blocks of `size` tokens leave a position. It names the field to change:

    `field` has their number, `size_field` (if it can be changed) their size, which is named where not one block would fit.
    """
    fit = min((positions - 1) // size, MAX_RANGE)  # MAX_RANGE: the longest loop of a chat template
    if blocks <= fit:
        return
    if not fit and size_field:
        raise ConfigError(f"{size_field}: a block of {size} tokens does not fit: the model has {positions} positions")
    limit = f"the model has {positions}" if positions <= blocks * size else "a chat template writes no more"
    raise ConfigError(
        f"{field}: {blocks} blocks of {size} tokens need {blocks * size} positions; {limit}, so at most {fit} blocks fit"
    )


def check_prompts(prompts: Sequence[Sequence[int]], positions: int, added: int = 0) -> None:
    """Raise DataError, naming the first question, if a prompt and the `added` tokens leave no position for an answer."""
    for number, prompt in enumerate(prompts, 1):
        if (length := len(prompt) + added) >= positions:
            what = "continuous thoughts" if added else "memory blocks"
            raise DataError(f"question {number}: {length} tokens with its {what}; the model has {positions} positions")


@contextlib.contextmanager
def _nothing_but_ours(model: Any) -> Iterator[None]:
    """In this context `model.generate` fills no gap of a generation config from the model's own: penalties, beams, top-p."""
    bare = bare_model(model)
    own, bare.generation_config = bare.generation_config, GenerationConfig()
    try:
        yield
    finally:
        bare.generation_config = own


def _together(limits: Sequence[int], batch: int) -> list[list[int]]:
    """Which answers are generated together: at most `batch`, all of one limit, so that none is cut short by a longer prompt."""
    groups = [[i for i, own in enumerate(limits) if own == limit] for limit in dict.fromkeys(limits)]
    return [group[start : start + batch] for group in groups for start in range(0, len(group), batch)]


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    sampling: Sampling | None = None,
    watch: StoppingCriteria | None = None,
) -> list[list[int]]:
    """New token ids of each prompt, without the token that ends them. Prompts are padded on the left and masked.

    With `sampling` the answers to a prompt follow each other; they depend on its seed alone. An answer ends at the model's last
    position, whatever it is batched with. `watch` is called after every token. Raises DataError if a prompt does not fit.
    """
    positions, added = model_positions(model.config), getattr(bare_model(model), ADDED_TOKENS, 0)
    check_prompts(prompts, positions, added)
    device, ends, pad = next(model.parameters()).device, end_ids(model, tokenizer), pad_id(tokenizer)
    limits = [min(decoding.max_new_tokens, positions - added - len(prompt)) for prompt in prompts]
    batches = _together(limits, decoding.batch)
    rounds = len(batches)
    if decoding.synced_ranks:  # every rank generates equally often
        count = torch.tensor(rounds, device=device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        rounds = int(count)
    answers: list[list[list[int]]] = [[] for _ in prompts]
    for number in range(rounds):
        indices = batches[min(number, len(batches) - 1)]
        batch = [prompts[i] for i in indices]
        send_heartbeat(f"answers, batch {number + 1} of {rounds}")
        length = max(map(len, batch))
        config = generation_config(tokenizer, ends, limits[indices[0]], sampling)
        ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in batch], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in batch], device=device)
        criteria: list[StoppingCriteria] = [watch] if watch is not None else []
        if decoding.stop:
            criteria.append(_StopTexts(tokenizer, decoding.stop, length))
        with torch.no_grad(), torch.random.fork_rng(enabled=sampling is not None), _nothing_but_ours(model):
            if sampling is not None:
                torch.manual_seed(sampling.seed + indices[0])
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=decoding.synced_ranks,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        found = iter(output[:, length:].tolist())
        for i in indices:
            answers[i] = [before_end(next(found), ends) for _ in range(sampling.answers if sampling else 1)]
    return [answer for own in answers for answer in own]


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
