"""Where a rank stands among the ranks: one mapping for every launcher, and what follows from it for cores and network."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

# Who names rank, ranks, local rank and ranks of the node. The first launcher whose names are all there is the one: mpirun
# starts its daemons with srun, so that its ranks see SLURM's variables of the daemon as well.
_NAMES = {
    "torch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "deepspeed": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE"),
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "hydra": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class RankInfo:
    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    launcher: str

    @property
    def shares_task(self) -> bool:
        """Whether one SLURM task holds all ranks of the node, so that its cores are still to be divided among them."""
        return self.launcher in ("torch", "deepspeed")


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """The info a launcher gave this process; a process alone if there is no launcher."""
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
    """The part of the node's cores for this rank, where the launcher has not divided them; all if there are too few."""
    if not info.shares_task or len(cores) < info.local_ranks:
        return cores
    share = len(cores) // info.local_ranks
    ordered = sorted(cores)
    return set(ordered[info.local_rank * share : (info.local_rank + 1) * share])


def interface_to(host: str) -> str | None:
    """The network interface over which the head node is reached; on the head node, the one that has its address.

    None where that is the loopback (a single node) or the name is not known.
    """
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: asks the routing table
            own = probe.getsockname()[0]
    except OSError:
        return None
    for _, name in socket.if_nameindex():
        if name != "lo" and _address_of(name) == own:
            return name
    return None


def _address_of(interface: str) -> str | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        SIOCGIFADDR = 0x8915  # noqa: N806  # the kernel's name
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


def rank_environment(info: RankInfo, environment: Mapping[str, str]) -> dict[str, str]:
    """What the rank's process needs beside what the launcher gave it."""
    extra: dict[str, str] = {}
    if info.launcher == "slurm" and environment.get("RIM_LAUNCHER") not in ("mpi", "mpirun"):
        extra.update(RANK=str(info.rank), WORLD_SIZE=str(info.ranks), LOCAL_RANK=str(info.local_rank))
        extra["LOCAL_WORLD_SIZE"] = str(info.local_ranks)
    head = environment.get("MASTER_ADDR")
    interface = environment.get("RIM_INTERFACE") or (interface_to(head) if head else None)
    if interface:
        extra.update({name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in environment})
    return extra
