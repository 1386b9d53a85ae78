"""The text format of GSM8K-Aug."""

from __future__ import annotations

from pathlib import Path

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import LineFormat, from_gsm8k
from rim_dist.data.samples import BadSample, SourceRow


class Gsm8kAug(LineFormat):
    """GSM8K-Aug's text lines: `question||<<..>> <<..>> #### answer`."""

    precedence = 3

    def recognises(self, path: Path, line: str | None) -> bool:  # noqa: ARG002 - the content says enough
        return line is not None and "||" in line and "####" in line and not line.startswith("{")

    def parse(self, line: int, text: str, columns: ColumnsSection) -> SourceRow:  # noqa: ARG002 - it has no columns
        question, bars, solution = text.partition("||")
        if not bars:
            return BadSample(line, "no || between question and steps")
        return from_gsm8k(line, question, solution)


FORMAT = Gsm8kAug()
