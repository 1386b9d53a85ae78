"""GSM8K's own files."""

from __future__ import annotations

from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import JsonFormat, from_gsm8k
from rim_dist.data.samples import BadSample, SourceRow


class Gsm8k(JsonFormat):
    """GSM8K's JSONL: `question`, and an `answer` with equations in `<<..>>` and the result after `####`."""

    precedence = 1

    def fits(self, row: dict[str, Any]) -> bool:
        return "####" in str(row.get("answer", ""))

    def convert(self, line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:  # noqa: ARG002 - its own names
        solution = row.get("answer")
        if not isinstance(solution, str):
            return BadSample(line, "missing column", "answer")
        return from_gsm8k(line, row.get("question"), solution)


FORMAT = Gsm8k()
