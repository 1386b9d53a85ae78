"""Reasoning in Memory: blocks grounded in the steps (stage 1), then refined towards the answer (stage 2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rim_dist.data.samples import EncodedSample, Row, TokenIds
from rim_dist.methods.base import Method, StageProgress


@functools.lru_cache(maxsize=64)
def stage1_weights(targets: int, fraction: float, schedule: str, max_steps: int) -> tuple[float, ...]:
    """lambda_t for t = 1 .. `targets` at fraction u in [0, 1) of the stage; the answer (the last) always weighs 1.

    `relative`: max(0, 1 - u T / t); `absolute`: the same with `max_steps` for T; `constant`: 1. The paper's exact
    formula is open; earliest steps fade first, relative to the sample's own T (method.md, "Stage 1").
    """
    if schedule == "constant":
        return (1.0,) * targets
    horizon = targets if schedule == "relative" else max(max_steps, targets)
    return (*(max(0.0, 1.0 - fraction * horizon / t) for t in range(1, targets)), 1.0)


@functools.lru_cache(maxsize=64)
def stage2_weights(blocks: int, power: float) -> tuple[float, ...]:
    """alpha_k = k^power / sum of j^power for k = 1 .. K; power 1 is the paper's 2k / (K (K + 1)). They add up to 1."""
    powers = [k**power for k in range(1, blocks + 1)]
    return tuple(p / sum(powers) for p in powers)


class ReasoningInMemory(Method):
    """Reasoning in Memory (method.md, stages 1 and 2). With `samples: 0` for one of the stages: stage 1 or stage 2 only."""

    uses_blocks = True

    @property
    def learns_steps(self) -> bool:
        return self.recipe.curriculum.stage1.enabled

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:
        steps: Sequence[TokenIds] = []
        if progress.stage == "stage1":
            section = self.recipe.curriculum.stage1
            steps = sample.steps[1:] if section.targets == "next_step" else sample.steps
            targets = [*steps, sample.answer]
            weights = stage1_weights(len(targets), progress.fraction, section.weights, section.max_steps)
        else:
            targets = [sample.answer] * self.recipe.memory.blocks
            weights = stage2_weights(len(targets), self.recipe.curriculum.stage2.weight_power)
        readouts = zip(range(1, len(targets) + 1), targets, weights, strict=True)
        return self.block_row(sample.question, len(targets), readouts, step_blocks=len(steps))


METHOD = ReasoningInMemory
