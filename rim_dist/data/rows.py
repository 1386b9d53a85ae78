"""From a sample's tokens to the row the model runs, and from rows to a packed batch.

Rows stand one after the other in one long row without padding. Labels and weights belong to the *predicting* position: the
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
def _block(block_ids: tuple[int, ...], size: int) -> numpy.ndarray:
    return numpy.array([block_ids[0], *[block_ids[1]] * (size - 2), block_ids[-1]], dtype=numpy.int64)


class _Piece(NamedTuple):
    """A question, a block, or the tokens of a readout: what stands side by side in a packed row."""

    tokens: TokenIds
    kind: int
    block: int
    position: int  # of the first token
    segment: int


class _TargetRun(NamedTuple):
    """A readout's labels: the column that predicts the first of them, and that of its first own token."""

    readout: Readout
    anchor: int
    column: int


def pack(rows: Sequence[Row], block_ids: Sequence[int], bidirectional: bool = False, thoughts: int | None = None) -> Batch:
    """One packed row of all rows, those of the same shape side by side so that they share attention calls.

    Position ids of readout k start at q + k (M + 2), where the text would stand if nothing followed block k. `block_ids`: one
    block of the method's own size. `thoughts`: see `Batch`.
    """
    pieces: list[_Piece] = []
    targets: list[_TargetRun] = []
    spans: list[Span] = []
    placed = sorted(((row.span(), number) for number, row in enumerate(rows)), key=lambda pair: (pair[0].shape, pair[1]))
    start = 0
    for segment, (span, number) in enumerate(placed):
        spans.append(replace(span, start=start))
        pieces += _pieces_of(rows[number], segment, tuple(block_ids))
        targets += _targets_of(rows[number], start)
        start += span.length
    input_ids = torch.from_numpy(numpy.concatenate([piece.tokens for piece in pieces]).astype(numpy.int64)).unsqueeze(0)
    places = _places(pieces)
    layout = RowLayout(places, places, tuple(spans), bidirectional)
    return Batch(input_ids, layout, _all_targets(targets), tuple(number for _, number in placed), thoughts)


def _pieces_of(row: Row, segment: int, block_ids: tuple[int, ...]) -> list[_Piece]:
    question, size = len(row.question), row.block_size
    pieces = [_Piece(row.question, QUESTION, 0, 0, segment)]
    block = _block(block_ids, size)
    pieces += [_Piece(block, MEMORY, k + 1, question + k * size, segment) for k in range(row.blocks)]
    pieces += [_Piece(r.target[:-1], READOUT, r.block, question + r.block * size, segment) for r in row.readouts]
    return pieces


def _targets_of(row: Row, start: int) -> list[_TargetRun]:
    """`start`: column of the row's first token."""
    column = start + len(row.question) + row.blocks * row.block_size
    runs = []
    for readout in row.readouts:
        runs.append(_TargetRun(readout, start + len(row.question) + readout.block * row.block_size - 1, column))
        column += len(readout.target) - 1
    return runs


def _places(pieces: Sequence[_Piece]) -> TokenCoordinates:
    lengths = numpy.array([len(piece.tokens) for piece in pieces], dtype=numpy.int64)
    firsts = numpy.cumsum(lengths) - lengths

    def spread(values: Iterable[int]) -> torch.Tensor:
        return torch.from_numpy(numpy.repeat(numpy.array(list(values), dtype=numpy.int64), lengths)).unsqueeze(0)

    offsets = spread(piece.position for piece in pieces) - spread(firsts)
    position = offsets + torch.arange(int(lengths.sum())).unsqueeze(0)
    return TokenCoordinates(
        spread(p.segment for p in pieces), spread(p.kind for p in pieces), spread(p.block for p in pieces), position
    )


def _all_targets(runs: Sequence[_TargetRun]) -> Targets:
    counts = numpy.array([len(run.readout.target) for run in runs], dtype=numpy.int64)
    firsts = numpy.cumsum(counts) - counts

    def spread(values: Iterable[Any], dtype: Any) -> numpy.ndarray:
        return numpy.repeat(numpy.array(list(values), dtype=dtype), counts)

    # Target j of a readout is predicted one column before the column of its j-th own token; the first at the anchor.
    column = (
        numpy.arange(int(counts.sum())) + spread((run.column for run in runs), numpy.int64) - 1 - numpy.repeat(firsts, counts)
    )
    column[firsts] = [run.anchor for run in runs]
    opens_step = numpy.zeros(len(column), dtype=bool)
    opens_step[firsts] = [run.readout.is_step for run in runs]
    return Targets(
        torch.from_numpy(column),
        torch.from_numpy(numpy.concatenate([run.readout.target for run in runs]).astype(numpy.int64)),
        torch.from_numpy(spread((run.readout.weight for run in runs), numpy.float32)),
        torch.from_numpy(spread((run.readout.block for run in runs), numpy.int64)),
        torch.from_numpy(opens_step),
    )
