"""From samples to token ids: prompts through the chat template, targets as plain text with end-of-text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from rim_dist.config import Recipe
from rim_dist.data.samples import BadSample, EncodedSample, Sample
from rim_dist.data.sources import source_name
from rim_dist.errors import DataError
from rim_dist.methods import method_of
from rim_dist.tokens import MemoryTokens, prompt_ids

_CHUNK = 512


@dataclass
class DataReport:
    """What became of the rows of a source: used + skipped = rows."""

    rows: int = 0
    used: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    steps: Counter[int] = field(default_factory=Counter)

    def skip(self, bad: BadSample, name: str) -> None:
        self.skipped[bad.reason] += 1
        self.examples.setdefault(bad.reason, f"{name}:{bad.line}" + (f" ({bad.detail})" if bad.detail else ""))

    def to_json(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "used": self.used,
            "truncated": self.truncated,
            "skipped": dict(self.skipped),
            "examples": self.examples,
            "steps": {str(k): v for k, v in sorted(self.steps.items())},
        }

    @staticmethod
    def from_json(tree: dict) -> DataReport:
        return DataReport(
            tree["rows"],
            tree["used"],
            tree["truncated"],
            Counter(tree["skipped"]),
            dict(tree["examples"]),
            Counter({int(k): v for k, v in tree["steps"].items()}),
        )


def encode(
    recipe: Recipe,
    rows: Iterable[Sample | BadSample],
    tokenizer: PreTrainedTokenizerBase,
    tokens: MemoryTokens,
    positions: int,
    report: DataReport,
) -> Iterator[EncodedSample]:
    """Token ids of every usable row, in order; `report` counts the rest with reasons.

    `positions` is the longest sequence the model takes. Raises DataError, with file and line, at the first bad row if
    `data.on_bad_sample` is `refuse`. Samples with too many steps follow `curriculum.stage1.longer`.
    """
    name = source_name(recipe.data)
    stage1, method = recipe.curriculum.stage1, method_of(recipe)

    def reject(bad: BadSample) -> None:
        if recipe.data.on_bad_sample == "refuse":
            detail = f" ({bad.detail})" if bad.detail else ""
            raise DataError(
                f"{name}:{bad.line}: {bad.reason}{detail}; correct it, or leave such rows out with data.on_bad_sample=skip"
            )
        report.skip(bad, name)

    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        report.rows += len(chunk)
        good: list[Sample] = []
        for row in chunk:
            if isinstance(row, BadSample):
                reject(row)
            elif len(row.steps) > stage1.max_steps and stage1.longer == "skip":
                report.skip(BadSample(row.line, f"more than curriculum.stage1.max_steps={stage1.max_steps} steps"), name)
            else:
                good.append(row)
        questions = prompt_ids(tokenizer, [s.question for s in good], blocks=0)
        targets = [
            [*(recipe.data.step_format.format(step=t) for t in s.steps), recipe.data.answer_format.format(answer=s.answer)]
            for s in good
        ]
        texts = [text for sample_targets in targets for text in sample_targets]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for sample, question, sample_targets in zip(good, questions, targets, strict=True):
            *steps, answer = [[*next(encoded), tokenizer.eos_token_id] for _ in sample_targets]
            if len(steps) > stage1.max_steps:
                steps = steps[: stage1.max_steps]
                report.truncated += 1
            if any(i in tokens.ids for ids in (question, *steps, answer) for i in ids):
                reject(BadSample(sample.line, "the text contains a memory token"))
                continue
            encoded_sample = EncodedSample(question, steps, answer, sample.line)
            longest_rows = list(method.longest_rows(encoded_sample))
            limit = min(positions, recipe.data.max_tokens or positions)
            if (longest := max(row.longest_sequence for row in longest_rows)) > limit:
                reject(BadSample(sample.line, f"longer than {limit} tokens", f"{longest} tokens"))
                continue
            budget = recipe.optimizer.micro_batch_tokens
            if (packed := max(map(len, longest_rows))) > budget:
                reject(BadSample(sample.line, f"its row is above optimizer.micro_batch_tokens={budget}", f"{packed} tokens"))
                continue
            report.used += 1
            report.steps[len(steps)] += 1
            yield encoded_sample
