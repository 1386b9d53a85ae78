"""FlexAttention's block mask, built from the spans of a row, against the one that PyTorch computes from every pair."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from rim_dist.attention.flex import block_mask, block_size, keys_seen
from rim_dist.attention.visibility import RowLayout, TokenCoordinates
from rim_dist.data.rows import pack
from rim_dist.data.samples import Readout, Row
from rim_dist.parallel.sequence import _padded

BLOCK = [60, 61, 61, 62]
FIELDS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
FIELDS += ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")


def random_layout(seed: int, bidirectional: bool) -> RowLayout:
    """Samples of any shape: without blocks, readouts of one token (which are no tokens of the row), some blocks left out."""
    pick = random.Random(seed)
    rows = []
    for _ in range(pick.randint(1, 9)):
        blocks = pick.randint(0, 40) if pick.random() < 0.3 else pick.randint(0, 5)
        read = sorted(pick.sample(range(blocks + 1), pick.randint(1, min(4, blocks + 1))))
        readouts = tuple(Readout(k, [1] * pick.choice([1, 2, 7, 90]), 1.0) for k in read)
        rows.append(Row([5] * pick.choice([1, 8, 60, 170]), blocks, len(BLOCK), readouts))
    return pack(rows, BLOCK, bidirectional).layout


def expected(layout: RowLayout, window: int | None, size: int) -> object:
    queries, keys = layout.queries.map(lambda t: t[0]), layout.keys.map(lambda t: t[0])

    def seen(_row: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return layout.mask(queries.map(lambda t: t[query]), keys.map(lambda t: t[key]), window)

    lengths = (len(queries.segment), len(keys.segment))
    return create_block_mask(seen, None, None, *lengths, device="cpu", BLOCK_SIZE=size)


def of_a_rank(layout: RowLayout, pick: random.Random) -> RowLayout:
    """Chunks of a row as a rank of a sequence group has them."""
    tokens = layout.queries.segment.shape[1]
    edges = sorted(pick.sample(range(tokens + 1), min(tokens + 1, 4)))
    chunks = tuple(zip(edges[::2], edges[1::2], strict=False))
    at = torch.cat([torch.arange(*chunk) for chunk in chunks])
    return RowLayout(layout.queries.map(lambda t: t[:, at]), layout.keys, layout.spans, layout.bidirectional, chunks)


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize(("bidirectional", "window"), [(False, None), (False, 3), (False, 50), (True, None)])
def test_block_mask_is_that_of_every_pair(bidirectional: bool, window: int | None, size: int) -> None:
    for seed in range(12):
        layout, pick = random_layout(seed, bidirectional), random.Random(seed)
        for some in (layout, of_a_rank(layout, pick)):
            found, wanted = block_mask(some, window, size), expected(some, window, size)
            assert found.seq_lengths == wanted.seq_lengths  # type: ignore[attr-defined]
            for name in FIELDS:
                assert torch.equal(getattr(found, name), getattr(wanted, name)), (seed, name)
            assert torch.equal(found.to_dense(), wanted.to_dense())  # type: ignore[attr-defined]


def test_padding_of_a_row_is_a_sample_of_its_own() -> None:
    """As ranks of a sequence group have it."""
    batch = pack([Row([5, 6, 7], 2, len(BLOCK), (Readout(1, [1, 2], 1.0), Readout(2, [3, 4, 5], 1.0)))] * 3, BLOCK)
    _, layout = _padded(batch, batch.tokens + 70)
    found, wanted = block_mask(layout, None, 16), expected(layout, None, 16)
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize(("bidirectional", "window"), [(False, None), (False, 3), (True, None)])
def test_ranges_of_keys_are_the_mask(bidirectional: bool, window: int | None) -> None:
    """Token by token, against the predicate."""
    for seed in range(12):
        layout = random_layout(seed, bidirectional)
        lows, ends = (torch.from_numpy(values) for values in keys_seen(layout, window))
        token = torch.arange(len(lows))
        found = ((token >= lows[:, :, None]) & (token < ends[:, :, None])).any(1)
        queries: TokenCoordinates = layout.queries.map(lambda t: t[0, :, None])
        assert torch.equal(found, layout.mask(queries, layout.keys.map(lambda t: t[0]), window)), seed


def test_blocks_by_size_of_head() -> None:
    assert [block_size(channels) for channels in (16, 64, 80, 128, 256)] == [64, 64, 128, 128, 128]
