"""Global batches, sharded over data ranks and packed into micro-batches.

The samples of an optimizer step depend on the seed and the step alone. Their distribution over ranks and micro-batches changes
only rounding, since the loss is divided once, by the weight of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rim_dist.config import STAGE_NAMES, Recipe, StageName
from rim_dist.data.packing import Packing, RowCost, pack_step
from rim_dist.data.prepared import SampleStream
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods import method_of
from rim_dist.methods.base import StageProgress
from rim_dist.tokens import MemoryTokens


@dataclass(frozen=True)
class StagePlan:
    """The length of a stage, and its first step and sample (its position in the run's sample stream)."""

    name: StageName
    samples: int
    steps: int
    first_sample: int
    first_step: int


def plan_stages(recipe: Recipe, epoch_samples: int) -> list[StagePlan]:
    """The enabled stages with their lengths. `epoch_samples`: samples of one epoch (0 for a stream)."""
    plans: list[StagePlan] = []
    sample = step = 0
    for name in STAGE_NAMES:
        stage = recipe.curriculum.stage(name)
        if not stage.enabled:
            continue
        samples = stage.samples or max(1, round((stage.epochs or 0.0) * epoch_samples))
        steps = -(-samples // recipe.optimizer.global_batch)
        plans.append(StagePlan(name, samples, steps, sample, step))
        sample, step = sample + samples, step + steps
    return plans


@dataclass(frozen=True)
class RankBatch:
    """What one rank runs of a global batch: micro-batches, the samples in each, and the total loss weight of these samples."""

    micro_batches: list[Batch]
    samples: list[list[EncodedSample]]
    weight: float
    packing: Packing


class BatchLoader:
    """Builds the micro-batches of this rank for any step of any stage."""

    def __init__(
        self,
        recipe: Recipe,
        data: SampleStream,
        tokens: MemoryTokens,
        rank: int,
        ranks: int,
        cost: Callable[[Row], float] | None = None,
    ) -> None:
        self._recipe, self._data, self._tokens, self._method = recipe, data, tokens, method_of(recipe)
        self._rank, self._ranks, self._cost = rank, ranks, cost or RowCost()
        self._bidirectional = recipe.memory.inside_block == "bidirectional"

    def step_samples(self, stage: StagePlan, step: int) -> list[EncodedSample]:
        """The samples of the whole global batch of a stage's step (the last one of a stage may be smaller)."""
        start = step * self._recipe.optimizer.global_batch
        stop = min(start + self._recipe.optimizer.global_batch, stage.samples)
        return self._data.samples(stage.first_sample + start, stage.first_sample + stop)

    def progress(self, stage: StagePlan, step: int) -> StageProgress:
        """How far the stage is before a step."""
        consumed = step * self._recipe.optimizer.global_batch
        epochs = consumed / len(self._data) if len(self._data) else 0.0
        return StageProgress(stage.name, consumed / stage.samples, epochs, step)

    def phase(self, stage: StagePlan, step: int) -> int:
        """The phase of the stage that a step belongs to (`Method.phase`)."""
        return self._method.phase(self.progress(stage, step))

    def row(self, stage: StagePlan, step: int, sample: EncodedSample) -> Row:
        return self._method.row(sample, self.progress(stage, step))

    def rank_batch(self, stage: StagePlan, step: int) -> RankBatch:
        """This rank's micro-batches. All ranks have equally many: an empty one gets a dummy row, whose weight is 0."""
        samples = self.step_samples(stage, step)
        rows = [self.row(stage, step, sample) for sample in samples]
        packing = pack_step(rows, self._ranks, self._recipe.optimizer.micro_batch_tokens, self._cost)
        local = [bins[self._rank] for bins in packing.bins]
        shortest = min(rows, key=len)
        # Over the whole step: ZeRO-3 gathers weights in every pass, so all ranks must run equally many.
        thoughts = max((row.thoughts for row in rows if row.latent), default=None)
        batches = [
            pack([rows[i] for i in indices] or [shortest.without_weight()], self._tokens.block, self._bidirectional, thoughts)
            for indices in local
        ]
        weight = sum(rows[i].total_weight for indices in local for i in indices)
        return RankBatch(batches, [[samples[i] for i in indices] for indices in local], weight, packing)
