"""One table for a terminal, a Markdown page and an HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_TERMINAL_WIDTH = 140  # columns at least; a narrower terminal breaks lines itself


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head. A cell is shown as `str` shows it.

    `align`: `l` or `r` for each column; the last letter is that of all further columns.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    align: str = "lr"

    def _left(self) -> list[bool]:
        letters = itertools.chain(self.align, itertools.repeat(self.align[-1]))
        return [letter == "l" for letter, _ in zip(letters, self.head, strict=False)]

    def text(self) -> str:
        """For standard output: with lines and bold heads on a terminal, aligned text with a row a line elsewhere."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        console = Console(highlight=False, markup=False, emoji=False)
        terminal = console.is_terminal
        console.width = max(console.width, _TERMINAL_WIDTH) if terminal else 100_000
        table = RichTable(box=box.HEAVY_HEAD if terminal else None, pad_edge=terminal)
        for name, left in zip(self.head, self._left(), strict=True):
            table.add_column(name, justify="left" if left else "right")
        for row in self.rows:
            table.add_row(*map(str, row))
        with console.capture() as capture:
            console.print(table)
        lines = [line.rstrip() for line in capture.get().splitlines()]
        return "\n".join([self.title, *lines] if self.title else lines)

    def markdown(self) -> str:
        def line(cells: Sequence[object]) -> str:
            return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |\n"

        rule = "|" + "|".join("---" if left else "--:" for left in self._left()) + "|\n"
        title = f"{self.title}\n\n" if self.title else ""
        return title + line(self.head) + rule + "".join(map(line, self.rows))

    def html(self) -> str:
        """A `<table>`; cells on the left have the class `l`, a table with no others the class `words`."""

        def line(tag: str, cells: Sequence[object]) -> str:
            pairs = zip(cells, self._left(), strict=True)
            classes = ((str(cell), ' class="l"' if left else "") for cell, left in pairs)
            return "<tr>" + "".join(f"<{tag}{name}>{escape(cell)}</{tag}>" for cell, name in classes) + "</tr>"

        words = "" if "r" in self.align else ' class="words"'
        title = f"<caption>{escape(self.title)}</caption>\n" if self.title else ""
        body = "\n".join(line("td", row) for row in self.rows)
        return f"<table{words}>\n{title}<thead>{line('th', self.head)}</thead>\n<tbody>\n{body}\n</tbody></table>\n"


def show(*parts: Table | str) -> None:
    """Tables and lines of text on standard output."""
    for part in parts:
        print(part.text() if isinstance(part, Table) else part)
