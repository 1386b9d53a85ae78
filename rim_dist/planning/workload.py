"""What a rank runs in one micro-batch: rows of one sample each, as `rim_dist.data.rows.Row` lays them out."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """`samples` equal rows (with a fraction: on average): `question` tokens, `blocks` blocks of `memory` tokens between begin
    and end, a readout of `target` tokens (end-of-text included) after each. Without blocks the one target follows the question.

    `one_readout`: after the last block only. `rounds`: micro-batches of a rank in an optimizer step. `alike`: all rows are of
    exactly this shape and share masks; real ones are not.
    """

    question: int
    blocks: int
    memory: int
    target: int
    samples: float = 1
    rounds: int = 1
    one_readout: bool = False
    alike: bool = False

    @property
    def readouts(self) -> int:
        return 1 if self.one_readout else max(1, self.blocks)

    @property
    def block(self) -> int:
        """Tokens of a block with its begin and end."""
        return self.memory + 2

    @property
    def prefix(self) -> int:
        return self.question + self.blocks * self.block

    @property
    def readout_tokens(self) -> int:
        """Tokens of the readouts in a row; the last token of a target is predicted and never an input."""
        return self.readouts * (self.target - 1)

    @property
    def row(self) -> int:
        """Tokens of one row."""
        return self.prefix + self.readout_tokens

    @property
    def tokens(self) -> int:
        return math.ceil(self.samples * self.row)

    @property
    def targets(self) -> int:
        """Supervised positions of the micro-batch."""
        return math.ceil(self.samples * self.readouts * self.target)

    @property
    def positions(self) -> int:
        """Longest sequence a server would run: what must fit the model's positions."""
        return self.prefix + self.target

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key it sees, of one row (`rim_dist.attention.visibility.Span.pairs`)."""
        pairs = self.prefix * (self.prefix + 1) // 2
        own = self.target - 1
        blocks_seen = self.blocks if self.one_readout else self.blocks * (self.blocks + 1) // 2
        seen = self.readouts * self.question + self.block * blocks_seen
        return pairs + own * seen + self.readouts * own * (own + 1) // 2
