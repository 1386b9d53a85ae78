"""The paper's protocol: choose a checkpoint on a part of the questions, score it on the rest, for 16 random splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

SPLITS = 16
SELECTION_SHARE = 0.2  # 264 of GSM8K's 1,319 test questions


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


def select_by_splits(
    correct: Sequence[Sequence[bool]], selection: int | None = None, splits: int = SPLITS, seed: int = 0
) -> SplitFigures:
    """`correct[c][q]`: whether checkpoint c, in the order of training, answers question q right.

    In each split `selection` questions (default: `SELECTION_SHARE` of them) choose the checkpoint; the earliest of equals.
    Needs at least two questions.
    """
    table = numpy.asarray(correct, dtype=numpy.float64)
    questions = table.shape[1]
    size = selection or max(1, round(SELECTION_SHARE * questions))
    random = numpy.random.default_rng(seed)
    chosen, accuracies = [], []
    for _ in range(splits):
        order = random.permutation(questions)
        best = int(table[:, order[:size]].mean(axis=1).argmax())
        chosen.append(best)
        accuracies.append(float(table[best, order[size:]].mean()))
    values = numpy.asarray(accuracies)
    error = float(values.std(ddof=1) / numpy.sqrt(splits))
    return SplitFigures(size, chosen, accuracies, float(values.mean()), error)
