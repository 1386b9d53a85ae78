"""The learning rate as a pure function of stage and step: it has no state to save."""

from __future__ import annotations

import math

from rim_dist.config import StageSection


def learning_rate(stage: StageSection, step: int, steps: int) -> float:
    """Rate of the `step`-th (from 0) of a stage's `steps` optimizer steps: linear warm-up, then the schedule.

    Warm-up takes round(warmup_fraction x steps) steps, the first of which has a rate above 0. So has the last step of cosine
    and linear.
    """
    warmup = round(stage.warmup_fraction * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    fraction = (step - warmup) / max(1, steps - warmup)
    if stage.schedule == "cosine":
        return stage.learning_rate * 0.5 * (1.0 + math.cos(math.pi * fraction))
    if stage.schedule == "linear":
        return stage.learning_rate * (1.0 - fraction)
    return stage.learning_rate
