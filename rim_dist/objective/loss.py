"""The loss: weighted cross-entropy summed over supervised positions, divided once for the whole step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from rim_dist.data.rows import IGNORE, Batch


@dataclass
class ReadoutLoss:
    """Sums of one micro-batch.

    `weighted_sum` (scalar, with gradient): sum of weight x token loss. `block_sums`, `block_counts` (`[blocks + 1]`, no
    gradient): unweighted token losses and their number by block; block 0 is a target without blocks.
    """

    weighted_sum: torch.Tensor
    block_sums: torch.Tensor
    block_counts: torch.Tensor


def supervised_columns(batch: Batch) -> torch.Tensor:
    """Columns in which any row of the batch has a target, ascending."""
    return (batch.labels != IGNORE).any(dim=0).nonzero().flatten()


def readout_loss(logits: torch.Tensor, batch: Batch, columns: torch.Tensor, blocks: int) -> ReadoutLoss:
    """Loss from `logits` `[rows, len(columns), vocabulary]` at the supervised columns of a batch. In fp32."""
    labels = batch.labels[:, columns]
    chosen = labels != IGNORE
    token_loss = F.cross_entropy(logits[chosen].float(), labels[chosen], reduction="none")
    block = batch.layout.block[:, columns][chosen]
    sums = torch.zeros(blocks + 1, dtype=torch.float32, device=logits.device)
    counts = torch.zeros_like(sums)
    with torch.no_grad():
        sums.index_add_(0, block, token_loss.detach())
        counts.index_add_(0, block, torch.ones_like(token_loss))
    return ReadoutLoss((token_loss * batch.weights[:, columns][chosen]).sum(), sums, counts)
