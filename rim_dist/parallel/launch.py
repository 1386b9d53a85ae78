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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rim_dist.errors import ConfigError, first_line
from rim_dist.parallel import liveness
from rim_dist.parallel.environment import MPI_RANKS, RankInfo, host_name, read_rank_info
from rim_dist.parallel.ops import skip_shared_memory_op
from rim_dist.parallel.rendezvous import meeting, start_of

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # options of mallopt(3)


@dataclass(frozen=True)
class Process:
    """This process as one of the ranks. `device`: the torch device of its model; `monitor`: None for a single rank."""

    rank: int
    ranks: int
    device: str
    monitor: liveness.LivenessMonitor | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def follow_first(self, action: Callable[[], None]) -> None:
        """Run an action on the first rank alone; returns on all ranks when it is done there, however long it takes."""
        if self.monitor is None:
            action()
        else:
            self.monitor.follow_first(action)

    def share(self, value: str) -> list[str]:
        """The value of every rank, by rank. Ranks come to it at any time: what precedes it may wait for a disk."""
        return [value] if self.monitor is None else self.monitor.share(value)

    @property
    def hosts(self) -> list[str]:
        """The host of every rank."""
        return self.monitor.hosts if self.monitor is not None else [host_name()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_terminal() -> bool:
    """Whether a terminal controls this process. srun's tasks have none, but for the one of `srun --pty`."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _set_environment_from_slurm(info: RankInfo) -> None:
    """Map srun's variables to torch's. The port is computed from job and step, so that all ranks agree on it."""
    environment = os.environ
    if info.ranks > 1 and _has_terminal():
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={info.ranks} is of the interactive shell, whose other tasks do not start this command: "
            "start it with srun, or alone with env -u SLURM_PROCID"
        )
    if int(environment.get("SLURM_STEP_NUM_NODES", "1")) == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
    elif "MASTER_ADDR" not in environment:
        raise ConfigError(
            "MASTER_ADDR is not set: on several nodes export the head node's address before srun, for example "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    job, step = (int(environment.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    environment.setdefault("MASTER_PORT", str(20000 + (job + 101 * step) % 12000))


def _set_environment_from_mpi() -> str:
    """Take the ranks from MPI; returns what names this start on all of them.

    DeepSpeed's own discovery takes any address of the head node and always the same port.
    """
    environment = os.environ
    variable = next(name for name in MPI_RANKS if name in environment)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{variable}={environment[variable]} says that MPI started this process, but mpi4py cannot be loaded "
            f"({first_line(error)}); install it for this MPI, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        ) from None
    world = MPI.COMM_WORLD
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    promised = next((name for name in sizes if name in environment), None)
    if promised and int(environment[promised]) != world.size:
        raise ConfigError(
            f"{promised}={environment[promised]}, but mpi4py sees {world.size} rank(s): it is built for another MPI than the "
            "launcher's"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = "127.0.0.1" if node.size == world.size else socket.gethostname()
    head = (environment.get("MASTER_ADDR") or address, environment.get("MASTER_PORT") or str(_free_port()))
    environment["MASTER_ADDR"], environment["MASTER_PORT"] = world.bcast(head)
    environment.update(RANK=str(world.rank), LOCAL_RANK=str(node.rank), WORLD_SIZE=str(world.size))
    environment["LOCAL_SIZE"] = str(node.size)
    return str(world.bcast(f"MPI ranks of {socket.gethostname()}, process {os.getpid()}"))


def _started_by_mpi() -> bool:
    """Whether MPI started this process. mpirun's variables win over srun's: it starts its daemons with srun.

    A site may let srun set MPI's variables for every step; they count only if RIM_LAUNCHER says that MPI is used.
    """
    environment = os.environ
    if "SLURM_STEP_NUM_TASKS" in environment and environment.get("RIM_LAUNCHER") not in ("mpi", "mpirun"):
        return any(name in environment for name in ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID"))
    return any(name in environment for name in MPI_RANKS)


def choose_gpu(info: RankInfo, gpus: int) -> int:
    """The index of this rank's GPU among the `gpus` that it sees. Raises ConfigError if that cannot be known.

    Where a cluster or a user shows each task a GPU of its own, every local rank has the GPU 0.
    """
    if gpus == 1:
        return 0
    visible = f"{gpus} GPUs are visible (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')})"
    if info.launcher == "variables" and "LOCAL_RANK" not in os.environ and info.ranks > 1:
        raise ConfigError(
            f"LOCAL_RANK is not set, though WORLD_SIZE={info.ranks} is and {visible}: the rank's number on its host"
        )
    if info.local_rank >= gpus:
        raise ConfigError(f"LOCAL_RANK={info.local_rank}, but {visible}; start at most {gpus} ranks on {host_name()}")
    return info.local_rank


def join(timeout_seconds: float) -> Process:
    """Initialise torch.distributed through DeepSpeed for any launcher, also for a single process.

    deepspeed, torchrun: their variables. srun: SLURM's, mapped. mpirun, srun --mpi: discovered with mpi4py. The import
    of deepspeed happens here: it is slow and needs DS_ACCELERATOR set before.
    """
    import torch

    environment = os.environ
    cuda = torch.cuda.is_available()
    environment.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    shared = None
    if "RANK" not in environment and "WORLD_SIZE" not in environment and _started_by_mpi():
        shared = _set_environment_from_mpi()
    info = read_rank_info(environment)
    if info.launcher == "slurm":
        _set_environment_from_slurm(info)
    elif info.ranks == 1:
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    # DeepSpeed takes LOCAL_RANK for the index of the GPU, for the process group and for its engine.
    device = choose_gpu(info, torch.cuda.device_count()) if cuda else info.local_rank
    environment.update(RANK=str(info.rank), WORLD_SIZE=str(info.ranks), LOCAL_RANK=str(device))
    if cuda:
        torch.cuda.set_device(device)
    if shutil.which("ninja") is None:  # torch looks for it on PATH when DeepSpeed loads an op; pip put it beside Python
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    import deepspeed

    skip_shared_memory_op()
    with meeting(info, timeout_seconds, start_of(info, environment) if shared is None else shared) as init_method:
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            verbose=False,
            init_method=init_method,
        )
    if not cuda:
        # DeepSpeed runs a program to count cores at every reduction without it.
        environment.setdefault("LOCAL_SIZE", str(info.local_ranks))
        if info.ranks > 1 and "OMP_NUM_THREADS" not in environment:
            # Ranks that each use every core slow each other down many times over.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // info.local_ranks))
        keep_freed_memory()
    monitor = liveness.start_monitor(info.rank, info.ranks, timeout_seconds) if info.ranks > 1 else None
    return Process(info.rank, info.ranks, f"cuda:{device}" if cuda else "cpu", monitor)


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
