"""What the task files call: questions from a local file, and the project's own scoring as a metric.

The harness loads this file by its path, so it imports by full names only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import datasets

from rim_dist.config import ColumnsSection
from rim_dist.errors import DataError
from rim_dist.evaluation.evaluate import evaluation_samples
from rim_dist.evaluation.scoring import extract_answer, same_answer


def _questions(data: str | None, usual: str) -> dict[str, datasets.Dataset]:
    if data is None and "RIM_DIST_DATA" not in os.environ:
        raise DataError(f'no data: set RIM_DIST_DATA to a folder with {usual}, or give --metadata \'{{"data": "FILE"}}\'')
    path = Path(data) if data is not None else Path(os.environ["RIM_DIST_DATA"]) / usual
    samples = evaluation_samples(str(path), "auto", sys.maxsize, ColumnsSection())
    return {"test": datasets.Dataset.from_list([{"question": s.question, "answer": s.answer} for s in samples])}


def gsm8k(data: str | None = None, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """GSM8K's test set from RIM_DIST_DATA, or any file that `rim-dist evaluate` reads."""
    return _questions(data, "gsm8k/test.jsonl")


def gsm_hard(data: str | None = None, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """GSM-Hard from RIM_DIST_DATA, or any file that `rim-dist evaluate` reads."""
    return _questions(data, "gsm_hard/gsmhardv2.jsonl")


def decimal(references: list[str], predictions: list[str], **_keywords: Any) -> float:
    """1 if the answer in the prediction is the target by the project's rule (`evaluation.scoring`), else 0."""
    (target,), (text,) = references, predictions
    return float(same_answer(extract_answer(text, target), target))
