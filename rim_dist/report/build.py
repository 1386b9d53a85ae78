"""From runs to a report: which figures are put beside each other."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rim_dist.errors import ConfigError
from rim_dist.evaluation.comparison import SPLITS, compare_paired, select_by_splits
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import number
from rim_dist.evaluation.table import comparison_cells, milliseconds, percent
from rim_dist.methods import method_class, method_names
from rim_dist.report.collect import Evaluated, Pictured, RunFacts, differences
from rim_dist.report.document import Example, Examples, Paragraph, Part, Picture, Report, Section, Table
from rim_dist.report.figures import draw_blocks, draw_latency, draw_training
from rim_dist.report.html import render_html
from rim_dist.report.markdown import PICTURES, pictures, render_markdown

SHOWN = 5  # right and wrong examples of an evaluation


def build_report(runs: Sequence[RunFacts]) -> Report:
    """All sections that the runs have something for."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    report = Report("Runs: " + ", ".join(run.name for run in runs))
    for title, parts in (
        ("Runs", _runs(runs)),
        ("Accuracy", _accuracy(evaluations)),
        ("Latency", _latency(evaluations)),
        ("Pairs on the same questions", _pairs(evaluations)),
        ("Training", _pictures([("training", "loss and accuracy", draw_training(runs))])),
        ("Block budgets", [part for run in runs for sweep in run.sweeps for part in _sweep(sweep)]),
        ("What blocks do", [part for run in runs for analysis in run.analyses for part in _analysis(analysis)]),
        ("Configuration differences", _differences(runs)),
        ("Samples", [part for evaluation in evaluations for part in _samples(evaluation)]),
    ):
        if parts:
            report.sections.append(Section(title, parts))
    return report


def write_report(report: Report, folder: Path) -> None:
    """`report.html`, `report.md` and its pictures. Raises ConfigError if the folder cannot be written."""
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(render_html(report), encoding="utf-8")
        (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
        for name, content in pictures(report).items():
            (folder / PICTURES / name).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written ({error.strerror})") from None


def _pictures(drawn: Sequence[tuple[str, str, bytes | None]]) -> list[Part]:
    return [Picture(name, title, png) for name, title, png in drawn if png is not None]


def _filled(head: list[str], rows: list[list[str]]) -> Table:
    """A table without the columns that nobody has anything for."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _runs(runs: Sequence[RunFacts]) -> list[Part]:
    head = ["run", "method", "base", "K x M", "samples", "steps", "last loss", "10^12 operations", "hours", "tokens/s"]
    rows = []
    for run in runs:
        if not run.recipe:
            continue
        memory, model = run.recipe.get("memory", {}), run.recipe.get("model", {})
        method = run.recipe.get("method", "")
        row = [run.name, method, str(model.get("init_from") or "from scratch")]
        with_blocks = method in method_names() and method_class(method).uses_blocks
        row.append(f"{memory.get('blocks')} x {memory.get('tokens_per_block')}" if with_blocks else "")
        if train := run.lines("train"):
            last = train[-1]
            row += [_number(last["samples"]), _number(last["step"]), f"{last['loss']:.4f}"]
            row.append(f"{last['operations'] / 1e12:.3g}" if "operations" in last else "")
            row.append(f"{sum(line['seconds'] for line in train) / 3600:.2f}")
            row.append(_number(statistics.median(line["tokens_per_second"] for line in train)))
        rows.append(row + [""] * (len(head) - len(row)))
    return [_filled(head, rows)] if rows else []


def _data(evaluation: Evaluated) -> str:
    return str(evaluation.figures.get("data", "the recipe's"))


def _accuracy(evaluations: Sequence[Evaluated]) -> list[Part]:
    if not evaluations:
        return []
    rows = []
    for evaluation in evaluations:
        figures, correct = evaluation.figures, evaluation.correct
        share = figures["accuracy"]
        error = math.sqrt(share * (1 - share) / len(correct))
        row = [evaluation.label, _data(evaluation), str(len(correct)), f"{percent(share)} ± {percent(error)}"]
        if len(correct) > 1:
            splits = select_by_splits([correct])
            row.append(f"{percent(splits.mean)} ± {percent(splits.standard_error)}")
        else:
            row.append("")
        several = len(figures["per_block"]) > 1
        row += [percent(figures["any_block"]) if several else "", percent(figures.get("majority")) if several else ""]
        numbers = all(number(answer["target"]) is not None for answer in evaluation.answers)
        rules = figures.get("rules", {}) if numbers else {}
        row += [percent(rules.get(name)) for name in RULES]
        row.append(", ".join(f"{k}: {percent(value)}" for k, value in figures.get("pass_at_k", {}).items()))
        rows.append(row)
    head = ["evaluation", "data", "questions", "final block % ± s.e.", f"{SPLITS} splits ± s.e.", "any block", "majority"]
    head += [*RULES, "pass@k, sampled"]
    note = (
        "s.e.: of a share of so many questions; of the mean over the paper's splits, which share their questions. "
        f"{', '.join(RULES)}: the final block by others' rules (docs/evaluation.md), where targets are numbers."
    )
    parts: list[Part] = [_filled(head, rows), Paragraph(note)]
    return parts + _pictures([("blocks", "accuracy after every block", draw_blocks(evaluations))])


def _latency(evaluations: Sequence[Evaluated]) -> list[Part]:
    timed = [e for e in evaluations if e.figures.get("latency")]
    if not timed:
        return []
    names = ("first_token_seconds", "answer_start_seconds", "answer_seconds")
    rows = []
    for evaluation in timed:
        latency = evaluation.figures["latency"]
        row = [evaluation.label, str(evaluation.figures.get("device", "")), f"{latency.get('batch', 1):g}"]
        row += [milliseconds(latency[name], latency.get(f"{name}_iqr")) if name in latency else "" for name in names]
        rows.append([*row, f"{latency['new_tokens']:.1f}"])
    head = ["evaluation", "device", "batch", "TTFT ms", "first token of the answer itself ms", "full answer ms", "new tokens"]
    parts: list[Part] = [Table(head, rows), Paragraph("Medians, in brackets the width of the middle half.")]
    return parts + _pictures([("latency", "accuracy against latency", draw_latency(timed))])


def _pairs(evaluations: Sequence[Evaluated]) -> list[Part]:
    rows = [
        [a.label, b.label, *comparison_cells(compare_paired(a.correct, b.correct))]
        for a, b in itertools.combinations(evaluations, 2)
        if a.asked == b.asked
    ]
    if not rows:
        return []
    head = ["a", "b", "a %", "b %", "a - b, points (95 %)", "only a / only b right", "p (McNemar)"]
    return [Table(head, rows)]


def _sweep(sweep: Pictured) -> list[Part]:
    budgets = [
        [
            str(entry["blocks"]),
            percent(entry["accuracy"]),
            milliseconds(entry["latency"]["first_token_seconds"], entry["latency"]["first_token_seconds_iqr"]),
            milliseconds(entry["latency"]["answer_seconds"], entry["latency"]["answer_seconds_iqr"]),
        ]
        for entry in sweep.figures["budgets"]
    ]
    title = f"{sweep.label}, {sweep.figures['questions']} questions, trained with {sweep.figures['trained_blocks']} blocks"
    parts: list[Part] = [Paragraph(title), Table(["blocks", "accuracy %", "TTFT ms", "full answer ms"], budgets)]
    probe = sweep.figures["probe"]
    if "left_out" not in probe:
        head = ["probe", "AUROC", "AUPRC", "final block %", "selected %", "any block %", "recoverable", "final there %"]
        recoverable = probe["recoverable"]
        cells = [percent(probe[name]) for name in ("auroc", "auprc", "final_block", "selected", "any_block")]
        cells += [str(recoverable["questions"]), percent(recoverable["final_block"]), percent(recoverable["selected"])]
        parts.append(Table([*head, "selected there %"], [[f"on {probe['questions']} questions", *cells]]))
        rows = [
            [f"{e['confidence']:g}", percent(e["accuracy"]), f"{e['blocks']:.2f}", percent(e["saved"])]
            for e in probe["early_exit"]
        ]
        parts.append(Table(["stopping at", "accuracy %", "blocks", "blocks saved %"], rows))
        measured = sweep.figures["early_exit"]
        rows = [
            [
                label,
                percent(measured[name]["accuracy"]),
                f"{measured[name]['blocks']:.2f}",
                milliseconds(measured[name]["first_token_seconds"], measured[name]["first_token_seconds_iqr"]),
            ]
            for name, label in (("all_blocks", "all blocks in one prefill"), ("early_exit", "block by block"))
        ]
        parts.append(Table([f"timed, stopping at {measured['confidence']:g}", "accuracy %", "blocks", "TTFT ms"], rows))
    return parts + _inlined(sweep)


def _analysis(analysis: Pictured) -> list[Part]:
    patching = analysis.figures["patching"]
    exchanged = {entry["blocks"]: entry for entry in patching["exchanged"]}
    rows = []
    for k, accuracy in enumerate(analysis.figures["accuracy_per_block"], 1):
        row = [str(k), percent(accuracy), percent(analysis.figures["attention"]["by_block"][k - 1][0])]
        entry: dict[str, Any] = exchanged.get(f"block {k}", {})
        row += [percent(entry.get("own")), percent(entry.get("donor"))]
        row.append(percent(patching["left_out"][k - 1]["own"]) if patching["left_out"] else "")
        rows.append(row)
    head = ["block", "accuracy %", "attention to the question %", "exchanged: stays %", "becomes the other's %"]
    title = f"{analysis.label}, {analysis.figures['questions']} questions, {patching['pairs']} pairs for exchanges"
    return [Paragraph(title), Table([*head, "left out: stays %"], rows), *_inlined(analysis)]


def _inlined(pictured: Pictured) -> list[Part]:
    """Its pictures, under names that are unique on the page."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in pictured.label)
    return [Picture(f"{stem}-{name}", f"{pictured.label}: {name}", png) for name, png in pictured.pictures.items()]


def _differences(runs: Sequence[RunFacts]) -> list[Part]:
    with_recipe = [run for run in runs if run.recipe]
    if len(with_recipe) < 2:
        return []
    table = differences(with_recipe)
    if not table:
        return [Paragraph("The recipes are the same.")]
    rows = [[name, *("" if value is None else str(value) for value in values)] for name, values in table.items()]
    return [Table(["field", *(run.name for run in with_recipe)], rows, words=True)]


def _samples(evaluation: Evaluated) -> list[Part]:
    parts: list[Part] = []
    for wanted, word in ((True, "right"), (False, "wrong")):
        chosen = [a for a, right in zip(evaluation.answers, evaluation.correct, strict=True) if right == wanted]
        examples = [
            Example(a["question"], a["target"], list(zip(a["answers"], a["correct"], strict=True)), a["text"])
            for a in chosen[:SHOWN]
        ]
        if examples:
            shown = f"{evaluation.label}: {word}, {len(examples)} of {len(chosen)}, with the answer after every block"
            parts.append(Examples(shown, examples))
    return parts
