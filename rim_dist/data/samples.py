"""The forms of a sample: text, token ids, a row, and the row's position in a packed row. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy

TokenIds = Sequence[int] | numpy.ndarray


@dataclass(frozen=True)
class Sample:
    """A question, the true intermediate steps and the final answer, all text.

    `lacks_steps`: its row has no column of steps, and which it has, as text; empty where steps are not looked for in a column.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    line: int
    lacks_steps: str = field(default="", compare=False)


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used: its line (from 1) and why. `hint`: what may help."""

    line: int
    reason: str
    detail: str = ""
    hint: str = field(default="", compare=False)

    @property
    def remark(self) -> str:
        """The detail in brackets and the hint, to follow the reason in a message."""
        return (f" ({self.detail})" if self.detail else "") + (f"; {self.hint}" if self.hint else "")


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
    """One sample in a packed row: question, blocks and readouts, one after the other from token `start` on.

    `readouts`: (block, tokens) of each readout that has tokens, blocks ascending.
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
        """Samples of equal shape can share attention calls."""
        return (self.question, self.blocks, self.block_size, self.readouts)

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs if blocks are causal."""
        pairs = self.prefix * (self.prefix + 1) // 2
        for block, tokens in self.readouts:
            pairs += tokens * (self.question + block * self.block_size) + tokens * (tokens + 1) // 2
        return pairs


@dataclass(frozen=True)
class Readout:
    """What is predicted after a block: `target` token ids (with the end-of-text token), whose losses have `weight` each.

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
    block, with continuous thoughts between its begin and end tokens (`rim_dist.objective.latent`).
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
        """Tokens of the longest unrolled run, its last target included. They must fit the model's positions."""
        return len(self.question) + max(r.block * self.block_size + len(r.target) for r in self.readouts)

    @property
    def targets(self) -> int:
        """Supervised positions."""
        return sum(len(r.target) for r in self.readouts)

    @property
    def total_weight(self) -> float:
        return sum(len(r.target) * r.weight for r in self.readouts)

    def without_weight(self) -> Row:
        """A dummy row: the same tokens with weight 0."""
        return replace(self, readouts=tuple(replace(r, weight=0.0) for r in self.readouts))

    def span(self, start: int = 0) -> Span:
        """The row's span in a packed row, from token `start` on."""
        readouts = tuple((r.block, len(r.target) - 1) for r in self.readouts if len(r.target) > 1)
        return Span(start, len(self.question), self.blocks, self.block_size, readouts)
