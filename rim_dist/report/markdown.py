"""A report as Markdown, its pictures as files beside it."""

from __future__ import annotations

from rim_dist.report.document import Part, Picture, Report
from rim_dist.table import Table

PICTURES = "pictures"


def _part(part: Part) -> str:
    if isinstance(part, str):
        return part + "\n\n"
    if isinstance(part, Table):
        return part.markdown() + "\n"
    if isinstance(part, Picture):
        return f"![{part.title}]({PICTURES}/{part.name}.png)\n\n"
    blocks = max(len(answer["answers"]) for answer in part.answers)
    rows = []
    for answer in part.answers:
        marked = [f"{text} {'✓' if right else '✗'}" for text, right in zip(answer["answers"], answer["correct"], strict=True)]
        rows.append([answer["question"], answer["target"], *marked, *[""] * (blocks - len(marked))])
    return Table(["question", "target", *range(1, blocks + 1)], rows, f"{part.title}:", "l").markdown() + "\n"


def render_markdown(report: Report) -> str:
    """The text, which expects the report's pictures in the folder `PICTURES`."""
    return f"# {report.title}\n\n" + "".join(
        f"## {title}\n\n" + "".join(map(_part, parts)) for title, parts in report.sections.items()
    )
