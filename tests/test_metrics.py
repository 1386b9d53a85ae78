"""Metrics are declared once: a new entry of the list shows up in every output. Tables are the same in three formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from ranks import run

import config_reference
from rim_dist import metrics
from rim_dist.cli import main
from rim_dist.config import LoggingSection
from rim_dist.metrics import Column, Curve, EvaluationDone, Metric, TrainStep, make_line, numbers, progress_texts, read_metrics
from rim_dist.table import Table, show
from rim_dist.training.curves import curve_metrics, draw_curves
from rim_dist.training.metrics_log import MetricsLog

WORKER = """
import sys
from rim_dist import metrics
from rim_dist.cli import main
from test_metrics import NEW

metrics.METRICS += NEW
sys.exit(main(["train", sys.argv[1]]))
"""
# One made from the sums of a step, one by block, one from an evaluation.
NEW = [
    Metric(
        "target_fraction",
        "targets / tokens",
        lambda step: float(step.sums["by_block"][1].sum()) / float(step.sums["tokens"]),
        digits=".3f",
        progress="targets {}",
        curve=Curve("targets / tokens"),
        column=Column("targets / tokens", max),
    ),
    Metric("block_targets", "number of targets", lambda step: [count for _, count in step.by_block(0)], by_block=True),
    Metric(
        "majority_accuracy",
        "fraction of questions whose most frequent answer over blocks is right",
        lambda done: done.result.majority,
        metrics.EVALUATION,
        scale=100,
        digits=".1f",
        progress="majority {}%",
        curve=Curve("accuracy by majority (%)"),
        column=Column("majority %"),
    ),
]


def step_done(**values: object) -> TrainStep:
    state = SimpleNamespace(stage="stage1", step=3, samples=48, operations=4e12)
    by_block = numpy.array([[1.0, 6.0, 0.0, 3.0, 0.0], [2, 3, 0, 2, 0], [0.0, 2.0, 0.0, 0.0, 0.0], [0, 1, 0, 0, 0]])
    sums = {"tokens": numpy.array(100.0), "operations": numpy.array(1e12), "by_block": by_block}
    packing = SimpleNamespace(efficiency=0.9, balance=0.8)
    done = TrainStep(state, packing, sums, 1.25, 1e-3, 0.5, 16, 2.0, 3 * 2**30)
    for name, value in values.items():
        setattr(done, name, value)
    return done


def test_names_of_metrics() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    assert "kind" not in names
    assert all(metric.meaning for metric in metrics.METRICS)


def test_line_of_a_step() -> None:
    line = make_line(step_done())
    assert line == {
        "kind": "train",
        "stage": "stage1",
        "samples": 48,
        "step": 3,
        "loss": 1.25,
        "block_loss": [2.0, None, 1.5],
        "step_loss": [2.0],
        "step_readouts": [1],
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "batch_samples": 16,
        "tokens": 100,
        "packing_efficiency": 0.9,
        "packing_balance": 0.8,
        "operations": 4e12,
        "seconds": 2.0,
        "samples_per_second": 8.0,
        "tokens_per_second": 50.0,
        "memory_bytes": 3 * 2**30,
    }
    assert make_line(step_done(peak_operations=2e12))["mfu"] == 0.25
    json.dumps(line)
    assert progress_texts(line) == [
        "loss 1.2500",
        "blocks 2.00 - 1.50",
        "lr 1.00e-03",
        "grad 0.500",
        "8 samples/s",
        "50 tokens/s",
        "mem 3.00 GiB",
    ]
    slow = {**line, "seconds": 40.0, "samples_per_second": 0.4}
    assert progress_texts(slow)[4:6] == ["40.0 s/step", "50 tokens/s"]
    named = numbers(line)
    assert named["block_loss/3"] == 1.5
    assert named["step_readouts/1"] == 1
    assert not named.keys() & {"kind", "stage", "step", "block_loss", "block_loss/2"}


def test_line_of_an_evaluation() -> None:
    result = SimpleNamespace(questions=8, accuracy=0.5, per_block=[0.25, 0.5], any_block=0.75)
    line = make_line(EvaluationDone(step_done().state, result))
    assert line == {
        "kind": "evaluation",
        "stage": "stage1",
        "samples": 48,
        "step": 3,
        "questions": 8,
        "accuracy": 0.5,
        "block_accuracy": [0.25, 0.5],
        "any_block_accuracy": 0.75,
        "operations": 4e12,
    }
    assert progress_texts(line) == ["8 questions", "accuracy 50.0%", "by block 25.0 50.0"]


LINES = [{"kind": "train", "stage": "stage1", "step": step, "loss": 1.0} for step in (1, 2, 3)]


@pytest.mark.parametrize(
    "damage", [b"\x00" * 40, b'{"kind": "train", "st', b"\xff\xfe", b"[1, 2]", b"17", b'{"step": 2}', b"["]
)
def test_damaged_lines_are_left_out_and_kept(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """All lines beside the damage are read, with a warning, and a resume keeps the file as it was."""
    first, second, third = (json.dumps(line).encode() for line in LINES)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content := b"\n".join([first, damage, third, second[:20]]))
    assert read_metrics(path) == [LINES[0], LINES[2]]
    assert capsys.readouterr().err.startswith(f"warning: {path}:2: 1 damaged line left out; ")
    MetricsLog(tmp_path, LoggingSection(), 3, {}).close()
    assert path.read_bytes() == b"\n".join([first, third, b""])
    (copy,) = tmp_path.glob("metrics-damaged-*.jsonl")
    assert copy.read_bytes() == content
    assert copy.name in capsys.readouterr().err
    MetricsLog(tmp_path, LoggingSection(), 3, {}).close()
    assert capsys.readouterr().err == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_metric_is_one_entry(tmp_path: Path, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of the list is enough for the log, TensorBoard, progress line, curves, report and the page of metrics."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    said = run("fork", 1, [str(worker), str(recipe_file(logging={"tensorboard": True}))]).stdout
    assert "  targets 0." in said
    assert "  majority " in said
    folder = tmp_path / "runs" / "tiny"
    lines = read_metrics(folder / "metrics.jsonl")
    train, evaluation = ([line for line in lines if line["kind"] == kind] for kind in metrics.BOTH)
    assert all(0 < line["target_fraction"] < 1 for line in train)
    assert len(train[-1]["block_targets"]) == 3
    assert "target_fraction" not in evaluation[-1]
    assert evaluation[-1]["majority_accuracy"] >= 0
    written = b"".join(path.read_bytes() for path in (folder / "tensorboard").iterdir())
    assert all(
        name in written for name in (b"train/target_fraction", b"train/block_targets/3", b"evaluation/majority_accuracy")
    )

    without = draw_curves({"tiny": lines}, [(metric, "step") for metric in curve_metrics()])
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS, *NEW])
    assert draw_curves({"tiny": lines}, [(metric, "step") for metric in curve_metrics()]) != without
    assert (folder / "report" / "curves.png").read_bytes() != without
    assert "| `block_targets` | train | by block: number of targets |  |" in config_reference.metrics_reference()

    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 0
    page, text = (tmp_path / "out" / "report.html").read_text(), (tmp_path / "out" / "report.md").read_text()
    head, _, row = (cells.split(" | ") for cells in text.partition("## Runs\n\n")[2].splitlines()[:3])
    shown = dict(zip(head, row, strict=False))
    assert shown["targets / tokens"] == f"{max(line['target_fraction'] for line in train):.3f}"
    assert "majority %" in " ".join(head)
    assert "<th>targets / tokens</th>" in page
    assert f"<td>{shown['targets / tokens']}</td>" in page
    monkeypatch.undo()
    assert main(["report", str(folder), "--output", str(tmp_path / "before")]) == 0
    pictures = [(tmp_path / name / "pictures" / "training.png").read_bytes() for name in ("out", "before")]
    assert pictures[0] != pictures[1]


# ---- tables --------------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """Texts and classes of the cells of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.classes: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag in ("th", "td")
        if self._inside:
            self.texts.append("")
            self.classes.append(dict(attrs).get("class") or "")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


TABLE = Table(["name", "a", "b"], [["x|y [/b] <z> :smile:", 1, 2.5], ["", 100, None]], "title", "lr")


def test_a_table_in_three_formats(capsys: pytest.CaptureFixture[str]) -> None:
    show(TABLE, "and text")
    assert capsys.readouterr().out == (
        "title\nname                    a     b\nx|y [/b] <z> :smile:    1   2.5\n                      100  None\nand text\n"
    )
    assert TABLE.markdown() == (
        "title\n\n| name | a | b |\n|---|--:|--:|\n| x\\|y [/b] <z> :smile: | 1 | 2.5 |\n|  | 100 | None |\n"
    )
    cells = Cells(TABLE.html())
    assert cells.texts == ["name", "a", "b", "x|y [/b] <z> :smile:", "1", "2.5", "", "100", "None"]
    assert cells.classes == ["l", "", ""] * 3
    assert "<caption>title</caption>" in TABLE.html()
    assert 'class="words"' not in TABLE.html()
    assert Table(["a", "b"], [], align="l").html().startswith('<table class="words">')


def test_a_long_row_stays_a_line_when_piped_and_has_a_frame_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "w" * 300
    assert f"{long}  1" in Table(["name", "a"], [[long, 1]]).text().splitlines()[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = TABLE.text().splitlines()
    assert lines[0] == "title"
    assert lines[1].startswith("┏━")
    assert "│ x|y [/b] <z> :smile: │   1 │  2.5 │" in lines
