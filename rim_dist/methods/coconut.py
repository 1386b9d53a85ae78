"""Coconut: the first steps of the chain replaced, stage by stage, by continuous thoughts."""

from __future__ import annotations

import random
from collections.abc import Iterable

from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods.base import Method, StageProgress, chain_of


class Coconut(Method):
    """Coconut (Hao et al. 2024, "Training Large Language Models to Reason in a Continuous Latent Space", arXiv 2412.06769).

    `question, begin, thought x n, end, what is left of the chain, answer`: a thought's input is the last hidden state of the
    position before it. In latent stage s the first s steps give way to n = s x c_thought thoughts. After `max_latent_stage` = L
    comes a last one without any written step and with n = L x c_thought, also for samples of fewer steps (the published
    configurations: `pad_latent_to_max`). Stage 1 of the recipe runs the latent stages 0 .. L, stage 2 the last one; without
    stage 2, stage 1 ends with it. The begin and end tokens of a memory block mark the thoughts.
    """

    def check(self) -> None:
        self.need_memory("tokens_per_block")
        self.need_answer_mark()
        recipe = self.recipe
        if recipe.model.activation_checkpointing:
            raise ValueError("model.activation_checkpointing: true is not allowed with method coconut, which keeps a cache")
        if recipe.memory.inside_block != "causal":
            raise ValueError("memory.inside_block: a continuous thought cannot see later ones; with method coconut: causal")
        if recipe.parallel.sequence > 1:
            raise ValueError("parallel.sequence: rows of continuous thoughts are not split; with method coconut: 1")
        if recipe.data.streaming and recipe.coconut.epochs_per_stage:
            raise ValueError("coconut.epochs_per_stage: a stream has no known length; leave it out")

    @property
    def learns_steps(self) -> bool:
        return True

    @property
    def thoughts(self) -> int:
        return self.recipe.coconut.max_latent_stage * self.recipe.coconut.c_thought

    def phase(self, progress: StageProgress) -> int:
        return self.latent_stage(progress) if self.recipe.coconut.reset_optimizer else 0

    def latent_stage(self, progress: StageProgress) -> int:
        """Latent stage of a step, 0 .. L + 1; L + 1 is the one without written steps."""
        last = self.recipe.coconut.max_latent_stage + 1
        if progress.stage == "stage2":
            return last
        phases = last if self.recipe.curriculum.stage2.enabled else last + 1
        epochs = self.recipe.coconut.epochs_per_stage
        passed = progress.epochs / epochs if epochs else progress.fraction * phases
        return min(phases - 1, int(passed + 1e-9))  # floating point may leave a whole number of phases just below itself

    def row(self, sample: EncodedSample, progress: StageProgress) -> Row:
        stage, mixed = self.latent_stage(progress), self.recipe.coconut.uniform_prob
        if mixed:
            # A function of sample and step alone: the draw is the same on every rank and after a resume.
            draw = random.Random(f"{self.recipe.run.seed} {progress.stage} {progress.step} {sample.line}")
            if draw.random() < mixed:
                stage = draw.randrange(len(sample.steps) + 1)
        return self._row_at(sample, stage)

    def _row_at(self, sample: EncodedSample, stage: int) -> Row:
        most = self.recipe.coconut.max_latent_stage
        written = [] if stage > most else sample.steps[stage:]
        chain = chain_of(written, sample.answer)
        return self.block_row(sample.question, 1, [(1, chain, 1.0)], thoughts=min(stage, most) * self.recipe.coconut.c_thought)

    def longest_rows(self, sample: EncodedSample) -> Iterable[Row]:
        return (self._row_at(sample, stage) for stage in range(self.recipe.coconut.max_latent_stage + 2))


METHOD = Coconut
