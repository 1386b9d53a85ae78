"""What a GPU sends in an optimizer step, kind by kind, and how long the links of a cluster need for it.

Volumes are what a GPU sends (and receives) with ring algorithms: an all-gather or reduce-scatter of S bytes over n ranks moves
S (n - 1) / n, an all-reduce twice that, an all-to-all of B bytes a rank B (n - 1) / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rim_dist.planning.memory import ALL_REDUCE_BUCKET, Setup, Weights
from rim_dist.planning.shape import ModelShape, adapted
from rim_dist.planning.workload import Workload

Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "copy"]

# NCCL's own model of a ring collective (src/graph/tuning.cc, protocol Simple): seconds to start, seconds a step over NVLink,
# over PCIe and over the network.
START_SECONDS = 8.4e-6
NVLINK_STEP_SECONDS, PCIE_STEP_SECONDS, NETWORK_STEP_SECONDS = 3.4e-6, 5.7e-6, 9.6e-6


@dataclass(frozen=True)
class Interconnect:
    """Links in bytes a second, one direction, as data sheets have them. `network`: of a whole node of `gpus_per_node`."""

    name: str
    node: float
    network: float
    host: float
    step_seconds: float
    about: str

    def network_of_gpu(self, gpus_per_node: int) -> float:
        return self.network / gpus_per_node


INTERCONNECTS = {
    link.name: link
    for link in (
        Interconnect(
            "nvlink+ib-400g", 450e9, 8 * 50e9, 63e9, NVLINK_STEP_SECONDS,
            "DGX/HGX H100: NVLink 4, 900 GB/s both ways; a 400 Gb/s InfiniBand NDR adapter a GPU; PCIe 5.0 x16",
        ),
        Interconnect(
            "nvlink+ib-200g", 300e9, 8 * 25e9, 31.5e9, NVLINK_STEP_SECONDS,
            "DGX A100: NVLink 3, 600 GB/s both ways; a 200 Gb/s InfiniBand HDR adapter a GPU; PCIe 4.0 x16",
        ),
        Interconnect(
            "ib-400g", 63e9, 50e9, 63e9, PCIE_STEP_SECONDS,
            "PCIe 5.0 x16 between the GPUs of a node, one 400 Gb/s InfiniBand NDR adapter a node",
        ),
        Interconnect(
            "ib-200g", 31.5e9, 25e9, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 200 Gb/s InfiniBand HDR adapter a node",
        ),
        Interconnect(
            "ethernet-100g", 31.5e9, 12.5e9, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 100 Gb/s Ethernet adapter a node",
        ),
        Interconnect(
            "ethernet-25g", 31.5e9, 3.125e9, 31.5e9, PCIE_STEP_SECONDS,
            "PCIe 4.0 x16 between the GPUs of a node, one 25 Gb/s Ethernet adapter a node",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Group:
    """`ranks` ranks that stand `stride` apart in the rank order (tensor innermost, then sequence, then data)."""

    ranks: int
    stride: int

    def on_a_node(self, gpus_per_node: int) -> int:
        return max(1, min(self.ranks, gpus_per_node // self.stride))


@dataclass(frozen=True)
class Transfer:
    """One kind of sending in an optimizer step: `payload` bytes, `times`; `sent` bytes of a GPU and `seconds` in all."""

    part: Literal["zero", "tensor", "sequence", "offload"]
    what: str
    operation: Operation
    times: float
    payload: float
    sent: float
    seconds: float


def transfer(
    part: Literal["zero", "tensor", "sequence", "offload"],
    what: str,
    operation: Operation,
    group: Group,
    times: float,
    payload: float,
    link: Interconnect,
    gpus_per_node: int,
) -> Transfer:
    """`payload`: the whole tensor that is gathered, scattered or reduced; of an all-to-all, what a rank has."""
    n = group.ranks
    if operation == "copy":
        return Transfer(part, what, operation, times, payload, times * payload, times * payload / link.host)
    here = group.on_a_node(gpus_per_node)
    nodes = -(-n // here)
    rounds = 2 if operation == "all-reduce" else 1
    sent = rounds * payload * (n - 1) / n
    network = link.network_of_gpu(gpus_per_node)
    if operation == "all-to-all":
        seconds = max(payload * (here - 1) / n / link.node, payload * (n - here) / n / network)
    else:
        # A ring enters and leaves a node once; where several of its GPUs have adapters, as many rings share the work.
        across = rounds * payload * (nodes - 1) / nodes / (here * network)
        seconds = max(sent / link.node if here > 1 else 0.0, across)
    between = rounds * (nodes - 1)
    inside = rounds * (n - 1) - between
    latency = START_SECONDS + inside * link.step_seconds + between * NETWORK_STEP_SECONDS
    return Transfer(part, what, operation, times, payload, times * sent, times * (seconds + latency))


def transfers(shape: ModelShape, setup: Setup, load: Workload, link: Interconnect, gpus_per_node: int) -> list[Transfer]:
    """Everything a GPU sends in an optimizer step of `load.rounds` micro-batches."""
    found: list[Transfer] = []

    def add(
        part: Literal["zero", "tensor", "sequence", "offload"],
        what: str,
        operation: Operation,
        group: Group,
        times: float,
        payload: float,
    ) -> None:
        if times and payload and (operation == "copy" or group.ranks > 1):
            found.append(transfer(part, what, operation, group, times, payload, link, gpus_per_node))

    _add_zero(add, shape, setup, load)
    _add_tensor(add, shape, setup, load)
    _add_sequence(add, shape, setup, load)
    return found


def _add_zero(add, shape: ModelShape, setup: Setup, load: Workload) -> None:  # type: ignore[no-untyped-def]
    b, rounds, buckets = setup.entry, load.rounds, setup.buckets
    weights = Weights.of(shape, setup)
    shards = Group(setup.shards, setup.tensor)
    trained, sharded = weights.trained, weights.all - weights.persistent

    def pieces(entries: int, bucket: int) -> int:
        return -(-entries // max(1, min(bucket, entries)))

    def in_pieces(what: str, operation: Operation, times: float, entries: int, bucket: int) -> None:
        if entries:
            count = pieces(entries, bucket)
            add("zero", what, operation, shards, times * count, b * entries / count)

    if setup.zero_stage == 0:
        in_pieces("gradients", "all-reduce", 1, trained, ALL_REDUCE_BUCKET)
    elif setup.zero_stage < 3:
        # DeepSpeed reduces a bucket to all ranks and each keeps its own (use_multi_rank_bucket_allreduce). ZeRO-1 does so once
        # a step, ZeRO-2 in every micro-batch.
        in_pieces("gradients", "all-reduce", 1 if setup.zero_stage == 1 else rounds, trained, buckets.reduce)
        in_pieces("updated parameters", "all-gather", 1, trained, ALL_REDUCE_BUCKET)
    else:
        in_pieces("parameters, forward", "all-gather", rounds, sharded, buckets.prefetch)
        # What the forward pass gathered last is still there.
        in_pieces("parameters, backward", "all-gather", rounds, max(0, sharded - buckets.reuse // 2), buckets.prefetch)
        in_pieces("gradients", "reduce-scatter", rounds, trained, buckets.reduce)
    if setup.offload:
        shard = weights.all / setup.shards
        add("offload", "parameters from CPU memory", "copy", shards, 2 * rounds, b * shard)
        add("offload", "gradients to CPU memory", "copy", shards, rounds, b * trained / setup.shards)
        # AdamW in CPU memory reads gradient, weight and moments and writes the last three: 28 bytes an entry.
        add("offload", "update in CPU memory", "copy", shards, 1, 28 * trained / setup.shards)


def _add_tensor(add, shape: ModelShape, setup: Setup, load: Workload) -> None:  # type: ignore[no-untyped-def]
    b, rounds = setup.entry, load.rounds
    group = Group(setup.tensor, 1)
    tokens, targets = load.tokens / setup.sequence, load.targets / setup.sequence
    row = b * tokens * shape.hidden
    # Forward: the outputs of attention and MLP; backward: the gradients of their inputs. Recomputing a layer stops before the
    # sum of the MLP's output, which nothing keeps.
    add("tensor", "layer outputs, forward", "all-reduce", group, 2 * shape.layers * rounds, row)
    add("tensor", "layer inputs, backward", "all-reduce", group, 2 * shape.layers * rounds, row)
    if setup.checkpointing:
        add("tensor", "layer outputs, recomputed", "all-reduce", group, shape.layers * rounds, row)
    add("tensor", "embedding", "all-reduce", group, rounds, row)
    add("tensor", "head, backward", "all-reduce", group, rounds, b * targets * shape.hidden)
    add("tensor", "loss over the vocabulary", "all-reduce", group, 3 * rounds, 4 * targets)
    if setup.lora is not None:
        count = sum(adapted(linear, setup.lora, shape.layers) for linear in shape.linears)
        add("tensor", "adapters", "all-reduce", group, count * shape.layers * rounds, b * tokens * setup.lora.rank)


def _add_sequence(add, shape: ModelShape, setup: Setup, load: Workload) -> None:  # type: ignore[no-untyped-def]
    b, t, s = setup.entry, setup.tensor, setup.sequence
    group = Group(s, t)
    passes = (3 if setup.checkpointing else 2) * shape.layers * load.rounds
    tokens = load.tokens / s
    if setup.sequence_mode == "ulysses":
        kv = shape.head_dim * math.lcm(shape.kv_heads // t, s)
        add("sequence", "queries and outputs", "all-to-all", group, 2 * passes, b * tokens * shape.query_width // t)
        add("sequence", "keys and values", "all-to-all", group, 2 * passes, b * tokens * kv)
    else:
        forward = passes - shape.layers * load.rounds
        whole = b * load.tokens * 2 * shape.kv_width // t
        add("sequence", "keys and values, forward", "all-gather", group, forward, whole)
        add("sequence", "keys and values, backward", "reduce-scatter", group, shape.layers * load.rounds, whole)


def sent_bytes(found: list[Transfer], part: str | None = None) -> float:
    return sum(t.sent for t in found if part in (None, t.part) and t.operation != "copy")


def seconds(found: list[Transfer], part: str) -> float:
    return sum(t.seconds for t in found if t.part == part)
