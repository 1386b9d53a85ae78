"""Attempts: each start of a run by a job, recorded in `logs/` of the run's folder, and what follows from earlier ones.

logs/current                         name of the attempt that owns the folder
logs/20261123T084001Z-job17-0/       one attempt: UTC, job, how often SLURM had restarted the job
    start.json                       environment, commit, versions, allocation, newest checkpoint
    recipe.yaml                      the resolved recipe
    rank-00003.log                   what rank 3 printed, each line with UTC, host and rank
    stacks-rank-00003.txt            its stack traces, if the run hung
    ended-75                         ranks that ended with 75 (or 1, 2), a line of JSON each
    stop                             written by the job to make the ranks save and end
    status                           exit status of the attempt as a whole
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_dist.checkpoint.store import complete_checkpoints, read_state
from rim_dist.config import Recipe
from rim_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, ConfigError, RimError, TrainingError
from rim_dist.files import write_atomically
from rim_dist.parallel.environment import host_name, package_versions
from rim_dist.recipe import dump_recipe
from rim_dist.training.folder import check_run_folder

CURRENT = "current"
_RECORDED = re.compile("SLURM_|RIM_|OMP_|MKL_|NCCL_|GLOO_|MASTER_|CUDA_|DS_|HF_|TORCH|PYTHON|UCX_|FI_")  # how names begin
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|JWT|AUTH", re.IGNORECASE)  # what names contain
_ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")  # still listed
_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate", "safetensors", "mpi4py", "numpy")


@dataclass(frozen=True)
class Attempt:
    folder: Path
    record: dict[str, Any]

    @property
    def status(self) -> int | None:
        """Exit status of the attempt; None while it runs, or if it was cut off."""
        try:
            return int((self.folder / "status").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def ended(self) -> list[dict[str, Any]]:
        """The records of ranks that did not end well (see `record_end`)."""
        lines: list[dict[str, Any]] = []
        for path in sorted(self.folder.glob("ended-*")):
            for text in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def suspects(self) -> list[str]:
        """Nodes that the next attempt should avoid."""
        return sorted({line["host"] for line in self.ended() if line.get("suspect")})


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def attempts_of(run: Path) -> list[Attempt]:
    """All attempts of a run, oldest first."""
    found = []
    for path in sorted((run / "logs").glob("*/start.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(Attempt(path.parent, json.loads(path.read_text(encoding="utf-8"))))
    return found


def is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None


def _commit(folder: Path) -> str:
    """The commit of a checkout, "+changes" behind it if tracked files differ; empty without git or for another folder."""
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    found = complete_checkpoints(run / "checkpoints")
    return read_state(found[-1]).step if found else 0


def check_earlier_attempts(run: Path, environment: dict[str, str], step: int) -> None:
    """Raise an error if another attempt of this job, or of its chain, would not help. `step`: of the newest checkpoint.

    That is so if an earlier job of the chain ended with 1 or 2, which is then the error's exit status, or if as many restarts
    as allowed began at `step`: the run made no progress, and another attempt would waste the allocation.
    """
    earlier = attempts_of(run)
    job, chain = environment.get("SLURM_JOB_ID", ""), environment.get("RIM_CHAIN", "")
    if chain:
        earlier = [a for a in earlier if a.record.get("chain") == chain]
        if earlier and (status := earlier[-1].status) in (EXIT_FAILED, EXIT_USAGE):
            raise (TrainingError if status == EXIT_FAILED else RimError)(
                f"{run}: job {earlier[-1].record['job']} of this chain ended with {status} (see {earlier[-1].folder}); "
                "starting again would not help"
            )
    else:
        earlier = [a for a in earlier if a.record.get("job") == job]
    allowed = int(environment.get("RIM_MAX_RESTARTS") or 3)
    steps = [attempt.record.get("checkpoint_step") for attempt in reversed(earlier)]
    stuck = next((number for number, other in enumerate(steps) if other != step), len(steps))
    if stuck > allowed:
        why = "; ".join(f"{e['host']} rank {e['rank']}: {e['why']}" for e in earlier[-1].ended()[:3]) or "no rank said why"
        raise TrainingError(
            f"{run}: {stuck} starts in a row came no further than step {step} (RIM_MAX_RESTARTS={allowed}); the last one: "
            f"{why}. Look at {earlier[-1].folder}; a new job starts counting anew"
        )


def check_owner(run: Path, job: str) -> None:
    """Raise ConfigError if another job owns the run's folder and SLURM still has it, running or waiting to go on.

    The job may not have come to its ranks, whose lease (training/lease.py) is the last word.
    """
    try:
        owner = (run / "logs" / CURRENT).read_text(encoding="utf-8").strip()
    except OSError:
        return
    attempt = next((a for a in attempts_of(run) if a.folder.name == owner), None)
    if attempt is None or attempt.record["job"] in ("none", job) or attempt.status in (EXIT_DONE, EXIT_FAILED, EXIT_USAGE):
        return
    with contextlib.suppress(FileNotFoundError):
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={attempt.record['job']}"]
        state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if state and state not in _ENDED:
            raise ConfigError(
                f"{run}: job {attempt.record['job']} ({state}) runs it; cancel that one (scancel {attempt.record['job']}), or "
                "choose another run.name"
            )


def begin_attempt(recipe: Recipe, environment: dict[str, str], code: Path) -> Attempt:
    """Check earlier attempts, record this one without secrets, and make it the owner of the run's folder."""
    run = recipe.folder
    check_run_folder(recipe)
    check_owner(run, environment.get("SLURM_JOB_ID", "none"))
    step = newest_step(run)
    check_earlier_attempts(run, environment, step)
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
        "checkpoint_step": step,
        "commit": _commit(code),
        "versions": package_versions(_PACKAGES),
        "environment": {k: v for k, v in sorted(environment.items()) if _RECORDED.match(k) and not is_secret(k)},
    }
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    write_atomically(folder / "start.json", json.dumps(record, indent=1) + "\n")
    write_atomically(run / "logs" / CURRENT, folder.name + "\n")
    return Attempt(folder, record)


def record_end(attempt: Path, rank: int, status: int, why: str, suspect: bool, host: str = "") -> None:
    """Record how a rank (-1: a node before its ranks) ended. `suspect`: the next attempt should avoid its node.

    The file's name alone tells the job what to do, even if the disk has no room for its content.
    """
    line = {
        "time": utc_now().isoformat(timespec="milliseconds"),
        "host": host or host_name(),
        "rank": rank,
        "status": status,
        "why": why,
        "suspect": suspect,
    }
    with contextlib.suppress(OSError), (attempt / f"ended-{status}").open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())
