"""How much each stage of RiM asks of each block (method.md, stages 1 and 2)."""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=64)
def stage1_weights(targets: int, share: float, schedule: str, max_steps: int) -> tuple[float, ...]:
    """lambda_t for t = 1 .. `targets` at `share` u in [0, 1) of the stage; the answer (the last) always weighs 1.

    `relative`: max(0, 1 - u T / t); `absolute`: the same with `max_steps` for T; `constant`: 1. The paper's exact
    formula is open; earliest steps fade first, relative to the sample's own T (method.md, "Stage 1").
    """
    if schedule == "constant":
        return (1.0,) * targets
    horizon = targets if schedule == "relative" else max(max_steps, targets)
    return (*(max(0.0, 1.0 - share * horizon / t) for t in range(1, targets)), 1.0)


@functools.lru_cache(maxsize=64)
def stage2_weights(blocks: int, power: float) -> tuple[float, ...]:
    """alpha_k = k^power / sum of j^power for k = 1 .. K; power 1 is the paper's 2k / (K (K + 1)). They add up to 1."""
    parts = [k**power for k in range(1, blocks + 1)]
    return tuple(part / sum(parts) for part in parts)
