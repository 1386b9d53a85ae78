"""Ranks forked from one process that has imported what they need: quick, for what wants neither launcher nor deepspeed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import free_port

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line sets it
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rim_dist.parallel.preflight"])


def _rank(body: Callable[..., None], rank: int, ranks: int, port: int, output: str, arguments: tuple[Any, ...]) -> None:
    from torch.distributed import TCPStore

    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    body(TCPStore("127.0.0.1", port, ranks, is_master=rank == 0, wait_for_workers=False), rank, ranks, *arguments)
    os._exit(0)


class Job:
    """What each rank of a job wrote to standard error (`said`), its exit status, and how long all took.

    `body(store, rank, ranks, *arguments)` runs in every rank, on hosts `n0`, `n1`, ...; `stopped`: a rank not waited for.
    """

    def __init__(
        self, body: Callable[..., None], ranks: int, folder: Path, *arguments: Any, stopped: int | None = None
    ) -> None:
        port, files = free_port(), [folder / f"rank-{rank}" for rank in range(ranks)]
        processes = [
            PROCESSES.Process(target=_rank, args=(body, rank, ranks, port, str(file), arguments))
            for rank, file in enumerate(files)
        ]
        began = time.monotonic()
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            if rank != stopped:
                process.join(max(1.0, began + 120 - time.monotonic()))
        self.seconds = time.monotonic() - began
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive() and rank != stopped]
        for process in processes:
            process.kill()
            process.join()
        self.said = [file.read_text() if file.exists() else "" for file in files]
        self.statuses = [process.exitcode for process in processes]
        assert not hanging, (hanging, self.said)
