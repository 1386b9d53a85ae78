"""The record of every start of a run, in `logs/` of its folder, and what follows from earlier starts.

logs/current                         name of the start that owns the folder
logs/20261123T084001Z-job17-0/       one start: UTC, job, how often SLURM had restarted the job
    start.json                       environment, commit, versions, allocation, newest checkpoint
    recipe.yaml                      the resolved recipe
    rank-00003.log                   what rank 3 said, each line with UTC, host and rank
    stacks-rank-00003.txt            its stack traces, if the run hung
    ended-75                         ranks that ended with 75 (or 1, 2), a line of JSON each
    stop                             written by the job to make the ranks save and end
    status                           exit status of the start as a whole
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rim_dist.checkpoint.store import complete_checkpoints, read_state
from rim_dist.config import Recipe
from rim_dist.errors import RimError
from rim_dist.files import write_atomically
from rim_dist.parallel.environment import host_name
from rim_dist.recipe import dump_recipe
from rim_dist.training.folder import check_run_folder

CURRENT = "current"
_RECORDED = (
    "SLURM_",
    "RIM_",
    "OMP_",
    "MKL_",
    "NCCL_",
    "GLOO_",
    "MASTER_",
    "CUDA_",
    "DS_",
    "HF_",
    "TORCH",
    "PYTHON",
    "UCX_",
    "FI_",
)
_SECRET = ("TOKEN", "KEY", "SECRET", "PASS", "CREDENTIAL", "JWT", "AUTH")
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate", "safetensors", "mpi4py", "numpy")


class NoProgress(RimError):
    """The last starts of a job came no further; another one would burn the allocation."""

    exit_status = 1


class EarlierEnd(RimError):
    """An earlier job of the same chain failed for good."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_status = status


@dataclass(frozen=True)
class Attempt:
    folder: Path
    record: dict[str, Any]

    @property
    def status(self) -> int | None:
        """Exit status of the start, None while it runs (or if it was cut off)."""
        try:
            return int((self.folder / "status").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def ended(self) -> list[dict[str, Any]]:
        """What the ranks that did not end well said about it."""
        lines: list[dict[str, Any]] = []
        for path in sorted(self.folder.glob("ended-*")):
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        return lines


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def attempts_of(run: Path) -> list[Attempt]:
    """All starts of a run, oldest first."""
    found = []
    for path in sorted((run / "logs").glob("*/start.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(Attempt(path.parent, json.loads(path.read_text(encoding="utf-8"))))
    return found


def is_secret(name: str) -> bool:
    return any(word in name.upper() for word in _SECRET)


def safe_environment(environment: dict[str, str]) -> dict[str, str]:
    """The variables that decide how a run goes; nothing that could be a secret."""
    return {k: v for k, v in sorted(environment.items()) if k.startswith(_RECORDED) and not is_secret(k)}


def _commit(folder: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if commit and git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = complete_checkpoints(run / "checkpoints")
    return read_state(found[-1]).step if found else 0


def check_earlier_starts(run: Path, environment: dict[str, str]) -> None:
    """Raise if this job (or its chain) should not start once more.

    NoProgress: as many restarts as allowed began at the step where the run still is. EarlierEnd: an earlier job of the chain
    ended with 1 or 2, where starting again does not help.
    """
    starts = attempts_of(run)
    job, chain = environment.get("SLURM_JOB_ID", ""), environment.get("RIM_CHAIN", "")
    if chain:
        mine = [s for s in starts if s.record.get("chain") == chain]
        if mine and mine[-1].status in (1, 2):
            raise EarlierEnd(
                f"{run}: job {mine[-1].record['job']} of this chain ended with {mine[-1].status} (see {mine[-1].folder}); "
                "starting again would not help",
                mine[-1].status or 1,
            )
    else:
        mine = [s for s in starts if s.record.get("job") == job]
    allowed = int(environment.get("RIM_MAX_RESTARTS") or 3)
    step = newest_step(run)
    stuck = 0
    for start in reversed(mine):
        if start.record.get("checkpoint_step") != step:
            break
        stuck += 1
    if stuck > allowed:
        why = "; ".join(f"{e['host']} rank {e['rank']}: {e['why']}" for e in mine[-1].ended()[:3]) or "no rank said why"
        raise NoProgress(
            f"{run}: {stuck} starts in a row came no further than step {step} (RIM_MAX_RESTARTS={allowed}); the last one: "
            f"{why}. Look at {mine[-1].folder}; a new job starts counting anew"
        )


def begin_attempt(recipe: Recipe, environment: dict[str, str], code: Path) -> Attempt:
    """Check earlier starts, record this one and make it the owner of the run's folder."""
    run = recipe.folder
    check_run_folder(recipe)
    check_earlier_starts(run, environment)
    now = utc_now()
    job, restart = environment.get("SLURM_JOB_ID", "none"), environment.get("SLURM_RESTART_COUNT", "0")
    folder = run / "logs" / f"{now:%Y%m%dT%H%M%SZ}-job{job}-{restart}"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "time": now.isoformat(timespec="seconds"),
        "job": job,
        "job_name": environment.get("SLURM_JOB_NAME", ""),
        "restart": int(restart),
        "chain": environment.get("RIM_CHAIN", ""),
        "launcher": environment.get("RIM_LAUNCHER", ""),
        "nodes": environment.get("SLURM_JOB_NODELIST", socket.gethostname()),
        "checkpoint_step": newest_step(run),
        "commit": _commit(code),
        "versions": _versions(),
        "environment": safe_environment(environment),
    }
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    write_atomically(folder / "start.json", json.dumps(record, indent=1) + "\n")
    write_atomically(run / "logs" / CURRENT, folder.name + "\n")
    return Attempt(folder, record)


def record_end(start: Path, rank: int, status: int, why: str, suspect: bool, host: str = "") -> None:
    """Say how a rank (-1: a node without its ranks) ended.

    The file's name alone tells the job what to do, also when the disk takes no more bytes.
    """
    line = {
        "time": utc_now().isoformat(timespec="milliseconds"),
        "host": host or host_name(),
        "rank": rank,
        "status": status,
        "why": why,
        "suspect": suspect,
    }
    with contextlib.suppress(OSError):
        descriptor = os.open(start / f"ended-{status}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)


def suspects(start: Attempt) -> list[str]:
    """Nodes that a start gives reason to avoid."""
    return sorted({line["host"] for line in start.ended() if line.get("suspect")})
