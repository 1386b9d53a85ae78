"""What a GPU sends in an optimizer step, kind by kind, and how long the links of a cluster need for it.

Volumes are what a GPU sends (and receives) with ring algorithms: an all-gather or reduce-scatter of S bytes over n ranks moves
S (n - 1) / n, an all-reduce twice that, an all-to-all of B bytes a rank B (n - 1) / n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rim_dist.planning.links import (
    NETWORK_STEP_SECONDS,
    START_SECONDS,
    TREE_NETWORK_SECONDS,
    TREE_NODE_SECONDS,
    Interconnect,
)
from rim_dist.planning.memory import ALL_REDUCE_BUCKET, Setup, Weights
from rim_dist.planning.shape import ModelShape, adapted
from rim_dist.planning.workload import Workload

Part = Literal["zero", "tensor", "sequence", "offload"]
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "copy"]


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

    part: Part
    what: str
    operation: Operation
    times: float
    payload: float
    sent: float
    seconds: float


def transfer(
    part: Part,
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
    latency = inside * link.step_seconds + between * NETWORK_STEP_SECONDS
    if operation == "all-reduce":  # NCCL takes a tree where a ring would have too many steps
        tree = 2 * ((here - 1) * TREE_NODE_SECONDS + math.log2(nodes) * TREE_NETWORK_SECONDS)
        latency = min(latency, tree)
    latency += START_SECONDS
    return Transfer(part, what, operation, times, payload, times * sent, times * (seconds + latency))


class _Sent:
    """Collects transfers; nothing is sent in a group of one, and nothing of no size."""

    def __init__(self, link: Interconnect, gpus_per_node: int) -> None:
        self._link, self._gpus_per_node = link, gpus_per_node
        self.found: list[Transfer] = []

    def add(self, part: Part, what: str, operation: Operation, group: Group, times: float, payload: float) -> None:
        if times and payload and (operation == "copy" or group.ranks > 1):
            self.found.append(transfer(part, what, operation, group, times, payload, self._link, self._gpus_per_node))

    def add_in_pieces(self, what: str, operation: Operation, group: Group, times: float, size: float, bucket: float) -> None:
        """ZeRO's: `size` bytes in as many pieces of at most `bucket` bytes as it takes."""
        if size:
            pieces = math.ceil(size / max(1, min(bucket, size)))
            self.add("zero", what, operation, group, times * pieces, size / pieces)


def transfers(shape: ModelShape, setup: Setup, load: Workload, link: Interconnect, gpus_per_node: int) -> list[Transfer]:
    """Everything a GPU sends in an optimizer step of `load.rounds` micro-batches."""
    sent = _Sent(link, gpus_per_node)
    _add_zero(sent, shape, setup, load)
    _add_tensor(sent, shape, setup, load)
    _add_sequence(sent, shape, setup, load)
    return sent.found


def _add_zero(sent: _Sent, shape: ModelShape, setup: Setup, load: Workload) -> None:
    b, rounds, buckets = setup.entry, load.rounds, setup.buckets
    weights = Weights.of(shape, setup)
    group = Group(setup.shards, setup.tensor)
    trained, sharded = b * weights.trained, b * (weights.all - weights.persistent)
    if setup.zero_stage == 0:
        sent.add_in_pieces("gradients", "all-reduce", group, 1, trained, b * ALL_REDUCE_BUCKET)
    elif setup.zero_stage < 3:
        # DeepSpeed reduces a bucket to all ranks and each keeps its own (use_multi_rank_bucket_allreduce). ZeRO-1 does so once
        # a step, ZeRO-2 in every micro-batch.
        times = 1 if setup.zero_stage == 1 else rounds
        sent.add_in_pieces("gradients", "all-reduce", group, times, trained, b * buckets.reduce)
        sent.add_in_pieces("updated parameters", "all-gather", group, 1, trained, b * ALL_REDUCE_BUCKET)
    else:
        again = max(0, sharded - b * buckets.reuse // 2)  # what the forward pass gathered last is still there
        sent.add_in_pieces("parameters, forward", "all-gather", group, rounds, sharded, b * buckets.prefetch)
        sent.add_in_pieces("parameters, backward", "all-gather", group, rounds, again, b * buckets.prefetch)
        sent.add_in_pieces("gradients", "reduce-scatter", group, rounds, trained, b * buckets.reduce)
    if setup.offload:
        d = setup.shards
        sent.add("offload", "parameters from CPU memory", "copy", group, 2 * rounds, b * weights.all / d)
        sent.add("offload", "gradients to CPU memory", "copy", group, rounds, trained / d)
        # AdamW in CPU memory reads gradient, weight and moments and writes the last three: 28 bytes an entry.
        sent.add("offload", "update in CPU memory", "copy", group, 1, 28 * weights.trained / d)


def _add_tensor(sent: _Sent, shape: ModelShape, setup: Setup, load: Workload) -> None:
    b, rounds = setup.entry, load.rounds
    group = Group(setup.tensor, 1)
    tokens, targets = load.tokens / setup.sequence, load.targets / setup.sequence
    row = b * tokens * shape.hidden
    # Forward: the outputs of attention and MLP; backward: the gradients of their inputs. Recomputing a layer stops before the
    # sum of the MLP's output, which nothing keeps.
    sent.add("tensor", "layer outputs, forward", "all-reduce", group, 2 * shape.layers * rounds, row)
    sent.add("tensor", "layer inputs, backward", "all-reduce", group, 2 * shape.layers * rounds, row)
    if setup.checkpointing:
        sent.add("tensor", "layer outputs, recomputed", "all-reduce", group, shape.layers * rounds, row)
    sent.add("tensor", "embedding", "all-reduce", group, rounds, row)
    sent.add("tensor", "head, backward", "all-reduce", group, rounds, b * targets * shape.hidden)
    sent.add("tensor", "loss over the vocabulary", "all-reduce", group, 3 * rounds, 4 * targets)
    if setup.lora is not None:
        count = sum(adapted(linear, setup.lora, shape.layers) for linear in shape.linears)
        sent.add("tensor", "adapters", "all-reduce", group, count * shape.layers * rounds, b * tokens * setup.lora.rank)


def _add_sequence(sent: _Sent, shape: ModelShape, setup: Setup, load: Workload) -> None:
    b, t, s = setup.entry, setup.tensor, setup.sequence
    group = Group(s, t)
    passes = (3 if setup.checkpointing else 2) * shape.layers * load.rounds
    tokens = load.tokens / s
    if setup.sequence_mode == "ulysses":
        kv = shape.head_dim * math.lcm(shape.kv_heads // t, s)
        sent.add("sequence", "queries and outputs", "all-to-all", group, 2 * passes, b * tokens * shape.query_width // t)
        sent.add("sequence", "keys and values", "all-to-all", group, 2 * passes, b * tokens * kv)
    else:
        forward = passes - shape.layers * load.rounds
        whole = b * load.tokens * 2 * shape.kv_width // t
        sent.add("sequence", "keys and values, forward", "all-gather", group, forward, whole)
        sent.add("sequence", "keys and values, backward", "reduce-scatter", group, shape.layers * load.rounds, whole)


def sent_bytes(found: list[Transfer], part: str | None = None) -> float:
    return sum(t.sent for t in found if part in (None, t.part) and t.operation != "copy")


def seconds(found: list[Transfer], part: str) -> float:
    return sum(t.seconds for t in found if t.part == part)
