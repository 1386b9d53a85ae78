"""GSM8K's own files."""

from __future__ import annotations

from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import JsonFormat, from_gsm8k, missing_column
from rim_dist.data.samples import BadSample, SourceRow


class Gsm8k(JsonFormat):
    """GSM8K's JSONL: `question`, and an `answer` with equations in `<<..>>` and the result after `####`."""

    precedence = 1

    def fits(self, row: dict[str, Any]) -> bool:
        return "####" in str(row.get("answer", ""))

    def convert(self, line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:  # noqa: ARG002 - its own names
        if (bad := missing_column(line, row, "question", "answer")) is not None:
            return bad
        solution = row["answer"]
        if not isinstance(solution, str):
            return BadSample(line, "no answer" if solution is None else f"answer is {type(solution).__name__}, not text")
        return from_gsm8k(line, row["question"], solution)


FORMAT = Gsm8k()
