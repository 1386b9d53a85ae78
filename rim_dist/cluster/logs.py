"""`rim-dist logs`: what the ranks of a run said, over all its starts, in the order of time."""

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
    """Log lines of all ranks (or one) of all starts. Every line begins with its UTC time; each file is in order.

    `stacks`: the stack traces instead, each below its file's name.
    """
    starts = attempts_of(run)
    if not starts:
        raise ConfigError(f"{run}: no start of a job has been recorded here")
    kind = "stacks-rank" if stacks else "rank"
    suffix = "txt" if stacks else "log"
    pattern = f"{kind}-{'*' if rank is None else f'{rank:05d}'}.{suffix}"
    files = [path for start in starts for path in sorted(start.folder.glob(pattern))]
    if not files:
        raise ConfigError(f"{run}: no {'stack traces' if stacks else 'logs'}{'' if rank is None else f' of rank {rank}'}")
    if stacks:
        return (line for path in files for line in (f"--- {path.relative_to(run)}", *_lines(path)))
    return heapq.merge(*(_lines(path) for path in files), key=lambda line: line[:24])
