"""Pictures that put runs side by side; none where there is nothing to draw."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from rim_dist.metrics import EVALUATION
from rim_dist.report.collect import EvaluationFolder, RunFolder
from rim_dist.report.document import Picture
from rim_dist.training.curves import curve_metrics, draw_curves


def draw_training(runs: Sequence[RunFolder]) -> list[Picture]:
    """The metrics that have a curve over samples, those of evaluations over operations as well."""
    lines = {run.name: run.metrics for run in runs if any(line.get("kind") == "train" for line in run.metrics)}
    metrics = [metric for metric in curve_metrics() if not metric.by_block]
    panels = [(metric, "samples") for metric in metrics]
    panels += [(metric, "operations") for metric in metrics if metric.kinds == EVALUATION]
    return [Picture("training", "curves", draw_curves(lines, panels, logarithmic=True))] if lines else []


def draw_blocks(evaluations: Sequence[EvaluationFolder]) -> list[Picture]:
    """Accuracy after every block."""
    chosen = [e for e in evaluations if len(e.figures["per_block"]) > 1]
    if not chosen:
        return []
    figure, axes = _axes("accuracy by block (%)", "block")
    for evaluation in chosen:
        values = [100 * fraction for fraction in evaluation.figures["per_block"]]
        axes.plot(range(1, len(values) + 1), values, marker="o", label=evaluation.label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return [_picture("blocks", "accuracy after every block", figure, axes)]


def draw_latency(evaluations: Sequence[EvaluationFolder]) -> list[Picture]:
    """Accuracy against the time to the first token of the answer itself, of two or more evaluations that were timed.

    Bars: the middle half of the time, the standard error of the accuracy.
    """
    timed = [e for e in evaluations if e.figures.get("latency")]
    if len(timed) < 2:
        return []
    figure, axes = _axes("accuracy (%) against latency", "ms to the first token of the answer itself (log)")
    for evaluation in timed:
        latency, accuracy = evaluation.figures["latency"], evaluation.figures["accuracy"]
        name = "answer_start_seconds" if "answer_start_seconds" in latency else "first_token_seconds"
        error = 100 * math.sqrt(accuracy * (1 - accuracy) / evaluation.figures["questions"])
        width = 500 * latency.get(f"{name}_iqr", 0)
        position = 1000 * latency[name], 100 * accuracy
        axes.errorbar(*position, xerr=width, yerr=error, marker="o", capsize=3, label=evaluation.label)
    axes.set_xscale("log")
    return [_picture("latency", "accuracy against latency", figure, axes)]


def _axes(title: str, xlabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylim=(0, 103))
    return figure, axes


def _picture(name: str, title: str, figure: Any, axes: Any) -> Picture:
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Picture(name, title, buffer.getvalue())
