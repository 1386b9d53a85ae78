"""From a sample's tokens to the row the model runs, and from rows to a batch.

Labels and weights stand at the *predicting* position: the first token of readout k is predicted at the end
token of block k (at the last question token without blocks), every later one at its predecessor. The
loss never shifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rim_dist.attention.visibility import MEMORY, PADDING_SEGMENT, QUESTION, READOUT, RowLayout

IGNORE = -100


@dataclass(frozen=True)
class Readout:
    """What is predicted after a block: `target` token ids (with the end-of-text token) at `weight` a token."""

    block: int
    target: list[int]
    weight: float


@dataclass
class Row:
    """One sample as the model sees it; all lists have one entry a token."""

    input_ids: list[int]
    kind: list[int]
    block: list[int]
    position: list[int]
    label: list[int]
    weight: list[float]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def total_weight(self) -> float:
        return sum(self.weight)

    def without_weight(self) -> Row:
        """The same row with weight 0: it keeps ranks in step without changing the loss."""
        return Row(self.input_ids, self.kind, self.block, self.position, self.label, [0.0] * len(self))


def build_row(question: Sequence[int], block_ids: Sequence[int], blocks: int, readouts: Sequence[Readout]) -> Row:
    """Lay out `question, m_1 .. m_blocks, r_1 .. r_n` (method.md, "Sequence").

    Position ids of readout k start at q + k (M + 2), where the text would stand if nothing followed block k. A readout's
    last target token is predicted and never an input.
    """
    q, size = len(question), len(block_ids)
    prefix = q + blocks * size
    input_ids = [*question, *(list(block_ids) * blocks)]
    kind = [QUESTION] * q + [MEMORY] * (blocks * size)
    block = [0] * q + [k for k in range(1, blocks + 1) for _ in range(size)]
    position = list(range(prefix))
    label = [IGNORE] * prefix
    weight = [0.0] * prefix
    for readout in readouts:
        start = q + readout.block * size
        target = readout.target
        label[start - 1], weight[start - 1] = target[0], readout.weight
        count = len(target) - 1
        input_ids += target[:-1]
        kind += [READOUT] * count
        block += [readout.block] * count
        position += range(start, start + count)
        label += target[1:]
        weight += [readout.weight] * count
    return Row(input_ids, kind, block, position, label, weight)


@dataclass
class Batch:
    """Rows side by side, padded on the right: tensors `[rows, seq]`."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: RowLayout
    labels: torch.Tensor
    weights: torch.Tensor
    tokens: int  # real tokens, padding not counted

    def to(self, device: torch.device | str) -> Batch:
        layout = RowLayout(*(getattr(self.layout, n).to(device) for n in ("segment", "kind", "block", "position")))
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            layout,
            self.labels.to(device),
            self.weights.to(device),
            self.tokens,
        )


def collate(rows: Sequence[Row]) -> Batch:
    """Pad rows to the longest. Padding is a segment of its own that no real token sees."""
    length = max(len(row) for row in rows)

    def pad(lists: Sequence[Sequence[float]], fill: float, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.tensor([[*values, *[fill] * (length - len(values))] for values in lists], dtype=dtype)

    position = pad([row.position for row in rows], 0)
    layout = RowLayout(
        segment=pad([[0] * len(row) for row in rows], PADDING_SEGMENT),
        kind=pad([row.kind for row in rows], QUESTION),
        block=pad([row.block for row in rows], 0),
        position=position,
    )
    return Batch(
        input_ids=pad([row.input_ids for row in rows], 0),
        position_ids=position,
        layout=layout,
        labels=pad([row.label for row in rows], IGNORE),
        weights=pad([row.weight for row in rows], 0.0, torch.float32),
        tokens=sum(len(row) for row in rows),
    )
