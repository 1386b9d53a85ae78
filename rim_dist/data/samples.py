"""What a sample is on its way: text, encoded, laid out as a row, and where the row's tokens stand. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

TokenIds = Sequence[int] | numpy.ndarray


@dataclass(frozen=True)
class Sample:
    """A question, the true intermediate steps and the final answer, all text."""

    question: str
    steps: tuple[str, ...]
    answer: str
    line: int


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used: its line (from 1) and why."""

    line: int
    reason: str
    detail: str = ""


SourceRow = Sample | BadSample


@dataclass(frozen=True)
class EncodedSample:
    """Token ids of one sample; steps and answer end with the end-of-text token. `line` is its line in the source."""

    question: TokenIds
    steps: Sequence[TokenIds]
    answer: TokenIds
    line: int


@dataclass(frozen=True)
class Span:
    """One sample of a packed row: question, blocks and readouts side by side from token `start` on.

    `readouts`: block and number of tokens of each readout that has tokens, blocks ascending.
    """

    start: int
    question: int
    blocks: int
    block_size: int
    readouts: tuple[tuple[int, int], ...]

    @property
    def prefix(self) -> int:
        """Tokens of question and memory."""
        return self.question + self.blocks * self.block_size

    @property
    def length(self) -> int:
        return self.prefix + sum(tokens for _, tokens in self.readouts)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What two samples share if the same attention calls serve both."""
        return (self.question, self.blocks, self.block_size, self.readouts)

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees, causal blocks."""
        pairs = self.prefix * (self.prefix + 1) // 2
        for block, tokens in self.readouts:
            pairs += tokens * (self.question + block * self.block_size) + tokens * (tokens + 1) // 2
        return pairs


@dataclass(frozen=True)
class Readout:
    """What is predicted after a block: `target` token ids (with the end-of-text token) at `weight` a token.

    `is_step`: the target is a step of the solution, not the answer.
    """

    block: int
    target: TokenIds
    weight: float
    is_step: bool = False


@dataclass(frozen=True)
class Row:
    """One sample as the model sees it: `question, m_1 .. m_blocks, r_1 .. r_n` (method.md, "Sequence").

    Readouts are ordered by block. A readout's last target token is predicted and never an input. `latent`: the row has one
    block, and what stands between its begin and its end are continuous thoughts (`rim_dist.objective.latent`).
    """

    question: TokenIds
    blocks: int
    block_size: int
    readouts: tuple[Readout, ...]
    latent: bool = False

    def __len__(self) -> int:
        return len(self.question) + self.blocks * self.block_size + sum(len(r.target) - 1 for r in self.readouts)

    @property
    def thoughts(self) -> int:
        """Continuous thoughts."""
        return self.block_size - 2 if self.latent else 0

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest plain sequence in the row, its last target included: what must fit the model's positions."""
        return len(self.question) + max(r.block * self.block_size + len(r.target) for r in self.readouts)

    @property
    def targets(self) -> int:
        """Supervised positions."""
        return sum(len(r.target) for r in self.readouts)

    @property
    def total_weight(self) -> float:
        return sum(len(r.target) * r.weight for r in self.readouts)

    def without_weight(self) -> Row:
        """The same row with weight 0: it keeps ranks in step without changing the loss."""
        return replace(self, readouts=tuple(replace(r, weight=0.0) for r in self.readouts))

    def span(self, start: int = 0) -> Span:
        """Where the row's tokens stand if it begins at token `start` of a packed row."""
        readouts = tuple((r.block, len(r.target) - 1) for r in self.readouts if len(r.target) > 1)
        return Span(start, len(self.question), self.blocks, self.block_size, readouts)
