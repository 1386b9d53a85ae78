"""What does the work of a conversion: this process, several processes of this machine, or the ranks of an MPI run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from rim_dist.errors import CheckpointError, ConfigError, RimError

_Outcome = tuple[Any, Exception | None]  # a result, or the error there is instead


def _attempt(action: Callable[[], Any]) -> _Outcome:
    """An MPI rank that raised would leave the others waiting for it. Bugs raise: mpirun then ends all ranks."""
    try:
        return action(), None
    except (RimError, OSError) as error:
        return None, error


def _results(outcomes: list[_Outcome]) -> list[Any]:
    if error := next((error for _, error in outcomes if error), None):
        raise error
    return [result for result, _ in outcomes]


def _mpi_world() -> Any:
    """The communicator of all ranks; None unless several were started: importing mpi4py without a runtime would fail."""
    if not any(int(os.environ.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        return None
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _prepare_process(all_started: Any) -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C reaches all; the first process reports it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # An executor's processes outlive one that is killed: they hold the writing end of the pipe that they wait for.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    all_started.wait()  # none takes work before all have started; one that dies before ends the executor


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Workers:
    """This process, `processes` processes, or (`mpi`) the ranks of an MPI run if mpirun started several.

    A trainer's first rank exports alone whatever started it, hence `mpi`.
    """

    def __init__(self, processes: int = 1, mpi: bool = False) -> None:
        self._mpi = _mpi_world() if mpi else None
        if self._mpi is not None and processes > 1:
            raise ConfigError(f"--processes: {processes} under mpirun; the ranks are the processes, leave it out")
        self.count = processes if self._mpi is None else self._mpi.size
        self.is_first = self._mpi is None or self._mpi.rank == 0
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[..., Any], arguments: list[tuple[Any, ...]], meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """Call `function` once in each worker, with its entry of `arguments`; returns all results, on every MPI rank.

        `meanwhile`: called once, on the first rank, while the processes work if there are any. An error that a user can cause
        is raised on every rank. Raises CheckpointError if a process was killed.
        """
        if self._mpi is None and self.count > 1:
            return self._run_processes(function, arguments, meanwhile)
        if meanwhile is not None:
            self.on_first(meanwhile)
        if self._mpi is None:
            return [function(*arguments[0])]
        own = arguments[self._mpi.rank]
        return _results(self._mpi.allgather(_attempt(lambda: function(*own))))

    def _run_processes(
        self, function: Callable[..., Any], arguments: list[tuple[Any, ...]], meanwhile: Callable[[], None] | None
    ) -> list[Any]:
        try:
            pool = self.start()
            results = [pool.submit(function, *values) for values in arguments]
            try:
                if meanwhile is not None:
                    meanwhile()
                wait(results)
            except BaseException:
                self.close()  # none is still writing while the caller cleans up
                raise
            return [result.result() for result in results]
        except BrokenProcessPool as raised:
            self.close()
            raise CheckpointError(
                f"one of the {self.count} processes that write has ended (killed, perhaps for want of memory); "
                "try again with fewer --processes"
            ) from raised

    def start(self) -> ProcessPoolExecutor:
        """Start the processes and wait until all have started; `run` does it when needed."""
        if self._pool is None:
            # A server that has imported this once and forks: starting Python and torch anew takes seconds a process.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["rim_dist.checkpoint.safetensors_files"])
            barrier = context.Barrier(self.count)
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_prepare_process, initargs=(barrier,))
            for answer in [self._pool.submit(os.getpid) for _ in range(self.count)]:
                answer.result()
        return self._pool

    def close(self) -> None:
        """End the processes: waits for calls that run, drops those that have not begun."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def on_first(self, action: Callable[[], object]) -> None:
        """Call `action` on the first rank while the others wait; an error that a user can cause is raised on all of them."""
        if self._mpi is None:
            action()
        else:
            _results([self._mpi.bcast(_attempt(action) if self.is_first else None)])
