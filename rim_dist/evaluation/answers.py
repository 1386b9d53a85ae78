"""The answers that an evaluation left on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rim_dist.errors import DataError

ANSWERS = "answers.jsonl"


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl` as `evaluate.write_evaluation` wrote them. Raises DataError naming file and line."""
    path = folder / ANSWERS
    if not path.is_file():
        raise DataError(f"{folder}: no {ANSWERS} in it; `rim-dist evaluate ... --output {folder}` writes one")
    answers = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            answer = json.loads(line)
            _ = answer["question"], answer["target"], answer["text"], answer["answers"][-1], answer["correct"][-1]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            raise DataError(f"{path}:{number}: not an answer of an evaluation") from None
        answers.append(answer)
    if not answers:
        raise DataError(f"{path}: no answers in it")
    return answers


def same_questions(names: Sequence[str], answers: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Raise DataError, naming the first difference, unless all evaluations asked the same questions in the same order."""
    for name, rows in zip(names[1:], answers[1:], strict=True):
        if len(rows) != len(answers[0]):
            raise DataError(f"{name} has {len(rows)} questions, {names[0]} has {len(answers[0])}; the same ones are needed")
        for number, (a, b) in enumerate(zip(answers[0], rows, strict=True), 1):
            if (a["question"], a["target"]) != (b["question"], b["target"]):
                raise DataError(f"question {number} of {name} is not that of {names[0]}; the same ones are needed")
