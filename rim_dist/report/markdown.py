"""A report as Markdown, its pictures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rim_dist.report.document import Examples, Paragraph, Part, Picture, Report, Table

PICTURES = "pictures"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


def _table(table: Table) -> str:
    side = ":--" if table.words else "--:"
    rule = "|" + "|".join([":--", *[side] * (len(table.head) - 1)]) + "|\n"
    return _row(table.head) + rule + "".join(map(_row, table.rows)) + "\n"


def _part(part: Part) -> str:
    if isinstance(part, Paragraph):
        return part.text + "\n\n"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Picture):
        return f"![{part.title}]({PICTURES}/{part.name}.png)\n\n"
    assert isinstance(part, Examples)
    blocks = max((len(example.answers) for example in part.examples), default=0)
    head = ["question", "target", *(f"{k}" for k in range(1, blocks + 1))]
    rows = []
    for example in part.examples:
        answers = [answer + (" ✓" if right else " ✗") for answer, right in example.answers]
        rows.append([example.question, example.target, *answers, *[""] * (blocks - len(answers))])
    return f"{part.title}:\n\n" + _table(Table(head, rows, words=True))


def render_markdown(report: Report) -> str:
    """The text; `pictures` has what belongs beside it."""
    sections = (f"## {section.title}\n\n" + "".join(map(_part, section.parts)) for section in report.sections)
    return f"# {report.title}\n\n" + "".join(sections)


def pictures(report: Report) -> dict[str, bytes]:
    """File name below `PICTURES`, and content."""
    parts = [part for section in report.sections for part in section.parts]
    return {f"{part.name}.png": part.png for part in parts if isinstance(part, Picture)}
