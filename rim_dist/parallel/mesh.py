"""Degrees of parallelism and the groups they make: the one object that knows who shares what with whom.

Rank order: tensor innermost, then sequence, then data. Launchers number ranks node by node, so tensor ranks, which talk most,
stand side by side on a node. To DeepSpeed sequence ranks are data ranks: it shards over data x sequence ("shards").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Coordinates(NamedTuple):
    """Where a rank stands in the mesh."""

    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Degrees:
    """How many ranks share a layer's matrices, a packed row, and a global batch."""

    tensor: int = 1
    sequence: int = 1
    data: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data

    @property
    def shards(self) -> int:
        """Ranks that ZeRO spreads a tensor rank's parameters over."""
        return self.sequence * self.data

    def place(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor)
        data, sequence = divmod(rest, self.sequence)
        return Coordinates(data, sequence, tensor)

    def rank_of(self, place: Coordinates) -> int:
        return (place.data * self.sequence + place.sequence) * self.tensor + place.tensor

    def __str__(self) -> str:
        return f"tensor {self.tensor} x sequence {self.sequence} x data {self.data}"


@dataclass(frozen=True)
class Mesh:
    """A rank among all. A group of one rank is None: nothing is sent in it.

    `shard_group`: ranks with the same slice of the matrices (data x sequence), over which gradients are summed and ZeRO shards.
    """

    degrees: Degrees
    rank: int
    place: Coordinates
    tensor_group: Any = None
    sequence_group: Any = None
    shard_group: Any = None

    @staticmethod
    def alone() -> Mesh:
        return Mesh(Degrees(), 0, Coordinates(0, 0, 0))

    @property
    def shard(self) -> int:
        """The rank's number in its shard group: what random numbers of a step are drawn by."""
        return self.place.data * self.degrees.sequence + self.place.sequence

    @property
    def counts(self) -> bool:
        """Whether what this rank measured is to be added up: tensor ranks all measure the same."""
        return self.place.tensor == 0


def make_mesh(degrees: Degrees, rank: int, device_type: str) -> Mesh:
    """The mesh of this rank with its process groups. Collective: every rank calls it once."""
    from torch.distributed.device_mesh import init_device_mesh

    if degrees.ranks == 1:
        return Mesh.alone()
    place = degrees.place(rank)
    if degrees.tensor == degrees.sequence == 1:
        return Mesh(degrees, rank, place)
    names = ("data", "sequence", "tensor")
    mesh = init_device_mesh(device_type, (degrees.data, degrees.sequence, degrees.tensor), mesh_dim_names=names)
    tensor = mesh.get_group("tensor") if degrees.tensor > 1 else None
    sequence = mesh.get_group("sequence") if degrees.sequence > 1 else None
    shards = None
    if degrees.tensor > 1:  # otherwise all ranks are one group of shards
        shards = mesh["data", "sequence"]._flatten("shards").get_group()
    return Mesh(degrees, rank, place, tensor, sequence, shards)


class ModelParallelUnit:
    """The mesh in the words of DeepSpeed's `mpu` interface (Megatron's), so that it knows which ranks to average over and
    whose gradients count in the norm."""

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
        return self._mesh.place.tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank


def describe(mesh: Mesh, ranks_per_node: int) -> str:
    """The mesh as a table: each kind of group, how many there are, who is in this rank's, and whether a node holds it."""
    degrees, place = mesh.degrees, mesh.place
    kinds = {
        "tensor": [place._replace(tensor=i) for i in range(degrees.tensor)],
        "sequence": [place._replace(sequence=i) for i in range(degrees.sequence)],
        "data": [place._replace(data=i) for i in range(degrees.data)],
    }
    lines = [f"{'':9}{'degree':>7}{'groups':>8}  {'nodes':6} ranks of the first group"]
    for name, members in kinds.items():
        ranks = [degrees.rank_of(member) for member in members]
        nodes = len({rank // max(1, ranks_per_node) for rank in ranks})
        shown = ", ".join(map(str, ranks[:8])) + (f", ... {ranks[-1]}" if len(ranks) > 8 else "")
        lines.append(f"{name:9}{len(ranks):7}{degrees.ranks // len(ranks):8}  {nodes:<6} {shown}")
    return "\n".join(lines)
