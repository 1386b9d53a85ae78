"""Which checkpoint a run goes on from: the newest one that is intact, verified by all ranks together."""

from __future__ import annotations

import json
from pathlib import Path

from rim_dist.checkpoint import store
from rim_dist.errors import CheckpointError
from rim_dist.files import damage_of
from rim_dist.messages import say
from rim_dist.parallel.launch import Process


def agree_on_checkpoint(checkpoints: Path, process: Process) -> Path | None:
    """The newest intact checkpoint, the same on every rank; None if there is none at all. All ranks call it.

    Sizes and checksums are compared with the manifest, the files divided among the ranks. Raises CheckpointError on every
    rank if there are checkpoints and none is intact.
    """
    listed = [p.name for p in store.all_checkpoints(checkpoints)] if process.is_first else []
    names: list[str] = json.loads(process.share(json.dumps(listed))[0])  # a shared file system may show ranks different ones
    for name in reversed(names):
        wrong = process.share(damage_of(checkpoints / name, True, process.rank, process.ranks))
        if not any(wrong):
            return checkpoints / name
        if process.is_first:
            reason = next(w for w in wrong if w)
            say(f"{checkpoints / name} is damaged and passed over: {reason}")
    if names:
        raise CheckpointError(
            f"{checkpoints}: none of its checkpoints is intact ({', '.join(names)}); "
            "restore one from a backup, or remove the folder to start over"
        )
    return None
