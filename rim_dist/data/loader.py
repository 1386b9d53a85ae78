"""Global batches: a fixed list of samples, divided among ranks and cut into micro-batches.

Which samples an optimizer step sees depends on the seed and the step alone. How they are spread over ranks and
micro-batches changes nothing but rounding, since the loss is divided once by the weight of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rim_dist.config import Recipe, StageName
from rim_dist.data.packing import Packing, RowCost, pack_step
from rim_dist.data.prepared import SampleStream
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import EncodedSample, Row
from rim_dist.methods import method_of
from rim_dist.methods.base import Moment
from rim_dist.tokens import MemoryTokens


@dataclass(frozen=True)
class StagePlan:
    """One stage of the run in steps: `first_sample` is its start in the run's sample stream."""

    name: StageName
    samples: int
    steps: int
    first_sample: int
    first_step: int


def plan_stages(recipe: Recipe, epoch_samples: int) -> list[StagePlan]:
    """The enabled stages with their lengths; an epoch has `epoch_samples` samples."""
    plans: list[StagePlan] = []
    sample = step = 0
    for name in ("stage1", "stage2"):
        stage = recipe.curriculum.stage(name)
        if not stage.enabled:
            continue
        samples = stage.samples or max(1, round((stage.epochs or 0.0) * epoch_samples))
        steps = -(-samples // recipe.optimizer.global_batch)
        plans.append(StagePlan(name, samples, steps, sample, step))
        sample, step = sample + samples, step + steps
    return plans


@dataclass(frozen=True)
class RankShare:
    """A rank's part of one optimizer step: its micro-batches, the samples in each, the loss weight of its rows."""

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
        self._block = tokens.block
        self._bidirectional = recipe.memory.inside_block == "bidirectional"

    def step_samples(self, stage: StagePlan, step: int) -> list[EncodedSample]:
        """The samples of the whole global batch of a stage's step (the last one of a stage may be smaller)."""
        start = step * self._recipe.optimizer.global_batch
        stop = min(start + self._recipe.optimizer.global_batch, stage.samples)
        return self._data.samples(stage.first_sample + start, stage.first_sample + stop)

    def moment(self, stage: StagePlan, step: int) -> Moment:
        """Where a step of a stage stands in it."""
        consumed = step * self._recipe.optimizer.global_batch
        return Moment(stage.name, consumed / stage.samples, consumed / len(self._data) if len(self._data) else 0.0, step)

    def part(self, stage: StagePlan, step: int) -> int:
        """The part of its stage that a step belongs to (`Method.part`)."""
        return self._method.part(self.moment(stage, step))

    def row(self, stage: StagePlan, step: int, sample: EncodedSample) -> Row:
        return self._method.row(sample, self.moment(stage, step))

    def share(self, stage: StagePlan, step: int) -> RankShare:
        """This rank's micro-batches: as many on every rank, a weightless row filling an empty place."""
        samples = self.step_samples(stage, step)
        rows = [self.row(stage, step, sample) for sample in samples]
        packing = pack_step(rows, self._ranks, self._recipe.optimizer.micro_batch_tokens, self._cost)
        mine = [bins[self._rank] for bins in packing.bins]
        shortest = min(rows, key=len)
        # Of the whole step, so that every rank runs as many passes: ZeRO-3 gathers weights in each.
        thoughts = max((row.thoughts for row in rows if row.latent), default=None)
        batches = [
            pack([rows[i] for i in numbers] or [shortest.without_weight()], self._block, self._bidirectional, thoughts)
            for numbers in mine
        ]
        weight = sum(rows[i].total_weight for numbers in mine for i in numbers)
        return RankShare(batches, [[samples[i] for i in numbers] for numbers in mine], weight, packing)
