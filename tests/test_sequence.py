"""How a packed row is split over the ranks of a sequence group, and what each then computes; no process group needed."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import BLOCK, pack_samples, random_samples

from rim_dist.attention import split
from rim_dist.attention.dense import dense_mask
from rim_dist.attention.split import chunk_plan
from rim_dist.attention.visibility import PADDING_SEGMENT, RowLayout
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ConfigError
from rim_dist.parallel.degrees import choose_mode
from rim_dist.parallel.mesh import Coordinates, Degrees, Mesh
from rim_dist.parallel.sequence import _keys_seen, divide_balanced, shard_row

MODES = ("ulysses", "allgather_kv")


def parts_of(batch: Batch, ranks: int, mode: Any) -> list[Batch]:
    return [shard_row(batch, Mesh(Degrees(sequence=ranks), rank, Coordinates(0, rank, 0)), mode) for rank in range(ranks)]


def whole_layout(part: Batch) -> RowLayout:
    """The layout of the whole row, padding included, as a rank's part has it."""
    layout = part.layout
    if layout.queries is layout.keys:
        return layout.exchange.full_layout  # type: ignore[union-attr]
    return replace(layout, queries=layout.keys, chunks=(), cache={})


def random_row(pick: random.Random, size: int) -> Row:
    blocks = pick.choice((1, 4, 16, 64))
    readouts = [Readout(k, list(range(pick.randint(1, 40))), 1.0) for k in range(1, blocks + 1)]
    return Row(list(range(pick.randint(1, 200))), blocks, size, tuple(readouts))


def costs(batch: Batch, ranks: int) -> list[int]:
    """Pairs of a query and a key it sees, by rank."""
    seen = torch.cat([_keys_seen(span) for span in batch.layout.spans])
    division = divide_balanced(seen, ranks)
    assert len({len(division.tokens(rank)) for rank in range(ranks)}) == 1
    return [int(seen[tokens[tokens < len(seen)]].sum()) for tokens in map(division.tokens, range(ranks))]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_attention_is_dealt_evenly(ranks: int) -> None:
    """Within 5% for large memory blocks, and for packed rows of many samples."""
    large = [(16, 1024, 5), (4, 4096, 30), (64, 256, 1), (1, 16_384, 200)]
    for blocks, memory, answer in large:
        readouts = tuple(Readout(k, list(range(answer)), 1.0) for k in range(1, blocks + 1))
        block = [1, *[2] * memory, 3]
        found = costs(pack([Row(list(range(80)), blocks, len(block), readouts)], block), ranks)
        assert max(found) <= 1.05 * min(found), (blocks, memory, found)
    for seed in range(30):
        pick = random.Random(seed)
        size = pick.choice((3, 4, 18, 66))
        batch = pack([random_row(pick, size) for _ in range(pick.randint(1, 40))], [1] * size)
        found = costs(batch, ranks)
        assert max(found) <= 1.05 * min(found), (seed, batch.tokens, found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_parts_put_together_are_the_row(ranks: int, mode: str) -> None:
    """Every token and every target exactly once, each where it belongs; as many tokens on every rank."""
    for seed in range(10):
        batch = pack_samples(random_samples(seed), bidirectional=seed % 2 == 0)
        parts = parts_of(batch, ranks, mode)
        assert len({part.tokens for part in parts}) == 1
        assert len({id_ for part in parts for id_ in part.order}) == len(batch.order)
        ids, tokens, targets = {}, Counter(), Counter()
        for rank, part in enumerate(parts):
            chunks = part.layout.chunks or ((rank * part.tokens, (rank + 1) * part.tokens),)
            columns = [column for chunk in chunks for column in range(*chunk)]
            tokens.update(columns)
            whole, own = whole_layout(part), part.layout.queries
            for places in zip(whole.queries, own, strict=True):
                assert torch.equal(places[0][:, columns], places[1])
            ids |= dict(zip(columns, part.input_ids[0].tolist(), strict=True))
            t = part.targets
            for local, *rest in zip(t.column.tolist(), t.label.tolist(), t.weight.tolist(), t.block.tolist(), strict=True):
                assert 0 <= local < part.tokens
                targets[(columns[local], *rest)] += 1
        assert sorted(tokens) == list(range(ranks * parts[0].tokens))
        assert set(tokens.values()) == {1}
        assert [ids[column] for column in range(batch.tokens)] == batch.input_ids[0].tolist()
        t = batch.targets
        assert targets == Counter(zip(t.column.tolist(), t.label.tolist(), t.weight.tolist(), t.block.tolist(), strict=True))
        whole = whole_layout(parts[0])
        for places, wanted in zip(whole.queries, batch.layout.queries, strict=True):
            assert torch.equal(places[:, : batch.tokens], wanted)
        assert (whole.queries.segment[0, batch.tokens :] == PADDING_SEGMENT).all()


def part_mask(part: Batch, window: int | None, whole_masks: bool) -> torch.Tensor:
    """The mask `[own tokens, tokens of the row]` that the calls of a rank amount to."""
    seen = torch.zeros(part.tokens, part.layout.keys.kind.shape[1], dtype=torch.bool)
    row = 0
    for span, calls in chunk_plan(part.layout, window, torch.float32, whole_masks):
        for call in calls:
            rows = torch.arange(row, row + call.stop - call.start)[:, None]
            row += len(rows)
            for piece in call.slices:
                columns = torch.tensor([span.start + i for r in piece.ranges for i in range(*r)])
                assert not seen[rows, columns].any()  # no key twice
                whole = torch.ones(len(rows), len(columns), dtype=torch.bool)
                seen[rows, columns] = whole.tril() if piece.causal else whole if piece.mask is None else piece.mask == 0
    assert row == part.tokens
    return seen


@pytest.mark.parametrize("whole_masks", [True, False])
@pytest.mark.parametrize("limit", [1, 40, 200, 1 << 20])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 1000])
def test_calls_of_all_ranks_add_up_to_the_predicate(
    window: int | None, limit: int, whole_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "MASK_ENTRIES", limit)
    monkeypatch.setattr(split, "CHUNK", 3)
    for seed in range(3):
        for bidirectional in (False, True) if window is None else (False,):
            batch = pack_samples(random_samples(seed), bidirectional)
            for ranks in (2, 3, 8):
                for part in parts_of(batch, ranks, "allgather_kv"):
                    wanted = dense_mask(part.layout, window)[0, 0]
                    assert torch.equal(part_mask(part, window, whole_masks), wanted), (seed, bidirectional, ranks)


def test_how_ranks_share_a_row_is_chosen() -> None:
    assert choose_mode("auto", 2, 8, 4) == "ulysses"
    assert choose_mode("auto", 4, 8, 2) == "ulysses"  # two ranks get each key head
    assert choose_mode("auto", 2, 9, 3) == "allgather_kv"
    assert choose_mode("allgather_kv", 2, 8, 4) == "allgather_kv"
    with pytest.raises(ConfigError, match=r"2 ranks cannot share the 9 heads \(3 for keys\).*that can: 1 .*allgather_kv"):
        choose_mode("ulysses", 2, 9, 3)
    with pytest.raises(ConfigError, match=r"8 ranks cannot share the 12 heads .*that can: 6 "):
        choose_mode("ulysses", 8, 12, 2)


def test_a_row_for_one_rank_stays_as_it_is() -> None:
    batch = pack_samples(random_samples(0))
    assert shard_row(batch, Mesh.alone(), "ulysses") is batch
    assert BLOCK[0] in batch.input_ids
