"""From a sample's tokens to the row the model runs, and from rows to a packed batch.

Rows stand one after the other in one long row without padding. Labels and weights belong to the *predicting* position: the
first token of readout k is predicted at the end token of block k (at the last question token without blocks), every later
one at its predecessor. The loss never shifts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch

from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT, Places, RowLayout
from rim_dist.data.samples import Row, Span


@dataclass(frozen=True)
class Targets:
    """What the loss is computed from, `[targets]` each: `column` predicts `label` at `weight`, for readout `block`.

    `opens_step` (boolean): the label is the first token of a step, which only memory can tell.
    """

    column: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    block: torch.Tensor
    opens_step: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        """The targets with every tensor changed alike."""
        return Targets(*(change(t) for t in (self.column, self.label, self.weight, self.block, self.opens_step)))

    def to(self, device: torch.device | str) -> Targets:
        return self.map(lambda t: t.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Packed rows: `input_ids` `[1, tokens]`, their places and their targets. Nothing is padding, but at the end of a row
    that several ranks share (`layout.share`), of which this is a part.

    `order[i]` is the number, in what was packed, of the row that is segment i. `thoughts`: passes of continuous thoughts (the
    most that any rank's rows need in this step); None: rows without any.
    """

    input_ids: torch.Tensor
    layout: RowLayout
    targets: Targets
    order: tuple[int, ...]
    thoughts: int | None = None

    @property
    def position_ids(self) -> torch.Tensor:
        return self.layout.queries.position

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key it sees that this batch computes."""
        pairs = sum(span.pairs for span in self.layout.spans)
        return pairs / self.layout.share.ranks if self.layout.share is not None else pairs

    def rows_at(self, targets: torch.Tensor) -> list[int]:
        """Numbers, in what was packed, of the rows with any of the `targets` (boolean, `[targets]`)."""
        columns = self.targets.column[targets.to(self.targets.column.device)]
        return [self.order[i] for i in self.layout.queries.segment[0, columns].unique().tolist()]

    def without_weight(self) -> Batch:
        """The same tokens, whose loss does not count."""
        return replace(self, targets=replace(self.targets, weight=torch.zeros_like(self.targets.weight)))

    def to(self, device: torch.device | str) -> Batch:
        input_ids = self.input_ids.to(device, non_blocking=True)
        return replace(self, input_ids=input_ids, layout=self.layout.to(device), targets=self.targets.to(device))


@functools.cache
def _memory(block_ids: tuple[int, ...], blocks: int, size: int) -> numpy.ndarray:
    block = [block_ids[0], *[block_ids[1]] * (size - 2), block_ids[-1]]
    return numpy.tile(numpy.array(block, dtype=numpy.int64), blocks)


def pack(rows: Sequence[Row], block_ids: Sequence[int], bidirectional: bool = False, thoughts: int | None = None) -> Batch:
    """One packed row of all rows, those of the same shape side by side so that they share attention calls.

    Position ids of readout k start at q + k (M + 2), where the text would stand if nothing followed block k. `block_ids`: one
    block of the method's own size. `thoughts`: see `Batch`.
    """
    ids = tuple(block_ids)
    tokens: list[Any] = []
    labels: list[Any] = []
    # A piece is a question, a block or a readout: its kind, block, first position, length and sample.
    kinds: list[int] = []
    blocks: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    segments: list[int] = []
    spans: list[Span] = []
    # A target is a readout: the column that predicts its first token, the first column of its own, its length.
    anchors: list[int] = []
    columns: list[int] = []
    counts: list[int] = []
    target_blocks: list[int] = []
    weights: list[float] = []
    steps: list[bool] = []
    start = 0
    placed = sorted(((row.span(), number) for number, row in enumerate(rows)), key=lambda pair: (pair[0].shape, pair[1]))
    for segment, (span, number) in enumerate(placed):
        row = rows[number]
        question, size = span.question, span.block_size
        spans.append(replace(span, start=start))
        tokens += (row.question, _memory(ids, row.blocks, size))
        kinds += [QUESTION, *[MEMORY] * row.blocks]
        blocks += range(row.blocks + 1)
        positions += [0, *range(question, question + row.blocks * size, size)]
        lengths += [question, *[size] * row.blocks]
        column = start + span.prefix
        for readout in row.readouts:
            count = len(readout.target)
            end = question + readout.block * size
            tokens.append(readout.target[:-1])
            kinds.append(READOUT)
            blocks.append(readout.block)
            positions.append(end)
            lengths.append(count - 1)
            labels.append(readout.target)
            anchors.append(start + end - 1)
            columns.append(column)
            counts.append(count)
            target_blocks.append(readout.block)
            weights.append(readout.weight)
            steps.append(readout.is_step)
            column += count - 1
        segments += [segment] * (1 + row.blocks + len(row.readouts))
        start = column

    def spread(values: list[int], times: numpy.ndarray) -> torch.Tensor:
        return torch.from_numpy(numpy.repeat(numpy.array(values, dtype=numpy.int64), times))

    times = numpy.array(lengths, dtype=numpy.int64)
    firsts = numpy.cumsum(times) - times
    offsets = numpy.array(positions, dtype=numpy.int64) - firsts
    position = torch.from_numpy(numpy.arange(start) + numpy.repeat(offsets, times))
    segment_of, kind_of, block_of = (spread(values, times).unsqueeze(0) for values in (segments, kinds, blocks))
    places = Places(segment_of, kind_of, block_of, position.unsqueeze(0))

    repeats = numpy.array(counts, dtype=numpy.int64)
    target_firsts = numpy.cumsum(repeats) - repeats
    # Target j of a readout is predicted one column before the column of its j-th own token; the first at the anchor.
    column_of = numpy.arange(int(repeats.sum())) + numpy.repeat(
        numpy.array(columns, dtype=numpy.int64) - 1 - target_firsts, repeats
    )
    column_of[target_firsts] = anchors
    opens_step = torch.zeros(len(column_of), dtype=torch.bool)
    opens_step[target_firsts] = torch.tensor(steps, dtype=torch.bool)
    targets = Targets(
        torch.from_numpy(column_of),
        torch.from_numpy(numpy.concatenate(labels).astype(numpy.int64)),
        torch.from_numpy(numpy.repeat(numpy.array(weights, dtype=numpy.float32), repeats)),
        spread(target_blocks, repeats),
        opens_step,
    )
    input_ids = torch.from_numpy(numpy.concatenate(tokens).astype(numpy.int64)).unsqueeze(0)
    layout = RowLayout(places, places, tuple(spans), bidirectional)
    return Batch(input_ids, layout, targets, tuple(number for _, number in placed), thoughts)
