"""Results as tables. The commands print them, a report has the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rim_dist.evaluation.comparison import PairedComparison, SplitFigures
from rim_dist.evaluation.evaluate import Evaluation
from rim_dist.evaluation.scoring import number
from rim_dist.table import Table

TIMES = {
    "first_token_seconds": "TTFT ms",
    "answer_start_seconds": "first token of the answer itself ms",
    "answer_seconds": "full answer ms",
}


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


def milliseconds(timed: Mapping[str, Any], name: str) -> str:
    """A median with the interquartile range in brackets where it is known; empty if the time was not measured."""
    if name not in timed:
        return ""
    spread = timed.get(f"{name}_iqr")
    return f"{1000 * timed[name]:.1f}" + ("" if spread is None else f" ({1000 * spread:.1f})")


def evaluation_table(result: Evaluation, title: str) -> Table:
    """Accuracy by block and latency."""
    rows = [("accuracy, final block", percent(result.accuracy))]
    if len(result.per_block) > 1:
        rows += [(f"accuracy, block {k}", percent(value)) for k, value in enumerate(result.per_block, 1)]
        rows.append(("accuracy, any block", percent(result.any_block)))
        rows.append(("accuracy, majority over blocks", percent(result.majority)))
    if all(number(answer["target"]) is not None for answer in result.answers):
        rows += [(f"final block by the rule of {name}", percent(value)) for name, value in result.rules.items()]
    rows += [(f"pass@{k}, sampled", percent(value)) for k, value in result.pass_at_k.items()]
    rows = [(name, f"{value} %") for name, value in rows]
    if result.latency:
        rows += [(f"{label}, median (middle half)", milliseconds(result.latency, name)) for name, label in TIMES.items()]
        rows.append(("new tokens, mean", f"{result.latency['new_tokens']:.1f}"))
    return Table(["measure", "value"], rows, f"{title}: {result.questions} questions")


def latency_table(figures: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Models side by side; multiples are of the first one's."""
    first = next(iter(figures.values()))
    rows = []
    for name, timed in figures.items():
        row = [name, f"{timed['prompt_tokens']:.1f}"]
        for measure in TIMES:
            measured = measure == "first_token_seconds" or not timed["only_first_token"]
            row += [milliseconds(timed, measure), f"{timed[measure] / first[measure]:.2f}"] if measured else ["", ""]
        rows.append([*row, "" if timed["only_first_token"] else f"{timed['new_tokens']:.1f}"])
    times = [head for label in TIMES.values() for head in (label, "x")]
    return Table(["model", "prompt tokens", *times, "new tokens"], rows, title)


def budget_tables(figures: Mapping[str, Any], title: str) -> list[Table | str]:
    """Block budgets, the probe and stopping early."""
    title = f"{title}: {figures['questions']} questions, trained with {figures['trained_blocks']} blocks"
    times = ("first_token_seconds", "answer_seconds")
    budgets = [
        [entry["blocks"], percent(entry["accuracy"]), *(milliseconds(entry["latency"], name) for name in times)]
        for entry in figures["budgets"]
    ]
    heads = ["accuracy %", "TTFT ms (middle half)", "full answer ms (middle half)"]
    tables: list[Table | str] = [Table(["blocks", *heads], budgets, title)]
    probe = figures["probe"]
    if "left_out" in probe:
        return [*tables, f"no probe: {probe['left_out']}"]
    recoverable = probe["recoverable"]
    measures = [
        ["AUROC", percent(probe["auroc"])],
        ["AUPRC (fraction of right answers)", f"{percent(probe['auprc'])} ({percent(probe['share_right'])})"],
        ["accuracy, final block", percent(probe["final_block"])],
        ["accuracy, block selected by the probe", percent(probe["selected"])],
        ["accuracy, any block", percent(probe["any_block"])],
        [
            f"on {recoverable['questions']} recoverable questions: final block / selected",
            f"{percent(recoverable['final_block'])} / {percent(recoverable['selected'])}",
        ],
    ]
    title = f"probe, trained on {probe['learned_from']} questions, on {probe['questions']} others"
    tables.append(Table(["measure", "%"], measures, title))
    exits = [
        [f"{entry['confidence']:g}", percent(entry["accuracy"]), f"{entry['blocks']:.2f}", percent(entry["saved"])]
        for entry in probe["early_exit"]
    ]
    tables.append(Table(["stopping at", "accuracy %", "blocks", "blocks saved %"], exits))
    measured = figures["early_exit"]
    ways = {"all_blocks": "all blocks in one prefill", "early_exit": "block by block, stopping early"}
    timed = [
        [
            label,
            percent(measured[name]["accuracy"]),
            f"{measured[name]['blocks']:.2f}",
            *(milliseconds(measured[name], time) for time in times),
        ]
        for name, label in ways.items()
    ]
    title = f"stopping at {measured['confidence']:g}, {measured['questions']} questions timed"
    return [*tables, Table(["", heads[0], "blocks", *heads[1:]], timed, title)]


def comparison_table(pairs: Sequence[tuple[str, str, PairedComparison]], title: str = "") -> Table:
    """Pairs of methods on the same questions."""
    rows = [
        [
            a,
            b,
            percent(pair.accuracy_a),
            percent(pair.accuracy_b),
            f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})",
            f"{pair.only_a} / {pair.only_b}",
            f"{pair.p_value:.2g}",
        ]
        for a, b, pair in pairs
    ]
    return Table(["a", "b", "a %", "b %", "a - b, points (95 %)", "only a / only b right", "p (McNemar)"], rows, title, "llr")


def selection_tables(figures: SplitFigures, names: Sequence[str], accuracies: Sequence[float]) -> list[Table | str]:
    """The choice of a checkpoint."""
    rows = [
        [name, percent(accuracy), figures.chosen.count(i)]
        for i, (name, accuracy) in enumerate(zip(names, accuracies, strict=True))
    ]
    title = f"chosen by {figures.selection_questions} questions, {len(figures.chosen)} splits"
    mean = f"{percent(figures.mean)} +- {percent(figures.standard_error)} % (standard error)"
    table = Table(["checkpoint", "accuracy %, all questions", "chosen in splits"], rows, title)
    return [table, f"accuracy on the other questions: {mean}"]


def analysis_tables(figures: Mapping[str, Any], title: str) -> list[Table | str]:
    """What the blocks do, side by side."""
    patching = figures["patching"]
    exchanged = [entry for entry in patching["exchanged"] if entry["blocks"] != "all"]
    rows = []
    for k, accuracy in enumerate(figures["accuracy_per_block"]):
        row = [k + 1, percent(accuracy), percent(figures["attention"]["by_block"][k][0])]
        if exchanged:
            row += [percent(exchanged[k]["own"]), percent(exchanged[k]["donor"]), percent(patching["left_out"][k]["own"])]
        rows.append(row)
    head = ["block", "accuracy %", "attention to the question %"]
    note = "no exchanges: no two prompts of equal length with different answers"
    if exchanged:
        head += ["exchanged: answer stays %", "becomes the other's %", "left out: answer stays %"]
        everything = patching["exchanged"][-1]
        own, donor = percent(everything["own"]), percent(everything["donor"])
        note = f"all blocks exchanged: {own} % stay, {donor} % become the other's"
    variance = ", ".join(f"{percent(value)} % {name}" for name, value in figures["states"]["variance"].items())
    title = f"{title}: {figures['questions']} questions, {patching['pairs']} pairs for exchanges"
    return [Table(head, rows, title), note, f"variance of the states: {variance}"]
