"""How well scores rank right above wrong: exact areas under the ROC and the precision-recall curve."""

from __future__ import annotations

import torch


def auroc(scores: torch.Tensor, right: torch.Tensor) -> float | None:
    """Chance that a right one has a higher score than a wrong one, ties counting half; None if there are not both.

    The Mann-Whitney statistic by mean ranks. `scores` and boolean `right` of one length.
    """
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        return None
    _, inverse, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse]  # the mean rank of equal scores, from 1
    above = float(ranks[right].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def auprc(scores: torch.Tensor, right: torch.Tensor) -> float | None:
    """Average precision: precision at each distinct score, weighted by the recall it adds; None if none is right.

    Without interpolation, equal scores as one step.
    """
    positives = int(right.sum())
    if not positives:
        return None
    values, inverse = torch.unique(scores.double(), return_inverse=True)
    found = torch.zeros(len(values), dtype=torch.float64).index_add_(0, inverse, right.double()).flip(0)
    taken = torch.bincount(inverse, minlength=len(values)).double().flip(0)
    precision = found.cumsum(0) / taken.cumsum(0)
    return float((precision * found).sum() / positives)
