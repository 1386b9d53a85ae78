"""Accuracy after every block and latency, of a loaded model or of the model in training."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rim_dist.config import ColumnsSection, Recipe
from rim_dist.data.encoding import unknown_text
from rim_dist.data.formats import recognise
from rim_dist.data.samples import BadSample, Sample
from rim_dist.data.sources import read_file
from rim_dist.data.synthetic import SyntheticTask
from rim_dist.errors import DataError, ModelError
from rim_dist.evaluation.latency import Candidate, time_side_by_side
from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.readouts import readout_ids
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import extract_answer, is_right, majority_answer, pass_at_k, same_answer
from rim_dist.files import os_errors
from rim_dist.model.generation import Decoding, Sampling, answer_questions, answer_texts, generate_ids
from rim_dist.model.proof import prove_family
from rim_dist.tokens import appended_block, prompt_ids
from rim_dist.unwrap import bare_model

_TAKES_MASK = "_rim_dist_takes_mask"


@dataclass
class Evaluation:
    """Result over `questions` questions, accuracies as fractions.

    `accuracy`: after the last block. `per_block[k - 1]`: after block k (one entry without blocks). `any_block`: after at least
    one. `majority`: of the answer most blocks give. `rules`: after the last block, by the rules of others (`evaluation.rules`).
    """

    questions: int
    accuracy: float
    per_block: list[float]
    any_block: float
    majority: float
    rules: dict[str, float]
    pass_at_k: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> torch.Tensor:
        """Whether the answer to each question is right after each block: boolean `[questions, blocks]`."""
        return torch.tensor([answer["correct"] for answer in self.answers], dtype=torch.bool)

    def figures(self) -> dict[str, Any]:
        """Everything but the answers."""
        return {name: value for name, value in vars(self).items() if name != "answers"}


def evaluation_samples(data: str, file_format: str, limit: int, columns: ColumnsSection, steps: int = 5) -> list[Sample]:
    """Questions of a file, or of the embedded task's held-out problems (`synthetic[:SEED]`), the first `limit`.

    Raises DataError: no such file, unknown format, a bad row (with its line), no rows.
    """
    name, _, seed = data.partition(":")
    if name == "synthetic":
        if seed and not seed.isdigit():
            raise DataError(f"{data}: the seed of synthetic is a whole number")
        return list(SyntheticTask(1, steps).held_out(limit, int(seed or 0)))
    path = Path(data)
    file_format = recognise(path) if file_format == "auto" else file_format
    samples: list[Sample] = []
    for row in read_file(path, file_format, columns):
        if isinstance(row, BadSample):
            raise DataError(f"{path}:{row.line}: {row.reason}{row.remark}")
        samples.append(row)
        if len(samples) == limit:
            break
    if not samples:
        raise DataError(f"{path}: no questions in it")
    return samples


def unknown_answers_note(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> str:
    """A note to the user if there are answers that the tokenizer knows nothing of, which no model can write; else empty."""
    unknown = unknown_text(tokenizer, [])
    lines = [sample.line for sample in samples if unknown(sample.answer, [])]
    count = f"{len(lines)} of {len(samples)} answers to evaluate"
    return f"warning: {count} are only unknown text to the tokenizer; first in line {lines[0]}" if lines else ""


def recipe_samples(recipe: Recipe) -> list[Sample]:
    """The evaluation questions of a recipe; empty if it names none."""
    data = recipe.evaluation.data or ("synthetic" if recipe.data.source == "synthetic" else None)
    if data is None:
        return []
    return evaluation_samples(
        data, recipe.evaluation.format, recipe.evaluation.samples, recipe.data.columns, recipe.data.synthetic.max_steps
    )


def block_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[str],
    blocks: int,
    decoding: Decoding,
    bidirectional: bool = False,
    budgets: Sequence[int] | None = None,
) -> list[list[str]]:
    """Answer texts of every question after each of 1 .. `blocks` blocks (one text each with 0 blocks).

    `budgets`: these numbers of blocks only, the largest of them `blocks`.
    """
    if not blocks:
        return [[text] for text in answer_questions(model, tokenizer, questions, None, decoding)]
    budgets = budgets or range(1, blocks + 1)
    if not bidirectional and not _takes_mask(bare_model(model)):
        columns = [answer_questions(model, tokenizer, questions, budget, decoding) for budget in budgets]
        return [list(row) for row in zip(*columns, strict=True)]
    prompts = prompt_ids(tokenizer, questions, blocks)
    answers = readout_ids(model, tokenizer, prompts, len(appended_block(tokenizer)), budgets, decoding, bidirectional)
    return [answer_texts(tokenizer, row, decoding) for row in answers]


def _takes_mask(model: Any) -> bool:
    """Whether a model can decode all readouts from one prefix: its family honours the RiM mask."""
    if not hasattr(model, _TAKES_MASK):
        try:
            prove_family(model.config)
            setattr(model, _TAKES_MASK, True)
        except ModelError:
            setattr(model, _TAKES_MASK, False)
    return getattr(model, _TAKES_MASK)


def score(samples: Sequence[Sample], texts: Sequence[Sequence[str]], answer_format: str) -> Evaluation:
    """Compare answers after every block, written as the model was trained to write them, with the targets."""
    answers: list[dict[str, Any]] = []
    for sample, row in zip(samples, texts, strict=True):
        target = sample.answer
        given = [extract_answer(text, target, answer_format) for text in row]
        answers.append(
            {
                "question": sample.question,
                "target": target,
                "answers": given,
                "correct": [same_answer(answer, target) for answer in given],
                "majority_correct": same_answer(majority_answer(given), target),
                "text": row[-1],
            }
        )
    correct = torch.tensor([a["correct"] for a in answers], dtype=torch.float64)
    per_block = correct.mean(dim=0).tolist()
    return Evaluation(
        questions=len(answers),
        accuracy=per_block[-1],
        per_block=per_block,
        any_block=float(correct.any(dim=1).double().mean()),
        majority=statistics.fmean(a["majority_correct"] for a in answers),
        rules={name: statistics.fmean(rule(a["text"], a["target"]) for a in answers) for name, rule in RULES.items()},
        answers=answers,
    )


def sampled_pass_at_k(
    loaded: LoadedModel, samples: Sequence[Sample], blocks: int, decoding: Decoding, sampling: Sampling
) -> dict[str, float]:
    """Chance of a right answer among k drawn ones, for k = 1, 2, 4 .. up to the number drawn; keys are k as text."""
    prompts = loaded.prompts([sample.question for sample in samples], blocks or None)
    ids = generate_ids(loaded.model, loaded.tokenizer, prompts, decoding, sampling)
    texts = iter(answer_texts(loaded.tokenizer, ids, decoding))
    n = sampling.answers
    right = [sum(is_right(next(texts), sample.answer, loaded.answer_format) for _ in range(n)) for sample in samples]
    budgets = sorted({n, *(1 << i for i in range(n.bit_length()))})
    return {str(k): statistics.fmean(pass_at_k(n, c, k) for c in right) for k in budgets}


def evaluate_model(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    blocks: int,
    decoding: Decoding,
    timed_questions: int,
    timed_batch: int = 1,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Accuracy after every block, pass@k where answers are sampled, and latency.

    `timed_questions`: the first so many questions are timed in batches of `timed_batch`, after a warm-up.
    """
    questions = [sample.question for sample in samples]
    texts = block_answers(loaded.model, loaded.tokenizer, questions, blocks, decoding)
    result = score(samples, texts, loaded.answer_format)
    if sampling is not None:
        result.pass_at_k = sampled_pass_at_k(loaded, samples, blocks, decoding, sampling)
    prompts = loaded.prompts(questions[: max(timed_batch, timed_questions)], blocks or None)
    result.latency = time_side_by_side({"": Candidate(loaded, prompts, decoding)}, min(timed_batch, len(prompts)))[""]
    return result


def write_evaluation(result: Evaluation, folder: Path, about: dict[str, Any]) -> None:
    """`evaluation.json` (figures) and `answers.jsonl` (every question with its answers by block)."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = json.dumps({**about, **result.figures()}, indent=1) + "\n"
    answers = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in result.answers)
    for path, text in ((folder / "evaluation.json", figures), (folder / "answers.jsonl", answers)):
        with os_errors(path):
            path.write_text(text, encoding="utf-8")
