"""Packed micro-batches: rows side by side in one long row, without padding.

Labels and weights belong to the *predicting* position: the
first token of readout k is predicted at the end token of block k (at the last question token without blocks), every later
one at its predecessor. The loss never shifts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy
import torch

from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT, RowLayout, TokenCoordinates
from rim_dist.data.samples import Readout, Row, Span, TokenIds


@dataclass(frozen=True)
class Targets:
    """The supervised positions, `[targets]` each: `column` predicts `label`, whose loss has `weight`, in readout `block`.

    `opens_step` (boolean): the label is the first token of a step, which only memory can predict.
    """

    column: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor
    block: torch.Tensor
    opens_step: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        """The targets after `change` of every tensor."""
        return Targets(*(change(t) for t in (self.column, self.label, self.weight, self.block, self.opens_step)))

    def to(self, device: torch.device | str) -> Targets:
        return self.map(lambda t: t.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Packed rows: `input_ids` `[1, tokens]`, their layout and targets.

    Only a slice for one rank of a sequence group (`layout.exchange`) may end with padding. `order[i]`: index, among the rows
    given to `pack`, of segment i. `thoughts`: passes of continuous thoughts (the most over all ranks); None: the method has
    none.
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
        """Attended (query, key) pairs that this batch computes."""
        pairs = sum(span.pairs for span in self.layout.spans)
        return pairs / self.layout.exchange.ranks if self.layout.exchange is not None else pairs

    def rows_at(self, targets: torch.Tensor) -> list[int]:
        """Indices, among the rows given to `pack`, of the rows with any of the `targets` (boolean, `[targets]`)."""
        columns = self.targets.column[targets.to(self.targets.column.device)]
        return [self.order[i] for i in self.layout.queries.segment[0, columns].unique().tolist()]

    def without_weight(self) -> Batch:
        """The same tokens with weight 0."""
        return replace(self, targets=replace(self.targets, weight=torch.zeros_like(self.targets.weight)))

    def to(self, device: torch.device | str) -> Batch:
        input_ids = self.input_ids.to(device, non_blocking=True)
        return replace(self, input_ids=input_ids, layout=self.layout.to(device), targets=self.targets.to(device))


@functools.cache
def _block(block_ids: tuple[int, ...], size: int) -> numpy.ndarray:
    """A block of `size` tokens: the second of `block_ids` is repeated."""
    return numpy.array([block_ids[0], *[block_ids[1]] * (size - 2), block_ids[-1]])


class _Segment(NamedTuple):
    """Consecutive tokens of one kind in a packed row: a question, a block or a readout."""

    tokens: TokenIds
    sample: int
    kind: int
    block: int
    position: int  # of the first token


def pack(rows: Sequence[Row], block_ids: Sequence[int], bidirectional: bool = False, thoughts: int | None = None) -> Batch:
    """Pack rows into one. Rows of the same shape come side by side and share attention calls.

    Position ids of readout k start at q + k (M + 2), as if the text ended with block k. `block_ids`: one block, of the method's
    own size. `thoughts`: see `Batch`.
    """
    order = sorted(((row.span(), number) for number, row in enumerate(rows)), key=lambda pair: (pair[0].shape, pair[1]))
    segments: list[_Segment] = []
    spans: list[Span] = []
    columns: list[int] = []  # of every target
    start = 0
    for sample, (span, number) in enumerate(order):
        row = rows[number]
        question, size = len(row.question), row.block_size
        block = _block(tuple(block_ids), size)
        segments.append(_Segment(row.question, sample, QUESTION, 0, 0))
        segments += [_Segment(block, sample, MEMORY, k + 1, question + k * size) for k in range(row.blocks)]
        spans.append(replace(span, start=start))
        column = start + span.prefix  # of a readout's first token
        for readout in row.readouts:
            inputs = readout.target[:-1]
            segments.append(_Segment(inputs, sample, READOUT, readout.block, question + readout.block * size))
            columns += [start + question + readout.block * size - 1, *range(column, column + len(inputs))]
            column += len(inputs)
        start = column
    input_ids = torch.from_numpy(numpy.concatenate([s.tokens for s in segments]).astype(numpy.int64)).unsqueeze(0)
    coordinates = _coordinates(segments)
    layout = RowLayout(coordinates, coordinates, tuple(spans), bidirectional)
    targets = _targets([readout for _, number in order for readout in rows[number].readouts], columns)
    return Batch(input_ids, layout, targets, tuple(number for _, number in order), thoughts)


def _spread(values: Iterable[Any], counts: Sequence[int], dtype: type) -> torch.Tensor:
    """Each value as often as its count says."""
    return torch.from_numpy(numpy.repeat(numpy.array(list(values), dtype=dtype), counts))


def _coordinates(segments: Sequence[_Segment]) -> TokenCoordinates:
    lengths = [len(s.tokens) for s in segments]
    starts = numpy.cumsum(lengths) - lengths
    sample, kind, block, offset = (
        _spread(values, lengths, numpy.int64).unsqueeze(0)
        for values in (
            (s.sample for s in segments),
            (s.kind for s in segments),
            (s.block for s in segments),
            (s.position - start for s, start in zip(segments, starts, strict=True)),
        )
    )
    return TokenCoordinates(sample, kind, block, offset + torch.arange(offset.shape[1]))


def _targets(readouts: Sequence[Readout], columns: Sequence[int]) -> Targets:
    counts = [len(r.target) for r in readouts]
    opens_step = torch.zeros(len(columns), dtype=torch.bool)
    opens_step[numpy.cumsum(counts) - counts] = torch.tensor([r.is_step for r in readouts])
    return Targets(
        torch.from_numpy(numpy.array(columns)),
        torch.from_numpy(numpy.concatenate([r.target for r in readouts]).astype(numpy.int64)),
        _spread((r.weight for r in readouts), counts, numpy.float32),
        _spread((r.block for r in readouts), counts, numpy.int64),
        opens_step,
    )
