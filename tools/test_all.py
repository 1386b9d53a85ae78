"""All tests in groups that can be resumed: the quick ones of `make test`, the thorough ones, and all that is done to SLURM.

    python tools/test_all.py [--minutes N] [--only WORD] [--write]

A group is a file of tests. One that passed at this commit is not run again; a run that is stopped, or that `--minutes` ends
(exit status 75), goes on where it was. `--write` puts the table into docs/testing.md once all groups have passed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from rim_dist.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "build" / "test-all.json"
PAGE = ROOT / "docs" / "testing.md"
TRY_AGAIN = 75
_NO_TESTS = 5  # pytest's exit status
_HEADING = "## The last complete run"


def commit() -> str:
    """The commit, with a mark if tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = "-changed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def run_group(path: Path) -> dict[str, object]:
    """Run a file of tests, thorough ones included. Returns its exit status, its counts and how long it took."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(path.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n", flush=True)
    last = next((line for line in reversed(done.stdout.splitlines()) if re.search(r"\d+ (passed|failed|skipped)", line)), "")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {"status": done.returncode, "counts": counts, "minutes": round((time.monotonic() - started) / 60, 2)}


def table(results: dict[str, dict[str, object]], at: str) -> str:
    """The section of docs/testing.md on a complete run."""
    rows: list[list[object]] = []
    total: dict[str, int] = {}
    minutes = 0.0
    for name, result in results.items():
        counts = dict(result["counts"])  # type: ignore[call-overload]
        for word, number in counts.items():
            total[word] = total.get(word, 0) + number
        minutes += float(str(result["minutes"]))
        rows.append([name, counts.get("passed", 0), counts.get("skipped", 0), result["minutes"]])
    rows.append(["all", total.get("passed", 0), total.get("skipped", 0), f"{minutes:.0f}"])
    title = f"Commit {at}, {datetime.date.today().isoformat()}, {os.cpu_count()} cores."
    return f"{_HEADING}\n\n" + Table(["file", "passed", "left out", "minutes"], rows, title).markdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="begin no group after so long; the same command goes on")
    parser.add_argument("--only", default="", metavar="WORD", help="groups with this word in their name")
    parser.add_argument("--write", action="store_true", help="write the table into docs/testing.md when all have passed")
    options = parser.parse_args()
    at, deadline = commit(), time.monotonic() + 60 * (options.minutes or 1e9)
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    results: dict[str, dict[str, object]] = kept.get("groups", {}) if kept.get("commit") == at else {}
    groups = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if options.only in path.stem]
    failed = []
    for path in groups:
        if results.get(path.stem, {}).get("status") == 0:
            continue
        if time.monotonic() > deadline:
            print("test-all: the time is over; the same command goes on", flush=True)
            return TRY_AGAIN
        print(f"==== {path.stem}", flush=True)
        result = run_group(path)
        if result["status"] == _NO_TESTS:
            result["status"] = 0
        results[path.stem] = result
        if result["status"]:
            failed.append(path.stem)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"commit": at, "groups": results}, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"test-all: failed: {', '.join(failed)}", flush=True)
        return 1
    text = table({path.stem: results[path.stem] for path in groups}, at)
    print(text)
    if options.write:
        PAGE.write_text(PAGE.read_text(encoding="utf-8").partition(_HEADING)[0] + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
