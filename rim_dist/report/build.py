"""From runs to a report: which figures are put beside each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from rim_dist import metrics
from rim_dist.errors import ConfigError
from rim_dist.evaluation.comparison import SPLITS, compare_paired, select_by_splits
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import number
from rim_dist.evaluation.tables import TIMES, analysis_tables, budget_tables, comparison_table, milliseconds, percent
from rim_dist.methods import method_class, method_names
from rim_dist.report.collect import EvaluationFolder, RunFolder, differences
from rim_dist.report.document import Examples, Part, Picture, Report
from rim_dist.report.figures import draw_blocks, draw_latency, draw_training
from rim_dist.report.html import render_html
from rim_dist.report.markdown import PICTURES, render_markdown
from rim_dist.table import Table

SHOWN = 5  # right and wrong examples of an evaluation


def build_report(runs: Sequence[RunFolder]) -> Report:
    """All sections that the runs have something for."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations]
    sections: dict[str, list[Part]] = {
        "Runs": _runs(runs),
        "Accuracy": _accuracy(evaluations),
        "Latency": _latency(evaluations),
        "Pairs on the same questions": _pairs(evaluations),
        "Training": [*draw_training(runs)],
        "Block budgets": [
            part
            for run in runs
            for budgets in run.block_budgets
            for part in (*budget_tables(budgets.figures, budgets.label), *budgets.pictures)
        ],
        "What blocks do": [
            part
            for run in runs
            for analysis in run.analyses
            for part in (*analysis_tables(analysis.figures, analysis.label), *analysis.pictures)
        ],
        "Configuration differences": _differences(runs),
        "Samples": [part for evaluation in evaluations for part in _samples(evaluation)],
    }
    names = ", ".join(run.name for run in runs)
    return Report(f"Runs: {names}", {title: parts for title, parts in sections.items() if parts})


def write_report(report: Report, folder: Path) -> None:
    """`report.html`, `report.md` and its pictures. Raises ConfigError if the folder cannot be written."""
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        (folder / "report.html").write_text(render_html(report), encoding="utf-8")
        (folder / "report.md").write_text(render_markdown(report), encoding="utf-8")
        for part in itertools.chain.from_iterable(report.sections.values()):
            if isinstance(part, Picture):
                (folder / PICTURES / f"{part.name}.png").write_bytes(part.png)
    except OSError as error:
        raise ConfigError(f"--output: {folder} cannot be written ({error.strerror})") from None


def _without_empty_columns(head: list[str], rows: list[list[str]]) -> Table:
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _runs(runs: Sequence[RunFolder]) -> list[Part]:
    columns = [metric for metric in metrics.METRICS if metric.column is not None]
    rows = []
    for run in runs:
        if not run.recipe:
            continue
        memory, model = run.recipe.get("memory", {}), run.recipe.get("model", {})
        method = run.recipe.get("method", "")
        with_blocks = method in method_names() and method_class(method).uses_blocks
        size = f"{memory.get('blocks')} x {memory.get('tokens_per_block')}" if with_blocks else ""
        base = str(model.get("init_from") or "from scratch")
        rows.append([run.name, method, base, size, *(metric.cell(run.metrics) for metric in columns)])
    head = ["run", "method", "base", "K x M", *(metric.column.head for metric in columns if metric.column)]
    return [_without_empty_columns(head, rows)] if rows else []


def _accuracy(evaluations: Sequence[EvaluationFolder]) -> list[Part]:
    if not evaluations:
        return []
    rows = []
    for evaluation in evaluations:
        figures, correct = evaluation.figures, evaluation.correct
        accuracy = figures["accuracy"]
        error = math.sqrt(accuracy * (1 - accuracy) / len(correct))
        row = [evaluation.label, str(figures.get("data", "the recipe's")), str(len(correct))]
        row.append(f"{percent(accuracy)} ± {percent(error)}")
        splits = select_by_splits([correct]) if len(correct) > 1 else None
        row.append(f"{percent(splits.mean)} ± {percent(splits.standard_error)}" if splits else "")
        several = len(figures["per_block"]) > 1
        row += [percent(figures["any_block"]) if several else "", percent(figures.get("majority")) if several else ""]
        numbers = all(number(answer["target"]) is not None for answer in evaluation.answers)
        rules = figures.get("rules", {}) if numbers else {}
        row += [percent(rules.get(name)) for name in RULES]
        row.append(", ".join(f"{k}: {percent(value)}" for k, value in figures.get("pass_at_k", {}).items()))
        rows.append(row)
    head = ["evaluation", "data", "questions", "final block % ± s.e.", f"{SPLITS} splits ± s.e.", "any block", "majority"]
    note = (
        "s.e.: of a fraction of so many questions; of the mean over the paper's splits, which share their questions. "
        f"{', '.join(RULES)}: the final block by others' rules (docs/evaluation.md), where targets are numbers."
    )
    return [_without_empty_columns([*head, *RULES, "pass@k, sampled"], rows), note, *draw_blocks(evaluations)]


def _latency(evaluations: Sequence[EvaluationFolder]) -> list[Part]:
    timed = [e for e in evaluations if e.figures.get("latency")]
    if not timed:
        return []
    rows = []
    for evaluation in timed:
        latency, device = evaluation.figures["latency"], evaluation.figures.get("device", "")
        times = (milliseconds(latency, name) for name in TIMES)
        rows.append([evaluation.label, device, f"{latency.get('batch', 1):g}", *times, f"{latency['new_tokens']:.1f}"])
    head = ["evaluation", "device", "batch", *TIMES.values(), "new tokens"]
    return [Table(head, rows), "Medians, in brackets the width of the middle half.", *draw_latency(timed)]


def _pairs(evaluations: Sequence[EvaluationFolder]) -> list[Part]:
    pairs = [
        (a.label, b.label, compare_paired(a.correct, b.correct))
        for a, b in itertools.combinations(evaluations, 2)
        if a.questions == b.questions
    ]
    return [comparison_table(pairs)] if pairs else []


def _differences(runs: Sequence[RunFolder]) -> list[Part]:
    with_recipe = [run for run in runs if run.recipe]
    if len(with_recipe) < 2:
        return []
    table = differences(with_recipe)
    if not table:
        return ["The recipes are the same."]
    rows = [[name, *("" if value is None else str(value) for value in values)] for name, values in table.items()]
    return [Table(["field", *(run.name for run in with_recipe)], rows, align="l")]


def _samples(evaluation: EvaluationFolder) -> list[Part]:
    parts: list[Part] = []
    for wanted, word in ((True, "right"), (False, "wrong")):
        chosen = [a for a, right in zip(evaluation.answers, evaluation.correct, strict=True) if right == wanted]
        shown = chosen[:SHOWN]
        if shown:
            title = f"{evaluation.label}: {word}, {len(shown)} of {len(chosen)}, with the answer after every block"
            parts.append(Examples(title, shown))
    return parts
