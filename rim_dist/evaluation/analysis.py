"""What the memory blocks of a model do: their states, what they look at, what the answer takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rim_dist.data.samples import Sample
from rim_dist.evaluation.attention_shares import attention_shares
from rim_dist.evaluation.evaluate import block_answers, score
from rim_dist.evaluation.opened import ExportedModel, open_checkpoint
from rim_dist.evaluation.patching import exchange_blocks
from rim_dist.evaluation.pca import Components, principal_components, variance_shares
from rim_dist.evaluation.probe import right_answers
from rim_dist.evaluation.states import block_states
from rim_dist.model.generation import Decoding
from rim_dist.tokens import prompt_ids

MOST_PANELS = 8


def spaced(items: Sequence[Any], most: int = MOST_PANELS) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def states_of(export: ExportedModel, questions: list[str], batch: int) -> torch.Tensor:
    """States `[questions, blocks, hidden]` at the end of every trained block."""
    prompts = prompt_ids(export.tokenizer, questions, export.blocks)
    return block_states(export.model, export.tokenizer, prompts, export.block_size(), export.blocks, batch)


def analyse(
    export: ExportedModel, samples: Sequence[Sample], checkpoints: Sequence[Path], decoding: Decoding, folder: Path
) -> dict[str, Any]:
    """All figures of `rim-dist analyse`, and their pictures in `folder`.

    `checkpoints`: of the same run, oldest first, for states over training; empty: none. Raises CheckpointError if one of them
    cannot be opened, DataError if a prompt does not fit.
    """
    questions = [sample.question for sample in samples]
    prompts = prompt_ids(export.tokenizer, questions, export.blocks)
    size, blocks = export.block_size(), export.blocks
    states = states_of(export, questions, decoding.batch)
    right = right_answers(score(samples, block_answers(export.model, export.tokenizer, questions, blocks, decoding)).answers)
    components = principal_components(states)
    figures: dict[str, Any] = {
        "questions": len(samples),
        "blocks": blocks,
        "accuracy_per_block": right.double().mean(dim=0).tolist(),
        "states": {"explained": components.explained, "variance": variance_shares(states)},
    }
    _draw_states(components, states, right, folder / "states.png")
    if checkpoints:
        taken = spaced(checkpoints)
        over_time = torch.stack([states_of(open_checkpoint(path), questions, decoding.batch) for path in taken])
        together = principal_components(over_time)
        figures["training"] = {
            "explained": together.explained,
            "checkpoints": [
                {"checkpoint": path.name, "variance": variance_shares(part)}
                for path, part in zip(taken, over_time, strict=True)
            ],
        }
        _draw_training(together, over_time, [path.name for path in taken], folder / "training.png")
    shares = attention_shares(export.model, export.tokenizer, prompts, size, blocks)
    figures["attention"] = {
        "by_block": shares.mean(dim=0).tolist(),
        "question_by_layer": shares[:, :, 0].tolist(),
    }
    _draw_attention(shares, folder / "attention.png")
    figures["patching"] = exchange_blocks(export.model, export.tokenizer, prompts, size, blocks, decoding)
    if figures["patching"]["pairs"]:
        _draw_patching(figures["patching"], folder / "patching.png")
    return figures


# ---- pictures --------------------------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _colour(k: int, blocks: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](k / max(1, blocks - 1))


def _scatter(axes: Any, projected: torch.Tensor) -> None:
    points = projected.numpy()
    blocks = points.shape[1]
    for k in range(blocks):
        axes.scatter(points[:, k, 0], points[:, k, 1], s=6, alpha=0.6, color=_colour(k, blocks), label=f"block {k + 1}")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_states(components: Components, states: torch.Tensor, right: torch.Tensor, path: Path) -> None:
    """States on their two principal axes, by block and by whether the answer read there is right."""
    figure = _new_figure(11, 5)
    by_block, by_answer = figure.subplots(1, 2)
    points = components.project(states)
    _scatter(by_block, points)
    by_block.legend(fontsize="x-small", markerscale=2)
    by_block.set_title("by block")
    for wanted, colour, label in ((False, "tab:red", "wrong"), (True, "tab:green", "right")):
        chosen = points[right == wanted].numpy()
        by_answer.scatter(chosen[:, 0], chosen[:, 1], s=6, alpha=0.5, color=colour, label=label)
    by_answer.set_xticks([])
    by_answer.set_yticks([])
    by_answer.legend(fontsize="x-small", markerscale=2)
    by_answer.set_title("by the answer read there")
    figure.suptitle("block states, {:.0%} and {:.0%} of the variance".format(*components.explained))
    figure.savefig(path, dpi=100)


def _draw_training(components: Components, states: torch.Tensor, names: list[str], path: Path) -> None:
    """A panel a checkpoint, all on the same axes and scale."""
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = _new_figure(3 * columns, 3 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, part, name in zip(panels, states, names, strict=False):
        _scatter(axes, components.project(part))
        axes.set_title(name, fontsize="small")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend(fontsize="xx-small", markerscale=2)
    figure.suptitle("block states over training, {:.0%} and {:.0%} of the variance".format(*components.explained))
    figure.savefig(path, dpi=100)


def _draw_attention(shares: torch.Tensor, path: Path) -> None:
    """Attention to the question by layer and block, and to everything by block."""
    layers, blocks, _ = shares.shape
    mean, by_question = shares.mean(dim=0).numpy(), shares[:, :, 0].numpy()
    figure = _new_figure(11, 4.2)
    by_layer, by_key = figure.subplots(1, 2)
    image = by_layer.imshow(by_question, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="magma")
    by_layer.set(title="share of attention to the question", xlabel="block", ylabel="layer")
    by_layer.set_xticks(range(blocks), [str(k) for k in range(1, blocks + 1)])
    by_layer.set_yticks(range(0, layers, max(1, layers // 8)))
    figure.colorbar(image, ax=by_layer)
    bottom = 0 * mean[:, 0]
    for j in range(blocks + 1):
        colour = "lightgrey" if j == 0 else _colour(j - 1, blocks)
        by_key.bar(range(1, blocks + 1), mean[:, j], bottom=bottom, color=colour, label="question" if j == 0 else f"block {j}")
        bottom = bottom + mean[:, j]
    by_key.set(title="where a block's attention goes, mean over layers", xlabel="block", ylim=(0, 1))
    by_key.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


def _draw_patching(figures: dict[str, Any], path: Path) -> None:
    figure = _new_figure(11, 3.8)
    exchanged, left_out = figure.subplots(1, 2, width_ratios=[2, 1])
    entries = figures["exchanged"]
    places = range(len(entries))
    bottom = [0.0] * len(entries)
    for kind, colour, label in (
        ("own", "tab:blue", "stays"),
        ("donor", "tab:orange", "the other question's"),
        ("other", "lightgrey", "something else"),
    ):
        heights = [100 * entry[kind] for entry in entries]
        exchanged.bar(places, heights, bottom=bottom, color=colour, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    exchanged.set_xticks(places, [entry["blocks"].removeprefix("block ") for entry in entries])
    exchanged.set(title=f"the answer (%) with a block of another question, {figures['pairs']} pairs", xlabel="exchanged block")
    exchanged.legend(fontsize="small")
    left_out.bar([e["block"] for e in figures["left_out"]], [100 * e["own"] for e in figures["left_out"]], color="tab:blue")
    left_out.set_xticks([e["block"] for e in figures["left_out"]])
    left_out.set(title="answers that stay (%)", xlabel="block left out", ylim=(0, 100))
    figure.savefig(path, dpi=100)
