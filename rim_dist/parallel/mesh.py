"""Degrees of parallelism, and the process groups of a rank: the device mesh.

Rank order: tensor innermost, then sequence, then data. Launchers number ranks node by node, so tensor ranks, which communicate
most, have consecutive numbers on one node. DeepSpeed treats sequence ranks as data ranks: it shards over data x sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Coordinates(NamedTuple):
    """A rank's indices in the mesh."""

    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Degrees:
    """Over how many ranks a layer's matrices, a packed row and a global batch are split."""

    tensor: int = 1
    sequence: int = 1
    data: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data

    @property
    def shards(self) -> int:
        """Number of ranks over which ZeRO shards a tensor rank's parameters."""
        return self.sequence * self.data

    def coordinates(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor)
        data, sequence = divmod(rest, self.sequence)
        return Coordinates(data, sequence, tensor)

    def rank_of(self, at: Coordinates) -> int:
        return (at.data * self.sequence + at.sequence) * self.tensor + at.tensor

    def __str__(self) -> str:
        return f"tensor {self.tensor} x sequence {self.sequence} x data {self.data}"


@dataclass(frozen=True)
class Mesh:
    """A rank's coordinates and process groups. A group of one rank is None: nothing is sent in it.

    `shard_group`: ranks with the same slice of the matrices (data x sequence); gradients are summed and ZeRO shards over it.
    """

    degrees: Degrees
    rank: int
    coordinates: Coordinates
    tensor_group: Any = None
    sequence_group: Any = None
    shard_group: Any = None

    @staticmethod
    def alone() -> Mesh:
        return Mesh(Degrees(), 0, Coordinates(0, 0, 0))

    @property
    def shard(self) -> int:
        """The rank's number in its shard group, which seeds the random numbers of a step."""
        return self.coordinates.data * self.degrees.sequence + self.coordinates.sequence

    @property
    def counts(self) -> bool:
        """Whether this rank's measurements enter sums over ranks: all tensor ranks of a group measure the same."""
        return self.coordinates.tensor == 0


def groups_of(degrees: Degrees, kind: str) -> list[list[int]]:
    """The ranks of every group of a kind (`tensor`, `sequence`, `data`), groups by their first rank."""
    groups: dict[Coordinates, list[int]] = {}
    for rank in range(degrees.ranks):
        groups.setdefault(degrees.coordinates(rank)._replace(**{kind: 0}), []).append(rank)
    return list(groups.values())


def make_mesh(degrees: Degrees, rank: int, device_type: str) -> Mesh:
    """The mesh of this rank with its process groups. Collective: every rank calls it once."""
    from torch.distributed.device_mesh import init_device_mesh

    if degrees.ranks == 1:
        return Mesh.alone()
    coordinates = degrees.coordinates(rank)
    if degrees.tensor == degrees.sequence == 1:
        return Mesh(degrees, rank, coordinates)
    names = ("data", "sequence", "tensor")
    mesh = init_device_mesh(device_type, (degrees.data, degrees.sequence, degrees.tensor), mesh_dim_names=names)
    tensor = mesh.get_group("tensor") if degrees.tensor > 1 else None
    sequence = mesh.get_group("sequence") if degrees.sequence > 1 else None
    shards = None
    if degrees.tensor > 1:  # otherwise all ranks are one group of shards
        shards = mesh["data", "sequence"]._flatten("shards").get_group()
    return Mesh(degrees, rank, coordinates, tensor, sequence, shards)


class ModelParallelUnit:
    """The mesh as DeepSpeed's `mpu` (Megatron's interface): over which ranks it averages, whose gradients enter the norm."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self._mesh.shard_group

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.degrees.shards

    def get_data_parallel_rank(self) -> int:
        return self._mesh.shard

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tensor_group

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.degrees.tensor

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_model_parallel_rank(self) -> int:
        return self._mesh.coordinates.tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank


def describe(degrees: Degrees, hosts: Sequence[str]) -> str:
    """The mesh as a table: for each kind of group its degree, the number of groups, the most nodes one is on, and an example.

    `hosts`: the host of every rank. A warning follows if a tensor group spans several nodes.
    """
    lines = [f"{'':9}{'degree':>7}{'groups':>8}{'nodes':>7}  ranks of the first group"]
    for kind in ("tensor", "sequence", "data"):
        groups = groups_of(degrees, kind)
        nodes = max(len({hosts[rank] for rank in group}) for group in groups)
        first = groups[0]
        shown = ", ".join(map(str, first[:8])) + (f", ... {first[-1]}" if len(first) > 8 else "")
        lines.append(f"{kind:9}{len(first):7}{len(groups):8}{nodes:7}  {shown}")
    if apart := next((g for g in groups_of(degrees, "tensor") if len({hosts[rank] for rank in g}) > 1), None):
        named = ", ".join(f"{rank} on {hosts[rank]}" for rank in apart[:8])
        lines.append(
            f"warning: ranks of a tensor group are on several nodes ({named}): every layer waits for their network; "
            "best is a parallel.tensor that divides the ranks of a node, and ranks numbered node by node"
        )
    return "\n".join(lines)
