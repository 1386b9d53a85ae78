"""Figures as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from rim_dist.evaluation.comparison import PairedComparison, SplitFigures
from rim_dist.evaluation.evaluate import Evaluation
from rim_dist.evaluation.scoring import number


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def milliseconds(seconds: float, spread: float | None = None) -> str:
    """A median, with the width of the middle half where it is known."""
    return f"{1000 * seconds:.1f}" + ("" if spread is None else f" ({1000 * spread:.1f})")


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A table on standard output, numbers to the right of the first column."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    table = Table(title=title)
    for column, name in enumerate(head):
        table.add_column(name, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_evaluation(result: Evaluation, title: str) -> None:
    """Accuracy by block and latency on standard output."""
    rows = [["accuracy, final block", f"{percent(result.accuracy)} %"]]
    if len(result.per_block) > 1:
        rows += [[f"accuracy, block {k}", f"{percent(value)} %"] for k, value in enumerate(result.per_block, 1)]
        rows.append(["accuracy, any block", f"{percent(result.any_block)} %"])
        rows.append(["accuracy, majority over blocks", f"{percent(result.majority)} %"])
    if all(number(answer["target"]) is not None for answer in result.answers):
        rows += [[f"final block by the rule of {name}", f"{percent(value)} %"] for name, value in result.rules.items()]
    rows += [[f"pass@{k}, sampled", f"{percent(value)} %"] for k, value in result.pass_at_k.items()]
    if latency := result.latency:
        for name, label in (
            ("first_token_seconds", "time to first token (TTFT)"),
            ("answer_start_seconds", "first token of the answer itself"),
            ("answer_seconds", "full answer"),
        ):
            rows.append([f"{label}, median (middle half)", f"{milliseconds(latency[name], latency[name + '_iqr'])} ms"])
        rows.append(["new tokens, mean", f"{latency['new_tokens']:.1f}"])
    print_table(f"{title}: {result.questions} questions", ["measure", "value"], rows)


def print_latency(figures: dict[str, dict[str, Any]], title: str) -> None:
    """Models side by side on standard output; multiples are of the first one's."""
    first = next(iter(figures.values()))
    rows = []
    for name, timed in figures.items():
        row = [name, f"{timed['prompt_tokens']:.1f}"]
        measures = ["first_token_seconds", "answer_start_seconds", "answer_seconds"]
        for measure in measures[: 1 if timed["only_first_token"] else 3]:
            row.append(milliseconds(timed[measure], timed[f"{measure}_iqr"]))
            row.append(f"{timed[measure] / first[measure]:.2f}")
        rows.append(row + [""] * 5 if timed["only_first_token"] else [*row, f"{timed['new_tokens']:.1f}"])
    head = ["model", "prompt tokens", "TTFT ms", "x", "first token of the answer itself ms", "x", "full answer ms", "x"]
    print_table(title, [*head, "new tokens"], rows)


def print_sweep(figures: dict[str, Any], title: str) -> None:
    """Budgets, the probe and stopping early on standard output."""
    rows = [
        [
            str(entry["blocks"]),
            percent(entry["accuracy"]),
            milliseconds(entry["latency"]["first_token_seconds"], entry["latency"]["first_token_seconds_iqr"]),
            milliseconds(entry["latency"]["answer_seconds"], entry["latency"]["answer_seconds_iqr"]),
        ]
        for entry in figures["budgets"]
    ]
    head = ["blocks", "accuracy %", "TTFT ms (middle half)", "full answer ms (middle half)"]
    print_table(f"{title}: {figures['questions']} questions, trained with {figures['trained_blocks']} blocks", head, rows)
    probe = figures["probe"]
    if "left_out" in probe:
        print(f"no probe: {probe['left_out']}")
        return
    rows = [
        ["AUROC", percent(probe["auroc"])],
        ["AUPRC (share of right answers)", f"{percent(probe['auprc'])} ({percent(probe['share_right'])})"],
        ["accuracy, final block", percent(probe["final_block"])],
        ["accuracy, block selected by the probe", percent(probe["selected"])],
        ["accuracy, any block", percent(probe["any_block"])],
        [
            f"on {probe['recoverable']['questions']} recoverable questions: final block / selected",
            f"{percent(probe['recoverable']['final_block'])} / {percent(probe['recoverable']['selected'])}",
        ],
    ]
    rows += [
        [f"stopping at {entry['confidence']:g}: accuracy, blocks used", f"{percent(entry['accuracy'])}, {entry['blocks']:.2f}"]
        for entry in probe["early_exit"]
    ]
    learned = f"probe, learned from {probe['learned_from']} questions, on {probe['questions']} others"
    print_table(learned, ["measure", "%"], rows)
    measured = figures["early_exit"]
    rows = [
        [
            label,
            percent(measured[name]["accuracy"]),
            f"{measured[name]['blocks']:.2f}",
            milliseconds(measured[name]["first_token_seconds"], measured[name]["first_token_seconds_iqr"]),
            milliseconds(measured[name]["answer_seconds"]),
        ]
        for name, label in (("all_blocks", "all blocks in one prefill"), ("early_exit", "block by block, stopping early"))
    ]
    title = f"stopping at {measured['confidence']:g}, {measured['questions']} questions timed"
    print_table(title, ["", "accuracy %", "blocks", "TTFT ms (middle half)", "full answer ms"], rows)


def print_comparisons(pairs: list[tuple[str, str, PairedComparison]]) -> None:
    """Pairs of methods on the same questions on standard output."""
    head = ["a", "b", "a %", "b %", "a - b, points (95 %)", "only a / only b right", "p (McNemar)"]
    rows = [[a, b, *comparison_cells(pair)] for a, b, pair in pairs]
    print_table(f"final block, {pairs[0][2].questions} questions", head, rows)


def comparison_cells(pair: PairedComparison) -> list[str]:
    interval = f"{100 * pair.difference:+.1f} ({100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    counts = f"{pair.only_a} / {pair.only_b}"
    return [percent(pair.accuracy_a), percent(pair.accuracy_b), interval, counts, f"{pair.p_value:.2g}"]


def print_selection(figures: SplitFigures, names: list[str], accuracies: list[float]) -> None:
    """The choice of a checkpoint on standard output."""
    rows = [
        [name, percent(share), str(figures.chosen.count(i))]
        for i, (name, share) in enumerate(zip(names, accuracies, strict=True))
    ]
    splits = len(figures.chosen)
    title = f"chosen by {figures.selection_questions} questions, {splits} splits"
    print_table(title, ["checkpoint", "accuracy %, all questions", "chosen in splits"], rows)
    print(f"accuracy on the other questions: {percent(figures.mean)} +- {percent(figures.standard_error)} % (standard error)")


def print_analysis(figures: dict[str, Any], title: str) -> None:
    """Blocks side by side on standard output."""
    patching = figures["patching"]
    exchanged = [entry for entry in patching["exchanged"] if entry["blocks"] != "all"]
    rows = []
    for k, accuracy in enumerate(figures["accuracy_per_block"]):
        row = [str(k + 1), percent(accuracy), percent(figures["attention"]["by_block"][k][0])]
        if exchanged:
            row += [percent(exchanged[k]["own"]), percent(exchanged[k]["donor"]), percent(patching["left_out"][k]["own"])]
        rows.append(row)
    head = ["block", "accuracy %", "attention to the question %"]
    if exchanged:
        head += ["exchanged: answer stays %", "becomes the other's %", "left out: answer stays %"]
    print_table(f"{title}: {figures['questions']} questions, {patching['pairs']} pairs for exchanges", head, rows)
    if exchanged:
        everything = patching["exchanged"][-1]
        print(f"all blocks exchanged: {percent(everything['own'])} % stay, {percent(everything['donor'])} % become the other's")
    else:
        print("no exchanges: no two prompts of equal length with different answers")
    shares = figures["states"]["variance"]
    print("variance of the states: " + ", ".join(f"{percent(share)} % {name}" for name, share in shares.items()))
