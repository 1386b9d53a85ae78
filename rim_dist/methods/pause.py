"""Pause tokens: RiM's blocks without any grounding, the answer after the last one."""

from __future__ import annotations

from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods.base import Method, StageProgress


class Pause(Method):
    """Pause tokens (Goyal et al. 2023, arXiv 2310.02226): as many extra tokens as RiM has at inference, never supervised before
    the answer, in both stages."""

    uses_blocks = True

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:  # noqa: ARG002 - the same at every step
        blocks = self.recipe.memory.blocks
        return self.block_row(sample.question, blocks, [(blocks, sample.answer, 1.0)])


METHOD = Pause
