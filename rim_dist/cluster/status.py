"""`rim-dist status`: how runs stand, from their folders and from squeue where there is one."""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_dist.checkpoint.store import complete_checkpoints, read_state
from rim_dist.cluster.attempts import Attempt, attempts_of
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.training.metrics import read_metrics

_RECENT = 20  # steps whose time an ETA is made from


@dataclass(frozen=True)
class RunStatus:
    """A run as its folder shows it. Fields are None where the folder does not say."""

    name: str
    state: str
    stage: str | None
    step: int | None
    total_steps: int | None
    loss: float | None
    eta_seconds: float | None
    checkpoint: str | None
    starts: int
    last_end: str | None


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "logs").is_dir()


def find_runs(output_dir: Path) -> list[Path]:
    """The runs below a folder, in order of their names."""
    if not output_dir.is_dir():
        raise ConfigError(f"{output_dir}: no such folder; name a run, or the folder that holds runs")
    return [path for path in sorted(output_dir.iterdir()) if path.is_dir() and is_run(path)]


def job_state(job: str) -> str | None:
    """What squeue says of a job: RUNNING, PENDING (reason); None if it does not know the job or is not there."""
    if not job.isdigit() or shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format=%A %T %r %S"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return None
    # One task of an array has the array's number, for which squeue answers with all of them.
    words = next((rest for number, *rest in map(str.split, done.stdout.splitlines()) if number == job), None)
    if done.returncode or not words:
        return None
    if words[0] != "PENDING":
        return words[0]
    return f"PENDING ({words[1]}{', ' + words[2] if len(words) > 2 and words[2] != 'N/A' else ''})"


def _plan_steps(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["total_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _eta(train: list[dict[str, Any]], total: int | None, running: bool) -> float | None:
    if not running or total is None or not train:
        return None
    return statistics.median(line["seconds"] for line in train[-_RECENT:]) * (total - train[-1]["step"])


def _last_end(starts: list[Attempt]) -> str | None:
    for start in reversed(starts):
        if start.status is not None:
            said = start.ended()
            why = f": {said[0]['host']} rank {said[0]['rank']} {said[0]['why']}" if said else ""
            return f"{start.status}{why}"
    return None


def run_status(folder: Path) -> RunStatus:
    """How a run stands. Raises ConfigError if the folder is not a run's."""
    if not is_run(folder):
        raise ConfigError(f"{folder}: not a run of rim_dist")
    starts = attempts_of(folder)
    train = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    total = _plan_steps(folder)
    found = complete_checkpoints(folder / "checkpoints")
    checkpoint, finished = None, False
    if found:
        try:
            state = read_state(found[-1])
            written = datetime.datetime.fromtimestamp((found[-1] / "manifest.json").stat().st_mtime, datetime.UTC)
            checkpoint, finished = f"step {state.step} ({written:%Y-%m-%dT%H:%M:%SZ})", state.finished
        except (CheckpointError, OSError):
            checkpoint = found[-1].name
    queue = job_state(str(starts[-1].record.get("job", ""))) if starts else None
    if finished and (folder / "report" / "curves.png").is_file():  # the last thing a run writes
        state_text = "finished"
    elif queue is not None:
        state_text = f"job {starts[-1].record['job']} {queue}"
    elif starts and starts[-1].status is not None:
        state_text = f"ended with {starts[-1].status}"
    else:
        state_text = "not in the queue" if starts else "not started by a job"
    last = train[-1] if train else None
    return RunStatus(
        name=folder.name,
        state=state_text,
        stage=last["stage"] if last else None,
        step=last["step"] if last else None,
        total_steps=total,
        loss=last["loss"] if last else None,
        eta_seconds=_eta(train, total, queue == "RUNNING"),
        checkpoint=checkpoint,
        starts=len(starts),
        last_end=_last_end(starts),
    )


def _span(seconds: float | None) -> str:
    return "-" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))


def describe(status: RunStatus) -> str:
    """A run in a few lines of text."""
    step = "-" if status.step is None else f"{status.step}/{status.total_steps or '?'}"
    loss = "-" if status.loss is None else f"{status.loss:.4f}"
    lines = [
        f"{status.name}: {status.state}",
        f"  {status.stage or '-'}  step {step}  loss {loss}  ETA {_span(status.eta_seconds)}",
        f"  last checkpoint {status.checkpoint or '-'}  restarts {max(0, status.starts - 1)}",
    ]
    if status.last_end is not None:
        lines.append(f"  last end {status.last_end}")
    return "\n".join(lines)
