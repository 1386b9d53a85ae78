"""Pictures that put runs side by side, as PNG bytes."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

from rim_dist.report.collect import Evaluated, RunFacts


def _new(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw_training(runs: Sequence[RunFacts]) -> bytes | None:
    """Loss and accuracy over samples, accuracy over operations; None without metrics. Dashed: a new stage."""
    runs = [run for run in runs if run.lines("train")]
    if not runs:
        return None
    figure = _new(13, 4)
    loss, accuracy, compute = figure.subplots(1, 3)
    for number, run in enumerate(runs):
        colour = f"C{number % 10}"
        train, evaluations = run.lines("train"), run.lines("evaluation")
        loss.plot([e["samples"] for e in train], [e["loss"] for e in train], color=colour, linewidth=0.9, label=run.name)
        for a, b in itertools.pairwise(train):
            if a["stage"] != b["stage"]:
                loss.axvline(a["samples"], color=colour, linestyle="--", linewidth=0.7)
        values = [100 * e["accuracy"] for e in evaluations]
        accuracy.plot([e["samples"] for e in evaluations], values, marker="o", markersize=4, color=colour, label=run.name)
        if all("operations" in e for e in evaluations):
            compute.plot([e["operations"] for e in evaluations], values, marker="o", markersize=4, color=colour)
    loss.set(title="training loss", xlabel="samples", yscale="log")
    accuracy.set(title="accuracy after the last block (%)", xlabel="samples", ylim=(0, 103))
    compute.set(title="the same over compute", xlabel="operations", ylim=(0, 103))
    for axes in (loss, accuracy, compute):
        axes.grid(alpha=0.3)
    loss.legend(fontsize="x-small")
    return _png(figure)


def draw_blocks(evaluations: Sequence[Evaluated]) -> bytes | None:
    """Accuracy after every block; None if no evaluation has more than one."""
    chosen = [e for e in evaluations if len(e.figures["per_block"]) > 1]
    if not chosen:
        return None
    figure = _new(6.5, 4)
    axes = figure.subplots()
    for evaluation in chosen:
        values = [100 * share for share in evaluation.figures["per_block"]]
        axes.plot(range(1, len(values) + 1), values, marker="o", label=evaluation.label)
    axes.set(title="accuracy by block (%)", xlabel="block", ylim=(0, 103))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return _png(figure)


def draw_latency(evaluations: Sequence[Evaluated]) -> bytes | None:
    """Accuracy against the time to the first token of the answer itself; None without two that were timed.

    Bars: the middle half of the time, the standard error of the accuracy.
    """
    timed = [e for e in evaluations if e.figures.get("latency")]
    if len(timed) < 2:
        return None
    figure = _new(6.5, 4)
    axes = figure.subplots()
    for evaluation in timed:
        latency, share = evaluation.figures["latency"], evaluation.figures["accuracy"]
        name = "answer_start_seconds" if "answer_start_seconds" in latency else "first_token_seconds"
        error = 100 * math.sqrt(share * (1 - share) / evaluation.figures["questions"])
        axes.errorbar(
            1000 * latency[name],
            100 * share,
            xerr=500 * latency.get(f"{name}_iqr", 0),
            yerr=error,
            marker="o",
            capsize=3,
            label=evaluation.label,
        )
    axes.set(title="accuracy (%) against latency", xlabel="ms to the first token of the answer itself (log)", ylim=(0, 103))
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small")
    return _png(figure)
