"""JSONL with named columns."""

from __future__ import annotations

from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import JsonFormat, from_columns
from rim_dist.data.samples import SourceRow


class Jsonl(JsonFormat):
    """JSONL with named columns (`data.columns`): question, steps, answer."""

    streams = True

    def fits(self, row: dict[str, Any]) -> bool:  # noqa: ARG002 - any object
        return True

    def convert(self, line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:
        return from_columns(line, row, columns)


FORMAT = Jsonl()
