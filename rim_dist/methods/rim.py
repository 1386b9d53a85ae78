"""Reasoning in Memory: blocks grounded in the steps (stage 1), then refined towards the answer (stage 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rim_dist.methods.base import Method, Moment
from rim_dist.objective.curriculum import stage1_weights, stage2_weights

if TYPE_CHECKING:
    from rim_dist.data.encoding import EncodedSample
    from rim_dist.data.rows import Row, TokenIds


class ReasoningInMemory(Method):
    """Reasoning in Memory (method.md, stages 1 and 2). With `samples: 0` for one of the stages: stage 1 or stage 2 only."""

    uses_blocks = True

    def row(self, sample: EncodedSample, moment: Moment) -> Row:
        curriculum = self.recipe.curriculum
        targets: list[TokenIds]
        weights: tuple[float, ...]
        if moment.stage == "stage1":
            steps = sample.steps[1:] if curriculum.stage1.targets == "next_step" else sample.steps
            targets = [*steps, sample.answer]
            weights = stage1_weights(len(targets), moment.share, curriculum.stage1.weights, curriculum.stage1.max_steps)
        else:
            targets = [sample.answer] * self.recipe.memory.blocks
            weights = stage2_weights(len(targets), curriculum.stage2.weight_power)
        readouts = ((k, t, w) for k, (t, w) in enumerate(zip(targets, weights, strict=True), 1))
        step_blocks = len(targets) - 1 if moment.stage == "stage1" else 0
        return self.block_row(sample.question, len(targets), readouts, step_blocks=step_blocks)


METHOD = ReasoningInMemory
