"""Figures as tables for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rim_dist.evaluation.evaluate import Evaluation


def print_evaluation(result: Evaluation, title: str) -> None:
    """Accuracy by block and latency on standard output."""
    console = Console(highlight=False)
    table = Table(title=f"{title}: {result.questions} questions")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("accuracy, final block", f"{100 * result.accuracy:.1f} %")
    if len(result.per_block) > 1:
        for k, value in enumerate(result.per_block, 1):
            table.add_row(f"accuracy, block {k}", f"{100 * value:.1f} %")
        table.add_row("accuracy, any block", f"{100 * result.any_block:.1f} %")
    if result.latency:
        table.add_row("time to first token (TTFT), median", f"{1000 * result.latency['first_token_seconds']:.1f} ms")
        table.add_row("full answer, median", f"{1000 * result.latency['answer_seconds']:.1f} ms")
        table.add_row("new tokens, mean", f"{result.latency['new_tokens']:.1f}")
    console.print(table)
