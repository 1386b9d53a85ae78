"""Which checkpoint a run goes on from: the newest one that is intact, verified by all ranks together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from rim_dist.checkpoint import store
from rim_dist.errors import CheckpointError
from rim_dist.files import damage_of
from rim_dist.messages import say
from rim_dist.parallel.launch import Process


def agree_on_checkpoint(checkpoints: Path, process: Process) -> Path | None:
    """The newest intact checkpoint, the same on every rank; None if there is none at all. Collective.

    Sizes and checksums are compared with the manifest, the files divided among the ranks. Raises CheckpointError on every
    rank if there are checkpoints and none is intact.
    """
    several = process.ranks > 1
    names: list[Any] = [[p.name for p in store.all_checkpoints(checkpoints)] if process.is_first else None]
    if several:
        dist.broadcast_object_list(names, src=0)  # one listing: a shared file system may show ranks different ones
    for name in reversed(names[0]):
        wrong: list[Any] = [damage_of(checkpoints / name, True, process.rank, process.ranks)]
        if several:
            mine, wrong = wrong[0], [None] * process.ranks
            dist.all_gather_object(wrong, mine)
        if not any(wrong):
            return checkpoints / name
        if process.is_first:
            reason = next(w for w in wrong if w)
            say(f"{checkpoints / name} is damaged and passed over: {reason}")
    if names[0]:
        raise CheckpointError(
            f"{checkpoints}: none of its checkpoints is intact ({', '.join(names[0])}); "
            "restore one from a backup, or remove the folder to start over"
        )
    return None
