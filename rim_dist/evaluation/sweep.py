"""One model at many block budgets: accuracy, latency, what a probe can select, and what stopping early saves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rim_dist.data.samples import Sample
from rim_dist.errors import DataError
from rim_dist.evaluation.early_exit import SteppedAnswer, answer_stepwise
from rim_dist.evaluation.evaluate import block_answers, score
from rim_dist.evaluation.latency import WARM_UP, Candidate, spread, time_side_by_side
from rim_dist.evaluation.opened import ExportedModel
from rim_dist.evaluation.probe import Probe, fit_probe, halves, judge_probe, right_answers
from rim_dist.evaluation.scoring import extract_answer, same_answer
from rim_dist.evaluation.states import block_states
from rim_dist.model.generation import Decoding, answer_texts
from rim_dist.tokens import prompt_ids


def answered(
    export: ExportedModel, samples: Sequence[Sample], budgets: Sequence[int], decoding: Decoding
) -> list[dict[str, Any]]:
    """Answers of every question after each of the budgets, scored (`evaluate.score`)."""
    questions = [sample.question for sample in samples]
    texts = block_answers(export.model, export.tokenizer, questions, max(budgets), decoding, budgets=budgets)
    return score(samples, texts).answers


def learn_probe(
    export: ExportedModel,
    samples: Sequence[Sample],
    answers: Sequence[dict[str, Any]],
    others: Sequence[Sample] | None,
    decoding: Decoding,
) -> tuple[Probe, torch.Tensor, list[int]]:
    """A probe for the trained blocks, its probabilities `[questions, blocks]` on questions it did not see, and which those are.

    `answers`: of `samples`, after 1 .. K blocks. It learns from `others`, or else from a random half of `samples`. Raises
    DataError if there is nothing to learn.
    """
    blocks, size = export.blocks, export.block_size()

    def states(of: Sequence[Sample]) -> torch.Tensor:
        prompts = prompt_ids(export.tokenizer, [sample.question for sample in of], blocks)
        return block_states(export.model, export.tokenizer, prompts, size, blocks, decoding.batch)

    found, right = states(samples), right_answers(answers)
    if others is not None:
        probe = fit_probe(states(others), right_answers(answered(export, others, range(1, blocks + 1), decoding)))
        judged = list(range(len(samples)))
    else:
        learned, judged = halves(len(samples))
        probe = fit_probe(found[learned], right[learned])
    return probe, probe.probabilities(found[judged]), judged


def time_early_exit(
    export: ExportedModel, samples: Sequence[Sample], probe: Probe, confidence: float, decoding: Decoding
) -> dict[str, Any]:
    """Stopping early against all blocks in one prefill, in turns, by the same decoding loop; accuracy on these questions."""
    questions = prompt_ids(export.tokenizer, [sample.question for sample in samples], 0)
    size = export.block_size()
    block = prompt_ids(export.tokenizer, ["?"], 1)[0][-size:]
    probes = {"all_blocks": None, "early_exit": probe}
    runs: dict[str, list[SteppedAnswer]] = {name: [] for name in probes}
    for number in range(-min(WARM_UP, len(samples)), len(samples)):
        for name, used in probes.items():
            run = answer_stepwise(
                export.model, export.tokenizer, questions[max(0, number)], block, export.blocks, decoding, used, confidence
            )
            if number >= 0:
                runs[name].append(run)
    figures: dict[str, Any] = {"questions": len(samples), "confidence": confidence}
    for name, made in runs.items():
        texts = answer_texts(export.tokenizer, [run.ids for run in made], decoding)
        first = [run.first_token_seconds for run in made]
        figures[name] = {
            "accuracy": statistics.fmean(
                same_answer(extract_answer(text, sample.answer), sample.answer)
                for text, sample in zip(texts, samples, strict=True)
            ),
            "blocks": statistics.fmean(run.blocks for run in made),
            "memory_tokens": statistics.fmean(run.blocks for run in made) * size,
            "first_token_seconds": statistics.median(first),
            "first_token_seconds_iqr": spread(first),
            "answer_seconds": statistics.median(run.answer_seconds for run in made),
        }
    return figures


def sweep(
    export: ExportedModel,
    samples: Sequence[Sample],
    budgets: Sequence[int],
    decoding: Decoding,
    timed: int,
    confidence: float,
    others: Sequence[Sample] | None = None,
) -> tuple[dict[str, Any], Probe | None]:
    """All figures of `rim-dist sweep`, and the probe they rest on.

    `timed`: questions timed at each budget. `others`: questions the probe learns from (see `learn_probe`); where there is
    nothing to learn, `probe` holds the reason under `left_out`.
    """
    trained = range(1, export.blocks + 1)
    everything = sorted({*trained, *budgets})
    answers = answered(export, samples, everything, decoding)
    right = right_answers(answers)
    by_budget = {k: float(right[:, i].double().mean()) for i, k in enumerate(everything)}
    asked = [sample.question for sample in samples[:timed]]
    latency = time_side_by_side(
        {k: Candidate(export.model, export.tokenizer, prompt_ids(export.tokenizer, asked, k), decoding) for k in budgets}
    )
    size = export.block_size()
    figures: dict[str, Any] = {
        "questions": len(samples),
        "trained_blocks": export.blocks,
        "budgets": [{"blocks": k, "memory_tokens": k * size, "accuracy": by_budget[k], "latency": latency[k]} for k in budgets],
    }
    for answer in answers:
        answer["correct"] = [c for k, c in zip(everything, answer["correct"], strict=True) if k <= export.blocks]
    try:
        probe, probabilities, judged = learn_probe(export, samples, answers, others, decoding)
    except DataError as error:
        return {**figures, "probe": {"left_out": str(error)}}, None
    right = right_answers([answers[i] for i in judged])
    figures["probe"] = {
        "learned_from": len(samples) - len(judged) if others is None else len(others),
        "penalty": probe.penalty,
        **judge_probe(probabilities, right),
    }
    unseen = [samples[i] for i in judged[:timed]]
    figures["early_exit"] = time_early_exit(export, unseen, probe, confidence, decoding)
    return figures, probe


def draw_sweep(figures: dict[str, Any], path: Path) -> None:
    """Accuracy and latency against the budget, and accuracy against the blocks used when stopping early, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    accuracy, latency, exits = figure.subplots(1, 3)
    blocks = [entry["blocks"] for entry in figures["budgets"]]
    accuracy.plot(blocks, [100 * entry["accuracy"] for entry in figures["budgets"]], marker="o")
    accuracy.axvline(figures["trained_blocks"], color="grey", linestyle="--", linewidth=0.8)
    accuracy.set(title="accuracy (%); dashed: K in training", xlabel="blocks K", ylim=(0, 103))
    for name, label in (("first_token_seconds", "first token"), ("answer_seconds", "whole answer")):
        latency.plot(blocks, [1000 * e["latency"][name] for e in figures["budgets"]], marker="o", label=label)
    latency.set(title="latency (ms), median", xlabel="blocks K")
    latency.set_ylim(bottom=0)
    latency.legend(fontsize="small")
    exits.set(title="stopping early: accuracy (%)", xlabel="blocks used, mean", ylim=(0, 103))
    if "early_exit" in figures["probe"]:
        entries = figures["probe"]["early_exit"]
        exits.plot([e["blocks"] for e in entries], [100 * e["accuracy"] for e in entries], marker="o")
        for entry, side in ((entries[0], "left"), (entries[-1], "right")):  # all of them would cover each other
            place = (entry["blocks"], 100 * entry["accuracy"] - 7)
            exits.annotate(f"at {entry['confidence']:g}", place, fontsize="x-small", ha=side)
        exits.axhline(100 * figures["probe"]["final_block"], color="grey", linestyle="--", linewidth=0.8)
    for axes in (accuracy, latency, exits):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
