"""The learning rate of a stage as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from rim_dist.config import StageSection


def learning_rate(stage: StageSection, step: int, steps: int) -> float:
    """Rate of the `step`-th (from 0) of a stage's `steps` optimizer steps: linear warm-up, then the schedule.

    Warm-up takes round(warmup_fraction x steps) steps; its first step already moves. Cosine and linear end just
    above 0 at the last step.
    """
    warmup = round(stage.warmup_fraction * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    if stage.schedule == "cosine":
        return stage.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))
    if stage.schedule == "linear":
        return stage.learning_rate * (1.0 - share)
    return stage.learning_rate
