"""A linear probe: from the state of a block, how likely the answer after it is right; and how well it predicts that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rim_dist.errors import DataError

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


def _logistic_regression(states: torch.Tensor, right: torch.Tensor, penalty: float) -> Any:
    """Fit on `[..., hidden]` and `[...]`: minimises mean cross-entropy + penalty / 2 |weight|^2."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (penalty * right.numel()), tol=1e-8, max_iter=1000)
    return model.fit(states.flatten(0, -2).numpy(), right.flatten().numpy())


def fit_probe(states: torch.Tensor, right: torch.Tensor) -> Probe:
    """Fit on `[questions, blocks, hidden]` and boolean `[questions, blocks]`: one probe for all blocks.

    The penalty is the one of `PENALTIES` with the least cross-entropy in cross-validation over `FOLDS` folds of the questions.
    Raises DataError if all answers are right, or all wrong, or there are fewer questions than folds.
    """
    from sklearn.metrics import log_loss

    if len(states) < FOLDS:
        raise DataError(f"the probe needs at least {FOLDS} questions to learn from, there are {len(states)}")
    if bool(right.all()) or not bool(right.any()):
        raise DataError(
            f"the probe has nothing to tell apart: {'all' if bool(right.any()) else 'none'} of its answers are right"
        )
    rows = states.double()
    mean, scale = rows.mean(dim=(0, 1)), rows.std(dim=(0, 1)).clamp_min(1e-6)
    rows = (rows - mean) / scale
    folds = torch.arange(len(rows)) % FOLDS

    def held_out_loss(penalty: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            held_out = folds == fold
            if len(right[~held_out].unique()) < 2:
                continue  # without this fold all answers are right, or all wrong: nothing to fit
            model = _logistic_regression(rows[~held_out], right[~held_out], penalty)
            predicted = model.predict_proba(rows[held_out].flatten(0, 1).numpy())
            total += log_loss(right[held_out].flatten().numpy(), predicted, normalize=False, labels=[False, True])
        return total

    penalty = min(PENALTIES, key=held_out_loss)
    model = _logistic_regression(rows, right, penalty)
    return Probe(mean, scale, torch.from_numpy(model.coef_[0].copy()), float(model.intercept_[0]), penalty)


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


def auroc(scores: torch.Tensor, right: torch.Tensor) -> float | None:
    """Chance that a right answer has a higher score than a wrong one, ties counting half; None if there are not both."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right.numpy(), scores.numpy())) if len(right.unique()) == 2 else None


def auprc(scores: torch.Tensor, right: torch.Tensor) -> float | None:
    """Average precision, without interpolation, equal scores as one step; None if no answer is right."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(right.numpy(), scores.numpy())) if bool(right.any()) else None


def judge_probe(probabilities: torch.Tensor, right: torch.Tensor) -> dict[str, Any]:
    """The probe's figures on questions it did not learn from; both tensors `[questions, blocks]`.

    `selected`: accuracy of the answer after the block with the highest probability. `recoverable`: the same on the questions
    that at least one block answers right. `early_exit`: by confidence; `saved` is the fraction of blocks not run.
    """
    blocks = right.shape[1]
    recoverable = right.any(dim=1)
    selected, final = chosen_blocks(probabilities), torch.full((len(right),), blocks - 1)

    def accuracy(block: torch.Tensor, rows: torch.Tensor | slice = slice(None)) -> float:
        return float(right[rows].gather(1, block[rows].unsqueeze(1)).double().mean())

    def early_exit(confidence: float) -> dict[str, float]:
        block = exit_blocks(probabilities, confidence)
        used = float(block.double().mean()) + 1
        return {"confidence": confidence, "accuracy": accuracy(block), "blocks": used, "saved": 1 - used / blocks}

    return {
        "questions": len(right),
        "share_right": float(right.double().mean()),
        "auroc": auroc(probabilities.flatten(), right.flatten()),
        "auprc": auprc(probabilities.flatten(), right.flatten()),
        "auroc_per_block": [auroc(probabilities[:, k], right[:, k]) for k in range(blocks)],
        "final_block": accuracy(final),
        "any_block": float(recoverable.double().mean()),
        "selected": accuracy(selected),
        "recoverable": {
            "questions": int(recoverable.sum()),
            "final_block": accuracy(final, recoverable) if recoverable.any() else None,
            "selected": accuracy(selected, recoverable) if recoverable.any() else None,
        },
        "early_exit": [early_exit(confidence) for confidence in CONFIDENCES],
    }
