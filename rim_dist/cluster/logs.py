"""`rim-dist logs`: the ranks' output over all attempts of a run, in the order of time."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from rim_dist.cluster.attempts import attempts_of
from rim_dist.errors import ConfigError


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")


def merged(run: Path, rank: int | None = None, stacks: bool = False) -> Iterator[str]:
    """Log lines of all ranks (or one) of all attempts, merged by time: every line begins with its UTC time.

    `stacks`: the stack traces instead, each below its file's name.
    """
    attempts = attempts_of(run)
    if not attempts:
        raise ConfigError(f"{run}: no start of a job has been recorded here")
    number = "*" if rank is None else f"{rank:05d}"
    pattern = f"stacks-rank-{number}.txt" if stacks else f"rank-{number}.log"
    files = [path for attempt in attempts for path in sorted(attempt.folder.glob(pattern))]
    if not files:
        raise ConfigError(f"{run}: no {'stack traces' if stacks else 'logs'}{'' if rank is None else f' of rank {rank}'}")
    if stacks:
        return (line for path in files for line in (f"--- {path.relative_to(run)}", *_lines(path)))
    return heapq.merge(*(_lines(path) for path in files), key=lambda line: line[:24])
