"""What a process finds around it: its rank from the launcher, host, cores, network interface, packages and their files."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rim_dist.errors import ConfigError

# Names of rank, world size, local rank and ranks on the node, by launcher. RANK and WORLD_SIZE go before the others: MPI and
# srun may start what sets them. MPI goes before SLURM: mpirun starts its daemons with srun, and its ranks see their variables.
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LOCAL_RANKS = {"LOCAL_WORLD_SIZE": "torch", "LOCAL_SIZE": "deepspeed"}
_MPI = {
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


@dataclass(frozen=True)
class RankInfo:
    """What the launcher says of this process.

    `launcher`: torch, deepspeed, openmpi, hydra, slurm, none, or `variables` for RANK and WORLD_SIZE set by something else.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    launcher: str


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """The rank that a launcher gave this process; rank 0 of 1 without a launcher.

    Raises ConfigError, naming the variable, for half of what a launcher sets and for values that contradict each other.
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return _from_torch(environment)
    for launcher, names in _MPI.items():
        if all(name in environment for name in names):
            rank, ranks, local, per_node = (_count(environment, name) for name in names)
            return RankInfo(rank, ranks, local, per_node, launcher)
    if all(name in environment for name in _SLURM[:2]):
        rank, ranks, local, nodes = (_count(environment, name, default) for name, default in zip(_SLURM, "0101", strict=True))
        return RankInfo(rank, ranks, local, -(-ranks // max(1, nodes)), "slurm")
    return RankInfo(0, 1, 0, 1, "none")


def _count(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not allowed; allowed: a whole number (or unset it)")
    return int(text)


def _from_torch(environment: Mapping[str, str]) -> RankInfo:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environment:
            raise ConfigError(f"{name} is not set, though {other}={environment[other]} is: set both, or neither")
    rank, ranks = _count(environment, "RANK"), _count(environment, "WORLD_SIZE")
    if rank >= ranks:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={ranks}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if ranks > 1 and not environment.get(name):
            raise ConfigError(f"{name} is not set, though WORLD_SIZE={ranks} is: rank 0's host and a free port of it")
    sizes = [(name, launcher) for name, launcher in _LOCAL_RANKS.items() if name in environment]
    size, launcher = sizes[0] if sizes else ("", "variables")
    if launcher == "variables":
        _check_against_slurm(environment, rank, ranks)
    if "LOCAL_RANK" not in environment:
        return RankInfo(rank, ranks, 0, 1, "variables")
    local, local_ranks = _count(environment, "LOCAL_RANK"), _count(environment, size) if size else ranks
    if local >= local_ranks:
        raise ConfigError(f"LOCAL_RANK={local} is not below {size or 'WORLD_SIZE'}={local_ranks}")
    return RankInfo(rank, ranks, local, local_ranks, launcher)


def _check_against_slurm(environment: Mapping[str, str], rank: int, ranks: int) -> None:
    """Raise ConfigError where srun started several tasks and RANK and WORLD_SIZE, left over from elsewhere, say otherwise."""
    if any(name in environment for name in MPI_RANKS) or not all(name in environment for name in _SLURM[:2]):
        return
    task, tasks = (_count(environment, name) for name in _SLURM[:2])
    if tasks > 1 and (rank, ranks) != (task, tasks):
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={ranks} are set, but srun started this process as task {task} of {tasks}; unset RANK "
            "and WORLD_SIZE"
        )


def host_name() -> str:
    """The node as SLURM calls it, or this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told from every other. `machine`: the kernel and the namespace in which its pid means something, if known."""

    host: str
    machine: str
    pid: int
    start_time: str

    @staticmethod
    def this() -> ProcessIdentity:
        return ProcessIdentity(host_name(), _machine(), os.getpid(), _start_time(os.getpid()) or "")

    @property
    def is_here(self) -> bool:
        """Whether it can be seen from this process."""
        return self.machine == _machine() != ""

    @property
    def alive(self) -> bool:
        return _start_time(self.pid) == self.start_time


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When a process of this machine started (clock ticks since boot); None if it has ended, a zombie included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def cores_of_rank(info: RankInfo, cores: set[int]) -> set[int]:
    """The cores of a node for this rank, where one task holds all ranks of the node; all cores if there are too few."""
    if info.launcher not in ("torch", "deepspeed") or len(cores) < info.local_ranks:
        return cores
    count = len(cores) // info.local_ranks
    return set(sorted(cores)[info.local_rank * count : (info.local_rank + 1) * count])


def interface_to(host: str) -> str | None:
    """The network interface over which the head node is reached; on the head node, the one that has its address.

    None where that is the loopback (a single node) or the name is not known.
    """
    import psutil

    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: asks the routing table
            own = probe.getsockname()[0]
        interfaces = psutil.net_if_addrs()
    except OSError:
        return None
    return next((name for name, found in interfaces.items() if name != "lo" and own in (a.address for a in found)), None)


def rank_environment(info: RankInfo, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that a rank's process needs in addition to those of its launcher."""
    extra: dict[str, str] = {}
    if info.launcher == "slurm" and environment.get("RIM_LAUNCHER") not in ("mpi", "mpirun"):
        extra.update(RANK=str(info.rank), WORLD_SIZE=str(info.ranks), LOCAL_RANK=str(info.local_rank))
        extra["LOCAL_WORLD_SIZE"] = str(info.local_ranks)
    head = environment.get("MASTER_ADDR")
    interface = environment.get("RIM_INTERFACE") or (interface_to(head) if head else None)
    if interface:
        extra.update({name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in environment})
    return extra


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def shipped_folder(name: str) -> Path:
    """`ds_configs/` or `slurm/`: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / name if (package / name).is_dir() else package.parent / name
