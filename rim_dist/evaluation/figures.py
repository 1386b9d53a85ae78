"""Figures of `rim-dist blocks` and `rim-dist analyse` as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rim_dist.evaluation.states import project


@contextmanager
def _panels(path: Path, width: float, height: float, rows: int, columns: int, **how: Any) -> Iterator[tuple[Any, Any]]:
    """A new figure of so many inches and its panels, written to `path` at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure, figure.subplots(rows, columns, **how)
    figure.savefig(path, dpi=100)


def _each_block(blocks: int) -> list[tuple[str, Any]]:
    """Label and colour of every block."""
    import matplotlib

    return [(f"block {k + 1}", matplotlib.colormaps["viridis"](k / max(1, blocks - 1))) for k in range(blocks)]


def _scatter(axes: Any, title: str, groups: Sequence[torch.Tensor], styles: Sequence[tuple[str, Any]]) -> None:
    """Groups of points `[points, 2]` with a label and a colour each, without ticks."""
    for points, (label, colour) in zip(groups, styles, strict=True):
        axes.scatter(*points.T.numpy(), s=6, alpha=0.6, color=colour, label=label)
    axes.set(title=title, xticks=[], yticks=[])


def _stacked(axes: Any, columns: Sequence[int], heights: torch.Tensor, styles: Sequence[tuple[str, Any]]) -> None:
    """Bars of heights `[layers, columns]` on top of each other, with a label and a colour for each layer."""
    bottom = torch.zeros(len(columns))
    for layer, (label, colour) in zip(heights, styles, strict=True):
        axes.bar(columns, layer.numpy(), bottom=bottom.numpy(), color=colour, label=label)
        bottom = bottom + layer


def draw_budgets(figures: dict[str, Any], path: Path) -> None:
    """Accuracy and latency against the budget, and accuracy against the blocks used when stopping early."""
    blocks = [entry["blocks"] for entry in figures["budgets"]]
    with _panels(path, 11, 3.6, 1, 3) as (_, (accuracy, latency, exits)):
        accuracy.plot(blocks, [100 * entry["accuracy"] for entry in figures["budgets"]], marker="o")
        accuracy.axvline(figures["trained_blocks"], color="grey", linestyle="--", linewidth=0.8)
        accuracy.set(title="accuracy (%); dashed: K in training", xlabel="blocks K", ylim=(0, 103))
        for name, label in (("first_token_seconds", "first token"), ("answer_seconds", "whole answer")):
            latency.plot(blocks, [1000 * e["latency"][name] for e in figures["budgets"]], marker="o", label=label)
        latency.set(title="latency (ms), median", xlabel="blocks K")
        latency.set_ylim(bottom=0)
        latency.legend(fontsize="small")
        exits.set(title="stopping early: accuracy (%)", xlabel="blocks used, mean", ylim=(0, 103))
        if entries := figures["probe"].get("early_exit"):
            exits.plot([e["blocks"] for e in entries], [100 * e["accuracy"] for e in entries], marker="o")
            for entry, side in ((entries[0], "left"), (entries[-1], "right")):  # all of them would cover each other
                corner = (entry["blocks"], 100 * entry["accuracy"] - 7)
                exits.annotate(f"at {entry['confidence']:g}", corner, fontsize="x-small", ha=side)
            exits.axhline(100 * figures["probe"]["final_block"], color="grey", linestyle="--", linewidth=0.8)
        for axes in (accuracy, latency, exits):
            axes.grid(alpha=0.3)


def draw_states(axes: Any, states: torch.Tensor, right: torch.Tensor, path: Path) -> None:
    """States on their two principal axes, by block and by whether the answer predicted from them is right."""
    points = project(axes, states)
    with _panels(path, 11, 5, 1, 2) as (figure, (by_block, by_answer)):
        _scatter(by_block, "by block", points.unbind(1), _each_block(points.shape[1]))
        answers = (points[~right], points[right])
        _scatter(by_answer, "by the answer read there", answers, [("wrong", "tab:red"), ("right", "tab:green")])
        for panel in (by_block, by_answer):
            panel.legend(fontsize="x-small", markerscale=2)
        figure.suptitle("block states, {:.0%} and {:.0%} of the variance".format(*axes.explained_variance_ratio_))


def draw_training(axes: Any, states: torch.Tensor, names: list[str], path: Path) -> None:
    """A panel for each checkpoint, all on the same axes and scale. `states`: `[checkpoints, questions, blocks, hidden]`."""
    points = project(axes, states)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    shared = {"squeeze": False, "sharex": True, "sharey": True}
    with _panels(path, 3 * columns, 3 * rows + 0.4, rows, columns, **shared) as (figure, grid):
        panels = grid.flatten()
        for panel, of_checkpoint, name in zip(panels, points, names, strict=False):
            _scatter(panel, name, of_checkpoint.unbind(1), _each_block(points.shape[2]))
            panel.title.set_fontsize("small")
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        panels[0].legend(fontsize="xx-small", markerscale=2)
        explained = axes.explained_variance_ratio_
        figure.suptitle("block states over training, {:.0%} and {:.0%} of the variance".format(*explained))


def draw_attention(mass: torch.Tensor, path: Path) -> None:
    """Attention mass on the question by layer and block, and on everything by block (`attention_mass`)."""
    layers, blocks, _ = mass.shape
    with _panels(path, 11, 4.2, 1, 2) as (figure, (by_layer, by_key)):
        image = by_layer.imshow(mass[:, :, 0].numpy(), aspect="auto", origin="lower", vmin=0, vmax=1, cmap="magma")
        by_layer.set(title="attention mass on the question", xlabel="block", ylabel="layer")
        by_layer.set_xticks(range(blocks), [str(k) for k in range(1, blocks + 1)])
        by_layer.set_yticks(range(0, layers, max(1, layers // 8)))
        figure.colorbar(image, ax=by_layer)
        _stacked(by_key, range(1, blocks + 1), mass.mean(dim=0).T, [("question", "lightgrey"), *_each_block(blocks)])
        by_key.set(title="where a block's attention goes, mean over layers", xlabel="block", ylim=(0, 1))
        by_key.legend(fontsize="x-small")


def draw_patching(figures: dict[str, Any], path: Path) -> None:
    """What becomes of the answer when a block is exchanged, and how many answers stay when one is left out."""
    entries, left_out = figures["exchanged"], figures["left_out"]
    percent = torch.tensor([[100 * entry[kind] for entry in entries] for kind in ("own", "donor", "other")])
    styles = [("stays", "tab:blue"), ("the other question's", "tab:orange"), ("something else", "lightgrey")]
    with _panels(path, 11, 3.8, 1, 2, width_ratios=[2, 1]) as (_, (exchanged, without)):
        _stacked(exchanged, range(len(entries)), percent, styles)
        exchanged.set_xticks(range(len(entries)), [entry["blocks"].removeprefix("block ") for entry in entries])
        title = f"the answer (%) with a block of another question, {figures['pairs']} pairs"
        exchanged.set(title=title, xlabel="exchanged block")
        exchanged.legend(fontsize="small")
        without.bar([e["block"] for e in left_out], [100 * e["own"] for e in left_out], color="tab:blue")
        without.set_xticks([e["block"] for e in left_out])
        without.set(title="answers that stay (%)", xlabel="block left out", ylim=(0, 100))
