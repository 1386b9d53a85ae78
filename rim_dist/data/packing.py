"""A global batch into micro-batches: under a token budget, as many on every rank, all of nearly the same cost.

Which samples make up an optimizer step is settled before; where they run is this module's, and changes nothing but rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rim_dist.data.rows import Batch
from rim_dist.data.samples import Row


@dataclass(frozen=True)
class RowCost:
    """Floating-point operations of forward and backward: by token of the row, by supervised position, by attended pair."""

    token: float = 1.0
    target: float = 0.0
    pair: float = 0.0

    def __call__(self, row: Row) -> float:
        return len(row) * self.token + row.targets * self.target + (row.span().pairs * self.pair if self.pair else 0.0)

    def of_batch(self, batch: Batch) -> float:
        return batch.tokens * self.token + len(batch.targets.label) * self.target + batch.pairs * self.pair


@dataclass(frozen=True)
class Packing:
    """`bins[i][rank]`: numbers of the rows that a rank runs in its i-th micro-batch (none: a place to fill)."""

    bins: list[list[list[int]]]
    efficiency: float  # real tokens / (micro-batches x token budget)
    balance: float  # mean cost / largest cost of the micro-batches that ranks run at the same time, over the step


def pack_step(rows: Sequence[Row], ranks: int, budget: int, cost: Callable[[Row], float]) -> Packing:
    """Spread the rows of an optimizer step over as few rounds of micro-batches as their tokens allow.

    Rows are placed, the most expensive first, into the cheapest micro-batch that has room; micro-batches of like cost run at
    the same time. Deterministic. Raises ValueError for a row above the budget.
    """
    lengths, costs = [len(row) for row in rows], [cost(row) for row in rows]
    if max(lengths) > budget:
        raise ValueError(f"a row of {max(lengths)} tokens is above the budget of {budget}")
    order = sorted(range(len(rows)), key=lambda i: (-costs[i], i))
    rounds = -(-sum(lengths) // (ranks * budget))
    while (places := _place(order, lengths, costs, ranks * rounds, budget)) is None:
        rounds += 1
    places.sort(key=lambda place: -place[0])
    bins, longest = [], 0.0
    for i in range(rounds):
        part = places[i * ranks : (i + 1) * ranks]
        longest += part[0][0]
        # Every other round the other way about: a rank is not always the one with the most to do.
        bins.append([numbers for _, numbers in (part if i % 2 == 0 else part[::-1])])
    return Packing(bins, sum(lengths) / (ranks * rounds * budget), sum(costs) / (ranks * longest))


def _place(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], bins: int, budget: int
) -> list[tuple[float, list[int]]] | None:
    """(cost, row numbers) of each bin, or None if a row finds no room."""
    heap = [(0.0, number) for number in range(bins)]  # (cost so far, bin)
    room = [budget] * bins
    content: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        full = []
        while heap and room[heap[0][1]] < lengths[i]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, number = heap[0]
        room[number] -= lengths[i]
        content[number].append(i)
        heapq.heapreplace(heap, (load + costs[i], number))
        for entry in full:
            heapq.heappush(heap, entry)
    loads = {number: load for load, number in heap}
    return [(loads[number], numbers) for number, numbers in enumerate(content)]
