"""What each stage asks of each block, and how much it weighs (method.md, stages 1 and 2)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from rim_dist.config import CurriculumSection, Method, StageName
from rim_dist.data.rows import Readout, Row, TokenIds


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


def sample_row(
    method: Method,
    stage: StageName,
    curriculum: CurriculumSection,
    blocks: int,
    block_size: int,
    question: TokenIds,
    steps: Sequence[TokenIds],
    answer: TokenIds,
    share: float,
) -> Row:
    """The row of one sample. `steps` and `answer` are token ids of the targets, each with the end-of-text token.

    `share` is the part of the stage's samples already consumed, constant within an optimizer step. `direct` predicts the
    answer at once, `cot` the steps and the answer as one text; both without blocks.
    """
    if method == "direct":
        return Row(question, 0, block_size, (Readout(0, answer, 1.0),))
    if method == "cot":
        chain = [token for step in steps for token in step[:-1]]
        return Row(question, 0, block_size, (Readout(0, [*chain, *answer], 1.0),))
    if stage == "stage1":
        targets = [*steps[1:], answer] if curriculum.stage1.targets == "next_step" else [*steps, answer]
        weights = stage1_weights(len(targets), share, curriculum.stage1.weights, curriculum.stage1.max_steps)
    else:
        targets = [answer] * blocks
        weights = stage2_weights(blocks, curriculum.stage2.weight_power)
    # A readout of weight 0 has no part in the loss: leaving it out changes nothing but the work.
    readouts = tuple(
        Readout(k, target, weight) for k, (target, weight) in enumerate(zip(targets, weights, strict=True), 1) if weight
    )
    return Row(question, len(targets), block_size, readouts)


def longest_sequence(
    method: Method,
    curriculum: CurriculumSection,
    blocks: int,
    block_size: int,
    question: int,
    steps: Sequence[int],
    answer: int,
) -> int:
    """Tokens of the longest plain sequence a sample becomes in any stage (lengths in, length out).

    This is what must fit the model's positions: a packed row's position ids never go beyond it.
    """
    if method == "direct":
        return question + answer
    if method == "cot":
        return question + sum(n - 1 for n in steps) + answer
    longest = 0
    if curriculum.stage1.enabled:
        targets = [*steps[1:], answer] if curriculum.stage1.targets == "next_step" else [*steps, answer]
        longest = max(question + k * block_size + target for k, target in enumerate(targets, 1))
    if curriculum.stage2.enabled:
        longest = max(longest, question + blocks * block_size + answer)
    return longest


def longest_row(
    method: Method,
    curriculum: CurriculumSection,
    blocks: int,
    block_size: int,
    question: int,
    steps: Sequence[int],
    answer: int,
) -> int:
    """Tokens of the longest row a sample becomes in any stage (lengths in, length out), which one micro-batch must hold."""
    if method != "rim":
        return longest_sequence(method, curriculum, blocks, block_size, question, steps, answer) - 1
    longest = 0
    if curriculum.stage1.enabled:
        targets = [*steps[1:], answer] if curriculum.stage1.targets == "next_step" else [*steps, answer]
        longest = question + sum(block_size + target - 1 for target in targets)
    if curriculum.stage2.enabled:
        longest = max(longest, question + blocks * (block_size + answer - 1))
    return longest
