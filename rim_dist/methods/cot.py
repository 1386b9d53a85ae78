"""Supervised fine-tuning with a chain of thought: steps and answer as one text."""

from __future__ import annotations

from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods.base import Method, StageProgress, chain_of


class ChainOfThought(Method):
    """Supervised fine-tuning with a chain of thought, in both stages."""

    answer_factor = 16

    def check(self) -> None:
        self.need_answer_mark()

    @property
    def learns_steps(self) -> bool:
        return True

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:  # noqa: ARG002 - the same at every step
        return self.plain_row(sample.question, chain_of(sample.steps, sample.answer))


METHOD = ChainOfThought
