"""From samples to token ids: prompts through the chat template, targets as plain text with end-of-text."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from pydantic import BaseModel, Field
from transformers import PreTrainedTokenizerBase

from rim_dist.config import ColumnsSection, Recipe, around_text
from rim_dist.data.samples import BadSample, EncodedSample, Sample, TokenIds
from rim_dist.data.sources import source_name
from rim_dist.errors import DataError, ModelError
from rim_dist.methods import method_of
from rim_dist.methods.base import Method
from rim_dist.tokens import MemoryTokens, prompt_ids, text_ids

# Data that another version tokenised is not reused. tests/test_encoder_version.py fails if the encoder changes without it.
ENCODER_VERSION = 1

_CHUNK = 512
_STEPS = ColumnsSection().steps


class DataReport(BaseModel):
    """How many rows of a source are used and why others are skipped: used + skipped = rows.

    `steps_column`: whether a row has it; `columns`: those of the first row that has not. `unknown`: used samples with a target
    of which the tokenizer knows nothing, the first of them `first_unknown`.
    """

    rows: int = 0
    used: int = 0
    truncated: int = 0
    skipped: Counter[str] = Field(default_factory=Counter)  # by reason
    examples: dict[str, str] = Field(default_factory=dict)  # the first skipped row of each reason
    steps: Counter[int] = Field(default_factory=Counter)  # used samples by their number of steps
    steps_column: bool = False
    columns: str = ""
    unknown: int = 0
    first_unknown: str = ""

    def skip(self, bad: BadSample, name: str) -> None:
        self.skipped[bad.reason] += 1
        self.examples.setdefault(bad.reason, f"{name}:{bad.line}{bad.remark}")

    def reasons(self) -> str:
        """Why rows are skipped, in a line."""
        counted = self.skipped.items()
        return (
            "; ".join(f"{count} rows: {reason}, first {self.examples[reason]}" for reason, count in counted) or "it has no rows"
        )

    def notes(self, recipe: Recipe) -> list[str]:
        """What a user has to know of the data before it is trained on."""
        notes = []
        if self.used and self.steps[0] == self.used and method_of(recipe).learns_steps:
            notes.append(f"warning: no sample has steps, and method {recipe.method} learns from them")
            if self.columns and not self.steps_column:
                notes[0] += f": no row has the column {recipe.data.columns.steps} (data.columns.steps); {self.columns}"
        if self.unknown:
            count = f"{self.unknown} of {self.used} samples"
            notes.append(f"warning: {count} have a target of only unknown text to the tokenizer; first {self.first_unknown}")
        return notes


def encode(
    recipe: Recipe,
    rows: Iterable[Sample | BadSample],
    tokenizer: PreTrainedTokenizerBase,
    tokens: MemoryTokens,
    positions: int,
    report: DataReport,
    ends: Sequence[int] = (),
) -> Iterator[EncodedSample]:
    """Token ids of every usable row, in order. `report` counts them and the skipped rows.

    `positions`: the longest sequence of the model. `ends`: tokens besides end-of-text that end an answer. Samples with too many
    steps follow `curriculum.stage1.longer`. Raises DataError, with file and line, at the first bad row if `data.on_bad_sample`
    is `refuse`.
    """
    name, method, stage1 = source_name(recipe.data), method_of(recipe), recipe.curriculum.stage1

    def reject(bad: BadSample) -> None:
        if recipe.data.on_bad_sample == "refuse":
            raise DataError(
                f"{name}:{bad.line}: {bad.reason}{bad.remark}; correct it, or leave such rows out with data.on_bad_sample=skip"
            )
        report.skip(bad, name)

    def check_columns() -> None:
        """Refuse a column of steps that the recipe names and no row has."""
        column = recipe.data.columns.steps
        if report.columns and not report.steps_column and column != _STEPS:
            raise DataError(
                f"data.columns.steps: no row of {name} has the column {column}; {report.columns}; null if there are no steps"
            )

    formats = (around_text(recipe.data.step_format, "step"), around_text(recipe.data.answer_format, "answer"))
    unknown = unknown_text(tokenizer, [part for parts in formats for part in parts if part])
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        first = not report.rows
        report.rows += len(chunk)
        good: list[Sample] = []
        for row in chunk:
            if isinstance(row, BadSample):
                reject(row)
                continue
            report.steps_column |= not row.lacks_steps
            report.columns = report.columns or row.lacks_steps
            if stage1.longer == "skip" and len(row.steps) > stage1.max_steps:
                report.skip(BadSample(row.line, f"more than curriculum.stage1.max_steps={stage1.max_steps} steps"), name)
            else:
                good.append(row)
        if recipe.data.streaming:
            check_columns()  # the end of a stream is far away
        encoded = _tokenised(recipe, good, tokenizer)
        if first and len({s.question for s in good}) > 1 and len(set(map(_prompt, encoded))) == 1:
            raise DataError(f"{name}: the tokenizer makes the same prompt of every question")
        for source, sample in zip(good, encoded, strict=True):
            if isinstance(sample, BadSample):
                reject(sample)
                continue
            kept = replace(sample, steps=sample.steps[: stage1.max_steps])
            report.truncated += len(kept.steps) < len(sample.steps)
            if (bad := _unusable(recipe, method, kept, tokens, positions, {tokenizer.eos_token_id, *ends})) is not None:
                reject(bad)
                continue
            report.used += 1
            report.steps[len(kept.steps)] += 1
            if any(map(unknown, (*source.steps[: stage1.max_steps], source.answer), (*kept.steps, kept.answer))):
                report.unknown += 1
                report.first_unknown = report.first_unknown or f"{name}:{kept.line}"
            yield kept
    check_columns()


def unknown_text(tokenizer: PreTrainedTokenizerBase, formats: list[str]) -> Callable[[str, TokenIds], bool]:
    """Whether the tokenizer knows nothing of a text, given the token ids of the target made from it.

    All of it becomes the token for unknown text, or spaces, or no token at all. `formats`: what targets have around the text.
    """
    around = {i for ids in tokenizer(formats, add_special_tokens=False)["input_ids"] for i in ids} if formats else set()
    around.add(tokenizer.eos_token_id)

    @functools.cache
    def empty(token: int) -> bool:
        return token == tokenizer.unk_token_id or not tokenizer.decode([token]).strip()

    def unknown(text: str, target: TokenIds) -> bool:
        if not all(i in around or empty(i) for i in target):
            return False
        return all(map(empty, tokenizer(text, add_special_tokens=False)["input_ids"]))

    return unknown


def _tokenised(
    recipe: Recipe, samples: list[Sample], tokenizer: PreTrainedTokenizerBase
) -> Sequence[EncodedSample | BadSample]:
    """Token ids of samples, all tokenised in one call. Steps and answers end with the end-of-text token."""
    step, answer = recipe.data.step_format, recipe.data.answer_format
    asked = [s.question for s in samples]
    targets = [[*(step.format(step=text) for text in s.steps), answer.format(answer=s.answer)] for s in samples]
    try:
        questions = prompt_ids(tokenizer, asked, 0)
        encoded = iter(text_ids(tokenizer, list(itertools.chain.from_iterable(targets))))
    except ModelError as error:
        if len(samples) > 1:  # one of them
            return [one for sample in samples for one in _tokenised(recipe, [sample], tokenizer)]
        return [BadSample(samples[0].line, "it cannot be tokenised", str(error))]
    ends = [tokenizer.eos_token_id]
    return [
        EncodedSample(question, [next(encoded) + ends for _ in sample.steps], next(encoded) + ends, sample.line)
        for sample, question in zip(samples, questions, strict=True)
    ]


def _prompt(sample: EncodedSample | BadSample) -> tuple[int, ...]:
    """The prompt's token ids; a bad sample's are its line, unlike any other's."""
    return (-sample.line,) if isinstance(sample, BadSample) else tuple(sample.question)


def _unusable(
    recipe: Recipe, method: Method, sample: EncodedSample, tokens: MemoryTokens, positions: int, ends: set[int]
) -> BadSample | None:
    """The reason why an encoded sample cannot be used; None if it can."""
    if any(i in tokens.ids for ids in (sample.question, *sample.steps, sample.answer) for i in ids):
        return BadSample(sample.line, "the text contains a memory token")
    if any(i in ends for ids in (*sample.steps, sample.answer) for i in ids[:-1]):
        return BadSample(sample.line, "a step or the answer contains a token that ends answers")
    longest_rows = list(method.longest_rows(sample))
    limit = min(positions, recipe.data.max_tokens or positions)
    if (longest := max(row.longest_sequence for row in longest_rows)) > limit:
        return BadSample(sample.line, f"longer than {limit} tokens", f"{longest} tokens")
    budget = recipe.optimizer.micro_batch_tokens
    if (packed := max(map(len, longest_rows))) > budget:
        return BadSample(sample.line, f"its row is above optimizer.micro_batch_tokens={budget}", f"{packed} tokens")
    return None
