"""Sequence parallelism of a packed row, memory blocks included: each rank of a sequence group runs a part of its tokens.

Every layer but the attention works token by token. For the attention either heads are exchanged for tokens (`ulysses`: every
rank computes the whole row for a part of the heads; DeepSpeed-Ulysses, arXiv 2309.14509) or the keys and values of the whole
row are gathered (`allgather_kv`: every rank computes all heads for its tokens; any number of heads and ranks). All ranks have
as many tokens; the layout of the whole row is known to each. Labels and weights stand at the predicting position before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from rim_dist.attention.dense import ScoreRule
from rim_dist.attention.visibility import PADDING_SEGMENT, QUESTION, Places, RowLayout
from rim_dist.data.rows import Batch, Targets
from rim_dist.data.samples import Span
from rim_dist.parallel.collectives import all_to_all, gather_shards
from rim_dist.parallel.degrees import Mode
from rim_dist.parallel.mesh import Mesh

_BALANCE = 1.05  # attention cost of the most loaded rank against the cheapest one's
_MOST_CHUNKS = 64  # of a rank


@dataclass(frozen=True)
class Exchanged:
    """`ulysses`: this rank's share of a row as seen by the attention. `whole` is the layout of all of the row."""

    full_layout: RowLayout
    group: Any
    ranks: int

    def to(self, device: torch.device | str) -> Exchanged:
        return replace(self, full_layout=self.full_layout.to(device))

    def attend(
        self,
        path: Callable[..., torch.Tensor],
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
        came = all_to_all(sent, self.group).transpose(0, 1).flatten(1, 2)  # [heads, tokens, dim]
        output = path(*(t.unsqueeze(0) for t in came.split(sizes)), self.full_layout, rule)  # [1, tokens, heads / ranks, dim]
        back = all_to_all(output[0].unflatten(0, (ranks, -1)), self.group)  # [ranks, own tokens, heads / ranks, dim]
        return back.transpose(0, 1).reshape(1, -1, heads, back.shape[-1])


@dataclass(frozen=True)
class Gathered:
    """`allgather_kv`: keys and values of the whole row on every rank. `place[i]`: where token i of the row comes in."""

    place: torch.Tensor
    group: Any
    ranks: int

    def to(self, device: torch.device | str) -> Gathered:
        return replace(self, place=self.place.to(device))

    def attend(
        self,
        path: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RowLayout,
        rule: ScoreRule,
    ) -> torch.Tensor:
        parts = gather_shards(torch.cat([key[0], value[0]]), self.group)  # [ranks, 2 x KV heads, own tokens, dim]
        whole = parts.transpose(0, 1).flatten(1, 2).index_select(1, self.place)
        key, value = whole.chunk(2)
        return path(query, key.unsqueeze(0), value.unsqueeze(0), layout, rule)


def shard_row(batch: Batch, mesh: Mesh, mode: Mode) -> Batch:
    """This rank's part of a packed row: as many tokens on every rank, the targets predicted at them."""
    ranks = mesh.degrees.sequence
    if ranks == 1:
        return batch
    seen = torch.cat([_keys_seen(span) for span in batch.layout.spans])
    division = divide_contiguous(len(seen), ranks) if mode == "ulysses" else divide_balanced(seen, ranks)
    ids, layout = _padded(batch, ranks * division.own)
    mine = division.tokens(mesh.coordinates.sequence)
    place = torch.argsort(torch.cat([division.tokens(rank) for rank in range(ranks)]))
    own = layout.queries.map(lambda t: t[:, mine])
    if mode == "ulysses":
        share: Any = Exchanged(layout, mesh.sequence_group, ranks)
        local = replace(layout, queries=own, keys=own, share=share, attended=set(), cache={})
    else:
        share = Gathered(place, mesh.sequence_group, ranks)
        local = replace(
            layout, queries=own, share=share, chunks=division.ranges(mesh.coordinates.sequence), attended=set(), cache={}
        )
    return Batch(ids[:, mine], local, _own_targets(batch.targets, place, mesh.coordinates.sequence, division.own), batch.order)


def _keys_seen(span: Span) -> torch.Tensor:
    """Keys that each of a sample's tokens sees, causal blocks: `[span.length]`, adding up to `span.pairs`."""
    parts = [torch.arange(1, span.prefix + 1)]
    for block, tokens in span.readouts:
        parts.append(span.question + block * span.block_size + torch.arange(1, tokens + 1))
    return torch.cat(parts)


@dataclass(frozen=True)
class Division:
    """Chunks of `size` tokens of a row for each rank, as many for every rank."""

    size: int
    chunks: tuple[tuple[int, ...], ...]

    @property
    def own(self) -> int:
        """Tokens of a rank."""
        return self.size * len(self.chunks[0])

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The rank's tokens as (start, stop), neighbours joined."""
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
    """Chunks such that every rank attends to about as many keys; `seen`: keys that each token of the row sees.

    The most expensive chunks first, one to each rank in turn, the largest to the rank with the least so far; chunks are
    halved until the most loaded rank is within 5% of the least loaded.
    """
    tokens = len(seen)
    best: Division | None = None
    best_ratio = math.inf
    each = 2
    while each <= _MOST_CHUNKS:
        size = -(-tokens // (ranks * each))
        padded = torch.nn.functional.pad(seen, (0, ranks * each * size - tokens), value=1)
        costs = padded.view(ranks * each, size).sum(1).tolist()
        order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
        loads = [0] * ranks
        chosen: list[list[int]] = [[] for _ in range(ranks)]
        for start in range(0, len(order), ranks):
            for chunk, rank in zip(
                order[start : start + ranks], sorted(range(ranks), key=lambda r: (loads[r], r)), strict=True
            ):
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
    """Token ids and layout of the row with padding at its end, which nothing sees and which sees nothing else."""
    layout, have = batch.layout, batch.input_ids.shape[1]
    more = tokens - have
    if not more:
        return batch.input_ids, layout
    padding = torch.arange(more, device=batch.input_ids.device).unsqueeze(0)
    extra = Places(
        torch.full_like(padding, PADDING_SEGMENT), torch.full_like(padding, QUESTION), torch.zeros_like(padding), padding
    )
    places = Places(*(torch.cat(pair, dim=1) for pair in zip(layout.queries, extra, strict=True)))
    spans = (*layout.spans, Span(have, more, 0, layout.spans[0].block_size, ()))
    ids = torch.cat([batch.input_ids, batch.input_ids[:, :1].expand(1, more)], dim=1)
    return ids, RowLayout(places, places, spans, layout.bidirectional)


def _own_targets(targets: Targets, place: torch.Tensor, rank: int, own: int) -> Targets:
    column = place[targets.column]
    mine = torch.div(column, own, rounding_mode="floor") == rank
    return replace(targets, column=column - rank * own).map(lambda t: t[mine])
