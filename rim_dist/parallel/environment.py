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

# Each launcher's names of rank, world size, local rank and ranks on the node. The first launcher whose names are all set is
# taken: mpirun starts its daemons with srun, so its ranks also see the SLURM variables of the daemon.
_NAMES = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class RankInfo:
    """What the launcher says of this process. `launcher`: torch, deepspeed, openmpi, hydra, slurm or none."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    launcher: str


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """The rank that a launcher gave this process; rank 0 of 1 without a launcher."""
    for launcher, names in _NAMES.items():
        if all(name in environment for name in names):
            rank, ranks, local, per_node = (int(environment[name]) for name in names)
            return RankInfo(rank, ranks, local, per_node, launcher)
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        ranks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        local = int(environment.get("SLURM_LOCALID", "0"))
        return RankInfo(int(environment["SLURM_PROCID"]), ranks, local, -(-ranks // nodes), "slurm")
    return RankInfo(0, 1, 0, 1, "none")


def host_name() -> str:
    """The node as SLURM calls it, or this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


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
