"""Supervised fine-tuning without a chain of thought: the answer at once."""

from __future__ import annotations

from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods.base import Method, StageProgress


class Direct(Method):
    """Supervised fine-tuning without a chain of thought, in both stages."""

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:  # noqa: ARG002 - the same at every step
        return self.plain_row(sample.question, sample.answer)


METHOD = Direct
