"""One model at many block budgets: accuracy, latency, what a probe can select, and what stopping early saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rim_dist.data.samples import Sample
from rim_dist.errors import DataError
from rim_dist.evaluation.early_exit import time_early_exit
from rim_dist.evaluation.evaluate import block_answers, score
from rim_dist.evaluation.latency import Candidate, time_side_by_side
from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.probe import Probe, fit_probe, halves, judge_probe
from rim_dist.evaluation.states import block_states
from rim_dist.model.generation import Decoding


def right_after(loaded: LoadedModel, samples: Sequence[Sample], budgets: Sequence[int], decoding: Decoding) -> torch.Tensor:
    """Whether the answer to every question is right after each of the budgets: boolean `[questions, budgets]`."""
    questions = [sample.question for sample in samples]
    texts = block_answers(loaded.model, loaded.tokenizer, questions, max(budgets), decoding, budgets=budgets)
    return score(samples, texts, loaded.answer_format).correct


def learn_probe(
    loaded: LoadedModel, samples: Sequence[Sample], right: torch.Tensor, others: Sequence[Sample] | None, decoding: Decoding
) -> tuple[Probe, torch.Tensor, list[int]]:
    """A probe for the trained blocks, its probabilities `[questions, blocks]` on questions it did not see, and which those are.

    `right`: of `samples`, after 1 .. K blocks. It learns from `others`, or else from a random half of `samples`. Raises
    DataError if there is nothing to learn.
    """

    def states(of: Sequence[Sample]) -> torch.Tensor:
        return block_states(loaded, loaded.prompts([sample.question for sample in of]), decoding.batch)

    found = states(samples)
    if others is not None:
        probe = fit_probe(states(others), right_after(loaded, others, range(1, loaded.blocks + 1), decoding))
        judged = list(range(len(samples)))
    else:
        learned, judged = halves(len(samples))
        probe = fit_probe(found[learned], right[learned])
    return probe, probe.probabilities(found[judged]), judged


def measure_budgets(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    budgets: Sequence[int],
    decoding: Decoding,
    timed: int,
    confidence: float,
    others: Sequence[Sample] | None = None,
) -> tuple[dict[str, Any], Probe | None]:
    """All figures of `rim-dist blocks`, and the probe they rest on.

    `timed`: questions timed at each budget. `others`: questions the probe learns from (see `learn_probe`); where there is
    nothing to learn, `probe` holds the reason under `left_out`.
    """
    everything = sorted({*range(1, loaded.blocks + 1), *budgets})
    right = right_after(loaded, samples, everything, decoding)
    accuracy = dict(zip(everything, right.double().mean(dim=0).tolist(), strict=True))
    questions = [sample.question for sample in samples[:timed]]
    latency = time_side_by_side({k: Candidate(loaded, loaded.prompts(questions, k), decoding) for k in budgets})
    figures: dict[str, Any] = {
        "questions": len(samples),
        "trained_blocks": loaded.blocks,
        "budgets": [
            {"blocks": k, "memory_tokens": k * loaded.block_size, "accuracy": accuracy[k], "latency": latency[k]}
            for k in budgets
        ],
    }
    right = right[:, : loaded.blocks]  # the trained budgets come first
    try:
        probe, probabilities, judged = learn_probe(loaded, samples, right, others, decoding)
    except DataError as error:
        return {**figures, "probe": {"left_out": str(error)}}, None
    figures["probe"] = {
        "learned_from": len(samples) - len(judged) if others is None else len(others),
        "penalty": probe.penalty,
        **judge_probe(probabilities, right[judged]),
    }
    unseen = [samples[i] for i in judged[:timed]]
    figures["early_exit"] = time_early_exit(loaded, unseen, probe, confidence, decoding)
    return figures, probe
