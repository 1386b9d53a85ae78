"""What a format defines, and what formats have in common."""

from __future__ import annotations

import codecs
import difflib
import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from rim_dist.config import ColumnsSection
from rim_dist.data.samples import BadSample, Sample, SourceRow
from rim_dist.errors import DataError

# A whole number with commas between groups of three digits. Any other comma separates: 3,5 is not 35.
THOUSANDS = r"[1-9]\d{0,2}(?:,\d{3})+"
_CALCULATION = re.compile(r"<<(.*?)>>", re.DOTALL)
_THOUSANDS = re.compile(rf"(?<![\d.,]){THOUSANDS}(?!\d|,\d)")


class Format:
    """How a file's rows become samples. The first line of a format's docstring describes it to users."""

    # Files with one of these endings are not text.
    binary_endings: ClassVar[tuple[str, ...]] = ()
    # Of the formats that recognise a file, the one of the highest precedence reads it.
    precedence: ClassVar[int] = 0
    # Whether rows can be read as a stream (`data.streaming`).
    streams: ClassVar[bool] = False

    @classmethod
    def description(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    def recognises(self, path: Path, line: str | None) -> bool:
        """Whether a file is in this format, by its name and its first line (None: the file is binary)."""
        raise NotImplementedError

    def read(self, path: Path, columns: ColumnsSection) -> Iterator[SourceRow]:
        """All rows of a file, each a sample or what is wrong with it. Raises DataError if the file is not in this format."""
        raise NotImplementedError


class LineFormat(Format):
    """A row a line."""

    def parse(self, line: int, text: str, columns: ColumnsSection) -> SourceRow:
        """The row in a line's text."""
        raise NotImplementedError

    def read(self, path: Path, columns: ColumnsSection) -> Iterator[SourceRow]:
        for line, text in text_lines(path):
            yield BadSample(line, "not UTF-8") if text is None else self.parse(line, text, columns)


class JsonFormat(LineFormat):
    """A JSON object a line."""

    def convert(self, line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:
        raise NotImplementedError

    def recognises(self, path: Path, line: str | None) -> bool:  # noqa: ARG002 - the content says enough
        row = json_object(line)
        return row is not None and self.fits(row)

    def fits(self, row: dict[str, Any]) -> bool:
        """Whether the first row is one of this format's."""
        raise NotImplementedError

    def parse(self, line: int, text: str, columns: ColumnsSection) -> SourceRow:
        try:
            row = parse_json(text)
        except ValueError as error:
            return BadSample(line, "not valid JSON", str(error))
        return self.convert(line, row, columns) if isinstance(row, dict) else BadSample(line, "not a JSON object")


def _integer(digits: str) -> float:
    """A whole number; infinite beyond floating point, as `1e400` is. Python does not read one of 5,000 digits."""
    value = float(digits)
    return int(digits) if math.isfinite(value) else value


def parse_json(text: str) -> Any:
    """The value in a JSON text. Raises ValueError with the reason."""
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{error.msg} at {place}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_object(line: str | None) -> dict[str, Any] | None:
    """The object in a line of JSON; None if there is none."""
    try:
        row = parse_json(line or "")
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def first_line(path: Path) -> str | None:
    """The first line with text in it; None if there is none."""
    return next((text for _, text in text_lines(path) if text is not None), None)


def text_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Lines with their number from 1; None for a line that is not UTF-8. Blank lines and byte order marks are left out.

    Raises DataError if the file cannot be read or is UTF-16.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise DataError(f"{path}: the file is UTF-16; convert it to UTF-8")
                try:
                    text = raw.decode("utf-8-sig").rstrip("\r\n")  # files that were joined have marks between them
                except UnicodeDecodeError:
                    yield number, None
                    continue
                if text.strip():
                    yield number, text
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON and YAML let half of a surrogate pair through, tokenizers do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def answer_text(value: Any) -> str:
    """An answer as text: numbers without a trailing `.0`. Raises ValueError with the reason if it cannot be one."""
    if value is None:
        raise ValueError("no answer")
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond floating point
            finite = False
        if not finite:
            raise ValueError("non-finite answer")
        return str(int(value) if int(value) == value else value)
    if not isinstance(value, str):
        raise ValueError(f"answer is {type(value).__name__}, not text or number")
    text = value.strip()
    if not text:
        raise ValueError("no answer")
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise ValueError("non-finite answer")
    return text


def sample_of(line: int, question: Any, steps: Any, answer: Any) -> SourceRow:
    if not isinstance(question, str | None):
        return BadSample(line, f"question is {type(question).__name__}, not text")
    if not question or not question.strip():
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
    for name, part in (("question", question), ("answer", text), *(("steps", step) for step in steps)):
        if not is_unicode(part):
            return BadSample(line, "half of a surrogate pair in the text", name)
    return Sample(question.strip(), tuple(s.strip() for s in steps if s.strip()), text, line)


def from_gsm8k(line: int, question: Any, solution: str) -> SourceRow:
    """A sample from a solution as GSM8K writes it: equations in `<<..>>`, the answer after `####`."""
    body, marker, answer = solution.rpartition("####")
    if not marker:
        return BadSample(line, "no answer", "no #### in the solution")
    return sample_of(line, question, _CALCULATION.findall(body), _THOUSANDS.sub(lambda m: m[0].replace(",", ""), answer))


def from_columns(line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:
    """A sample from named columns."""
    if (bad := missing_column(line, row, columns.question, columns.answer)) is not None:
        return bad
    steps = row.get(columns.steps) if columns.steps else None
    sample = sample_of(line, row[columns.question], steps, row[columns.answer])
    if isinstance(sample, Sample) and columns.steps and columns.steps not in row:
        return replace(sample, lacks_steps=present_columns(tuple(row), columns.steps))
    return sample


def missing_column(line: int, row: dict[str, Any], *names: str) -> BadSample | None:
    """What is wrong with a row that lacks one of the columns; None if it has them."""
    name = next((name for name in names if name not in row), None)
    return None if name is None else BadSample(line, "missing column", name, present_columns(tuple(row), name))


@functools.lru_cache
def present_columns(names: tuple[str, ...], missing: str) -> str:
    """What to say where a column is missing: those that are there, and the one of the nearest name."""
    shown = ", ".join(ascii(name)[1:-1][:40] for name in names[:8]) + (" .." if len(names) > 8 else "")
    nearest = difflib.get_close_matches(missing.lower(), [name.lower() for name in names], n=1)
    meant = next((f"; did you mean {name}?" for name in names if [name.lower()] == nearest), "")
    return f"the columns are {shown}{meant}" if names else "the row has no columns"
