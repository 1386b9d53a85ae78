"""Tensors of the plain model written as safetensors files, shard by shard, without holding the model.

Memory: some MiB for what is copied, one tensor for what is computed (a merged adapter). The work of several processes, or
of several MPI ranks, is a list of files each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint.tensors import ModelTensor, forget_files, read_chunks, read_tensor, safetensors_header
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.files import ChecksumWriter, FileRecord

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size as transformers writes it: `5GB`, `200MB`, `64MiB`. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or not int(match[1]):
        raise ConfigError(f"--max-shard-size: {text!r} is not a size; write for example 5GB, 200MB or 64MiB")
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write: its tensors in order, each with the dtype it gets."""

    name: str
    tensors: dict[str, tuple[ModelTensor, torch.dtype]]

    @property
    def data_bytes(self) -> int:
        return sum(_size(tensor, dtype) for tensor, dtype in self.tensors.values())


def _size(tensor: ModelTensor, dtype: torch.dtype) -> int:
    elements = 1
    for length in tensor.shape:
        elements *= length
    return elements * dtype.itemsize


def plan_files(
    model: dict[str, ModelTensor], dtype: torch.dtype | None, shard_bytes: int, stem: str = "model"
) -> list[OutputFile]:
    """Deal tensors to files of at most `shard_bytes` (a larger tensor gets a file of its own), in the model's order.

    `dtype`: of floating-point tensors; None keeps each as it is stored. Other tensors always keep theirs.
    """
    files: list[dict[str, tuple[ModelTensor, torch.dtype]]] = [{}]
    size = 0
    for name, tensor in model.items():
        target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        bytes_ = _size(tensor, target)
        if files[-1] and size + bytes_ > shard_bytes:
            files.append({})
            size = 0
        files[-1][name] = (tensor, target)
        size += bytes_
    if len(files) == 1:
        return [OutputFile(f"{stem}.safetensors", files[0])]
    count = len(files)
    return [OutputFile(f"{stem}-{i:05d}-of-{count:05d}.safetensors", tensors) for i, tensors in enumerate(files, 1)]


def index_text(files: list[OutputFile]) -> str:
    """The index of several files. Sizes in bytes; a tied head has no entry, since it is in no file."""
    weight_map = {name: file.name for file in files for name in file.tensors}
    total = sum(file.data_bytes for file in files)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def tensor_values(tensor: ModelTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, in chunks, in the dtype asked for."""
    if tensor.low_rank is None:
        for part in tensor.parts:
            for chunk in read_chunks(part):
                yield chunk.to(dtype)
        return
    adapter = tensor.low_rank
    # The same arithmetic as peft's merge, in fp32, with the base added in place: one tensor in memory.
    update = read_tensor(adapter.b).float() @ read_tensor(adapter.a).float()
    if adapter.transposed:
        update = update.T.contiguous()
    update *= adapter.scaling
    flat = update.view(-1)
    start = 0
    for part in tensor.parts:
        for chunk in read_chunks(part):
            piece = flat[start : start + chunk.numel()]
            piece += chunk.float()
            yield piece.to(dtype)
            start += chunk.numel()


def write_file(folder: Path, file: OutputFile) -> FileRecord:
    """Write and sync one file; returns size and checksum. Raises CheckpointError for a value that became infinite."""
    header, _ = safetensors_header({name: (dtype, tensor.shape) for name, (tensor, dtype) in file.tensors.items()})
    writer = ChecksumWriter(folder / file.name)
    try:
        writer.write(header)
        for name, (tensor, dtype) in file.tensors.items():
            for chunk in tensor_values(tensor, dtype):
                if dtype == torch.float16 and not torch.isfinite(chunk).all():
                    raise CheckpointError(f"{name}: a value does not fit into fp16; export with --dtype bf16 or fp32")
                writer.write(chunk.view(torch.uint8).numpy())
    except BaseException:
        writer.close(sync=False)
        raise
    return writer.close()


@dataclass(frozen=True)
class _Done:
    records: dict[str, FileRecord]
    error: str = ""


def _write_files(folder: Path, files: list[OutputFile], threads: int) -> _Done:
    def write(file: OutputFile) -> tuple[str, FileRecord]:
        try:
            return file.name, write_file(folder, file)
        finally:
            forget_files()  # this thread's

    try:
        with ThreadPoolExecutor(threads) as pool:
            return _Done(dict(pool.map(write, files)))
    except OSError as error:
        return _Done({}, f"{folder}: cannot be written ({error.strerror or error})")
    except CheckpointError as error:
        return _Done({}, str(error))


def _deal(files: list[OutputFile], workers: int) -> list[list[OutputFile]]:
    """Like amounts of bytes for each worker: the largest file first, to the one with the least."""
    shares: list[list[OutputFile]] = [[] for _ in range(workers)]
    for file in sorted(files, key=lambda f: -f.data_bytes):
        min(shares, key=lambda share: sum(f.data_bytes for f in share)).append(file)
    return shares


def write_all(
    folder: Path, files: list[OutputFile], workers: Workers, meanwhile: Callable[[], None] | None = None
) -> dict[str, FileRecord]:
    """Write all files with the workers there are; the same result on every MPI rank. Raises CheckpointError.

    `meanwhile`: what the first rank does beside, while its processes write or before it does so itself.
    """
    shares = _deal(files, workers.count)
    # Copying and summing up leave Python's lock: a process alone does two files at a time.
    threads = min(2, os.cpu_count() or 1) if workers.count == 1 else 1
    done = workers.run(_write_files, [(folder, share, threads) for share in shares], meanwhile)
    if error := next((d.error for d in done if d.error), ""):
        raise CheckpointError(error)
    return {name: record for d in done for name, record in d.records.items()}


def _arrive(present: Any) -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C reaches all; the first process speaks for them
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # An executor's processes outlive one that is killed: they hold the writing end of the pipe that they wait for.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    present.wait()  # nobody takes work before all are there; one that dies before ends the executor


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Workers:
    """Who does the work: this process, several processes of this machine, or the ranks of an MPI run.

    `mpi`: whether every rank of an MPI run is here. A trainer's first rank exports alone, whatever started it.
    """

    def __init__(self, processes: int = 1, mpi: bool = False) -> None:
        from rim_dist.checkpoint.mpi import world

        self._mpi = world() if mpi else None
        if self._mpi is not None and processes > 1:
            raise ConfigError(f"--processes: {processes} under mpirun; the ranks are the processes, leave it out")
        self.count = self._mpi.size if self._mpi is not None else processes
        self._pool: ProcessPoolExecutor | None = None

    @property
    def is_first(self) -> bool:
        return self._mpi is None or self._mpi.rank == 0

    def run(
        self, function: Callable[..., Any], shares: list[tuple[Any, ...]], meanwhile: Callable[[], None] | None = None
    ) -> list[Any]:
        """The results of all shares, on every rank. `meanwhile`: done once, on the first rank, beside if it can be."""
        if self._mpi is None and self.count > 1:
            return self._run_processes(function, shares, meanwhile)
        if meanwhile is not None:
            self.on_first(meanwhile)
        if self._mpi is not None:
            return self._mpi.allgather(function(*shares[self._mpi.rank]))
        return [function(*shares[0])]

    def _run_processes(
        self, function: Callable[..., Any], shares: list[tuple[Any, ...]], meanwhile: Callable[[], None] | None
    ) -> list[Any]:
        try:
            pool = self.start()
            results = [pool.submit(function, *share) for share in shares]
            try:
                if meanwhile is not None:
                    meanwhile()
                wait(results)
            except BaseException:
                self.close()  # nobody writes while the caller clears up
                raise
            return [result.result() for result in results]
        except BrokenProcessPool as raised:
            self.close()
            raise CheckpointError(
                f"one of the {self.count} processes that write has ended (killed, perhaps for want of memory); "
                "try again with fewer --processes"
            ) from raised

    def start(self) -> ProcessPoolExecutor:
        """Start the processes and wait until all are there; `run` does it when needed."""
        if self._pool is None:
            # A server that has imported this once and forks: starting Python and torch anew takes seconds a process.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            present = context.Barrier(self.count)
            self._pool = ProcessPoolExecutor(self.count, context, initializer=_arrive, initargs=(present,))
            for answer in [self._pool.submit(os.getpid) for _ in range(self.count)]:
                answer.result()
        return self._pool

    def close(self) -> None:
        """Let the processes end; what they do is waited for, what they have not begun is left."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def on_first(self, action: Callable[[], None]) -> None:
        """Do something on one rank while the others wait; an error ends all of them with its message."""
        if self._mpi is None:
            action()
            return
        error = ""
        if self._mpi.rank == 0:
            try:
                action()
            except (CheckpointError, ConfigError) as raised:
                error = str(raised)
            except OSError as raised:
                error = f"{raised.filename or ''}: cannot be written ({raised.strerror or raised})"
        if error := self._mpi.bcast(error):
            raise CheckpointError(error)
