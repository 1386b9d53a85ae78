"""Progress for a person: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rim_dist.messages import say
from rim_dist.metrics import MetricLine, progress_texts


def _span(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe(line: MetricLine, total_steps: int, remaining_seconds: float) -> str:
    """One line of text for a step's metrics."""
    texts = [f"{line['stage']} step {line['step']}/{total_steps}", *progress_texts(line), f"ETA {_span(remaining_seconds)}"]
    return "  ".join(texts)


class ProgressReport:
    """Shows steps as they are done (first rank only)."""

    def __init__(self, total_steps: int, first_step: int, every_steps: int) -> None:
        self._total, self._first, self._every = total_steps, first_step, every_steps
        self._start = time.monotonic()
        self._live: Progress | None = None
        if sys.stderr.isatty():
            self._live = Progress(
                BarColumn(bar_width=20), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
            )
            self._live.start()
            self._task = self._live.add_task("starting", total=total_steps, completed=first_step)

    def step(self, line: MetricLine) -> None:
        done = line["step"]
        seconds = (time.monotonic() - self._start) / max(1, done - self._first) * (self._total - done)
        if self._live is not None:
            self._live.update(self._task, completed=done, description=describe(line, self._total, seconds))
        elif done % self._every == 0 or done == self._total or done == self._first + 1:
            self.say(describe(line, self._total, seconds))

    def say(self, text: str) -> None:
        """A lasting line."""
        if self._live is not None:
            self._live.console.print(text, highlight=False)
        else:
            say(text)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
