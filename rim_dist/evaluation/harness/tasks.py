"""What the task files call: questions from a local file, and the project's own scoring as a metric.

The harness loads this file by its path, so it imports by full names only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets

from rim_dist.checkpoint.model_card import read_export_info
from rim_dist.config import ColumnsSection
from rim_dist.errors import DataError
from rim_dist.evaluation.evaluate import evaluation_samples
from rim_dist.evaluation.scoring import ANSWER_FORMAT, extract_answer, is_right


def _questions(
    usual: str, data: str | None = None, pretrained: str = "", answer_format: str | None = None, **_metadata: Any
) -> dict[str, datasets.Dataset]:
    """`pretrained`: the model, whose recipe says how its answers are written unless `answer_format` does."""
    if data is None and "RIM_DIST_DATA" not in os.environ:
        raise DataError(f'no data: set RIM_DIST_DATA to a folder with {usual}, or give --metadata \'{{"data": "FILE"}}\'')
    path = Path(data) if data is not None else Path(os.environ["RIM_DIST_DATA"]) / usual
    samples = evaluation_samples(str(path), "auto", sys.maxsize, ColumnsSection())
    if answer_format is None:
        about = read_export_info(Path(pretrained)) if pretrained else {}
        answer_format = about.get("recipe", {}).get("data", {}).get("answer_format", ANSWER_FORMAT)
    rows = [{"question": s.question, "answer": s.answer, "answer_format": answer_format} for s in samples]
    return {"test": datasets.Dataset.from_list(rows)}


def gsm8k(**metadata: Any) -> dict[str, datasets.Dataset]:
    """GSM8K's test set from RIM_DIST_DATA, or any file that `rim-dist evaluate` reads."""
    return _questions("gsm8k/test.jsonl", **metadata)


def gsm_hard(**metadata: Any) -> dict[str, datasets.Dataset]:
    """GSM-Hard from RIM_DIST_DATA, or any file that `rim-dist evaluate` reads."""
    return _questions("gsm_hard/gsmhardv2.jsonl", **metadata)


def answers(responses: list[list[str]], docs: list[dict[str, str]]) -> list[list[str]]:
    """The answer in every response, read as the model was trained to write it."""
    return [
        [extract_answer(text, doc["answer"], doc["answer_format"]) for text in texts]
        for texts, doc in zip(responses, docs, strict=True)
    ]


def decimal(references: list[str], predictions: list[str], **_keywords: Any) -> float:
    """1 if the answer in the prediction is the target by the project's rule (`evaluation.scoring`), else 0."""
    (target,), (text,) = references, predictions
    return float(is_right(text, target))
