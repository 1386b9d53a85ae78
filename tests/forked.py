"""Ranks forked from one process that has imported what they need, DeepSpeed included: quick, where no launcher is tested."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ranks import ROOT, free_port

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line sets it
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "rim_dist.training.trainer",
        "rim_dist.training.engine",
        "rim_dist.training.preflight",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it, and with it torch's compiler
        "transformers.models.llama.modeling_llama",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
    ]
)


def _forked(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls the function; the process it is forked from is started without coverage."""
    traced = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_")}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.update(traced)
    return PROCESSES.Process(target=function, args=arguments)


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
        processes = [_forked(_rank, body, rank, ranks, port, str(file), arguments) for rank, file in enumerate(files)]
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


def _command(target: Sequence[str], variables: dict[str, str], output: str) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    module = target[0] == "-m"
    sys.argv = list(target[1:] if module else target)
    if module:
        runpy.run_module(target[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(target[0]).parent.resolve()))
        runpy.run_path(target[0], run_name="__main__")


def start_forked(targets: Sequence[Sequence[str]], variables: dict[str, str], outputs: Sequence[str]) -> list[BaseProcess]:
    """The ranks of one job without starting Python anew, each with its target and its output file (all may have the same).

    A target: `-m module` or a script, with arguments. What is registered with `atexit` is left out, as multiprocessing does
    (and as a rank among others does).
    """
    ranks = len(targets)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    processes = []
    for rank, (target, output) in enumerate(zip(targets, outputs, strict=True)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(_forked(_command, target, variables | shared | own, output))
        processes[-1].start()
    return processes


def run_each(commands: Sequence[tuple[Sequence[str], dict[str, str], str]], timeout: float) -> list[int | None]:
    """Exit statuses of processes that run at once, each a target with its variables and its output file."""
    processes = [_forked(_command, target, variables, output) for target, variables, output in commands]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
    return [process.exitcode for process in processes]


def run_forked(ranks: int, target: Sequence[str], timeout: float, variables: dict[str, str]) -> tuple[int | None, str]:
    """What torchrun does: the first status that is not 0 (None: time is up), and the output.

    After a rank has failed the others have a minute to notice.
    """
    deadline = time.monotonic() + timeout
    with tempfile.NamedTemporaryFile("r") as output:
        processes = start_forked([target] * ranks, variables, [output.name] * ranks)
        while (alive := [p for p in processes if p.is_alive()]) and time.monotonic() < deadline:
            connection.wait([p.sentinel for p in alive], 1)
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + 60)
        for process in alive:
            assert process.pid is not None
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        statuses = [p.exitcode for p in processes if p not in alive]
        failed = next((status for status in statuses if status), None)
        return failed if alive or failed else 0, output.read()
