"""What a method defines. Everything else is common to all methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rim_dist.config import STAGE_NAMES, Recipe, StageName, around_text
from rim_dist.data.samples import EncodedSample, Readout, Row, TokenIds


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is before an optimizer step.

    `fraction`: of the stage's samples. `epochs`: passes over the data (0 for a stream). `step`: the step's number in the stage,
    from 0.
    """

    stage: StageName
    fraction: float = 0.0
    epochs: float = 0.0
    step: int = 0


class Method:
    """How a sample becomes a row, and what a prompt ends with. The first line of a method's docstring describes it to users."""

    # Whether the prompt ends with memory blocks (`memory.blocks` of them).
    uses_blocks: ClassVar[bool] = False
    # The model may write this many times `evaluation.max_new_tokens`.
    answer_factor: ClassVar[int] = 1

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def check(self) -> None:
        """Raise ValueError, naming the field, if the recipe cannot be trained with this method."""
        if self.uses_blocks:
            self.need_memory("blocks", "tokens_per_block")

    def need_memory(self, *names: str) -> None:
        """Raise ValueError if one of these fields of `memory` is 0."""
        for name in names:
            if getattr(self.recipe.memory, name) == 0:
                raise ValueError(f"memory.{name}: 0 is not allowed with method {self.recipe.method}; allowed: 1 or more")

    def need_answer_mark(self) -> None:
        """Raise ValueError if nothing stands before the answer, which then cannot be told from the steps that it follows."""
        answer_format = self.recipe.data.answer_format
        if not around_text(answer_format, "answer")[0].strip():
            raise ValueError(
                f"data.answer_format: {answer_format!r} is not allowed with method {self.recipe.method}, where the answer "
                "follows the steps; put a text before it, as in '#### {answer}'"
            )

    @property
    def learns_steps(self) -> bool:
        """Whether the method learns from the steps of samples."""
        return False

    @property
    def prompt_blocks(self) -> int:
        """Memory blocks at the end of a prompt."""
        return self.recipe.memory.blocks if self.uses_blocks else 0

    @property
    def thoughts(self) -> int:
        """Continuous thoughts between prompt and answer (`rim_dist.objective.latent`): passes an ordinary server cannot do."""
        return 0

    @property
    def answer_tokens(self) -> int:
        """Most tokens of an answer in an evaluation of the recipe."""
        return self.recipe.evaluation.max_new_tokens * self.answer_factor

    def phase(self, progress: StageProgress) -> int:  # noqa: ARG002 - one phase, unless a method has more
        """The phase of the stage that a step belongs to, from 0. The optimizer is reset at the start of each phase."""
        return 0

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:
        """The row of one sample at a step. Steps and answer end with the end-of-text token."""
        raise NotImplementedError

    def longest_rows(self, sample: EncodedSample) -> Iterable[Row]:
        """Rows of the sample that include its longest one over all steps."""
        return (self.row(sample, StageProgress(name)) for name in STAGE_NAMES if self.recipe.curriculum.stage(name).enabled)

    def plain_row(self, question: TokenIds, text: Sequence[int] | TokenIds) -> Row:
        """A row without blocks: the question, and the text to learn after it."""
        return self.block_row(question, 0, [(0, text, 1.0)])

    def block_row(
        self,
        question: TokenIds,
        blocks: int,
        readouts: Iterable[tuple[int, TokenIds, float]],
        thoughts: int | None = None,
        step_blocks: int = 0,
    ) -> Row:
        """A row with `blocks` blocks. `readouts` are (block, target ids, weight of each token).

        The targets of the first `step_blocks` blocks are steps, the others are answers. `thoughts`: the row's only block holds
        this many continuous thoughts instead of memory tokens.
        """
        # A readout of weight 0 adds nothing to the loss: it is left out to save its computation.
        kept = tuple(Readout(block, target, weight, block <= step_blocks) for block, target, weight in readouts if weight)
        size = (self.recipe.memory.tokens_per_block if thoughts is None else thoughts) + 2
        return Row(question, blocks, size, kept, latent=thoughts is not None)


def chain_of(steps: Sequence[TokenIds], answer: TokenIds) -> list[int]:
    """Steps and answer as one text, with the end-of-text token at its end only."""
    return [*(token for step in steps for token in step[:-1]), *answer]
