"""The attention mask of a RiM row: the one predicate that every mask, plan and kernel is derived from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from rim_dist.data.samples import Span

QUESTION, MEMORY, READOUT = 0, 1, 2
KIND_NAMES = ("question", "memory", "readout")
PADDING_SEGMENT = -1


class TokenCoordinates(NamedTuple):
    """Coordinates of tokens in their samples: integer tensors of one shape, `[rows, seq]` in a batch.

    `segment` tells samples in one row apart (`PADDING_SEGMENT` is padding), `kind` is QUESTION, MEMORY or READOUT,
    `block` is k of block k or readout k (0 for the question), `position` is the position id.
    """

    segment: torch.Tensor
    kind: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenCoordinates:
        return TokenCoordinates(function(self.segment), function(self.kind), function(self.block), function(self.position))


class SequenceExchange(Protocol):
    """How the ranks of a sequence group, each with a shard of a row's tokens, compute its attention (`parallel.sequence`)."""

    @property
    def ranks(self) -> int: ...

    def attend(
        self,
        kernel: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: RowLayout,
        rule: Any,
    ) -> torch.Tensor:
        """Attention `[1, own tokens, heads, head_dim]` of this rank's tokens, by a kernel's `attend`."""
        ...

    def to(self, device: torch.device | str) -> SequenceExchange: ...


@dataclass
class RowLayout:
    """The coordinates of a batch's tokens, as the attention needs them.

    `keys` are the coordinates of the keys, where these differ from the queries (decoding with a cache, a shard of a row).
    `spans` describes packed rows (one row); without them only kernels that declare `decoding` can run. `bidirectional`: tokens
    inside a block see the whole block. `chunks`: the queries as ranges (start, stop) of the row's tokens, in order; empty: all.
    `exchange`: other ranks have the rest of the row.
    """

    queries: TokenCoordinates
    keys: TokenCoordinates
    spans: tuple[Span, ...] = ()
    bidirectional: bool = False
    chunks: tuple[tuple[int, int], ...] = ()
    exchange: SequenceExchange | None = None
    attended: set[int] = field(default_factory=set, repr=False)  # ids of the modules whose attention used this layout
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # masks and plans, built once for all layers

    def to(self, device: torch.device | str) -> RowLayout:
        """The same layout with its tensors on a device."""
        queries = self.queries.map(lambda t: t.to(device, non_blocking=True))
        keys = queries if self.keys is self.queries else self.keys.map(lambda t: t.to(device, non_blocking=True))
        exchange = self.exchange.to(device) if self.exchange is not None else None
        return RowLayout(queries, keys, self.spans, self.bidirectional, self.chunks, exchange)

    def mask(self, queries: TokenCoordinates, keys: TokenCoordinates, sliding_window: int | None) -> torch.Tensor:
        """Boolean mask (True: visible) between any of the layout's tokens; the arguments' shapes broadcast."""
        return visible(queries, keys, bidirectional=self.bidirectional, sliding_window=sliding_window)


def visible(
    query: TokenCoordinates, key: TokenCoordinates, bidirectional: bool = False, sliding_window: int | None = None
) -> torch.Tensor:
    """True where a query may see a key; the arguments' shapes broadcast (method.md, "Sequence").

    Question and memory are plain causal and never see a readout. Readout k sees the question, blocks 1..k and its own causal
    prefix; never another readout, never a later block. `bidirectional`: memory tokens also see the rest of their own block.
    `sliding_window`: a query sees only keys less than so many positions back. Positions are those of the unrolled
    run, so the window is the one an unmodified model applies there.
    """
    earlier = key.position <= query.position
    if sliding_window is not None:
        earlier = earlier & (query.position - key.position < sliding_window)
    key_is_readout = key.kind == READOUT
    query_is_readout = query.kind == READOUT
    prefix_key = ~key_is_readout & (~query_is_readout | (key.block <= query.block))
    readout_key = key_is_readout & query_is_readout & (key.block == query.block)
    seen = earlier & (prefix_key | readout_key)
    if bidirectional:
        seen = seen | ((key.kind == MEMORY) & (query.kind == MEMORY) & (key.block == query.block))
    return (query.segment == key.segment) & seen
