"""Readers: a file, a hub data set or the embedded task becomes samples (question, steps, answer).

Every row becomes a `Sample` or a `BadSample` with its line and the reason, so that all rows are accounted for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_dist.config import ColumnsSection, DataSection
from rim_dist.data.synthetic import SyntheticTask
from rim_dist.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A question, the true intermediate steps and the final answer, all text."""

    question: str
    steps: tuple[str, ...]
    answer: str
    line: int


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used: its line (from 1) and why."""

    line: int
    reason: str
    detail: str = ""


SourceRow = Sample | BadSample
_CALCULATION = re.compile(r"<<(.*?)>>", re.DOTALL)


def answer_text(value: Any) -> str:
    """An answer as text: numbers without a trailing `.0`. Raises ValueError with the reason if it cannot be one."""
    if isinstance(value, bool) or value is None:
        raise ValueError("no answer")
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise ValueError("non-finite answer")
        return str(int(value)) if float(value).is_integer() else repr(value)
    if not isinstance(value, str):
        raise ValueError(f"answer is {type(value).__name__}, not text or number")
    text = value.strip()
    if not text:
        raise ValueError("no answer")
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise ValueError("non-finite answer")
    return text


def _sample(line: int, question: Any, steps: Any, answer: Any) -> SourceRow:
    if not isinstance(question, str) or not question.strip():
        return BadSample(line, "no question")
    if steps is None:
        steps = []
    if isinstance(steps, str):
        steps = steps.splitlines()
    if not isinstance(steps, list | tuple) or not all(isinstance(step, str) for step in steps):
        return BadSample(line, "steps are not a list of texts")
    try:
        text = answer_text(answer)
    except ValueError as error:
        return BadSample(line, str(error))
    return Sample(question.strip(), tuple(s.strip() for s in steps if s.strip()), text, line)


def _from_gsm8k(line: int, row: dict[str, Any]) -> SourceRow:
    solution = row.get("answer")
    if not isinstance(solution, str):
        return BadSample(line, "missing column", "answer")
    body, marker, answer = solution.rpartition("####")
    if not marker:
        return BadSample(line, "no answer", "no #### in the answer column")
    return _sample(line, row.get("question"), _CALCULATION.findall(body), answer.strip().replace(",", ""))


def _from_gsm8k_aug(line: int, text: str) -> SourceRow:
    question, bars, rest = text.partition("||")
    if not bars:
        return BadSample(line, "no || between question and steps")
    body, marker, answer = rest.rpartition("####")
    if not marker:
        return BadSample(line, "no answer", "no #### after the steps")
    return _sample(line, question, _CALCULATION.findall(body), answer.strip().replace(",", ""))


def _from_gsm_hard(line: int, row: dict[str, Any]) -> SourceRow:
    return _sample(line, row.get("input"), [], row.get("target"))


def _from_columns(columns: ColumnsSection) -> Callable[[int, dict[str, Any]], SourceRow]:
    def convert(line: int, row: dict[str, Any]) -> SourceRow:
        for name in (columns.question, columns.answer):
            if name not in row:
                return BadSample(line, "missing column", name)
        steps = row.get(columns.steps) if columns.steps else None
        return _sample(line, row[columns.question], steps, row[columns.answer])

    return convert


def _text_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Lines with their number from 1; None for a line that is not UTF-8. Blank lines are left out."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None
                continue
            if text.strip():
                yield number, text


def _json_lines(path: Path, convert: Callable[[int, dict[str, Any]], SourceRow]) -> Iterator[SourceRow]:
    for number, text in _text_lines(path):
        if text is None:
            yield BadSample(number, "not UTF-8")
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            yield BadSample(number, "not valid JSON", f"{error.msg} at column {error.colno}")
            continue
        yield convert(number, row) if isinstance(row, dict) else BadSample(number, "not a JSON object")


def _gsm8k_aug_lines(path: Path) -> Iterator[SourceRow]:
    for number, text in _text_lines(path):
        yield BadSample(number, "not UTF-8") if text is None else _from_gsm8k_aug(number, text)


def _prosqa(path: Path) -> Iterator[SourceRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a JSON list of problems ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: not a JSON list of problems")
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            yield _sample(number, row.get("question"), row.get("steps"), row.get("answer"))
        else:
            yield BadSample(number, "not a JSON object")


def _parquet(path: Path, convert: Callable[[int, dict[str, Any]], SourceRow]) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield convert(number, row)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _hub(data: DataSection) -> Iterator[SourceRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            data.id, data.config_name, split=data.split, revision=data.revision, streaming=data.streaming
        )
    except Exception as error:
        raise DataError(f"data.id: {data.id!r} cannot be loaded ({str(error).splitlines()[0]})") from error
    convert = {"columns": _from_columns(data.columns), "gsm8k": _from_gsm8k}.get(data.layout)
    for number, row in enumerate(rows, 1):
        if convert is not None:
            yield convert(number, row)
        elif isinstance(row.get("text"), str):
            yield _from_gsm8k_aug(number, row["text"])
        else:
            yield BadSample(number, "missing column", "text")


def recognise(path: Path) -> str:
    """The format of a data file, from its ending and its first row. Raises DataError if none fits."""
    if path.suffix == ".parquet":
        return "parquet"
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    first = next((text for _, text in _text_lines(path) if text is not None), None)
    if first is None:
        raise DataError(f"{path}: the file is empty")
    if path.suffix == ".json" and first.lstrip().startswith("["):
        return "prosqa"
    if "||" in first and "####" in first and not first.startswith("{"):
        return "gsm8k_aug"
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        if "input" in row and "target" in row:
            return "gsm_hard"
        return "gsm8k" if "####" in str(row.get("answer", "")) else "jsonl"
    raise DataError(f"{path}: format not recognised; name it: gsm8k, gsm8k_aug, gsm_hard, prosqa, jsonl or parquet")


def read_file(path: str | Path, file_format: str, columns: ColumnsSection) -> Iterator[SourceRow]:
    """Rows of a local file in one of the known formats (`recognise` names them)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if file_format == "gsm8k_aug":
        return _gsm8k_aug_lines(path)
    if file_format == "prosqa":
        return _prosqa(path)
    if file_format == "parquet":
        return _parquet(path, _from_columns(columns))
    converters = {"gsm8k": _from_gsm8k, "gsm_hard": _from_gsm_hard, "jsonl": _from_columns(columns)}
    return _json_lines(path, converters[file_format])


def read_source(data: DataSection, seed: int) -> Iterator[SourceRow]:
    """All rows of the recipe's source, `data.limit` applied. Deterministic."""
    if data.source == "synthetic":
        walks = data.synthetic
        problems = SyntheticTask(walks.min_steps, walks.max_steps, walks.step_text).training(walks.samples, seed)
        rows: Iterator[SourceRow] = (Sample(p.question, p.steps, p.answer, i) for i, p in enumerate(problems, 1))
    elif data.source == "hub":
        rows = _hub(data)
    else:
        assert data.path is not None  # checked by DataSection
        rows = read_file(data.path, data.source, data.columns)
    for count, row in enumerate(rows):
        if data.limit is not None and count >= data.limit:
            return
        yield row


def source_name(data: DataSection) -> str:
    """How messages name the source."""
    return data.path or data.id or data.source
