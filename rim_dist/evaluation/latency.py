"""How long answers take: to the first token, to the first token of the answer itself, to the end."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.scoring import ANSWER_FORMAT, answer_marks, answer_start
from rim_dist.model.generation import Decoding, generate_ids

Subject = TypeVar("Subject")
Result = TypeVar("Result")
WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """Seconds from the prompts of one batch to three points in time, prefill included; and the tokens of an answer (mean).

    `first_token_seconds`: TTFT, the first new token is known. `answer_start_seconds`: the first token of the answer proper,
    which begins with what `data.answer_format` puts before it (a chain of thought writes its steps first), mean over the batch;
    a text without that counts whole. `answer_seconds`: the last answer of the batch is complete.
    """

    first_token_seconds: float
    answer_start_seconds: float
    answer_seconds: float
    new_tokens: float


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops anything."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_keywords: Any) -> Any:  # noqa: ARG002 - transformers' signature
        synchronise()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronise() -> None:
    """Wait for the device, so that the clock shows work that is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_latency(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    answer_format: str = ANSWER_FORMAT,
) -> Latency:
    """Time prompts (token ids) that are answered together, greedily, by transformers' own generation."""
    clock = _Clock()
    synchronise()
    start = time.perf_counter()
    together = Decoding(decoding.max_new_tokens, len(prompts), stop=decoding.stop)
    answers = generate_ids(model, tokenizer, prompts, together, watch=clock)
    synchronise()
    end = time.perf_counter()
    starts = [clock.ticks[min(answer_place(tokenizer, ids, answer_format), len(clock.ticks) - 1)] - start for ids in answers]
    new_tokens = statistics.fmean(map(len, answers))
    return Latency(clock.ticks[0] - start, statistics.fmean(starts), end - start, new_tokens)


def answer_place(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], answer_format: str = ANSWER_FORMAT) -> int:
    """Which token of a generated text is the first of the answer proper; one past the last where there is no answer."""
    if answer_marks(answer_format)[0] is None:
        return 0  # nothing stands before the answer

    def length(tokens: int) -> int:
        return len(tokenizer.decode(ids[:tokens], skip_special_tokens=True))

    found = answer_start(tokenizer.decode(ids, skip_special_tokens=True), answer_format)
    if found is None:
        return len(ids)
    # The fewest tokens whose text goes beyond the marker's first character end with the token that is looked for.
    return bisect.bisect_right(range(len(ids) + 1), found.start(), key=length) - 1


def spread(values: Sequence[float]) -> float:
    """Width of the middle half."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return ordered[-1 - quarter] - ordered[quarter]


def latency_summary(runs: Sequence[Latency], batch: int = 1) -> dict[str, float]:
    """Medians over the timed batches and the width of their middle half (`_iqr`), in seconds; tokens as a mean."""
    summary: dict[str, float] = {"questions": len(runs) * batch, "batch": batch}
    for name in ("first_token_seconds", "answer_start_seconds", "answer_seconds"):
        values = [getattr(run, name) for run in runs]
        summary[name], summary[f"{name}_iqr"] = statistics.median(values), spread(values)
    summary["new_tokens"] = statistics.fmean(run.new_tokens for run in runs)
    return summary


@dataclass(frozen=True)
class Candidate:
    """Something to be timed: a model with the prompts (token ids) of the same questions as the others have."""

    loaded: LoadedModel
    prompts: Sequence[Sequence[int]]
    decoding: Decoding


def in_turns(candidates: Mapping[Any, Subject], count: int, run: Callable[[Subject, int], Result]) -> dict[Any, list[Result]]:
    """Results of `run(candidate, number)` for all candidates and the numbers 0 to `count` - 1, after a warm-up.

    The candidates take turns with every number, so that a slow spell of the machine hits all alike.
    """
    results: dict[Any, list[Result]] = {name: [] for name in candidates}
    for number in range(-min(WARM_UP, count), count):
        for name, candidate in candidates.items():
            result = run(candidate, max(0, number))
            if number >= 0:
                results[name].append(result)
    return results


def time_side_by_side(candidates: Mapping[Any, Candidate], batch: int = 1) -> dict[Any, dict[str, float]]:
    """`latency_summary` of every candidate, `batch` prompts at a time (a last batch that is not full is left out)."""

    def run(c: Candidate, number: int) -> Latency:
        prompts = c.prompts[number * batch : (number + 1) * batch]
        return measure_latency(c.loaded.model, c.loaded.tokenizer, prompts, c.decoding, c.loaded.answer_format)

    count = min(len(c.prompts) for c in candidates.values()) // batch
    return {name: latency_summary(runs, batch) for name, runs in in_turns(candidates, count, run).items()}


def device_name() -> str:
    """What the figures were taken on: the GPU, or the threads of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
