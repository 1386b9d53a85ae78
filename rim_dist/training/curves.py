"""The curves of runs as a picture."""

from __future__ import annotations

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rim_dist import metrics
from rim_dist.metrics import Metric, MetricLine


def curve_metrics() -> list[Metric]:
    return [metric for metric in metrics.METRICS if metric.curve is not None]


def _points(metric: Metric, over: str, lines: Sequence[MetricLine]) -> dict[int, list[tuple[float, float]]]:
    """Points (x, y) of a run by block, NaN where a block has no value; of a metric that is not by block as block 0."""
    points = defaultdict(list)
    for line in lines:
        if line["kind"] in metric.kinds and over in line:
            numbers = metric.numbers(line)
            for block, number in numbers.items():
                points[block].append((line[over], metric.scale * number))
            for block in points.keys() - numbers.keys():
                points[block].append((line[over], math.nan))
    return points


def draw_curves(
    runs: Mapping[str, Sequence[MetricLine]], panels: Sequence[tuple[Metric, str]], logarithmic: bool = False
) -> bytes:
    """PNG with a panel for each (metric, name of the metric it is drawn over) that a run has. Dashed: a new stage.

    `runs`: lines of metrics.jsonl by name of the run. `logarithmic`: values of training steps on a logarithmic axis.
    """
    from matplotlib.figure import Figure

    drawn = [(m, over) for m, over in panels if any(_points(m, over, lines) for lines in runs.values())]
    rows = max(1, -(-len(drawn) // 2))
    figure = Figure(figsize=(11, 3.5 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, (metric, over) in zip(grid, drawn, strict=False):
        assert metric.curve is not None
        for number, (name, lines) in enumerate(runs.items()):
            for block, points in _points(metric, over, lines).items():
                colour, label = (f"C{block - 1}", f"block {block}") if block else (f"C{number}", name)
                marker = "" if "train" in metric.kinds else "o"
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, marker=marker, markersize=4, label=label)
            for before, after in itertools.pairwise(line for line in lines if line["kind"] == "train"):
                if before["stage"] != after["stage"] and over in after:
                    colour = f"C{number}" if len(runs) > 1 else "grey"
                    axes.axvline(after[over], color=colour, linestyle="--", linewidth=0.7)
        axes.set(title=metric.curve.title, xlabel=over)
        if metric.curve.limits is not None:
            axes.set_ylim(*metric.curve.limits)
        if logarithmic and "train" in metric.kinds:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(fontsize="x-small", ncols=2)
    for axes in grid[len(drawn) :]:
        axes.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
