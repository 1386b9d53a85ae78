"""Where block states lie: principal components, and how much of their variance is the block, how much the question."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Components:
    """The first two principal axes of a set of states: `mean` `[hidden]`, `axes` `[2, hidden]`, `explained` shares `[2]`."""

    mean: torch.Tensor
    axes: torch.Tensor
    explained: list[float]

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]` to `[..., 2]`."""
        return (states.double() - self.mean) @ self.axes.T


def principal_components(states: torch.Tensor) -> Components:
    """Of states `[..., hidden]`. The largest entry of each axis is positive, so that equal states give equal pictures."""
    rows = states.double().flatten(0, -2)
    mean = rows.mean(dim=0)
    _, values, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    variance = values.square()
    return Components(mean, axes * largest.sign(), (variance[:2] / variance.sum()).tolist())


def variance_shares(states: torch.Tensor) -> dict[str, float]:
    """How the variance of `[questions, blocks, hidden]` divides: between blocks, between questions, and the rest of it.

    Two-way analysis of variance, summed over the hidden channels; the three shares sum to 1.
    """
    values = states.double()
    centre = values.mean(dim=(0, 1), keepdim=True)
    total = (values - centre).square().sum()
    blocks = (values.mean(dim=0, keepdim=True) - centre).square().sum() * values.shape[0] / total
    questions = (values.mean(dim=1, keepdim=True) - centre).square().sum() * values.shape[1] / total
    shares = {"blocks": float(blocks), "questions": float(questions)}
    return {**shares, "both": 1.0 - sum(shares.values())}
