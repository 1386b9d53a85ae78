"""Continuous thoughts before an answer: the model's own `generate`, preceded by the passes that feed hidden states back.

Every caller of `generate` (answers, latency, sampling) then gets answers after thoughts, and its time to the first token
includes the passes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from rim_dist.model.generation import ADDED_TOKENS
from rim_dist.unwrap import backbone

_PLAIN = "_rim_dist_plain_generate"


def think_before_answers(model: PreTrainedModel, thoughts: int, markers: Sequence[int]) -> None:
    """Let `model.generate` run `thoughts` continuous thoughts between the prompt and what it generates.

    `markers`: ids of the begin token, of a placeholder for a thought, and of the end token. `generate` still returns prompt and
    new tokens.
    """
    begin, memory, end = markers
    extra = [begin, *[memory] * thoughts, end]
    plain = getattr(model, _PLAIN, model.generate)

    @functools.wraps(plain)
    def generate(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **keywords: Any,
    ) -> Any:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        added = torch.tensor([extra], device=input_ids.device).expand(len(input_ids), -1)
        whole = torch.cat([input_ids, added], dim=1)
        mask = torch.cat([attention_mask, torch.ones_like(added)], dim=1)
        cache, last = thought_cache(model, whole, mask, thoughts)
        config = generation_config
        wanted = {name: keywords.get(name, getattr(config, name, None)) or 1 for name in ("num_return_sequences", "num_beams")}
        if (copies := max(wanted.values())) > 1:  # generate repeats the prompt itself, but not the cache
            cache.batch_repeat_interleave(copies)
            last = last.repeat_interleave(copies, dim=0)
        with _last_thought(model, last) if thoughts else contextlib.nullcontext():
            output = plain(input_ids=whole, attention_mask=mask, generation_config=config, past_key_values=cache, **keywords)
        prompt = input_ids.repeat_interleave(len(output) // len(input_ids), dim=0)
        return torch.cat([prompt, output[:, whole.shape[1] :]], dim=1)

    setattr(model, _PLAIN, plain)
    setattr(model, ADDED_TOKENS, len(extra))
    model.generate = generate


@contextlib.contextmanager
def _last_thought(model: PreTrainedModel, state: torch.Tensor) -> Iterator[None]:
    """In this context the first pass, over last thought and end token, takes `state` `[rows, 1, hidden]` for the thought."""

    def replace(_module: torch.nn.Module, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.cat([state.to(embedded.dtype), embedded[:, 1:]], dim=1)

    handle = model.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def thought_cache(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, thoughts: int
) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of everything before the last thought, and the last thought's input `[rows, 1, hidden]`.

    `ids`, `mask`: `[rows, prompt + begin + thoughts + end]`, padded left. Without thoughts: keys and values of everything
    before the end token.
    """
    position = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = DynamicCache()

    def run(start: int, stop: int, **inputs: Any) -> torch.Tensor:
        inputs |= {"attention_mask": mask[:, :stop], "position_ids": position[:, start:stop]}
        return backbone(model)(**inputs, past_key_values=cache, use_cache=True)[0][:, -1:]

    prompt = ids.shape[1] - thoughts - 1
    with torch.no_grad():
        last = run(0, prompt, input_ids=ids[:, :prompt])
        for column in range(prompt, prompt + thoughts - 1):
            last = run(column, column + 1, inputs_embeds=last)
    return cache, last
