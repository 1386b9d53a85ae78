"""What the memory blocks of a model do: their states, what they attend to, what the answer takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rim_dist.data.samples import Sample
from rim_dist.evaluation.attention_mass import attention_mass
from rim_dist.evaluation.evaluate import block_answers, score
from rim_dist.evaluation.figures import draw_attention, draw_patching, draw_states, draw_training
from rim_dist.evaluation.loading import LoadedModel, load_checkpoint
from rim_dist.evaluation.patching import exchange_blocks
from rim_dist.evaluation.states import block_states, principal_axes, variance_fractions
from rim_dist.model.generation import Decoding

MOST_PANELS = 8


def spaced(items: Sequence[Any], most: int = MOST_PANELS) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def analyse(
    loaded: LoadedModel, samples: Sequence[Sample], checkpoints: Sequence[Path], decoding: Decoding, folder: Path
) -> dict[str, Any]:
    """All figures of `rim-dist analyse`, and their pictures in `folder`.

    `checkpoints`: of the same run, oldest first, for states over training; empty: none. Raises CheckpointError if one of them
    cannot be loaded, DataError if a prompt does not fit.
    """
    questions = [sample.question for sample in samples]
    prompts = loaded.prompts(questions)

    def states_of(model: LoadedModel) -> torch.Tensor:
        return block_states(model, model.prompts(questions), decoding.batch)

    states = states_of(loaded)
    answers = block_answers(loaded.model, loaded.tokenizer, questions, loaded.blocks, decoding)
    scored = score(samples, answers, loaded.answer_format)
    axes = principal_axes(states)
    figures: dict[str, Any] = {
        "questions": len(samples),
        "blocks": loaded.blocks,
        "accuracy_per_block": scored.per_block,
        "states": {"explained": axes.explained_variance_ratio_.tolist(), "variance": variance_fractions(states)},
    }
    draw_states(axes, states, scored.correct, folder / "states.png")
    if checkpoints:
        taken = spaced(checkpoints)
        over_time = torch.stack([states_of(load_checkpoint(path)) for path in taken])
        axes = principal_axes(over_time)
        figures["training"] = {
            "explained": axes.explained_variance_ratio_.tolist(),
            "checkpoints": [
                {"checkpoint": path.name, "variance": variance_fractions(states)}
                for path, states in zip(taken, over_time, strict=True)
            ],
        }
        draw_training(axes, over_time, [path.name for path in taken], folder / "training.png")
    mass = attention_mass(loaded, prompts)
    figures["attention"] = {
        "by_block": mass.mean(dim=0).tolist(),
        "question_by_layer": mass[:, :, 0].tolist(),
    }
    draw_attention(mass, folder / "attention.png")
    figures["patching"] = exchange_blocks(loaded, prompts, decoding)
    if figures["patching"]["pairs"]:
        draw_patching(figures["patching"], folder / "patching.png")
    return figures
