"""What a run records. Each metric is declared here, once.

`metrics.jsonl`, W&B and TensorBoard, the progress line, the curves, reports and docs/metrics.md follow from the list.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rim_dist.messages import say

MetricLine = dict[str, Any]  # a line of metrics.jsonl

TRAIN = ("train",)
EVALUATION = ("evaluation",)
BOTH = TRAIN + EVALUATION


@dataclass
class TrainStep:
    """An optimizer step, as the first rank knows it when it is done. Values of `train` lines are computed from it."""

    state: Any  # the run's TrainingState after the step
    packing: Any  # data.packing.Packing of the step
    sums: Mapping[str, Any]  # over all ranks: tokens, operations, by_block (objective.loss.ReadoutLoss)
    loss: float
    learning_rate: float
    grad_norm: float
    batch_samples: int
    seconds: float = 0.0
    memory_bytes: int = 0
    peak_operations: float | None = None  # operations per second of all ranks' devices; None where not known

    def by_block(self, row: int) -> list[tuple[float, int]]:
        """Sum and count of each block up to the last one that has any; `row` and the next one of the sums by block."""
        sums, counts = self.sums["by_block"][row : row + 2, 1:].tolist()
        last = max((block for block, count in enumerate(counts, 1) if count), default=0)
        return list(zip(sums, map(int, counts), strict=True))[:last]


@dataclass
class EvaluationDone:
    """An evaluation during training. Values of `evaluation` lines are computed from it."""

    state: Any  # the run's TrainingState
    result: Any  # evaluation.evaluate.Evaluation


@dataclass(frozen=True)
class Column:
    """A column in a report's table of runs: `summary` of the metric over all lines of a run."""

    head: str
    summary: Callable[[list[Any]], float] = itemgetter(-1)
    text: Callable[[float], str] | None = None  # instead of the metric's own


@dataclass(frozen=True)
class Curve:
    """A panel of the training curves."""

    title: str
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Metric:
    """A key in the lines of metrics.jsonl, and where its values are shown.

    `value` makes the value from a `TrainStep` or an `EvaluationDone`: a list with an entry for each block if `by_block`; None
    is left out. What is shown is `scale` times the value in the format `digits`; `progress` is the text in the progress line,
    with `{}` for the value, `slow` the one instead of a value below 1, with names of the line's values.
    """

    name: str
    meaning: str
    value: Callable[[Any], Any]
    kinds: tuple[str, ...] = TRAIN
    by_block: bool = False
    scale: float = 1.0
    digits: str = ".4g"
    progress: str = ""
    slow: str = ""
    curve: Curve | None = None
    column: Column | None = None

    def numbers(self, line: MetricLine) -> dict[int, float]:
        """The numbers of a line by block, or one as block 0; empty if the line has none."""
        value = line.get(self.name)
        if not self.by_block:
            return {0: value} if isinstance(value, int | float) else {}
        return {block: number for block, number in enumerate(value or [], 1) if number is not None}

    def text(self, number: float) -> str:
        return f"{self.scale * number:{self.digits}}"

    def cell(self, lines: Sequence[MetricLine]) -> str:
        """Text in the metric's column for a run with these lines; empty without a value."""
        assert self.column is not None
        values = [line[self.name] for line in lines if line.get("kind") in self.kinds and self.name in line]
        return (self.column.text or self.text)(self.column.summary(values)) if values else ""


def _rate(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# The order is that of the keys in a line, of the progress line, of the panels and of the columns.
METRICS: list[Metric] = [
    Metric("stage", "stage of the curriculum", lambda x: x.state.stage, BOTH),
    Metric("samples", "samples seen so far", lambda x: x.state.samples, BOTH, digits=",.0f", column=Column("samples")),
    Metric("step", "optimizer steps so far", lambda x: x.state.step, BOTH, digits=",.0f", column=Column("steps")),
    Metric(
        "loss",
        "weighted token losses of the step in nats, divided by what `curriculum.normalisation` names",
        lambda x: x.loss,
        digits=".4f",
        progress="loss {}",
        curve=Curve("training loss"),
        column=Column("last loss"),
    ),
    Metric(
        "block_loss",
        "mean token loss of the readouts after each block in nats, without weights; null where there is none",
        lambda x: [total / count if count else None for total, count in x.by_block(0)],
        by_block=True,
        digits=".2f",
        progress="blocks {}",
        curve=Curve("token loss by block"),
    ),
    Metric(
        "step_loss",
        "the same over the first tokens of the readouts that are a step of the solution (docs/learning.md)",
        lambda x: [total / count if count else None for total, count in x.by_block(2)],
        by_block=True,
    ),
    Metric(
        "step_readouts",
        "number of readouts that `step_loss` is the mean of",
        lambda x: [count for _, count in x.by_block(2)],
        by_block=True,
    ),
    Metric(
        "learning_rate",
        "learning rate of the step",
        lambda x: x.learning_rate,
        digits=".2e",
        progress="lr {}",
        curve=Curve("learning rate"),
    ),
    Metric("grad_norm", "norm of the gradient before clipping", lambda x: x.grad_norm, digits=".3f", progress="grad {}"),
    Metric("batch_samples", "samples of the step", lambda x: x.batch_samples),
    Metric("tokens", "tokens of the step on all ranks", lambda x: int(x.sums["tokens"])),
    Metric("packing_efficiency", "tokens of the step / room in its micro-batches", lambda x: x.packing.efficiency),
    Metric(
        "packing_balance", "mean / largest cost of micro-batches that ranks run at the same time", lambda x: x.packing.balance
    ),
    Metric("questions", "questions of the evaluation", lambda x: x.result.questions, EVALUATION, progress="{} questions"),
    Metric(
        "accuracy",
        "fraction of right answers after the last block",
        lambda x: x.result.accuracy,
        EVALUATION,
        scale=100,
        digits=".1f",
        progress="accuracy {}%",
        curve=Curve("accuracy after the last block (%)", (0, 103)),
    ),
    Metric(
        "block_accuracy",
        "fraction of right answers after each block",
        lambda x: x.result.per_block,
        EVALUATION,
        by_block=True,
        scale=100,
        digits=".1f",
        progress="by block {}",
    ),
    Metric(
        "any_block_accuracy",
        "fraction of questions with a right answer after at least one block",
        lambda x: x.result.any_block,
        EVALUATION,
    ),
    Metric(
        "operations",
        "floating-point operations so far, forward and backward",
        lambda x: x.state.operations,
        BOTH,
        scale=1e-12,
        digits=".3g",
        column=Column("10^12 operations"),
    ),
    Metric("seconds", "time of the step", lambda x: x.seconds, scale=1 / 3600, digits=".2f", column=Column("hours", sum)),
    Metric(
        "samples_per_second",
        "`batch_samples` / `seconds`; below 1 the progress line has the seconds of the step",
        lambda x: x.batch_samples / x.seconds,
        digits=".0f",
        progress="{} samples/s",
        slow="{seconds:.1f} s/step",
    ),
    Metric(
        "tokens_per_second",
        "`tokens` / `seconds`",
        lambda x: int(x.sums["tokens"]) / x.seconds,
        digits=".0f",
        progress="{} tokens/s",
        column=Column("tokens/s", statistics.median, _rate),
    ),
    Metric(
        "memory_bytes",
        "peak memory of the first rank so far: allocated on a GPU, resident on a CPU",
        lambda x: x.memory_bytes,
        scale=2**-30,
        digits=".2f",
        progress="mem {} GiB",
    ),
    Metric(
        "mfu",
        "model FLOPs utilisation: operations of the step / peak of the devices; absent where that is not known",
        lambda x: float(x.sums["operations"]) / x.seconds / x.peak_operations if x.peak_operations else None,
        scale=100,
        digits=".1f",
        progress="MFU {}%",
    ),
]


def make_line(done: TrainStep | EvaluationDone) -> MetricLine:
    """The line of metrics.jsonl for a step or an evaluation."""
    kind = "train" if isinstance(done, TrainStep) else "evaluation"
    values = {metric.name: metric.value(done) for metric in METRICS if kind in metric.kinds}
    return {"kind": kind} | {name: value for name, value in values.items() if value is not None}


def numbers(line: MetricLine) -> dict[str, float]:
    """All numbers of a line but its step, as W&B and TensorBoard name them: `loss`, `block_loss/1`, ..."""
    return {
        f"{metric.name}/{block}" if block else metric.name: number
        for metric in METRICS
        if metric.name != "step"
        for block, number in metric.numbers(line).items()
    }


def progress_texts(line: MetricLine) -> list[str]:
    """What the progress line says of a line. A block without a value, since its steps have faded out, is a dash."""
    texts = []
    for metric in METRICS:
        if metric.progress and (found := metric.numbers(line)):
            if metric.slow and found[0] < 1:
                texts.append(metric.slow.format_map(line))
                continue
            blocks = range(1, max(found) + 1) if max(found) else found
            shown = (metric.text(found[block]) if block in found else "-" for block in blocks)
            texts.append(metric.progress.format(" ".join(shown)))
    return texts


def scan_metrics(path: Path) -> tuple[list[MetricLine], list[int]]:
    """All lines of a metrics file, in order, and the numbers of those that are damaged.

    A last line that a kill cut off, without a line end, is in neither list.
    """
    lines: list[MetricLine] = []
    damaged: list[int] = []
    *whole, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, text in enumerate([*whole, rest], 1):
        try:
            line = json.loads(text)
            if (
                line["kind"] not in BOTH
                or not isinstance(line.get("step", 0), int)
                or not isinstance(line.get("stage", ""), str)
            ):
                raise ValueError("no line of a run")
            lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            if number <= len(whole):
                damaged.append(number)
    return lines, damaged


def read_metrics(path: Path) -> list[MetricLine]:
    """All lines of a metrics file, in order. Damaged ones are left out with a warning."""
    lines, damaged = scan_metrics(path)
    if damaged:
        say(f"warning: {path}:{damaged[0]}: {damaged_text(damaged)}")
    return lines


def damaged_text(numbers: Sequence[int]) -> str:
    """What is said of damaged lines of a metrics file."""
    return f"{len(numbers)} damaged line{'s' if len(numbers) > 1 else ''} left out; figures and curves lack those steps"
