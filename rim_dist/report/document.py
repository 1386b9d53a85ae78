"""A report before it has a format: sections of paragraphs, tables, pictures and examples."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is a name, the others are figures unless `words`."""

    head: list[str]
    rows: list[list[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG. `name` is unique in a report and fit for a file."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Example:
    """A question with the answer after every block and whether it is right; `text` is what the last block wrote."""

    question: str
    target: str
    answers: list[tuple[str, bool]]
    text: str


@dataclass(frozen=True)
class Examples:
    title: str
    examples: list[Example]


Part = Paragraph | Table | Picture | Examples


@dataclass
class Section:
    title: str
    parts: list[Part] = field(default_factory=list)


@dataclass
class Report:
    title: str
    sections: list[Section] = field(default_factory=list)
