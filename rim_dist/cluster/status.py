"""`rim-dist status`: the state of runs, from their folders and from squeue where there is one."""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
import subprocess
from pathlib import Path

from rim_dist.checkpoint.store import complete_checkpoints, read_state
from rim_dist.cluster.attempts import attempts_of
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.metrics import read_metrics

_RECENT = 20  # steps whose median time the ETA assumes


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "logs").is_dir()


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs in it, sorted by name. Raises ConfigError if there are none."""
    if _is_run(folder):
        return [folder]
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a run, or the folder that holds runs")
    if not (found := [path for path in sorted(folder.iterdir()) if _is_run(path)]):
        raise ConfigError(f"{folder}: holds no run")
    return found


def job_state(job: str) -> str | None:
    """The state of a job in squeue, as RUNNING or PENDING (reason); None if there is no squeue or it does not know the job."""
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


def _checkpoint(folder: Path) -> tuple[str, bool]:
    """The newest checkpoint, with its time of writing, and whether it ends the run."""
    found = complete_checkpoints(folder / "checkpoints")
    if not found:
        return "-", False
    try:
        state = read_state(found[-1])
        written = datetime.datetime.fromtimestamp((found[-1] / "manifest.json").stat().st_mtime, datetime.UTC)
    except (CheckpointError, OSError):
        return found[-1].name, False
    return f"step {state.step} ({written:%Y-%m-%dT%H:%M:%SZ})", state.finished


def describe(folder: Path) -> str:
    """A run's state in a few lines of text, with "-" or "?" where its folder does not say."""
    attempts = attempts_of(folder)
    train = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    total = _plan_steps(folder)
    checkpoint, finished = _checkpoint(folder)
    queue = job_state(str(attempts[-1].record.get("job", ""))) if attempts else None
    ended = [attempt for attempt in attempts if attempt.status is not None]
    if finished and (folder / "report" / "curves.png").is_file():  # the last thing a run writes
        state = "finished"
    elif queue is not None:
        state = f"job {attempts[-1].record['job']} {queue}"
    elif ended and ended[-1] is attempts[-1]:
        state = f"ended with {ended[-1].status}"
    else:
        state = "not in the queue" if attempts else "not started by a job"
    stage, step, loss, eta = "-", "-", "-", "-"
    if train:
        last = train[-1]
        stage, step, loss = last["stage"], f"{last['step']}/{total or '?'}", f"{last['loss']:.4f}"
        if queue == "RUNNING" and total is not None:
            seconds = statistics.median(line["seconds"] for line in train[-_RECENT:]) * (total - last["step"])
            eta = str(datetime.timedelta(seconds=round(seconds)))
    lines = [
        f"{folder.name}: {state}",
        f"  {stage}  step {step}  loss {loss}  ETA {eta}",
        f"  last checkpoint {checkpoint}  restarts {max(0, len(attempts) - 1)}",
    ]
    if ended:
        ranks = ended[-1].ended()
        why = f": {ranks[0]['host']} rank {ranks[0]['rank']} {ranks[0]['why']}" if ranks else ""
        lines.append(f"  last end {ended[-1].status}{why}")
    return "\n".join(lines)
