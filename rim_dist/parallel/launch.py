"""Joining the process group, whatever launcher started this process."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from rim_dist.errors import ConfigError
from rim_dist.parallel import liveness
from rim_dist.parallel.environment import RankInfo, host_name, read_rank_info
from rim_dist.parallel.ops import skip_shared_memory_op

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # options of mallopt(3)
_MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class Process:
    """This process as one of the ranks. `device`: the torch device of its model; `monitor`: None for a single rank."""

    rank: int
    ranks: int
    local_rank: int
    device: str
    monitor: liveness.LivenessMonitor | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def hosts(self) -> list[str]:
        """The host of every rank."""
        return self.monitor.hosts if self.monitor is not None else [host_name()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _set_environment_from_slurm(info: RankInfo) -> None:
    """Map srun's variables to torch's. The port is computed from the job id, so that all ranks agree on it."""
    environment = os.environ
    environment.update(RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.ranks))
    if int(environment.get("SLURM_STEP_NUM_NODES", "1")) == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
    elif "MASTER_ADDR" not in environment:
        raise ConfigError(
            "MASTER_ADDR is not set: on several nodes export the head node's address before srun, for example "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 12000))


def _set_environment_from_mpi() -> None:
    """Take the ranks from MPI. DeepSpeed's own discovery takes any address of the head node and always the same port."""
    from mpi4py import MPI

    environment = os.environ
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if node.size == world.size else socket.gethostname()
    head = (environment.get("MASTER_ADDR") or address, environment.get("MASTER_PORT") or str(_free_port()))
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = world.bcast(head)
    environment.update(RANK=str(world.rank), LOCAL_RANK=str(node.rank), WORLD_SIZE=str(world.size))


def _started_by_mpi() -> bool:
    """Whether MPI started this process. mpirun's variables win over srun's: it starts its daemons with srun.

    A site may let srun set MPI's variables for every step; they count only if RIM_LAUNCHER says that MPI is used.
    """
    environment = os.environ
    if "SLURM_STEP_NUM_TASKS" in environment and environment.get("RIM_LAUNCHER") not in ("mpi", "mpirun"):
        return any(name in environment for name in ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"))
    return any(name in environment for name in _MPI_VARIABLES)


def join(timeout_seconds: float) -> Process:
    """Initialise torch.distributed through DeepSpeed for any launcher, also for a single process.

    deepspeed, torchrun: their variables. srun: SLURM's, mapped. mpirun, srun --mpi: discovered with mpi4py. The import
    of deepspeed happens here: it is slow and needs DS_ACCELERATOR set before.
    """
    import torch

    environment = os.environ
    cuda = torch.cuda.is_available()
    environment.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    if "RANK" not in environment:
        if _started_by_mpi():
            _set_environment_from_mpi()
        elif (info := read_rank_info(environment)).launcher == "slurm":
            _set_environment_from_slurm(info)
        else:
            environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if shutil.which("ninja") is None:  # torch looks for it on PATH when DeepSpeed loads an op; pip put it beside Python
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    import deepspeed

    skip_shared_memory_op()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        timeout=datetime.timedelta(seconds=timeout_seconds),
        verbose=False,
    )
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    ranks = torch.distributed.get_world_size()
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        local_ranks = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or ranks)
        # DeepSpeed runs a program to count cores at every reduction without it.
        environment.setdefault("LOCAL_SIZE", str(local_ranks))
        if ranks > 1 and "OMP_NUM_THREADS" not in environment:
            # Ranks that each use every core slow each other down many times over.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
        keep_freed_memory()
    rank = torch.distributed.get_rank()
    monitor = liveness.start_monitor(rank, ranks, timeout_seconds) if ranks > 1 else None
    return Process(rank, ranks, local_rank, f"cuda:{local_rank}" if cuda else "cpu", monitor)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep large blocks for the next step.

    By default it returns them to the system at once and gets them back page by page, which takes a tenth of a CPU's step time.
    Nothing changes if the environment has a MALLOC_ variable, the user's own setting, or if the C library is another one.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, -1)


def leave() -> None:
    """Close the process group at the regular end of a command."""
    import torch

    liveness.stop_monitor()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
