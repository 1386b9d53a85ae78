"""The command that puts runs on one page. Imports what it needs when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rim_dist.errors import EXIT_DONE


def add_report_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    """`command(name, function, description, *examples)` makes a command's parser."""
    report = command(
        "report",
        _report,
        "Runs side by side on one self-contained HTML page, and as Markdown.",
        "rim-dist report runs/demo runs/demo-direct --output comparison/",
        "rim-dist report runs/demo evaluated/llama --output comparison/",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or one that evaluate, blocks or analyse wrote")
    report.add_argument("--output", metavar="DIR", default="report", help="write report.html and report.md here (report)")


def _report(arguments: argparse.Namespace) -> int:
    from rim_dist.report.build import build_report, write_report
    from rim_dist.report.collect import collect_all

    report = build_report(collect_all(arguments.runs))
    write_report(report, Path(arguments.output))
    print(f"{Path(arguments.output) / 'report.html'}")
    return EXIT_DONE
