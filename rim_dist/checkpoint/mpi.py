"""The MPI world of a conversion, if mpirun started it. Nothing else in a conversion knows MPI."""

from __future__ import annotations

import os
from typing import Any

_RANKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class MpiWorld:
    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self.rank = int(communicator.Get_rank())
        self.size = int(communicator.Get_size())

    def allgather(self, value: Any) -> list[Any]:
        return self._communicator.allgather(value)

    def bcast(self, value: Any) -> Any:
        return self._communicator.bcast(value, root=0)


def world() -> MpiWorld | None:
    """None unless several MPI ranks were started: importing mpi4py without a runtime would fail."""
    if not any(int(os.environ.get(name, "1")) > 1 for name in _RANKS):
        return None
    from mpi4py import MPI

    return MpiWorld(MPI.COMM_WORLD)
