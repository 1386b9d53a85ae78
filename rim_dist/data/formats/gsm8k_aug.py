"""The text format of GSM8K-Aug."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import Format, from_gsm8k, text_lines
from rim_dist.data.samples import BadSample, SourceRow


class Gsm8kAug(Format):
    """GSM8K-Aug's text lines: `question||<<..>> <<..>> #### answer`."""

    precedence = 3

    def recognises(self, path: Path, line: str | None) -> bool:  # noqa: ARG002 - the content says enough
        return line is not None and "||" in line and "####" in line and not line.startswith("{")

    def read(self, path: Path, columns: ColumnsSection) -> Iterator[SourceRow]:  # noqa: ARG002 - it has no columns
        for number, text in text_lines(path):
            yield BadSample(number, "not UTF-8") if text is None else convert(number, text)


def convert(line: int, text: str) -> SourceRow:
    """A sample from a line of the format."""
    question, bars, solution = text.partition("||")
    if not bars:
        return BadSample(line, "no || between question and steps")
    return from_gsm8k(line, question, solution)


FORMAT = Gsm8kAug()
