"""GSM-Hard's own files."""

from __future__ import annotations

from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import JsonFormat, missing_column, sample_of
from rim_dist.data.samples import SourceRow


class GsmHard(JsonFormat):
    """GSM-Hard's JSONL: `input` and `target`, without steps."""

    precedence = 2

    def fits(self, row: dict[str, Any]) -> bool:
        return "input" in row and "target" in row

    def convert(self, line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:  # noqa: ARG002 - its own names
        return missing_column(line, row, "input", "target") or sample_of(line, row["input"], [], row["target"])


FORMAT = GsmHard()
