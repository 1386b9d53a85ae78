"""ProsQA's own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import Format, missing_column, parse_json, sample_of
from rim_dist.data.samples import BadSample, SourceRow
from rim_dist.errors import DataError


class ProsQa(Format):
    """ProsQA's JSON: one list of objects with `question`, `steps` and `answer`."""

    precedence = 3

    def recognises(self, path: Path, line: str | None) -> bool:
        return path.suffix == ".json" and line is not None and line.lstrip().startswith("[")

    def read(self, path: Path, columns: ColumnsSection) -> Iterator[SourceRow]:  # noqa: ARG002 - its own names
        try:
            rows = parse_json(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a JSON list of problems ({error})") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: not a JSON list of problems")
        for number, row in enumerate(rows, 1):
            if isinstance(row, dict):
                sample = sample_of(number, row.get("question"), row.get("steps"), row.get("answer"))
                yield missing_column(number, row, "question", "answer") or sample
            else:
                yield BadSample(number, "not a JSON object")


FORMAT = ProsQa()
