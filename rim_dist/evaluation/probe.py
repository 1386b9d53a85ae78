"""A linear probe on block states that says how likely the answer after a block is right, and what it is good for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from rim_dist.errors import DataError
from rim_dist.evaluation.ranking import auprc, auroc

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the mean loss; states have unit variance
FOLDS = 5
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Probe:
    """Logistic regression on standardised states: `mean`, `scale`, `weight` `[hidden]`; `penalty` is the one chosen."""

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: float
    penalty: float

    def probabilities(self, states: torch.Tensor) -> torch.Tensor:
        """Chance that the answer read from each state is right: `[..., hidden]` to `[...]`, double precision."""
        return torch.sigmoid((states.double() - self.mean) / self.scale @ self.weight + self.bias)

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        numbers = {"bias": self.bias, "penalty": self.penalty}
        tensors = {"mean": self.mean, "scale": self.scale, "weight": self.weight}
        save_file(tensors, path, metadata={name: repr(value) for name, value in numbers.items()})


def _fit(states: torch.Tensor, right: torch.Tensor, penalty: float) -> tuple[torch.Tensor, float]:
    """Weight and bias that minimise mean cross-entropy + penalty / 2 |weight|^2: convex, so the start does not matter."""
    parameters = torch.zeros(states.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        weight, bias = parameters[:-1], parameters[-1]
        value = F.binary_cross_entropy_with_logits(states @ weight + bias, right.double()) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    fitted = parameters.detach()
    return fitted[:-1], float(fitted[-1])


def fit_probe(states: torch.Tensor, right: torch.Tensor) -> Probe:
    """Fit on `[questions, blocks, hidden]` and boolean `[questions, blocks]`: one probe for all blocks.

    The penalty is the one of `PENALTIES` with the least cross-entropy over `FOLDS` parts of the questions. Raises DataError if
    all answers are right, or all wrong, or there are fewer questions than parts.
    """
    if len(states) < FOLDS:
        raise DataError(f"the probe needs at least {FOLDS} questions to learn from, there are {len(states)}")
    if bool(right.all()) or not bool(right.any()):
        raise DataError(
            f"the probe has nothing to tell apart: {'all' if bool(right.any()) else 'none'} of its answers are right"
        )
    rows = states.double()
    mean, scale = rows.mean(dim=(0, 1)), rows.std(dim=(0, 1)).clamp_min(1e-6)
    rows = (rows - mean) / scale
    fold = torch.arange(len(rows)) % FOLDS

    def held_out_loss(penalty: float) -> float:
        total = 0.0
        for part in range(FOLDS):
            weight, bias = _fit(rows[fold != part].flatten(0, 1), right[fold != part].flatten(), penalty)
            logits = rows[fold == part] @ weight + bias
            total += float(F.binary_cross_entropy_with_logits(logits, right[fold == part].double(), reduction="sum"))
        return total

    penalty = min(PENALTIES, key=held_out_loss)
    weight, bias = _fit(rows.flatten(0, 1), right.flatten(), penalty)
    return Probe(mean, scale, weight, bias, penalty)


def halves(questions: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Questions split at random into those a probe learns from and those it is judged on."""
    order = torch.randperm(questions, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[: questions // 2]), sorted(order[questions // 2 :])


def chosen_blocks(probabilities: torch.Tensor) -> torch.Tensor:
    """The most promising block of each question, from 0: `[questions, blocks]` to `[questions]`; the later of equals."""
    blocks = probabilities.shape[1]
    return blocks - 1 - probabilities.flip(1).argmax(dim=1)


def exit_blocks(probabilities: torch.Tensor, confidence: float) -> torch.Tensor:
    """The first block, from 0, whose probability reaches `confidence`; the last one where none does."""
    reached = probabilities >= confidence
    reached[:, -1] = True
    return reached.int().argmax(dim=1)


def judge_probe(probabilities: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """The probe's figures on questions it did not learn from; both tensors `[questions, blocks]`.

    `selected`: accuracy of the answer after the block with the highest probability. `recoverable`: the same on the questions
    that at least one block answers right. `early_exit`: by confidence; `saved` is the share of blocks not run.
    """
    blocks = right.shape[1]

    def accuracy(block: torch.Tensor, rows: torch.Tensor) -> float | None:
        return float(right[rows].gather(1, block[rows].unsqueeze(1)).double().mean()) if bool(rows.any()) else None

    everything = torch.ones(len(right), dtype=torch.bool)
    selected, final = chosen_blocks(probabilities), torch.full((len(right),), blocks - 1)
    recoverable = right.any(dim=1)
    exits = {confidence: exit_blocks(probabilities, confidence) for confidence in CONFIDENCES}
    return {
        "questions": len(right),
        "share_right": float(right.double().mean()),
        "auroc": auroc(probabilities.flatten(), right.flatten()),
        "auprc": auprc(probabilities.flatten(), right.flatten()),
        "auroc_per_block": [auroc(probabilities[:, k], right[:, k]) for k in range(blocks)],
        "final_block": accuracy(final, everything),
        "any_block": float(recoverable.double().mean()),
        "selected": accuracy(selected, everything),
        "recoverable": {
            "questions": int(recoverable.sum()),
            "final_block": accuracy(final, recoverable),
            "selected": accuracy(selected, recoverable),
        },
        "early_exit": [
            {
                "confidence": confidence,
                "accuracy": accuracy(block, everything),
                "blocks": float(block.double().mean()) + 1,
                "saved": 1 - (float(block.double().mean()) + 1) / blocks,
            }
            for confidence, block in exits.items()
        ],
    }


def right_answers(answers: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Boolean `[questions, blocks]` from the answers of an evaluation."""
    return torch.tensor([answer["correct"] for answer in answers], dtype=torch.bool)
