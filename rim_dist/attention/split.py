"""Attention sample by sample, without any mask over a whole row: on every device, with memory linear in the row.

Question and memory of a sample are one plain causal call. Its readouts are a second call over the sample's keys, under a
mask of readout tokens x sample tokens. Where that mask would be large (many or long blocks), readouts are taken in groups:
the blocks that a whole group sees need no mask, the few keys left get a small one, and both results are merged by their
log-sum-exp, as blockwise attention does. Samples of the same shape that stand side by side share one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rim_dist.attention.dense import ScoreRule, masked_attention
from rim_dist.attention.visibility import RowLayout
from rim_dist.data.samples import Span
from rim_dist.limits import CHUNK, MASK_ENTRIES

Range = tuple[int, int]


@dataclass(frozen=True)
class KeySlice:
    """Keys of a sample in `ranges` (start, stop): all visible (no mask), under an additive `mask`, or causal."""

    ranges: tuple[Range, ...]
    mask: torch.Tensor | None = None
    causal: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These keys (or values) of `[rows, heads, seq, head_dim]`."""
        pieces = [tensor[:, :, start:stop] for start, stop in self.ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


@dataclass(frozen=True)
class Call:
    """Queries `start` .. `stop` - 1 of a sample over slices of its keys."""

    start: int
    stop: int
    slices: tuple[KeySlice, ...]


@dataclass(frozen=True)
class Group:
    """`count` samples of one shape, `length` tokens each, side by side; `calls` cover a sample's queries in order."""

    count: int
    length: int
    calls: tuple[Call, ...]


def split_plan(layout: RowLayout, sliding_window: int | None, dtype: torch.dtype, whole_masks: bool) -> list[Group]:
    """The calls for every sample, built once per batch and window.

    `whole_masks`: one mask over all readouts of a sample, whatever its size (where results cannot be merged).
    """
    key = ("split", sliding_window, dtype, whole_masks)
    if key not in layout.cache:
        groups = []
        for _, same in itertools.groupby(layout.spans, key=lambda span: span.shape):
            spans = list(same)
            calls = _Calls(layout, spans[0], sliding_window, dtype, whole_masks).of(0, spans[0].length)
            groups.append(Group(len(spans), spans[0].length, tuple(calls)))
        layout.cache[key] = groups
    return layout.cache[key]


def chunk_plan(
    layout: RowLayout, sliding_window: int | None, dtype: torch.dtype, whole_masks: bool
) -> list[tuple[Span, tuple[Call, ...]]]:
    """The calls for the queries in the layout's `chunks`, in their order, each with the sample whose keys it attends to."""
    key = ("split", sliding_window, dtype, whole_masks)
    if key not in layout.cache:
        plan = []
        for start, stop in layout.chunks:
            for span in layout.spans:
                first, last = max(start, span.start) - span.start, min(stop, span.start + span.length) - span.start
                if first < last:
                    plan.append((span, tuple(_Calls(layout, span, sliding_window, dtype, whole_masks).of(first, last))))
        layout.cache[key] = plan
    return layout.cache[key]


class _Calls:
    """The attention calls of one sample; tokens are numbered from the sample's first."""

    def __init__(self, layout: RowLayout, span: Span, window: int | None, dtype: torch.dtype, whole_masks: bool) -> None:
        # Positions run from 0 without gaps along every unrolled sequence; a window beyond the longest has no effect.
        longest = max([span.prefix, *(span.question + b * span.block_size + n for b, n in span.readouts)])
        self._window = None if window is not None and window >= longest else window
        self._layout, self._span, self._dtype, self._whole_masks = layout, span, dtype, whole_masks

    def of(self, first: int, last: int) -> Iterator[Call]:
        """Calls that cover the queries `first` .. `last` - 1, in order."""
        prefix, question = self._span.prefix, self._span.question
        if first < prefix:
            stop = min(last, prefix)
            if self._layout.bidirectional:
                if first < question:
                    yield from self._causal(first, min(stop, question))
                size = self._span.block_size
                for begin in range(question, prefix, size):
                    low, high = max(first, begin), min(stop, begin + size)
                    if low < high:
                        yield Call(low, high, (KeySlice(((0, begin + size),)),))
            else:
                yield from self._causal(first, stop)
        if last > prefix:
            yield from self._readouts(max(first, prefix), last)

    def _causal(self, first: int, last: int) -> Iterator[Call]:
        window, start = self._window, first
        if first == 0:
            start = last if window is None else min(last, window)
            yield Call(0, start, (KeySlice(((0, start),), causal=True),))
        for low in range(start, last, CHUNK):
            high = min(low + CHUNK, last)
            if window is not None or self._whole_masks:
                yield Call(low, high, (self._masked((low, high), (max(0, low - (window or low + 1) + 1), high)),))
            else:
                yield Call(low, high, (KeySlice(((0, low),)), self._masked((low, high), (low, high))))

    def _readouts(self, first: int, last: int) -> Iterator[Call]:
        span, window = self._span, self._window
        own: list[tuple[int, int, int, int]] = []  # block, first token of the readout, queries from, to
        begin = span.prefix
        for block, tokens in span.readouts:
            low, high = max(first, begin), min(last, begin + tokens)
            if low < high:
                own.append((block, begin, low, high))
            begin += tokens
        if self._whole_masks or (last - first) * span.length <= MASK_ENTRIES:
            yield Call(first, last, (self._masked((first, last), (0, span.prefix), (own[0][1], last)),))
            return
        for some in self._together(own):
            queries = (some[0][2], some[-1][3])
            shared, end = (span.question + block * span.block_size for block in (some[0][0], some[-1][0]))
            keys = (some[0][1], queries[1])
            # A readout token sees itself, so that no row of a mask is empty.
            slices: tuple[KeySlice, ...]
            if window is None:
                slices = (KeySlice(((0, shared),)), self._masked(queries, (shared, end), keys))
            else:
                slices = (self._masked(queries, (max(0, shared - window + 1), end), keys),)
            yield Call(*queries, slices)

    def _together(self, own: list[tuple[int, int, int, int]]) -> Iterator[list[tuple[int, int, int, int]]]:
        """Readouts taken together: as many as `MASK_ENTRIES` allows, at least one."""
        span = self._span
        some: list[tuple[int, int, int, int]] = []
        for readout in own:
            if some:
                tokens = readout[3] - some[0][2]
                masked = (readout[0] - some[0][0]) * span.block_size + min(self._window or 0, span.prefix)
                if tokens * max(masked, tokens) > MASK_ENTRIES:
                    yield some
                    some = []
            some.append(readout)
        yield some

    def _masked(self, queries: Range, *ranges: Range) -> KeySlice:
        ranges = _joined(ranges)
        start, layout = self._span.start, self._layout
        at = torch.cat([torch.arange(*r) for r in ranges]).to(layout.keys.kind.device) + start
        columns = layout.keys.map(lambda t: t[:, at])
        rows = layout.keys.map(lambda t: t[0, start + queries[0] : start + queries[1], None])
        seen = layout.mask(rows, columns, self._window)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        return KeySlice(ranges, mask)


def _joined(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """Ranges in order, those that touch made one."""
    result: list[Range] = []
    for start, stop in ranges:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        elif start < stop:
            result.append((start, stop))
    return tuple(result)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rule: ScoreRule) -> torch.Tensor:
    """Attention `[1, queries, heads, head_dim]` of a packed row, or of the tokens in the layout's `chunks`.

    `query` `[1, heads, queries, head_dim]`; key/value with KV heads, of the whole row.
    """
    # Slices of the keys are merged with PyTorch's CPU flash kernel, which returns the log-sum-exp and has no dropout.
    whole_masks = query.device.type != "cpu" or rule.dropout > 0 or rule.softcap is not None
    if layout.chunks:
        return _chunk_attention(query, key, value, layout, rule, whole_masks)
    groups = split_plan(layout, rule.sliding_window, query.dtype, whole_masks)
    sizes = [group.count * group.length for group in groups]
    outputs: list[torch.Tensor] = []
    for group, *tensors in zip(groups, *(t.split(sizes, dim=2) for t in (query, key, value)), strict=True):
        # [1, heads, count x length, head_dim] -> [count, heads, length, head_dim], a view
        q, k, v = (t[0].unflatten(1, (group.count, group.length)).transpose(0, 1) for t in tensors)
        pieces = [
            _run_call(queries, k, v, call, rule).transpose(1, 2)
            for queries, call in zip(q.split([c.stop - c.start for c in group.calls], dim=2), group.calls, strict=True)
        ]
        if group.count > 1 and len(pieces) > 1:
            pieces = [torch.cat(pieces, dim=1)]
        outputs += [piece.flatten(0, 1) for piece in pieces]
    return torch.cat(outputs).unsqueeze(0)


def _chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: RowLayout, rule: ScoreRule, whole_masks: bool
) -> torch.Tensor:
    outputs = []
    position = 0
    for span, calls in chunk_plan(layout, rule.sliding_window, query.dtype, whole_masks):
        k, v = (t[:, :, span.start : span.start + span.length] for t in (key, value))
        for call in calls:
            count = call.stop - call.start
            outputs.append(_run_call(query[:, :, position : position + count], k, v, call, rule).transpose(1, 2))
            position += count
    return torch.cat(outputs, dim=1)


def _run_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, rule: ScoreRule) -> torch.Tensor:
    if len(call.slices) > 1:
        return _MergedAttention.apply(query, key, value, call, rule.scale)
    (keys,) = call.slices
    key, value = keys.of(key), keys.of(value)
    if rule.softcap is not None:
        return _softcapped(query, key, value, keys, rule)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=keys.mask,
        is_causal=keys.causal,
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _softcapped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keys: KeySlice, rule: ScoreRule) -> torch.Tensor:
    """Scores of a chunk of queries at a time, recomputed in the backward pass: PyTorch's fused kernels have no softcap."""

    def some(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        if keys.causal:
            at = torch.arange(start, start + q.shape[2], device=q.device)
            seen = at[:, None] >= torch.arange(k.shape[2], device=q.device)
        elif keys.mask is not None:
            seen = keys.mask[start : start + q.shape[2]] == 0
        else:
            seen = torch.ones((), dtype=torch.bool, device=q.device)
        return masked_attention(q, k, v, seen, rule)

    outputs = []
    for start in range(0, query.shape[2], CHUNK):
        q = query[:, :, start : start + CHUNK]
        stop = start + q.shape[2] if keys.causal else key.shape[2]
        arguments = (q, key[:, :, :stop], value[:, :, :stop], start)
        if q.shape[2] * stop > CHUNK * CHUNK:
            outputs.append(checkpoint(some, *arguments, use_reentrant=False))
        else:
            outputs.append(some(*arguments))
    return torch.cat(outputs, dim=2)


class _MergedAttention(torch.autograd.Function):
    """Attention over slices of the keys, each by the CPU flash kernel, merged by their log-sum-exp.

    With the merged output and log-sum-exp handed to it, the kernel's backward pass gives the exact gradient of each
    slice: softmax weights are exp(score - log-sum-exp) wherever the keys stand.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: Call, scale: float | None
    ) -> torch.Tensor:
        folded = _fold(query, key.shape[1])
        groups = query.shape[1] // key.shape[1]
        outputs, sums = [], []
        for keys in call.slices:
            output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                folded, keys.of(key), keys.of(value), 0.0, False, attn_mask=_tile(keys.mask, groups), scale=scale
            )
            outputs.append(output)
            sums.append(log_sum)
        merged_sum = torch.logsumexp(torch.stack(sums), dim=0)
        merged = torch.zeros_like(outputs[0], dtype=torch.float32)
        for output, log_sum in zip(outputs, sums, strict=True):
            merged += output.float() * torch.exp(log_sum - merged_sum).unsqueeze(-1)
        merged = merged.to(query.dtype)
        ctx.save_for_backward(folded, key, value, merged, merged_sum)
        ctx.call, ctx.scale, ctx.shape, ctx.groups = call, scale, query.shape, groups
        return merged.reshape(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded, key, value, merged, merged_sum = ctx.saved_tensors
        gradient = _fold(gradient, key.shape[1])
        d_query = torch.zeros_like(folded, dtype=torch.float32)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for keys in ctx.call.slices:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient,
                folded,
                keys.of(key),
                keys.of(value),
                merged,
                merged_sum,
                0.0,
                False,
                attn_mask=_tile(keys.mask, ctx.groups),
                scale=ctx.scale,
            )
            d_query += dq
            sizes = [stop - start for start, stop in keys.ranges]
            for whole, piece in ((d_key, dk), (d_value, dv)):
                for (start, stop), gradient_of_range in zip(keys.ranges, piece.split(sizes, dim=2), strict=True):
                    whole[:, :, start:stop] += gradient_of_range
        return d_query.to(gradient.dtype).reshape(ctx.shape), d_key, d_value, None, None


def _fold(tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """`[rows, heads, queries, dim]` -> `[rows, KV heads, groups x queries, dim]`: grouped heads as more queries."""
    return tensor.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _tile(mask: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    return None if mask is None else mask.repeat(groups, 1)[None, None]
