"""Evaluations of the same questions side by side: their answers on disk, pairs of methods, checkpoints of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from rim_dist.errors import DataError

ANSWERS = "answers.jsonl"
DRAWS = 10_000  # of the bootstrap
SPLITS = 16
SELECTION_FRACTION = 0.2  # 264 of GSM8K's 1,319 test questions


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl` as `evaluate.write_evaluation` wrote them. Raises DataError naming file and line."""
    path = folder / ANSWERS
    if not path.is_file():
        raise DataError(f"{folder}: no {ANSWERS} in it; `rim-dist evaluate ... --output {folder}` writes one")
    answers = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of text they would end at U+2028 too
        try:
            answer = json.loads(line)
            _ = answer["question"], answer["target"], answer["text"], answer["answers"][-1], answer["correct"][-1]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise DataError(f"{path}:{number}: not an answer of an evaluation") from None
        answers.append(answer)
    if not answers:
        raise DataError(f"{path}: no answers in it")
    return answers


def same_questions(names: Sequence[str], answers: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Raise DataError, naming the first difference, unless all evaluations have the same questions in the same order."""
    for name, rows in zip(names[1:], answers[1:], strict=True):
        if len(rows) != len(answers[0]):
            raise DataError(f"{name} has {len(rows)} questions, {names[0]} has {len(answers[0])}; the same ones are needed")
        for number, (a, b) in enumerate(zip(answers[0], rows, strict=True), 1):
            if (a["question"], a["target"]) != (b["question"], b["target"]):
                raise DataError(f"question {number} of {name} is not that of {names[0]}; the same ones are needed")


# ---- two methods: is the difference more than chance? ------------------------------------------------------------


@dataclass(frozen=True)
class PairedComparison:
    """Method `a` against `b`, accuracies as fractions. `low`, `high`: 95 % interval of the difference a - b (paired bootstrap).

    `only_a`, `only_b`: questions that one of them alone answers right. `p_value`: exact McNemar test, two-sided.
    """

    questions: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        return self.accuracy_a - self.accuracy_b


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: under chance a question that one alone answers right is as likely to be either's."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def compare_paired(a: Sequence[bool], b: Sequence[bool]) -> PairedComparison:
    """Compare right and wrong on the same questions, in the same order.

    A bootstrap sample of questions is, for the difference, a multinomial draw of its three outcomes: +1, -1, 0. This draws from
    the same distribution as `scipy.stats.bootstrap`, needs 30 times less time, and one question is enough for it.
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    outcomes = numpy.random.default_rng(0).multinomial(n, [only_a / n, only_b / n, (n - only_a - only_b) / n], DRAWS)
    low, high = numpy.quantile((outcomes[:, 0] - outcomes[:, 1]) / n, [0.025, 0.975])
    return PairedComparison(n, sum(a) / n, sum(b) / n, only_a, only_b, float(low), float(high), mcnemar(only_a, only_b))


# ---- the paper's protocol: choose a checkpoint on a part of the questions, score it on the rest -------------------


@dataclass(frozen=True)
class SplitFigures:
    """`chosen[i]` is the checkpoint that split i chose, `accuracies[i]` its accuracy on the questions that did not choose it.

    `standard_error` is that of the mean over splits. The splits share their questions, so it says how much the choice matters,
    not how the figure would move on other questions.
    """

    selection_questions: int
    chosen: list[int]
    accuracies: list[float]
    mean: float
    standard_error: float


def select_by_splits(correct: Sequence[Sequence[bool]]) -> SplitFigures:
    """`correct[c][q]`: whether checkpoint c, in the order of training, answers question q right.

    In each split `SELECTION_FRACTION` of the questions choose the checkpoint; the earliest of equals. Needs at least two
    questions.
    """
    table = numpy.asarray(correct, dtype=numpy.float64)
    questions = table.shape[1]
    size = max(1, round(SELECTION_FRACTION * questions))
    random = numpy.random.default_rng(0)
    chosen, accuracies = [], []
    for _ in range(SPLITS):
        order = random.permutation(questions)
        best = int(table[:, order[:size]].mean(axis=1).argmax())
        chosen.append(best)
        accuracies.append(float(table[best, order[size:]].mean()))
    values = numpy.asarray(accuracies)
    error = float(values.std(ddof=1) / numpy.sqrt(SPLITS))
    return SplitFigures(size, chosen, accuracies, float(values.mean()), error)
