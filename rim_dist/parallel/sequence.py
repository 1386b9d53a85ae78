"""Sequence parallelism of a packed row, memory blocks included: each rank of a sequence group runs a shard of its tokens.

Every layer but the attention works token by token. For the attention, ranks either exchange heads for tokens (`ulysses`: every
rank computes all tokens for a subset of the heads; DeepSpeed-Ulysses, arXiv 2309.14509) or gather the keys and values of all
tokens (`allgather_kv`: every rank computes all heads for its own tokens; any number of heads and ranks). All ranks hold the
same number of tokens, and each knows the layout of the full row. Labels and weights stand at the predicting position before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rim_dist.attention.dense import ScoreRule
from rim_dist.attention.visibility import PADDING_SEGMENT, QUESTION, RowLayout, TokenCoordinates
from rim_dist.data.rows import Batch, Targets
from rim_dist.data.samples import Span
from rim_dist.parallel.collectives import all_to_all, gather_shards
from rim_dist.parallel.degrees import Mode
from rim_dist.parallel.mesh import Mesh

_BALANCE = 1.05  # attention cost of the most loaded rank against the cheapest one's
_MOST_CHUNKS = 64  # of a rank


@dataclass(frozen=True)
class Exchanged:
    """`ulysses`: the attention trades this rank's tokens for a subset of the heads of all tokens (`full_layout`)."""

    full_layout: RowLayout
    group: Any
    ranks: int

    def to(self, device: torch.device | str) -> Exchanged:
        return replace(self, full_layout=self.full_layout.to(device))

    def attend(
        self,
        kernel: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RowLayout,  # noqa: ARG002 - the interface's
        rule: ScoreRule,
    ) -> torch.Tensor:
        heads, kv_heads, ranks = query.shape[1], key.shape[1], self.ranks
        copies = math.lcm(kv_heads, ranks) // kv_heads
        if copies > 1:  # fewer key heads than ranks: some ranks get the same one
            key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
        # [1, heads, own tokens, dim] -> [ranks, heads / ranks of q, k and v, own tokens, dim], one entry to each rank
        sizes = [t.shape[1] // ranks for t in (query, key, value)]
        sent = torch.cat([t[0].unflatten(0, (ranks, -1)) for t in (query, key, value)], dim=1)
        received = all_to_all(sent, self.group).transpose(0, 1).flatten(1, 2)  # [heads, tokens, dim]
        output = kernel(*(t[None] for t in received.split(sizes)), self.full_layout, rule)  # [1, tokens, heads / ranks, dim]
        back = all_to_all(output[0].unflatten(0, (ranks, -1)), self.group)  # [ranks, own tokens, heads / ranks, dim]
        return back.transpose(0, 1).reshape(1, -1, heads, back.shape[-1])


@dataclass(frozen=True)
class Gathered:
    """`allgather_kv`: keys and values of the full row on every rank. `index[i]`: where token i of the row is among them."""

    index: torch.Tensor
    group: Any
    ranks: int

    def to(self, device: torch.device | str) -> Gathered:
        return replace(self, index=self.index.to(device))

    def attend(
        self,
        kernel: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RowLayout,
        rule: ScoreRule,
    ) -> torch.Tensor:
        shards = gather_shards(torch.cat([key[0], value[0]]), self.group)  # [ranks, 2 x KV heads, own tokens, dim]
        key, value = shards.transpose(0, 1).flatten(1, 2).index_select(1, self.index).chunk(2)
        return kernel(query, key.unsqueeze(0), value.unsqueeze(0), layout, rule)


def shard_row(batch: Batch, mesh: Mesh, mode: Mode) -> Batch:
    """This rank's shard of a packed row: the same number of tokens on every rank, and the targets predicted at them."""
    ranks, rank = mesh.degrees.sequence, mesh.coordinates.sequence
    if ranks == 1:
        return batch
    seen = torch.cat([_keys_seen(span) for span in batch.layout.spans])
    division = divide_contiguous(len(seen), ranks) if mode == "ulysses" else divide_balanced(seen, ranks)
    ids, layout = _padded(batch, ranks * division.own)
    mine = division.tokens(rank)
    index = torch.argsort(torch.cat([division.tokens(r) for r in range(ranks)]))
    queries = layout.queries.map(lambda t: t[:, mine])
    local = replace(layout, queries=queries, attended=set(), cache={})
    if mode == "ulysses":
        local.keys, local.exchange = queries, Exchanged(layout, mesh.sequence_group, ranks)
    else:
        local.chunks, local.exchange = division.ranges(rank), Gathered(index, mesh.sequence_group, ranks)
    return Batch(ids[:, mine], local, _own_targets(batch.targets, index, rank, division.own), batch.order)


def _keys_seen(span: Span) -> torch.Tensor:
    """Number of keys that each of a sample's tokens sees, causal blocks: `[span.length]`, adding up to `span.pairs`."""
    readouts = [span.question + block * span.block_size + torch.arange(1, tokens + 1) for block, tokens in span.readouts]
    return torch.cat([torch.arange(1, span.prefix + 1), *readouts])


@dataclass(frozen=True)
class Division:
    """Which chunks of `size` tokens of a row each rank has; every rank has the same number of them."""

    size: int
    chunks: tuple[tuple[int, ...], ...]

    @property
    def own(self) -> int:
        """Tokens of a rank."""
        return self.size * len(self.chunks[0])

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The rank's tokens as (start, stop), adjacent chunks joined."""
        result: list[tuple[int, int]] = []
        for chunk in self.chunks[rank]:
            start, stop = chunk * self.size, (chunk + 1) * self.size
            if result and result[-1][1] == start:
                start = result.pop()[0]
            result.append((start, stop))
        return tuple(result)

    def tokens(self, rank: int) -> torch.Tensor:
        return torch.cat([torch.arange(*r) for r in self.ranges(rank)])


def divide_contiguous(tokens: int, ranks: int) -> Division:
    return Division(-(-tokens // ranks), tuple((rank,) for rank in range(ranks)))


def divide_balanced(seen: torch.Tensor, ranks: int) -> Division:
    """Chunks such that every rank attends to about as many keys; `seen`: number of keys that each token of the row sees.

    Chunks are assigned in rounds, the most expensive first: each rank gets one a round, the rank with the lowest load the most
    expensive. Chunks are halved until the load of the most loaded rank is within 5% of the least loaded one's.
    """
    tokens, each = len(seen), 2
    best: Division | None = None
    best_ratio = math.inf
    while each <= _MOST_CHUNKS:
        size = -(-tokens // (ranks * each))
        padded = torch.nn.functional.pad(seen, (0, ranks * each * size - tokens), value=1)
        costs = padded.view(ranks * each, size).sum(1).tolist()
        order = sorted(range(len(costs)), key=lambda i: -costs[i])
        loads = [0] * ranks
        chosen: list[list[int]] = [[] for _ in range(ranks)]
        for start in range(0, len(order), ranks):
            by_load = sorted(range(ranks), key=loads.__getitem__)
            for chunk, rank in zip(order[start : start + ranks], by_load, strict=True):
                loads[rank] += costs[chunk]
                chosen[rank].append(chunk)
        ratio = max(loads) / min(loads)
        if ratio < best_ratio:
            best, best_ratio = Division(size, tuple(tuple(sorted(chunks)) for chunks in chosen)), ratio
        if ratio <= _BALANCE or size == 1:
            break
        each *= 2
    assert best is not None
    return best


def _padded(batch: Batch, tokens: int) -> tuple[torch.Tensor, RowLayout]:
    """Token ids and layout of the row, padded at its end to `tokens`; padding and real tokens do not see each other."""
    layout, have = batch.layout, batch.input_ids.shape[1]
    more = tokens - have
    if not more:
        return batch.input_ids, layout
    padding = torch.arange(more, device=batch.input_ids.device).unsqueeze(0)
    extra = TokenCoordinates(
        torch.full_like(padding, PADDING_SEGMENT), torch.full_like(padding, QUESTION), torch.zeros_like(padding), padding
    )
    places = TokenCoordinates(*(torch.cat(pair, dim=1) for pair in zip(layout.queries, extra, strict=True)))
    spans = (*layout.spans, Span(have, more, 0, layout.spans[0].block_size, ()))
    ids = torch.cat([batch.input_ids, batch.input_ids[:, :1].expand(1, more)], dim=1)
    return ids, RowLayout(places, places, spans, layout.bidirectional)


def _own_targets(targets: Targets, index: torch.Tensor, rank: int, own: int) -> Targets:
    column = index[targets.column]
    mine = column // own == rank
    return replace(targets, column=column - rank * own).map(lambda t: t[mine])
