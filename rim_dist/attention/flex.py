"""FlexAttention with a block mask made from the predicate: one kernel for the whole packed row, on CUDA.

On a CPU PyTorch has no backward pass for it; there its forward pass is compared with the other kernels in tests.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rim_dist.attention.dense import ScoreRule
from rim_dist.attention.visibility import RowLayout


@functools.cache
def _kernel(device_type: str) -> Any:
    # Uncompiled it materialises all scores; compiling is what makes it a kernel. Rows differ in length from batch to batch.
    return torch.compile(flex_attention, dynamic=True) if device_type == "cuda" else flex_attention


def block_size(head_dim: int) -> int:
    """Tokens of a block, of queries and of keys. Compiled for Hopper, blocks of 128 spill registers at 64 channels a head."""
    return 64 if head_dim <= 64 else 128


def _kernel_options(size: int) -> dict[str, int] | None:
    """What FlexAttention's compiled kernels need to run with blocks of 64; None for their own choice."""
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    return dict.fromkeys(names, size) if size == 64 else None


def keys_seen(layout: RowLayout, sliding_window: int | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The keys that each query of a packed row sees, as two ranges `[queries, 2]` of its tokens: first ones, and ends."""
    segments: list[tuple[int, ...]] = []
    for span in layout.spans:
        begin = span.start
        readouts = ((tokens, span.question + block * span.block_size) for block, tokens in span.readouts)
        for tokens, seen in ((span.prefix, -1), *readouts):
            # `seen`: tokens of question and memory that a readout sees; -1 in these, which see all before them.
            place, size = max(0, seen), max(1, span.block_size)
            segments.append((begin, tokens, span.start, span.question, seen, place, size))
            begin += tokens
    table = numpy.array(segments).T
    token = numpy.arange(table[1].sum())
    start, _, first, question, seen, place, size = numpy.repeat(table, table[1], axis=1)
    in_prefix, position = seen < 0, place + token - start
    end = numpy.where(in_prefix, token + 1, first + seen)
    if layout.bidirectional:
        block_end = first + question + ((token - first - question) // size + 1) * size
        end = numpy.where(in_prefix & (token - first >= question), block_end, end)
    own = numpy.where(in_prefix, token + 1, start)  # empty for question and memory
    low = first
    if sliding_window is not None:
        low = numpy.maximum(low, first + position - sliding_window + 1)
        own = numpy.maximum(own, numpy.where(in_prefix, own, token - sliding_window + 1))
    lows, ends = numpy.stack([numpy.minimum(low, end), own], 1), numpy.stack([end, token + 1], 1)
    if layout.chunks:
        chosen = numpy.concatenate([numpy.arange(*chunk) for chunk in layout.chunks])
        return lows[chosen], ends[chosen]
    return lows, ends


def block_mask(layout: RowLayout, sliding_window: int | None = None, size: int = 128) -> BlockMask:
    """The block mask of a packed row, built once per batch and window.

    Pairs are counted block by block from the ranges of keys that queries see, on the CPU; `create_block_mask` would compute all
    pairs of the row on the device.
    """
    key = ("flex", sliding_window, size)
    if key not in layout.cache:
        queries, keys = layout.queries.map(lambda t: t[0]), layout.keys.map(lambda t: t[0])

        def seen(_row: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return layout.mask(queries.map(lambda t: t[query]), keys.map(lambda t: t[key]), sliding_window)

        lengths = (queries.segment.shape[0], keys.segment.shape[0])
        lows, ends = keys_seen(layout, sliding_window)
        edges = numpy.arange(-(-lengths[1] // size) + 1) * size
        pairs: Any = 0
        for low, end in zip(lows.T[:, :, None], ends.T[:, :, None], strict=True):
            before = numpy.clip(edges, low, numpy.maximum(low, end))  # [queries, edges]: where the seen keys before an edge end
            pairs = pairs + numpy.add.reduceat(numpy.diff(before, axis=1), numpy.arange(0, lengths[0], size), axis=0)
        whole = pairs == size * size
        partial = _in_order((pairs > 0) & ~whole, keys.segment.device)
        layout.cache[key] = BlockMask.from_kv_blocks(
            *partial, *_in_order(whole, keys.segment.device), BLOCK_SIZE=size, mask_mod=seen, seq_lengths=lengths
        )
    return layout.cache[key]


def _in_order(blocks: numpy.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of the blocks of keys that are set for each block of queries, and which: those first, in order."""
    indices = numpy.argsort(~blocks, axis=1, kind="stable")
    found = (torch.from_numpy(values.astype(numpy.int32))[None, None] for values in (blocks.sum(1), indices))
    number, which = (values.to(device, non_blocking=True) for values in found)
    return number, which


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rule: ScoreRule) -> torch.Tensor:
    """Attention `[1, queries, heads, head_dim]` of a packed row or some of it; key/value with KV heads, of the whole row."""
    softcap, size = rule.softcap, block_size(query.shape[-1])

    def cap(score: torch.Tensor, *_index: Any) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    output = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=cap if softcap is not None else None,
        block_mask=block_mask(layout, rule.sliding_window, size),
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_kernel_options(size),
    )
    return output.transpose(1, 2)
