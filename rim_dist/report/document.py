"""A report before it has a format: sections of paragraphs (plain text), tables, pictures and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rim_dist.table import Table


@dataclass(frozen=True)
class Picture:
    """A PNG. `name` is unique in a report and fit for a file."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class Examples:
    """Questions with their answers after every block, as `answers.jsonl` has them."""

    title: str
    answers: list[dict[str, Any]]


Part = str | Table | Picture | Examples


@dataclass(frozen=True)
class Report:
    """Parts by the title of their section."""

    title: str
    sections: dict[str, list[Part]]
