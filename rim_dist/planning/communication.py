"""What a GPU sends in an optimizer step, by kind, and how long the links of a cluster need for it.

Volumes are what a GPU sends (and receives) with ring algorithms: an all-gather or reduce-scatter of S bytes over n ranks moves
S (n - 1) / n, an all-reduce twice that, an all-to-all of B bytes a rank B (n - 1) / n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rim_dist.planning.links import NETWORK_STEP_SECONDS, START_SECONDS, TREE_NETWORK_SECONDS, TREE_NODE_SECONDS, Interconnect
from rim_dist.planning.memory import ALL_REDUCE_BUCKET, Setup, Weights
from rim_dist.planning.shape import ModelShape, adapted
from rim_dist.planning.workload import Workload

Message = tuple[str, str, float, float]  # what, operation, times, bytes of the payload


@dataclass(frozen=True)
class Group:
    """`ranks` ranks, every `stride`-th in the rank order (tensor innermost, then sequence, then data)."""

    ranks: int
    stride: int


@dataclass(frozen=True)
class Transfer:
    """Messages of one kind in an optimizer step: `times` a payload of `payload` bytes.

    `part`: zero, tensor, sequence or offload. `operation`: a collective, or `copy` to or from CPU memory. `sent` and `seconds`:
    bytes a GPU sends and the time that takes, all messages together.
    """

    part: str
    what: str
    operation: str
    times: float
    payload: float
    sent: float
    seconds: float


def transfer(
    part: str,
    what: str,
    operation: str,
    group: Group,
    times: float,
    payload: float,
    link: Interconnect,
    gpus_per_node: int,
) -> Transfer:
    """`payload`: the bytes of the whole tensor that is gathered, scattered or reduced; else those a rank has."""
    n = group.ranks
    if operation == "copy":
        return Transfer(part, what, operation, times, payload, times * payload, times * payload / link.host)
    here = max(1, min(n, gpus_per_node // group.stride))  # ranks of the group on a node
    nodes = -(-n // here)
    rounds = 2 if operation == "all-reduce" else 1
    sent = rounds * payload * (n - 1) / n
    network = link.network_of_gpu(gpus_per_node)
    if operation == "all-to-all":
        seconds = max(payload * (here - 1) / n / link.node, payload * (n - here) / n / network)
    else:
        # A ring enters and leaves a node once. NCCL runs as many rings as GPUs of the node have adapters.
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


def transfers(shape: ModelShape, setup: Setup, load: Workload, link: Interconnect, gpus_per_node: int) -> list[Transfer]:
    """Everything a GPU sends in an optimizer step of `load.rounds` micro-batches."""
    weights, shards, tensor = Weights.of(shape, setup), Group(setup.shards, setup.tensor), Group(setup.tensor, 1)
    parts = (
        ("zero", shards, _zero(setup, load, weights)),
        ("offload", shards, _offload(setup, load, weights)),
        ("tensor", tensor, _tensor(shape, setup, load)),
        ("sequence", Group(setup.sequence, setup.tensor), _sequence(shape, setup, load)),
    )
    return [
        transfer(part, what, operation, group, times, payload, link, gpus_per_node)
        for part, group, messages in parts
        for what, operation, times, payload in messages
        if times and payload and (operation == "copy" or group.ranks > 1)
    ]


def _in_buckets(times: float, size: float, bucket: float) -> tuple[float, float]:
    """Messages and their payload where `size` bytes are sent in equal pieces of at most `bucket` bytes."""
    pieces = math.ceil(size / max(1, min(bucket, size))) if size else 1
    return times * pieces, size / pieces


def _zero(setup: Setup, load: Workload, weights: Weights) -> Iterator[Message]:
    b, rounds, buckets = setup.entry, load.rounds, setup.buckets
    trained, sharded = b * weights.trained, b * (weights.all - weights.persistent)
    if setup.zero_stage == 0:
        yield "gradients", "all-reduce", *_in_buckets(1, trained, b * ALL_REDUCE_BUCKET)
    elif setup.zero_stage < 3:
        # DeepSpeed reduces a bucket to all ranks and each keeps its own (use_multi_rank_bucket_allreduce). ZeRO-1 does so once
        # a step, ZeRO-2 in every micro-batch.
        times = 1 if setup.zero_stage == 1 else rounds
        yield "gradients", "all-reduce", *_in_buckets(times, trained, b * buckets.reduce)
        yield "updated parameters", "all-gather", *_in_buckets(1, trained, b * ALL_REDUCE_BUCKET)
    else:
        again = max(0, sharded - b * buckets.reuse // 2)  # what the forward pass gathered last is still there
        yield "parameters, forward", "all-gather", *_in_buckets(rounds, sharded, b * buckets.prefetch)
        yield "parameters, backward", "all-gather", *_in_buckets(rounds, again, b * buckets.prefetch)
        yield "gradients", "reduce-scatter", *_in_buckets(rounds, trained, b * buckets.reduce)


def _offload(setup: Setup, load: Workload, weights: Weights) -> Iterator[Message]:
    if setup.offload:
        b, d, rounds = setup.entry, setup.shards, load.rounds
        yield "parameters from CPU memory", "copy", 2 * rounds, b * weights.all / d
        yield "gradients to CPU memory", "copy", rounds, b * weights.trained / d
        # AdamW in CPU memory reads gradient, weight and moments and writes the last three: 28 bytes an entry.
        yield "update in CPU memory", "copy", 1, 28 * weights.trained / d


def _tensor(shape: ModelShape, setup: Setup, load: Workload) -> Iterator[Message]:
    b, rounds, layers = setup.entry, load.rounds, shape.layers
    tokens, targets = load.tokens / setup.sequence, load.targets / setup.sequence
    row = b * tokens * shape.hidden
    # Forward: the outputs of attention and MLP; backward: the gradients of their inputs. Recomputing a layer stops before the
    # sum of the MLP's output, which nothing keeps.
    yield "layer outputs, forward", "all-reduce", 2 * layers * rounds, row
    yield "layer inputs, backward", "all-reduce", 2 * layers * rounds, row
    if setup.activation_checkpointing:
        yield "layer outputs, recomputed", "all-reduce", layers * rounds, row
    yield "embedding", "all-reduce", rounds, row
    yield "head, backward", "all-reduce", rounds, b * targets * shape.hidden
    yield "loss over the vocabulary", "all-reduce", 3 * rounds, 4 * targets
    if setup.lora is not None:
        count = sum(adapted(linear, setup.lora, layers) for linear in shape.linears)
        yield "adapters", "all-reduce", count * layers * rounds, b * tokens * setup.lora.rank


def _sequence(shape: ModelShape, setup: Setup, load: Workload) -> Iterator[Message]:
    b, t, s = setup.entry, setup.tensor, setup.sequence
    once = shape.layers * load.rounds
    passes = (3 if setup.activation_checkpointing else 2) * once
    tokens = load.tokens / s
    if setup.sequence_mode == "ulysses":
        kv = shape.head_dim * math.lcm(shape.kv_heads // t, s)
        yield "queries and outputs", "all-to-all", 2 * passes, b * tokens * shape.query_width // t
        yield "keys and values", "all-to-all", 2 * passes, b * tokens * kv
    else:
        whole = b * load.tokens * 2 * shape.kv_width // t
        yield "keys and values, forward", "all-gather", passes - once, whole
        yield "keys and values, backward", "reduce-scatter", once, whole


def sent_bytes(found: list[Transfer], part: str | None = None) -> float:
    return sum(t.sent for t in found if part in (None, t.part) and t.operation != "copy")


def seconds(found: list[Transfer], part: str) -> float:
    return sum(t.seconds for t in found if t.part == part)
