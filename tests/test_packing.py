"""Micro-batches of a global batch: nothing lost, nothing above the budget, like cost at the same time."""

from __future__ import annotations

import random

import pytest

from rim_dist.data.packing import RowCost, pack_step
from rim_dist.data.samples import Readout, Row


def rows_of(seed: int, count: int) -> list[Row]:
    pick = random.Random(seed)
    return [
        Row([1] * pick.randint(20, 200), 4, 4, tuple(Readout(k, [1] * pick.randint(1, 9), 1.0) for k in range(1, 5)))
        for _ in range(count)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 64, 129])
@pytest.mark.parametrize("budget", [260, 600, 100_000])
def test_every_row_once_under_the_budget(ranks: int, count: int, budget: int) -> None:
    rows = rows_of(0, count)
    packing = pack_step(rows, ranks, budget, RowCost(1.0, 3.0, 0.01))
    assert all(len(bins) == ranks for bins in packing.bins)  # as many on every rank
    placed = sorted(i for bins in packing.bins for numbers in bins for i in numbers)
    assert placed == list(range(count))
    assert max(sum(len(rows[i]) for i in numbers) for bins in packing.bins for numbers in bins) <= budget
    assert packing == pack_step(rows, ranks, budget, RowCost(1.0, 3.0, 0.01))
    fewest = -(-sum(map(len, rows)) // (ranks * budget))
    assert fewest <= len(packing.bins) <= 2 * fewest + 1
    assert packing.efficiency == pytest.approx(sum(map(len, rows)) / (ranks * budget * len(packing.bins)))


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_ranks_have_the_same_to_do(ranks: int) -> None:
    """By cost, with attention that grows with the square of the length: a long row weighs more than its tokens."""
    cost = RowCost(1.0, 2.0, 0.05)
    for seed in range(5):
        rows = rows_of(seed, 16 * ranks)
        packing = pack_step(rows, ranks, 2048, cost)
        assert packing.balance >= 0.97
        for bins in packing.bins:
            costs = [sum(cost(rows[i]) for i in numbers) for numbers in bins]
            assert min(costs) >= 0.93 * max(costs)


def test_balance_is_by_cost_not_by_tokens() -> None:
    long, short = Row([1] * 1000, 0, 4, ()), Row([1] * 100, 0, 4, ())
    packing = pack_step([long, *[short] * 60], 2, 100_000, RowCost(1.0, 0.0, 0.01))
    ((one, other),) = packing.bins
    # 1,000 tokens in one row cost 6,005, in ten rows 1,505: 10 + 1 rows (2,000 tokens) against 50 (5,000 tokens).
    assert {len(one), len(other)} == {11, 50}


def test_a_row_above_the_budget() -> None:
    with pytest.raises(ValueError, match="a row of 90 tokens is above the budget of 80"):
        pack_step([Row([1] * 90, 0, 4, ())], 2, 80, RowCost())


def test_empty_places_are_left_for_fillers() -> None:
    packing = pack_step(rows_of(0, 2), 4, 1000, RowCost())
    assert sorted(map(len, packing.bins[0])) == [0, 0, 1, 1]
