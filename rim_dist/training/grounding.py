"""Warnings: a block has not learned its steps before they fade out; a run on the embedded task has learned nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable

from rim_dist.data.rows import Targets
from rim_dist.data.synthetic import GUESSING
from rim_dist.metrics import MetricLine

LEARNING_PAGE = "docs/learning.md"

_NOT_LEARNED = 0.7  # of the loss of guessing: above it a block's steps count as not learned
_LEARNED = 0.25  # of the way from guessing to always right: below it the embedded task counts as not learned
_FADED = 0.5  # of the readouts that the block had in the first steps of the stage
_WINDOW = 20  # optimizer steps


class GroundingWatch:
    """Watches the loss of the first token of every step during a stage (first rank only).

    A block predicts this token from memory alone; later tokens can follow from earlier ones. Guessing means to draw the token
    with the frequencies seen at the block: its loss is their entropy.
    """

    def __init__(self) -> None:
        self._begin(None)

    def _begin(self, stage: str | None) -> None:
        self._stage = stage
        self._seen: defaultdict[int, Counter[int]] = defaultdict(Counter)  # by block: first tokens
        self._first: Counter[int] = Counter()  # by block: readouts in the first _WINDOW steps
        self._recent: deque[dict[int, tuple[float, int]]] = deque(maxlen=_WINDOW)  # by block: mean loss, readouts
        self._steps = 0
        self._judged: set[int] = set()

    def observe(self, line: MetricLine, targets: Iterable[Targets] = ()) -> list[str]:
        """Warnings after an optimizer step, at most one a block: its steps fade out and are not learned.

        `line`: the step's metrics. `targets`: of this rank's micro-batches; the metrics read back after a resume have none.
        """
        if line["stage"] != self._stage:
            self._begin(line["stage"])
        pairs = enumerate(zip(line["step_loss"], line["step_readouts"], strict=True), 1)
        self._recent.append({block: (loss, count) for block, (loss, count) in pairs if count})
        self._steps += 1
        for some in targets:
            opening = some.opens_step & (some.weight > 0)
            for block, label in zip(some.block[opening].tolist(), some.label[opening].tolist(), strict=True):
                self._seen[block][label] += 1
        if self._steps <= _WINDOW:
            self._first.update({block: count for block, (_, count) in self._recent[-1].items()})
        return [] if self._steps < _WINDOW else [text for block in self._fading() if (text := self._judge(block))]

    def _fading(self) -> list[int]:
        """Blocks that have lost half of their step readouts and were not judged before."""
        now: Counter[int] = Counter()
        for step in self._recent:
            now.update({block: count for block, (_, count) in step.items()})
        return [b for b in self._first if b not in self._judged and 0 < now[b] <= _FADED * self._first[b]]

    def _judge(self, block: int) -> str | None:
        self._judged.add(block)
        found = [step[block] for step in self._recent if block in step]
        loss = sum(mean * count for mean, count in found) / sum(count for _, count in found)
        seen = self._seen[block]
        guessing = -sum(n / seen.total() * math.log(n / seen.total()) for n in seen.values())
        if loss <= _NOT_LEARNED * guessing or not seen:
            return None
        return (
            f"warning: block {block} is fading out and has not learned its steps: their first token has a loss of {loss:.2f}, "
            f"guessing it {guessing:.2f}. Later blocks build on it; {LEARNING_PAGE} says what to look at"
        )


def near_guessing(accuracy: float) -> bool:
    """Whether an accuracy on the embedded task shows that nothing was learned."""
    return accuracy < GUESSING + _LEARNED * (1 - GUESSING)


def not_learned(method: str, accuracy: float) -> str:
    """The warning at the end of a run that is near guessing on the embedded task."""
    name = "RiM" if method == "rim" else f"method {method}"
    return (
        f"{name} did not learn: {100 * accuracy:.1f} % right after the last block, guessing gets {100 * GUESSING:.0f} %. "
        f"Look at the token loss by block in report/curves.png and at the base model's own accuracy; {LEARNING_PAGE} says more"
    )
